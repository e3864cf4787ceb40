"""A run's folder belongs to one recipe and one process at a time, and its weights are whole under every name."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from engine.base.errors import ConfigError
from engine.base.files import atomic_write, hard_link
from engine.config import Config, parse_config
from engine.run.background import Background
from engine.run.folder import LOCK, _lock, claim
from tests.hosts import forks

DATA = {"values": "exact", "dataset": {"name": "made", "tile": 64}}


def config(tmp_path: Path, **optimizer: float) -> Config:
    return parse_config({"data": {"path": "/none"}, "run": {"folder": str(tmp_path)}, "optimizer": optimizer}, "a test")


def hold(folder: Path) -> None:
    kept = _lock(folder)
    (folder / "held").touch()
    time.sleep(60)
    kept.close()


def test_one_process_at_a_time_and_a_killed_one_leaves_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    other = forks().Process(target=hold, args=(folder,))
    other.start()
    end = time.monotonic() + 60
    while not (folder / "held").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    with pytest.raises(ConfigError, match=f"{folder}: process {other.pid} on host {socket.gethostname()} trains in it"):
        claim(folder, config(tmp_path), restart=False, data=DATA)
    with pytest.raises(ConfigError, match="another run.name"):
        _lock(folder)
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with _lock(folder):
        assert (folder / LOCK).read_text() == f"process {os.getpid()} on host {socket.gethostname()}\n"


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    folder = config(tmp_path).run_folder
    parts = folder / "weights" / ".last.safetensors.77.part", folder / ".config.yaml.77.part"
    kept = folder / "weights" / "last.safetensors", folder / ".notes"
    parts[0].parent.mkdir(parents=True)
    for path in (*parts, *kept):
        path.touch()
    lock = claim(folder, config(tmp_path), False, DATA)
    assert lock is not None
    lock.close()
    assert not any(path.exists() for path in parts) and all(path.exists() for path in kept)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.run.folder.write_text", full)
    with pytest.raises(ConfigError, match=r"run: cannot be written \(No space left on device\); make room on its disk"):
        claim(config(tmp_path).run_folder, config(tmp_path), False, DATA)


def test_a_recipe_claims_its_folder_and_no_other_does(tmp_path: Path) -> None:
    mine = config(tmp_path)
    folder = mine.run_folder
    for _ in range(2):
        lock = claim(folder, mine, False, DATA)
        assert lock is not None
        lock.close()
    with pytest.raises(ConfigError, match="another recipe .optimizer.lr changed."):
        claim(folder, config(tmp_path, lr=0.5), False, DATA)
    with pytest.raises(ConfigError, match="begun on data with floats as they are"):
        claim(folder, mine, False, {**DATA, "values": "steps"})
    with pytest.raises(ConfigError, match="begun on data of another description .dataset.tile changed."):
        claim(folder, mine, False, {**DATA, "dataset": {"name": "made", "tile": 96}})
    (folder / "weights").mkdir()
    (folder / "history.jsonl").write_text("{}\n")
    lock = claim(folder, config(tmp_path, lr=0.5), True, {**DATA, "values": "steps"})
    assert lock is not None and {path.name for path in folder.iterdir()} == {LOCK, "config.yaml", "data.json"}
    with pytest.raises(ConfigError, match="trains in it"):  # the lock is that of the folder that was emptied
        _lock(folder)
    lock.close()


def test_what_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    for train in ({}, {"zero_stage": 3}, {"precision": "fp32"}, {"micro_batch": 4}, {"timeout_s": 60},
                  {"hang_s": {"reading": 60}}):
        lock = claim(tmp_path / "run", parse_config({
            "data": {"path": "/none"}, "run": {"folder": str(tmp_path)}, "train": train}, "a test"), False, DATA)
        assert lock is not None
        lock.close()
    with pytest.raises(ConfigError, match="another recipe .train.global_batch changed."):
        claim(tmp_path / "run", parse_config({"data": {"path": "/none"}, "run": {"folder": str(tmp_path)},
                                              "train": {"timeout_s": 60, "global_batch": 4}}, "a test"), False, DATA)


@pytest.mark.parametrize(("text", "why"), [("{", "Expecting"), ("[]", "says nothing of it"), ('{"x": 1}', "says no")])
def test_what_a_run_was_begun_on_is_damaged(tmp_path: Path, text: str, why: str,
                                            caplog: pytest.LogCaptureFixture) -> None:
    mine = config(tmp_path)
    for damaged in (False, True):
        lock = claim(mine.run_folder, mine, False, DATA)
        assert lock is not None
        lock.close()
        said = [record.message for record in caplog.records]
        assert len(said) == damaged and all(f"data.json: is damaged ({why}" in line for line in said)
        (mine.run_folder / "data.json").write_text(text)


@pytest.mark.parametrize("text", ["[", "null: 1\nx: 2", "a: 1\na: 2", "5"])
def test_the_recipe_of_a_run_is_damaged(tmp_path: Path, text: str) -> None:
    mine = config(tmp_path)
    mine.run_folder.mkdir()
    (mine.run_folder / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config.yaml: cannot be read|holds a run of another recipe"):
        claim(mine.run_folder, mine, False, DATA)


def test_a_restart_does_not_empty_a_folder_that_is_no_run(tmp_path: Path) -> None:
    mine = config(tmp_path)
    mine.run_folder.mkdir()
    (mine.run_folder / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not a run's folder"):
        claim(mine.run_folder, mine, True, DATA)
    assert (mine.run_folder / "thesis.tex").exists()


# Weights ----------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    with atomic_write(path) as handle:
        handle.write(text.encode())


@pytest.mark.parametrize("links", [True, False])
def test_a_file_under_several_names(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    last, best, main = (tmp_path / name for name in ("last", "best", "main"))

    def unknown(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")  # as FAT and some network disks say

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", unknown)
    write(last, "first")
    hard_link(last, [best, main])
    hard_link(last, [best, main])  # once more: they are that file
    assert [path.read_text() for path in (last, best, main)] == ["first"] * 3
    assert (best.stat().st_ino == last.stat().st_ino) == links
    write(last, "second")  # which leaves the others as they were
    hard_link(last, [main])
    assert [path.read_text() for path in (last, best, main)] == ["second", "first", "second"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last", "main"]
    best.unlink()
    with pytest.raises(FileNotFoundError):
        hard_link(tmp_path / "none", [best])
    assert not best.exists()


def test_work_beside_training_keeps_its_order_and_does_not_pile_up() -> None:
    background, done, go = Background(), [], threading.Event()
    background.do(lambda: (go.wait(10), done.append("slow")))
    background.do(done.append, "quick")
    assert done == []
    threading.Timer(0.1, go.set).start()
    background.do(done.append, "third")  # waits for the first
    assert done[:1] == ["slow"]
    background.finish()
    assert done == ["slow", "quick", "third"]
    background.close()


def test_work_beside_training_raises_what_failed_at_the_next_call() -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    background, done = Background(), []
    background.do(full)
    background.do(done.append, "counts on it")
    with pytest.raises(OSError, match="No space left"):
        background.do(int)
    background.do(full)
    with pytest.raises(OSError, match="No space left"):
        background.finish()
    background.finish()  # said once
    assert not done
    background.close()
