"""Checkpoints to resume from: whole or not used, and tied to nothing but the recipe.

`checkpoints/step-N/` holds `model.safetensors` (parameters and buffers by name, float32), `optimizer.safetensors` (of
each parameter that was updated its exp_avg, exp_avg_sq and step), under `train.ema` also `ema.safetensors` (the average
of the model, by the same names), and `checkpoint.json`: where the run stands, who wrote it, of each file its size and
SHA-256, and its own SHA-256.  No pickle is in it, and nothing of the number of ranks, the ZeRO stage, the precision or
the cut of the global batch, so any of them may be another after a resume.

Not DeepSpeed's own format: pickles for one ZeRO stage, at stages 1 to 3 for one number of ranks; its universal form
forgets BatchNorm's buffers.  Not torch.distributed.checkpoint: its index is a pickle, and it knows no checksum.

It is written beside, in `.step-N.part`, every file synced, and renamed last: a kill leaves the one before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.base.distributed import from_rank_0, rank, together, world
from engine.base.errors import EngineError
from engine.base.files import fsync, sha256, write_text
from engine.base.sections import HERE
from engine.base.texts import parse_json
from engine.config import Config
from engine.model.tensors import write_tensors
from engine.run.background import Background
from engine.training.state import full_state, load_model, load_optimizer, optimizer_state, shapes
from engine.training.update.ema import Ema

NOTE, MODEL, OPTIMIZER, EMA = "checkpoint.json", "model.safetensors", "optimizer.safetensors", "ema.safetensors"
FORMAT = 1
DEEPSPEEDS = "state.json"  # in checkpoints of engines before format 1

log = logging.getLogger(__name__)

Job = tuple[Callable[..., object], tuple[Any, ...]]  # a function and its arguments


def steps(folder: Path) -> list[Path]:
    """Checkpoints that were whole when they were written, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def find(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and the `state` that it was saved with; None where a run has none yet.

    Damaged ones that are newer are moved aside, to step-N.damaged, with a warning.
    Raises EngineError where there are checkpoints and none is whole, or the newest is of another format.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(steps(folder)):
        content, fault = _examine(path)
        if content is not None:
            for other, why in damaged.items():
                aside = _move_aside(other)
                log.warning(f"{other} is damaged ({why}): going on from {path.name} instead; it is now {aside.name}")
            return path, content["state"]
        damaged[path] = fault
    if damaged or any(folder.glob("step-*.damaged*")):
        why = "; ".join(f"{path.name}: {why}" for path, why in damaged.items()) or "all were moved aside"
        raise EngineError(f"{folder}: none of its checkpoints is whole ({why}); bring one back from a copy, or begin "
                          f"again: from {folder.parent}/weights as model.weights of another run.name, or from nothing "
                          f"with --restart, which deletes the run")
    return None


def write(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], about: Mapping[str, Any],
          keep: int) -> None:
    """Write a checkpoint (tensors by file and name, and what else its JSON shall say), then remove all but the newest
    `keep`.  A step that is there already is left: a run that made none since then stands where it stood.

    Raises OSError, and leaves nothing, where the disk does not take it.
    """
    final = folder / f"step-{step:08d}"
    if final.exists():
        return
    part = folder / f".{final.name}.part"
    for stale in folder.glob(".step-*.part"):
        shutil.rmtree(stale)
    try:
        part.mkdir(parents=True)
        files = {}
        for name, content in tensors.items():
            digest = write_tensors(part / name, content, {})
            files[name] = {"size": (part / name).stat().st_size, "sha256": digest}
        write_text(part / NOTE, _sealed({"format": FORMAT, "step": step, **about, "files": files}))
        part.rename(final)
        fsync(folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for old in steps(folder)[:-keep]:
        shutil.rmtree(old)


def load(engine: Any, path: Path, ema: Ema | None = None) -> None:
    """Fill model, optimizer and average, on all ranks, from a checkpoint that `find` found whole.

    Raises EngineError where it is of another model.
    """
    with ExitStack() as stack:
        try:
            with together():
                model, optimizer = (stack.enter_context(safe_open(path / name, framework="pt"))
                                    for name in (MODEL, OPTIMIZER))
                average = stack.enter_context(safe_open(path / EMA, framework="pt")) if ema is not None else None
                _must_fit(path, shapes(engine), model, optimizer)
                if average is not None:
                    _must_fit(path, shapes(engine), average)
        except (SafetensorError, OSError) as error:
            raise EngineError(f"{path}: cannot be read ({error}); move it away to resume from an earlier one") from None
        if ema is not None and average is not None:
            with ema.in_place():
                load_model(engine, average.get_tensor)
        load_model(engine, model.get_tensor)
        load_optimizer(engine, set(optimizer.keys()), optimizer.get_tensor)


class Checkpoints:
    """Those of a run, with the weights beside them: copied while training waits, written while it goes on.

    What the disk does not take is said and tried again with the next checkpoint; with the last of `checkpoint.failures`
    in a row the run stops.  Weights are written before the checkpoint that counts on them, or it does not count.
    """

    def __init__(self, config: Config, background: Background):
        self.folder, self._config, self._background = config.run_folder / "checkpoints", config, background
        self._new: list[Job] = []  # for the next checkpoint
        self._owed: list[Job] = []  # handed to the writing thread and not written, the oldest first
        self._failed = 0  # times in a row
        self._why = ""

    def before(self, work: Callable[..., object], *args: Any) -> None:
        """On rank 0: write something, by `work(*args)`, before the next checkpoint."""
        self._new.append((work, args))

    def save(self, engine: Any, step: int, state: dict[str, Any], ema: Ema | None = None) -> None:
        """A collective.  Returns when all is copied; until then nothing may train."""
        self._give_up_after(self._config.checkpoint.failures)
        self._background.make_room()
        HERE.passed()  # at ZeRO stages others wait inside what follows, where rank 0 waits for the disk
        tensors = {MODEL: full_state(engine), OPTIMIZER: optimizer_state(engine)}
        if ema is not None:
            with ema.in_place():
                tensors[EMA] = full_state(engine)
        train = self._config.train
        about = {"state": state, "written_by": {
            "ranks": world(), "zero_stage": train.zero_stage, "precision": train.precision,
            "versions": {name: _version(name) for name in ("biomass-engine", "torch", "deepspeed")}}}
        if rank() == 0:
            jobs: list[Job] = [*self._new, (write, (self.folder, step, tensors, about, self._config.checkpoint.keep))]
            self._new = []
            self._background.do(self._write, jobs)

    def finish(self) -> None:
        """A collective: everything is written.  Raises EngineError where the disk does not take it."""
        self._background.finish()
        if self._owed:
            self._try()
        self._give_up_after(1)

    def _write(self, jobs: list[Job]) -> None:
        self._owed = [job for job in self._owed if job[0] is not write] + jobs  # a newer checkpoint is enough
        self._try()

    def _try(self) -> None:
        try:
            while self._owed:
                work, args = self._owed[0]
                work(*args)
                del self._owed[0]
            self._failed = 0
        except OSError as error:
            self._failed, self._why = self._failed + 1, str(error)
            log.warning(f"{self.folder}: a checkpoint could not be written ({error}), to be tried again with the next; "
                        f"{self._last_good()}")

    def _give_up_after(self, failures: int) -> None:
        failed, why = from_rank_0((self._failed, f"{self._why}; {self._last_good()}"))
        if failed >= failures:
            raise EngineError(f"checkpoints could not be written, {failed} times in a row ({why}); make room on the "
                              f"disk of {self.folder}, and the same command goes on from there")

    def _last_good(self) -> str:
        good = steps(self.folder)
        return f"the last good one is {good[-1].name}" if good else "there is none yet"


def _examine(path: Path) -> tuple[dict[str, Any] | None, str]:
    """What a checkpoint's JSON says if all of it is as it was written, or what is wrong with it.

    Raises EngineError for one of another format.
    """
    if (path / DEEPSPEEDS).exists() and not (path / NOTE).exists():
        raise EngineError(f"{path} is in DeepSpeed's own format, of an engine before this one, which reads no pickles: "
                          f"go on with the engine that wrote it, or begin another run.name from its weights "
                          f"(model.weights: {path.parent.parent})")
    try:
        text = (path / NOTE).read_bytes().decode()
        content = parse_json(text)
        if not isinstance(content, dict) or text != _sealed({k: v for k, v in content.items() if k != "sha256"}):
            return None, f"{NOTE} is not as it was written"
        if content["format"] != FORMAT:
            raise EngineError(f"{path} is of format {content['format']}, and this engine reads {FORMAT}: go on with "
                              f"the engine that wrote it")
        if path.name != f"step-{content['step']:08d}":
            return None, f"{NOTE} is step {content['step']}'s"
        if not content["files"].keys() <= {MODEL, OPTIMIZER, EMA} or not isinstance(content["state"], dict):
            return None, f"{NOTE} names files that no checkpoint has"
        for name, wanted in content["files"].items():
            size = (path / name).stat().st_size
            if size != wanted["size"]:
                return None, f"{name} has {size} bytes instead of {wanted['size']}"
            if sha256(path / name) != wanted["sha256"]:
                return None, f"{name} is not as it was written"
    except OSError as error:
        return None, f"{Path(error.filename or path).name}: {error.strerror}"
    except ValueError:
        return None, f"{NOTE} is cut off or not JSON"
    except (KeyError, TypeError, AttributeError) as error:  # sealed, and not by this engine
        return None, f"{NOTE} does not say what a checkpoint does ({error})"
    return content, ""


def _sealed(content: dict[str, Any]) -> str:
    """The one text that says `content`, with its SHA-256."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that was not installed
        return None


def _move_aside(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.damaged{'' if i == 1 else f'-{i}'}") for i in range(1, 1000))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    fsync(path.parent)
    return aside


def _must_fit(path: Path, wanted: Mapping[str, Any], model: Any, optimizer: Any = None) -> None:
    def shape(file: Any, name: str) -> tuple[int, ...]:
        return tuple(file.get_slice(name).get_shape())

    found = {name: shape(model, name) for name in model.keys()}  # noqa: SIM118  (not a dict)
    other = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    for name in () if optimizer is None else optimizer.keys():
        of, _, key = name.rpartition(".")
        if shape(optimizer, name) != (() if key == "step" else wanted.get(of)):
            other.append(name)
    if other:
        raise EngineError(f"{path} is of another model: {len(other)} tensors do not fit, the first {other[0]}; resume "
                          f"with the recipe and the engine that wrote it")
