"""Checkpoints: any damage is seen, and the newest whole one is used; what the disk does not take is tried again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engine.base.errors import EngineError
from engine.config import Config, parse_config
from engine.run.background import Background
from engine.training import checkpoint
from engine.training.checkpoint import DEEPSPEEDS, MODEL, NOTE, OPTIMIZER, Checkpoints, find, load, steps, write
from engine.training.state import full_state, optimizer_state
from tests.hosts import forks

FILES = (NOTE, MODEL, OPTIMIZER)


def save(folder: Path, *numbers: int, keep: int = 9) -> None:
    """Checkpoints of these steps, each of its own numbers."""
    for step in numbers:
        tensors = {"weight": torch.full((3, 5), float(step)), "count": torch.tensor(step)}
        write(folder, step, {MODEL: tensors, OPTIMIZER: {"weight.step": torch.tensor(float(step))}},
              {"state": {"step": step, "best": float("inf")}}, keep)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoints"
    save(path, 3, 6, 7)
    return path


def test_the_newest_is_found_and_the_last_ones_are_kept(folder: Path) -> None:
    assert find(folder) == (folder / "step-00000007", {"step": 7, "best": float("inf")})
    (folder / ".step-00000009.part").mkdir()  # of a kill in the middle
    assert steps(folder)[-1].name == "step-00000007"
    save(folder, 10, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000007", "step-00000010"]
    assert sorted(path.name for path in (folder / "step-00000010").iterdir()) == sorted(FILES)
    assert find(folder.parent / "none") is None


def test_a_step_that_is_there_is_not_written_again(folder: Path) -> None:
    """A kill between its removal and its successor would lose it."""
    before = (folder / "step-00000007" / NOTE).stat().st_mtime_ns
    save(folder, 7)
    assert (folder / "step-00000007" / NOTE).stat().st_mtime_ns == before


def die_while_writing(folder: Path) -> None:
    real = checkpoint.write_tensors

    def fatal(path: Path, *args: Any) -> str:
        if path.name == OPTIMIZER:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *args)

    checkpoint.write_tensors = fatal  # type: ignore[assignment]
    save(folder, 9)


def test_a_kill_while_it_is_written_leaves_the_one_before(folder: Path) -> None:
    process = forks().Process(target=die_while_writing, args=(folder,))
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL
    assert (folder / ".step-00000009.part" / MODEL).exists() and not (folder / "step-00000009").exists()
    assert find(folder)[0].name == "step-00000007"  # type: ignore[index]
    save(folder, 8)
    assert not list(folder.glob(".*")) and find(folder)[0].name == "step-00000008"  # type: ignore[index]


# Damage -----------------------------------------------------------------------------------------------------------


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def test_every_single_bit_counts(folder: Path) -> None:
    path = folder / "step-00000007"
    flipped = 0
    for name in FILES:
        data = (path / name).read_bytes()
        for bit in range(0, 8 * len(data), 1 if name == NOTE else 3):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            (path / name).write_bytes(changed)
            assert checkpoint._examine(path)[0] is None, (name, bit)
            flipped += 1
        (path / name).write_bytes(data)
    assert checkpoint._examine(path)[0] is not None and flipped > 4000


def test_folders_of_two_steps_swapped(folder: Path) -> None:
    (folder / "step-00000007").rename(folder / "x")
    (folder / "step-00000006").rename(folder / "step-00000007")
    (folder / "x").rename(folder / "step-00000006")
    assert checkpoint._examine(folder / "step-00000007") == (None, f"{NOTE} is step 6's")
    assert find(folder)[0].name == "step-00000003"  # type: ignore[index]


def test_where_none_is_whole_nothing_is_begun_anew(folder: Path) -> None:
    for path in steps(folder):
        emptied(path / MODEL)
    for _ in range(2):
        with pytest.raises(EngineError, match=r"none of its checkpoints is whole \(step-00000007: model.safetensors "
                                              r"has 0 bytes instead of \d+; step-00000006: .*; bring one back"):
            find(folder)
    assert [path.name for path in steps(folder)] == ["step-00000003", "step-00000006", "step-00000007"]
    for path in steps(folder):
        checkpoint._move_aside(path)
    with pytest.raises(EngineError, match="none of its checkpoints is whole .all were moved aside."):
        find(folder)


def test_two_damaged_ones_of_one_step_are_both_kept(folder: Path) -> None:
    for _ in range(2):
        emptied(folder / "step-00000007" / MODEL)
        find(folder)
        save(folder, 7)
    assert {path.name for path in folder.glob("*damaged*")} == {"step-00000007.damaged", "step-00000007.damaged-2"}


def test_formats_that_this_engine_does_not_read(folder: Path) -> None:
    path = folder / "step-00000007"
    content = json.loads((path / NOTE).read_text())
    del content["sha256"]
    (path / NOTE).write_text(checkpoint._sealed({**content, "format": 99}))
    with pytest.raises(EngineError, match="step-00000007 is of format 99, and this engine reads 1: go on with"):
        find(folder)
    (path / NOTE).unlink()
    (path / DEEPSPEEDS).write_text("{}")
    with pytest.raises(EngineError, match=r"DeepSpeed's own format.*begin another run.name from its weights "
                                          rf"\(model.weights: {folder.parent}\)"):
        find(folder)
    assert path.exists()


def test_a_note_that_is_a_trap(folder: Path) -> None:
    for text in ("[" * 100_000, "[]", "{}", '{"sha256": "0"}'):
        (folder / "step-00000007" / NOTE).write_text(text)
        assert checkpoint._examine(folder / "step-00000007")[0] is None


# What is in them, at ZeRO stage 0 (other stages: test_elastic.py) ----------------------------------------------------


class Small(nn.Module):
    """With buffers, a weight that lies channels_last, and one that is never used."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.conv.to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(width)
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


