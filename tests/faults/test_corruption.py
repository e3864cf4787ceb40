"""The newest checkpoint is damaged: the run goes on from the one before, says so, and ends as if nothing had been."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.training.checkpoint import MODEL, NOTE, OPTIMIZER, find
from tests.faults.conftest import Whole
from tests.faults.harness import SEED, go_on, recipe, same

FILES = (NOTE, MODEL, OPTIMIZER)
NEWEST, BEFORE = "step-00000010", "step-00000008"  # of the run of `harness`

Damage = Callable[[bytes, bytes, random.Random], bytes | None]


def truncated(content: bytes, other: bytes, chance: random.Random) -> bytes:
    return content[:chance.randrange(1, len(content))]


def one_bit(content: bytes, other: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def deleted(content: bytes, other: bytes, chance: random.Random) -> None:
    return None


def emptied(content: bytes, other: bytes, chance: random.Random) -> bytes:
    return b""


def zeroed(content: bytes, other: bytes, chance: random.Random) -> bytes:
    return bytes(len(content))


def swapped(content: bytes, other: bytes, chance: random.Random) -> bytes:
    return other


DAMAGES = [truncated, one_bit, deleted, emptied, zeroed, swapped]


def damage(run: Path, how: Damage, number: int) -> str:
    """Which file of the newest checkpoint, and where in it, is by chance."""
    chance = random.Random(f"{SEED} {how.__name__} {number}")
    name = chance.choice(FILES)
    path, other = (run / "checkpoints" / step / name for step in (NEWEST, BEFORE))
    content = how(path.read_bytes(), other.read_bytes(), chance)
    path.unlink()  # linked to the run that is compared with
    if content is not None:
        path.write_bytes(content)
    return name


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_one_is_moved_aside_and_the_one_before_is_used(
        whole: Callable[[int], Whole], tmp_path: Path, caplog: pytest.LogCaptureFixture, how: Damage,
        number: int) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole(1).run / "checkpoints", folder, copy_function=os.link)
    before = find(folder)
    assert before is not None and before[0].name == NEWEST and not caplog.records
    name = damage(tmp_path, how, number)
    content = {path.name: path.read_bytes() for path in (folder / NEWEST).iterdir()}
    for _ in range(2):  # once it is moved aside, it is not looked at again
        found = find(folder)
        assert found is not None and found[0].name == BEFORE and found[1]["step"] == 8
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{folder}/{NEWEST} is damaged (" in record.message and name in record.message
    assert f"going on from {BEFORE} instead; it is now {NEWEST}.damaged" in record.message
    aside = folder / f"{NEWEST}.damaged"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == content


@pytest.mark.faults
@pytest.mark.parametrize("how", DAMAGES)
def test_the_command_ends_as_if_nothing_had_been(data: Path, whole: Callable[[int], Whole], tmp_path: Path,
                                                 how: Damage) -> None:
    path, run = recipe(tmp_path, data), tmp_path / "run"
    shutil.copytree(whole(1).run, run)
    name = damage(run, how, 0)
    said = go_on(path, 1)
    assert f"WARNING: {run}/checkpoints/{NEWEST} is damaged (" in said and name in said
    assert f"resumed from {run}/checkpoints/{BEFORE}" in said
    aside = run / "checkpoints" / f"{NEWEST}.damaged"
    shutil.rmtree(aside)
    same(whole(1).run, run)
