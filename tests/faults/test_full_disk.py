"""The disk of a run is full: a message, the last good checkpoint stands, and with more room the run ends as if nothing
had been."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.training.checkpoint import find
from tests.faults.conftest import Whole
from tests.faults.harness import go_on, recipe, running, same

Disk = Callable[[str], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of such a size, or the same at another."""
    path = tmp_path / "disk"
    path.mkdir()

    def sized(size: str) -> Path:
        options = f"size={size}" + (",remount" if path.is_mount() else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", path], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk of a size of our own here: {done.stderr.strip()}")
        return path

    yield sized
    if path.is_mount():
        subprocess.run(["umount", path], check=True)


def fill(path: Path, run: Path) -> str:
    """What a run said that ended for want of room."""
    with running(path, 1) as [rank]:
        code, said = rank.wait(100), rank.text()
    assert code == 2 and "Traceback" not in said, said
    assert "No space left on device" in said and str(run) in said, said
    return said


@pytest.mark.parametrize("size", [pytest.param("100k", marks=pytest.mark.slow),
                                  *(pytest.param(size, marks=pytest.mark.faults)
                                    for size in ("4k", "3m", "8m", "16m", "24m", "33m", "40m"))])
def test_there_is_room_again(data: Path, whole: Callable[[int], Whole], disk: Disk, tmp_path: Path, size: str) -> None:
    path, run = recipe(tmp_path, data, disk(size)), disk(size) / "run"
    said = fill(path, run)
    good = find(run / "checkpoints")
    if good is not None:
        assert f"the last good one is {good[0].name}" in said
    disk("100m")
    said = go_on(path, 1)
    assert good is None or f"resumed from {good[0]}" in said
    same(whole(1).run, run)
