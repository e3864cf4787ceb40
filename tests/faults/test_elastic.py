"""What so many ranks saved at one ZeRO stage, any number goes on with at any: whole runs."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.faults.harness import go_on, recipe, same_history
from tests.hosts import history

pytestmark = pytest.mark.faults

WAYS = [(ranks, stage) for ranks in (1, 2) for stage in (0, 2, 3)]
SAVED = "step-00000004"  # in the middle of the second epoch

Saver = Callable[[tuple[int, int]], Path]


def options(stage: int) -> list[str]:
    return [f"train.zero_stage={stage}", "checkpoint.keep=9"]


@pytest.fixture(scope="session")
def saver(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Saver:
    """The uninterrupted run of a way."""

    @functools.cache
    def run(way: tuple[int, int]) -> Path:
        path = recipe(tmp_path_factory.mktemp("saver"), data)
        go_on(path, way[0], *options(way[1]))
        return path.parent / "run"

    return run


@pytest.mark.parametrize(("before", "after"), itertools.product(WAYS, WAYS), ids=lambda way: f"{way[0]}-{way[1]}")
def test_any_goes_on_with_what_any_saved(data: Path, saver: Saver, tmp_path: Path, before: tuple[int, int],
                                         after: tuple[int, int]) -> None:
    path, run, whole = recipe(tmp_path, data), tmp_path / "run", saver(before)
    shutil.copytree(whole, run)
    for newer in (run / "checkpoints").iterdir():
        if newer.name > SAVED:
            shutil.rmtree(newer)
    assert f"resumed from {run}/checkpoints/{SAVED}" in go_on(path, after[0], *options(after[1]))
    if before == after:
        same_history(whole, run)
    ours, theirs = (np.array([row["loss"] for row in history(each)]) for each in (run, whole))
    assert (ours[:4] == theirs[:4]).all()
    as_before = (before[1] == 3) == (after[1] == 3)  # stage 3 adds up in another order
    np.testing.assert_allclose(ours, theirs, rtol=0 if as_before else 1e-4)