def engine(seed: int, width: int = 4) -> Any:
    """As DeepSpeed's is at stage 0, for what checkpoints ask of it."""
    torch.manual_seed(seed)
    model = Small(width)
    return SimpleNamespace(module=model, zero_optimization_stage=lambda: 0,
                           optimizer=torch.optim.AdamW(model.parameters(), lr=0.01, fused=True))


def train(made: Any, *seeds: int) -> None:
    for seed in seeds:
        made.optimizer.zero_grad()
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        (made.module(x) - 1).square().mean().backward()
        made.optimizer.step()


def contents(made: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {MODEL: full_state(made), OPTIMIZER: optimizer_state(made)}


def same(a: Any, b: Any) -> bool:
    one, other = ({**tensors[MODEL], **tensors[OPTIMIZER]} for tensors in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_training_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole, halves = engine(0), engine(1)
    train(whole, 1, 2)
    write(tmp_path, 2, contents(whole), {"state": {}}, 1)
    load(halves, tmp_path / "step-00000002")
    assert same(contents(whole), contents(halves))
    assert not [name for name in optimizer_state(halves) if "unused" in name]
    assert int(halves.module.norm.num_batches_tracked) == 2
    moment = halves.optimizer.state[halves.module.conv.weight]["exp_avg"]
    assert moment.stride() == halves.module.conv.weight.stride()  # fused AdamW goes through memory
    train(whole, 3, 4)
    train(halves, 3, 4)
    assert same(contents(whole), contents(halves))


def test_before_the_first_update_there_is_no_state(tmp_path: Path) -> None:
    write(tmp_path, 0, contents(engine(0)), {"state": {}}, 1)
    made = engine(1)
    load(made, tmp_path / "step-00000000")
    assert same(contents(made), contents(engine(0))) and not made.optimizer.state


def test_another_model_is_refused(tmp_path: Path) -> None:
    made = engine(0)
    train(made, 1)
    write(tmp_path, 1, contents(made), {"state": {}}, 1)
    with pytest.raises(EngineError, match=r"step-00000001 is of another model: 14 tensors do not fit, the first conv"):
        load(engine(0, width=6), tmp_path / "step-00000001")


# Beside training, and a full disk -----------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse_config({"data": {"path": "/none"}, "run": {"folder": str(tmp_path)},
                         "checkpoint": {"failures": 3, "keep": 2}}, "a test")


