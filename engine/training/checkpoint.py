"""Checkpoints to resume from: DeepSpeed's, made atomic, with retention.

A checkpoint is a folder `checkpoints/step-{N}`; while it is being written it is called `.step-{N}.part`, so a name
without the dot is always whole.  These are DeepSpeed's own pickles and belong to the run that wrote them; weights to
share are the safetensors beside them (`engine.model.weights`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.base.distributed import barrier, rank
from engine.base.errors import EngineError
from engine.base.files import fsync

STATE = "state.json"


def save(engine: Any, folder: Path, step: int, state: dict[str, Any], keep: int,
         first: Callable[[], None] = lambda: None) -> Path:
    """Write a checkpoint on all ranks, then remove all but the newest `keep`.

    first: called on rank 0 before the checkpoint counts: what a resume will expect to be there.
    """
    final = folder / f"step-{step:08d}"
    part = folder / f".{final.name}.part"
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".step-*.part"):
            shutil.rmtree(stale)
    barrier()
    engine.save_checkpoint(str(folder), tag=part.name, save_latest=False)
    barrier()
    if rank() == 0:
        first()
        (part / STATE).write_text(json.dumps(state))
        for path in part.rglob("*"):
            if path.is_file():
                fsync(path)
        fsync(part)
        if final.exists():  # the same step once more: after a resume that made no step
            shutil.rmtree(final)
        part.rename(final)
        fsync(folder)
        for old in steps(folder)[:-keep]:
            shutil.rmtree(old)
    barrier()
    return final


def steps(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def read_state(path: Path) -> dict[str, Any]:
    """The `state` that a checkpoint was saved with."""
    return json.loads((path / STATE).read_text())


def load(engine: Any, path: Path) -> None:
    """Restore model and optimizer.  Raises EngineError where the checkpoint does not fit."""
    try:
        loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    except Exception as error:
        raise EngineError(f"{path}: cannot be resumed from ({type(error).__name__}: {error}); resume with the number "
                          f"of ranks and the ZeRO stage it was written with, or delete it to resume from an earlier "
                          f"one") from error
    if loaded is None:
        raise EngineError(f"{path}: not a checkpoint; delete it to resume from an earlier one")
