"""Data and uninterrupted runs to compare with, and the table at the end of `make faults`."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine.data.made.fields import make_fields
from engine.data.store.pack import pack
from tests.faults.harness import SEED, description, note_all, noted, recipe
from tests.hosts import started, torchrun


class Whole(NamedTuple):
    """An uninterrupted run."""

    run: Path
    events: list[Counter[str]]  # of each rank


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed: DALI's pipeline for TIFFs takes a third of such a run to be built."""
    folder = tmp_path_factory.mktemp("faults")
    make_fields(folder / "tiff", description(), 8, seed=1)
    pack(folder / "tiff", folder / "data", workers=1)
    return folder / "data"


@pytest.fixture(scope="session")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Whole]:
    """By so many ranks."""

    @functools.cache
    def run(ranks: int) -> Whole:
        path = recipe(tmp_path_factory.mktemp("whole"), data)
        notes = [path.parent / f"events-{rank}" for rank in range(ranks)]
        with started(path.parent / "log", "train", "--config", path, variables=torchrun(ranks) if ranks > 1 else [{}],
                     before={rank: functools.partial(note_all, note) for rank, note in enumerate(notes)}) as processes:
            for rank in processes:
                assert rank.wait() == 0, rank.text()
        return Whole(path.parent / "run", [noted(note) for note in notes])

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if "faults" not in config.option.markexpr:
        return
    good, seconds = defaultdict[str, list[bool]](list), defaultdict[str, float](float)
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            part = report.nodeid.rpartition("/")[2].partition("[")[0]
            seconds[part] += report.duration
            if report.when == "call" or outcome != "passed":
                good[part].append(outcome == "passed")
    terminalreporter.section(f"faults, seed {SEED}")
    for part, each in sorted(good.items()):
        terminalreporter.write_line(f"{part:90} {sum(each):4} of {len(each):4}  {seconds[part]:6.0f} s")
