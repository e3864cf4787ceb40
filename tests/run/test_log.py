"""What a run leaves to be read outlives a full disk."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from engine.base.errors import EngineError
from engine.run.log import RunLog


class Full:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, real, room: int):  # type: ignore[no-untyped-def]
        self.real, self.room, self.name = real, room, real.name

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        written = self.real.write(data[:self.room])
        self.room -= written
        return written

    def close(self) -> None:
        self.real.close()


class Board:
    def __getattr__(self, call: str) -> object:
        raise OSError(28, "No space left on device")


def rows(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text().splitlines()]


def test_lines_wait_for_room_on_the_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = RunLog(tmp_path, 0)
    log.steps(1, {"loss": [1.0]})
    full = log._history = Full(log._history, 20)  # type: ignore[assignment]
    for step in (2, 3):
        log.steps(step, {"loss": [float(step)]})
    assert (tmp_path / "history.jsonl").read_bytes().count(b"\n") == 1
    [record] = caplog.records
    assert "history.jsonl cannot be written" in record.message and "its lines wait" in record.message
    full.room = 10**6
    log.scalars("validation", 3, {"loss": 4.0})
    assert rows(tmp_path) == [1, 2, 3, 4]
    log.close()


def test_a_board_whose_thread_fails_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            caplog: pytest.LogCaptureFixture) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    bugs: list[object] = []

    def hook(failure: threading.ExceptHookArgs) -> None:
        bugs.append(failure.exc_type)

    monkeypatch.setattr(threading, "excepthook", hook)
    log = RunLog(tmp_path, 0)
    monkeypatch.setattr(RecordWriter, "write", full)
    for step in range(1, 4):
        log.steps(step, {"loss": [float(step)]})
        time.sleep(0.1)
    bug = threading.Thread(target=lambda: 1 / 0)
    bug.start()
    bug.join()
    log.close()
    assert rows(tmp_path) == [1, 2, 3] and threading.excepthook is hook
    [record] = caplog.records
    assert "no more curves and pictures" in record.message and bugs == [ZeroDivisionError]


def test_lines_that_cannot_be_read_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = '{"kind": "step", "step": 1, "loss": 1.0}'
    for bad, lines in ((b"", 0), (b"\xff", 1), (b'{"kind": "step", "st', 1), (b"[]\n5\nnull", 3)):
        (tmp_path / "history.jsonl").write_bytes(f"{good}\n".encode() + bad)
        caplog.clear()
        RunLog(tmp_path, 9).close()
        assert rows(tmp_path) == [1]
        assert [record.message for record in caplog.records] == [
            f"{tmp_path}/history.jsonl: {lines} of its {lines + 1} lines cannot be read, and are left out"][:lines]


def test_a_board_that_cannot_be_written_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = RunLog(tmp_path, 0)
    log._board.close()
    log._board = Board()
    for step in (1, 2):
        log.steps(step, {"loss": [float(step)]})
    log.close()
    assert rows(tmp_path) == [1, 2]
    [record] = caplog.records
    assert "no more curves and pictures" in record.message


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.run.log.write_text", fail)
    with pytest.raises(EngineError, match="cannot be written .No space left on device.; make room on its disk"):
        RunLog(tmp_path, 0)


def test_a_validation_that_is_done_again_is_said_once(tmp_path: Path) -> None:
    """Where the checkpoint was written because the run was asked to stop while it validated."""
    log = RunLog(tmp_path, 0)
    for step in (1, 2):
        log.steps(step, {"loss": [float(step)]})
        log.scalars("validation", step, {"loss": 10.0 * step})
    log.close()
    RunLog(tmp_path, 2).close()
    assert rows(tmp_path) == [1, 10, 2, 20]
    RunLog(tmp_path, 2, validated=False).close()
    assert rows(tmp_path) == [1, 10, 2]
    RunLog(tmp_path, 1).close()
    assert rows(tmp_path) == [1, 10]
