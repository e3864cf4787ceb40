"""What all commands share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment

LINES = """
import argparse, sys
from engine.base.cli import main
def run(args):
    for number in range(args.lines):
        print(number)
    return 0
parser = argparse.ArgumentParser(prog="count")
parser.add_argument("lines", type=int)
main(parser, run)
"""


@pytest.mark.parametrize("lines", [3, 100_000])
def test_who_reads_the_output_may_have_enough(lines: int, tmp_path: Path) -> None:
    """As in `inspect … | head`: of a few lines, that come at the end, and of many."""
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", LINES, str(lines)], cwd=ROOT, env=environment(),
                                   stdout=subprocess.PIPE, stderr=file)
        assert process.stdout is not None
        if lines > 3:
            assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.wait(60) == 141
    assert errors.read_text() == ""
