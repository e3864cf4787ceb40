"""Runs of three seconds to be killed, stopped and starved, and the moments at which that happens.

The data are chips of 64 × 64 pixels and three steps; the recipe has two phases, ten steps in all, and saves between
epochs, too, out of step with the log.  A moment is the n-th time that a process comes to a line, and the fault is done
there by itself, so that a test that failed fails again.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from engine.data.dataset import Dataset, parse_dataset
from tests.hosts import Rank, started, torchrun

SEED = int(os.environ.get("FAULTS_SEED", "1"))
STEPS = 10  # of a run: twice three with the six chips that are not in the fold, four with all
RECIPE = """
data: {{path: {data}, split: {{folds: 4}}, readers: 1, prefetch: 1}}
run: {{name: run, folder: {folder}}}
model: {{backbone: tf_mobilenetv3_small_minimal_100, decoder_channels: [8, 8, 8, 8, 8], attention: reference}}
train: {{global_batch: 2, micro_batch: 1, precision: fp32, device: cpu, timeout_s: 30, ema: 0.6}}
phases:
- {{name: first, epochs: 2, lr: 0.003}}
- {{name: second, epochs: 1, lr: 0.001, train_on: all, start_from: last-ema}}
checkpoint: {{every_steps: 2}}
log: {{every: 3, chips: 1}}
"""

EVENTS = {  # what a process is about to do, and the function that does it
    "start up": "engine.trainer:select_chips",
    "run": "engine.trainer:Trainer.run",
    "make a model": "engine.trainer:starting_model",
    "make an engine": "engine.trainer:make_engine",
    "step": "engine.training.update.step:Step.take",
    "update": "engine.training.update.step:Step._clip",  # in a step, after the backward
    "average the weights": "engine.training.update.ema:Ema.update",
    "log": "engine.run.log:RunLog.steps",
    "validate": "engine.trainer:predict_chips",
    "take a validated batch": "engine.training.shown:Shown.add",
    "score": "engine.run.log:RunLog.scalars",
    "export": "engine.trainer:Trainer._export",  # the validation is in the history
    "write weights": "engine.model.weights:save_weights",
    "name weights": "engine.trainer:hard_link",
    "save": "engine.training.checkpoint:Checkpoints.save",  # between validation and its save, where it follows one
    "write a checkpoint": "engine.training.checkpoint:write_tensors",
    "seal a checkpoint": "engine.training.checkpoint:write_text",
    "end a checkpoint": "engine.training.checkpoint:fsync",  # it has its name
    "remove a checkpoint": "engine.training.checkpoint:shutil.rmtree",
    "sync a file": "engine.base.files:os.fsync",  # it is written beside
    "finish a phase": "engine.training.checkpoint:Checkpoints.finish",
    "leave": "engine.base.distributed:leave",
}


class Moment(NamedTuple):
    event: str
    number: int = 1
    rank: int = 0


def description() -> Dataset:
    sensor = {"name": "s", "file": "{chip}_s_{step}.tif", "bands": ["a", "b"], "low": [0, 0], "high": [9000, 9000],
              "dtype": "uint16", "nodata": 0}
    return parse_dataset({"name": "tiny", "tile": 64, "pixel_metres": 10, "steps": ["one", "two", "three"],
                          "sensors": [sensor], "target": {"name": "height", "unit": "m", "file": "{chip}_height.tif",
                                                          "dtype": "float32"}}, "tiny")


def recipe(folder: Path, data: Path, runs: Path | None = None) -> Path:
    """A recipe in `folder`, where its run will be, too, if not in `runs`."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(data=data, folder=runs or folder))
    return path


# Faults, done by the process in which they happen -------------------------------------------------------------------


def when(events: list[str], do: Callable[[str, int], None]) -> None:
    """`do(event, n)` before the n-th time that this process does so."""
    for event in events:
        module, _, names = EVENTS.get(event, event).partition(":")
        *path, name = names.split(".")
        owner: Any = functools.reduce(getattr, path, importlib.import_module(module))
        setattr(owner, name, _announced(event, getattr(owner, name), do))


def _announced(event: str, real: Callable[..., object], do: Callable[[str, int], None]) -> Callable[..., object]:
    times = [0]

    @functools.wraps(real)
    def announced(*args: object, **more: object) -> object:
        times[0] += 1
        do(event, times[0])
        return real(*args, **more)

    return announced


def signal_itself(number: int, event: str, at: int) -> None:
    def do(_: str, n: int) -> None:
        if n == at:
            os.kill(os.getpid(), number)

    when([event], do)


def note_all(path: Path) -> None:
    def do(event: str, _: int) -> None:
        with path.open("a") as handle:
            handle.write(f"{event}\n")

    when(list(EVENTS), do)


def noted(path: Path) -> Counter[str]:
    """How often each event was until now."""
    return Counter(path.read_text().splitlines() if path.exists() else [])


# Runs -----------------------------------------------------------------------------------------------------------------


def running(path: Path, ranks: int, before: dict[int, Callable[[], None]] | None = None,
            options: tuple[str, ...] = ()) -> AbstractContextManager[list[Rank]]:
    """The run of a recipe."""
    words = [word for option in options for word in ("--set", option)]
    return started(path.parent / "log", "train", "--config", path, *words, before=before,
                   variables=torchrun(ranks) if ranks > 1 else [{}])


def signalled(moment: Moment, number: int) -> dict[int, Callable[[], None]]:
    """For `running`: the moment's rank sends itself the signal then."""
    return {moment.rank: functools.partial(signal_itself, number, moment.event, moment.number)}


def go_on(path: Path, ranks: int, *options: str) -> str:
    """The command again, to the end.  What rank 0 said."""
    with running(path, ranks, options=options) as processes:
        assert [rank.wait(600) for rank in processes] == [0] * ranks, "\n".join(rank.text() for rank in processes)
        return processes[0].text()


def kill(path: Path, ranks: int, moment: Moment) -> None:
    with running(path, ranks, signalled(moment, signal.SIGKILL)) as processes:
        was_killed(processes, moment.rank)


def was_killed(processes: list[Rank], killed: int) -> None:
    """And the other rank leaves by itself."""
    assert processes[killed].wait(100) == -signal.SIGKILL, "it ended before"
    for rank in processes:
        if rank is not processes[killed]:
            assert rank.wait(100) in (0, 2), rank.text()  # 0: nothing was left to do together
            assert "Traceback" not in rank.text(), rank.text()


def lines(run: Path) -> list[dict[str, Any]]:
    """Of the history, but for those with times in them."""
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] not in ("speed", "tuning")]


def same_history(one: Path, other: Path) -> None:
    """All steps, each once, and the validations between them, to the bit."""
    assert lines(one) == lines(other)
    assert [row["step"] for row in lines(other) if row["kind"] == "step"] == list(range(1, STEPS + 1))


def same(one: Path, other: Path) -> None:
    """To the bit, history and weights; and nothing is left of what was cut off."""
    same_history(one, other)
    names = sorted(path.name for path in (one / "weights").iterdir())
    assert sorted(path.name for path in (other / "weights").iterdir()) == names
    for name in names:
        ours, theirs = (load_file(run / "weights" / name) for run in (one, other))
        assert ours.keys() == theirs.keys()
        different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
        assert not different, (name, different)
    kept = [sorted(path.name for path in (run / "checkpoints").iterdir())[-2:] for run in (one, other)]
    assert kept[0] == kept[1]
    assert not list(other.rglob(".*.part"))
