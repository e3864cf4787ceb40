"""Who is to stop, and when: signals, the time, and launchers that are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.base.errors import ConfigError
from engine.base.stopping import launchers_of, parse_time
from tests.conftest import ROOT, environment

LISTEN = """
import os, signal, sys, time
from engine.base.stopping import ASKED, follow_launcher
ASKED.listen(float(sys.argv[1]) if len(sys.argv) > 1 else None)
follow_launcher()
print(os.getpid(), flush=True)
while not ASKED.now:
    time.sleep(0.05)
print("asked", flush=True)
time.sleep(1)
"""


def listener(*args: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", LISTEN, *args], cwd=ROOT, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_and_does_nothing_else(number: signal.Signals) -> None:
    process = listener()
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "asked\n" and process.returncode == 0


def test_a_second_interrupt_ends_it() -> None:
    process = listener()
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT or process.returncode == 1


def test_the_time_asks() -> None:
    start, process = time.monotonic(), listener("0.5")
    assert process.communicate(timeout=60)[0] == "asked\n" and time.monotonic() - start >= 0.5


def test_a_launcher_that_is_gone_asks(tmp_path: Path) -> None:
    """Two of them, one above the other, as the deepspeed command makes them; a shell above is none."""
    script = tmp_path / "deepspeed"
    script.write_text("import subprocess, sys\nsubprocess.run(sys.argv[1:])\n")
    (tmp_path / "listen.py").write_text(LISTEN)
    launcher = [sys.executable, str(script)]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen([*launcher, *launcher, sys.executable, str(tmp_path / "listen.py")], cwd=ROOT,
                                   env=environment(), stdout=out)
    said = tmp_path / "out"
    while not said.read_text():
        time.sleep(0.05)
    rank = int(said.read_text())
    assert len(launchers_of(rank)) == 2 and not launchers_of(os.getpid())
    time.sleep(1)
    assert said.read_text().split() == [str(rank)]
    process.kill()  # the upper one; the lower lives on
    process.wait()
    end = time.monotonic() + 60
    while "asked" not in said.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    assert "asked" in said.read_text()


@pytest.mark.parametrize(("text", "seconds"),
                         [("3h50m", 13_800), ("45m", 2700), ("1d2h", 93_600), ("90s", 90), ("5", 300)])
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "3h50", "-5m", "0s", "1.5h"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-time"):
        parse_time(text)
