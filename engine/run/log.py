"""What a run leaves behind to be read: `history.jsonl` (every step's numbers), TensorBoard events, pictures.

Rank 0 writes; on other ranks every call does nothing.  After a resume both files go back to the checkpoint's step,
so an interrupted run reads like an uninterrupted one.  On a full disk lines wait until there is room.
"""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np

from engine.base.distributed import rank
from engine.base.errors import EngineError
from engine.base.files import write_text
from engine.base.texts import parse_json

SCORES = ("validation", "seen_in_training")

log = logging.getLogger(__name__)


class RunLog:
    def __init__(self, folder: Path, step: int, validated: bool = True):
        """`step`: the checkpoint's, 0 for a new run; what was logged after it is dropped.  validated: whether it was
        saved after its step's validation, if there is one, and not because the run was asked to stop before.

        Raises EngineError where the folder cannot be written.
        """
        self._history = None
        if rank() != 0:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        path = folder / "history.jsonl"
        old = list(map(_parsed, path.read_bytes().splitlines())) if path.exists() else []
        if None in old:  # the last may have been cut off by a kill
            log.warning(f"{path}: {old.count(None)} of its {len(old)} lines cannot be read, and are left out")
        kept = [line for line in old if line and line["step"] <= step
                and (validated or line["step"] < step or not line["kind"].startswith(SCORES))]
        self._board: Any = None
        self._others_fail, threading.excepthook = threading.excepthook, self._thread_failed
        try:
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._history = path.open("ab", buffering=0)
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        except OSError as error:
            threading.excepthook = self._others_fail
            raise EngineError(f"{folder}: cannot be written ({error.strerror}); make room on its disk, and the same "
                              f"command goes on from there") from None
        self._unwritten, self._full = b"", False

    def steps(self, first: int, columns: dict[str, list[float]]) -> None:
        """One history line a step from step `first` on; the mean of each column goes to TensorBoard."""
        if self._history is None:
            return
        rows = list(zip(*columns.values()))
        for i, row in enumerate(rows):
            self._line({"kind": "step", "step": first + i, **dict(zip(columns, row))})
        self._flush()
        for name, values in columns.items():
            self._show("add_scalar", f"train/{name}", float(np.mean(values)), first + len(rows) - 1)

    def scalars(self, kind: str, step: int, values: dict[str, float], history: bool = True) -> None:
        if self._history is None:
            return
        if history:
            self._line({"kind": kind, "step": step, **values})
            self._flush()
        for name, value in values.items():
            self._show("add_scalar", f"{kind}/{name}", value, step)

    def note(self, kind: str, step: int, about: dict[str, Any]) -> None:
        """A line of the history alone."""
        if self._history is not None:
            self._line({"kind": kind, "step": step, **about})
            self._flush()

    def picture(self, name: str, step: int, image: np.ndarray) -> None:
        """`image` [H, W, 3] uint8."""
        if self._history is not None:
            self._show("add_image", name, image, step, dataformats="HWC")

    def close(self) -> None:
        if self._history is not None:
            self._flush()
            self._history.close()
            self._show("close")
            threading.excepthook = self._others_fail

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard writes on a thread of its own, whose failure Python would print as a bug."""
        if isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard."):
            self._leave_board(failure.exc_value)
        else:
            self._others_fail(failure)

    def _show(self, call: str, *args: Any, **more: Any) -> None:
        """A call of TensorBoard's writer, which fails for ever after the disk was full once."""
        try:
            board = self._board
            if board is not None:
                getattr(board, call)(*args, **more)
        except OSError as error:
            self._leave_board(error)

    def _leave_board(self, error: OSError) -> None:
        board, self._board = self._board, None
        if board is not None:
            log.warning(f"TensorBoard's file cannot be written ({error}): no more curves and pictures until the run is "
                        f"started again; history.jsonl has the numbers")

    def _line(self, row: dict[str, Any]) -> None:
        self._unwritten += (json.dumps(row) + "\n").encode()

    def _flush(self) -> None:
        assert self._history is not None
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._history.write(self._unwritten):]
            self._full = False
        except OSError as error:
            if not self._full:
                log.warning(f"{self._history.name} cannot be written ({error}): its lines wait until it can")
            self._full = True


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = parse_json(line)
        return found if isinstance(found["step"], int) and isinstance(found["kind"], str) else None
    except (ValueError, KeyError, TypeError):
        return None