@pytest.fixture
def background() -> Iterator[Background]:
    made = Background()
    yield made
    made.close()


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the disk is, from now on."""
    disk = [False]
    real = checkpoint.write_tensors

    def write_tensors(path: Path, *args: Any) -> str:
        if disk[0]:
            path.write_bytes(b"as much as went in")
            raise OSError(28, "No space left on device", str(path))
        return real(path, *args)

    monkeypatch.setattr(checkpoint, "write_tensors", write_tensors)
    return disk


def test_what_is_written_is_what_was_when_it_was_asked_for(config: Config, background: Background,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    go, real = threading.Event(), checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *args: go.wait(60) and real(*args))
    made, saved = engine(0), Checkpoints(config, background)
    train(made, 1)
    before = contents(made)
    saved.save(made, 1, {})
    train(made, 2)  # while nothing is written yet
    assert not steps(saved.folder)
    go.set()
    saved.finish()
    other = engine(1)
    load(other, saved.folder / "step-00000001")
    assert same(contents(other), before) and not same(contents(made), before)


def test_no_more_than_two_copies_are_held(config: Config, background: Background,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    go, real, copied = threading.Event(), checkpoint.write_tensors, []
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *args: go.wait(60) and real(*args))
    monkeypatch.setattr(checkpoint, "full_state", lambda made: copied.append(go.is_set()) or full_state(made))
    made, saved = engine(0), Checkpoints(config, background)
    saved.save(made, 1, {})
    saved.save(made, 2, {})
    threading.Timer(0.2, go.set).start()
    saved.save(made, 3, {})
    assert copied == [False, False, True]
    saved.finish()
    assert [path.name for path in steps(saved.folder)] == ["step-00000002", "step-00000003"]


def test_a_full_disk_costs_checkpoints_and_not_the_run(config: Config, background: Background, full: list[bool],
                                                       caplog: pytest.LogCaptureFixture) -> None:
    made, saved = engine(0), Checkpoints(config, background)
    saved.save(made, 1, {"step": 1})
    saved.finish()
    full[0] = True
    saved.save(made, 2, {"step": 2})
    saved.save(made, 3, {"step": 3})
    background.finish()
    assert [path.name for path in saved.folder.iterdir()] == ["step-00000001"]  # and nothing that takes room
    assert len(caplog.records) == 2 and "No space left on device: " in caplog.records[1].message
    assert "to be tried again with the next; the last good one is step-00000001" in caplog.records[1].message
    full[0] = False
    saved.save(made, 4, {"step": 4})
    saved.finish()
    assert find(saved.folder) == (saved.folder / "step-00000004", {"step": 4})
    assert [path.name for path in steps(saved.folder)] == ["step-00000001", "step-00000004"]
    full[0] = True
    for step in (5, 6, 7):  # it was good in between, and three count anew
        saved.save(made, step, {"step": step})
    background.finish()
    with pytest.raises(EngineError, match=r"could not be written, 3 times in a row \(.*No space left on device.*; the "
                                          r"last good one is step-00000004\); make room on the disk of"):
        saved.save(made, 8, {"step": 8})


def test_at_the_end_of_a_phase_it_is_tried_once_more(config: Config, background: Background, full: list[bool]) -> None:
    made, saved = engine(0), Checkpoints(config, background)
    full[0] = True
    saved.save(made, 1, {})
    with pytest.raises(EngineError, match=r"2 times in a row \(.*; there is none yet\)"):
        saved.finish()
    full[0] = False
    saved.finish()
    assert [path.name for path in steps(saved.folder)] == ["step-00000001"]


def test_weights_come_before_the_checkpoint_that_counts_on_them(config: Config, background: Background) -> None:
    """A run that goes on from it would never write them again."""
    made, saved, done, disk = engine(0), Checkpoints(config, background), [], [True]

    def weights(name: str) -> None:
        if disk[0]:
            raise OSError(28, "No space left on device", name)
        done.append((name, [path.name for path in steps(saved.folder)]))

    saved.before(weights, "first")
    saved.save(made, 1, {})
    background.finish()
    saved.before(weights, "second")
    saved.save(made, 2, {})
    background.finish()
    assert not steps(saved.folder)
    disk[0] = False
    saved.save(made, 3, {})
    saved.finish()
    assert done == [("first", []), ("second", [])]
    assert [path.name for path in steps(saved.folder)] == ["step-00000003"]


def test_a_bug_while_writing_stops_the_run(config: Config, background: Background,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> str:
        raise TypeError("a bug")

    monkeypatch.setattr(checkpoint, "write_tensors", bug)
    saved = Checkpoints(config, background)
    saved.save(engine(0), 1, {})
    with pytest.raises(TypeError, match="a bug"):
        saved.finish()
    shutil.rmtree(saved.folder)
