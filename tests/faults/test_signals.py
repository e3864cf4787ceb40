"""Asked to stop at any moment, by whatever: one checkpoint, exit status 143, nobody left, and on it goes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, command_line, environment
from tests.faults.conftest import Whole
from tests.faults.harness import (
    STEPS,
    Moment,
    go_on,
    kill,
    lines,
    recipe,
    running,
    same,
    same_history,
    signal_itself,
    signalled,
    when,
)
from tests.hosts import history, started

Wholes = Callable[[int], Whole]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
MOMENTS = [Moment("start up"), Moment("validate", 2), Moment("make an engine"), Moment("step"), Moment("update", 4),
           Moment("log"), Moment("take a validated batch"), Moment("export"), Moment("save", 3),
           Moment("write a checkpoint", 2), Moment("make a model", 2), Moment("step", 7)]


def nearly_same(one: Path, other: Path) -> None:
    """Losses and parameters to the bit.  Statistics of BatchNorm are averaged over ranks where something is saved: of
    those the mean is the same, up to rounding, and so are the scores that they give."""
    assert history(one) == history(other)
    for a, b in zip(lines(one), lines(other), strict=True):
        assert (a["kind"], a["step"]) == (b["kind"], b["step"])
        assert a["kind"] == "step" or a["rmse_per_chip"] == pytest.approx(b["rmse_per_chip"], rel=1e-5)
    for name in ("first-last", "first-last-ema", "last", "last-ema"):
        ours, theirs = (load_file(run / "weights" / f"{name}.safetensors") for run in (one, other))
        for key in ours:
            equal = torch.allclose if "running" in key else torch.equal
            assert equal(ours[key], theirs[key]), (name, key)


def stop(path: Path, ranks: int, moment: Moment, number: signal.Signals) -> None:
    """All ranks leave with 143, and the newest checkpoint is of the last step."""
    run = path.parent / "run"
    with running(path, ranks, signalled(moment, number)) as processes:
        assert [rank.wait(60) for rank in processes] == [143] * ranks, "\n".join(rank.text() for rank in processes)
        for rank in processes:
            assert f"with everything saved in {run}" in rank.text() and "Traceback" not in rank.text()
    newest = max(path.name for path in (run / "checkpoints").glob("step-*"))
    assert newest == f"step-{len(history(run)):08d}"


@pytest.mark.slow
def test_stopped_again_and_again(data: Path, whole: Wholes, tmp_path: Path) -> None:
    """One run of two ranks: as it begins, while it validates, then killed, and while it saves."""
    path = recipe(tmp_path, data)
    stop(path, 2, Moment("start up", 1, 1), signal.SIGUSR1)
    stop(path, 2, Moment("take a validated batch", 1, 1), signal.SIGTERM)
    kill(path, 2, Moment("step", 1, 1))
    stop(path, 2, Moment("write a checkpoint", 1, 0), signal.SIGINT)
    go_on(path, 2)
    nearly_same(whole(2).run, path.parent / "run")


@pytest.mark.faults
@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("ranks", [1, 2])
def test_asked_to_stop(data: Path, whole: Wholes, tmp_path: Path, ranks: int, number: int) -> None:
    path, moment = recipe(tmp_path, data), MOMENTS[number]
    if moment.event in whole(ranks).events[-1]:
        moment = moment._replace(rank=number % ranks)
    stop(path, ranks, moment, SIGNALS[number % 3])
    go_on(path, ranks)
    (same if ranks == 1 else nearly_same)(whole(ranks).run, path.parent / "run")


def stop_in_compiler() -> None:
    signal_itself(signal.SIGTERM, "torch._inductor.compile_fx:compile_fx", 3)


@pytest.mark.faults
def test_asked_to_stop_while_it_compiles(data: Path, whole: Wholes, tmp_path: Path) -> None:
    path, run = recipe(tmp_path, data), tmp_path / "run"
    with running(path, 1, {0: stop_in_compiler}, ("train.compile=true",)) as [rank]:
        assert rank.wait(600) == 143, rank.text()
    assert [row["step"] for row in history(run)] == [1]
    go_on(path, 1, "train.compile=true")
    np.testing.assert_allclose([row["loss"] for row in history(run)],
                               [row["loss"] for row in history(whole(1).run)], rtol=1e-3)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
                                    *(pytest.param(number, marks=pytest.mark.faults)
                                      for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGKILL))])
def test_the_launcher_is_asked_to_stop(data: Path, whole: Wholes, tmp_path: Path, number: signal.Signals) -> None:
    """The `deepspeed` command passes no signal on, and ends by it."""
    path, run = recipe(tmp_path, data), tmp_path / "run"
    launcher = subprocess.Popen(command_line("train", "--config", path, ranks=2), cwd=ROOT, env=environment(),
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 200
    while not history(run):
        assert launcher.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    launcher.send_signal(number)
    launcher.wait(60)
    while left(path):
        assert time.monotonic() < end, left(path)
        time.sleep(0.1)
    assert len(history(run)) < STEPS
    go_on(path, 2)
    nearly_same(whole(2).run, run)


@pytest.mark.slow
def test_the_time_is_over(data: Path, whole: Wholes, tmp_path: Path) -> None:
    path = recipe(tmp_path, data)
    with started(tmp_path / "log", "train", "--config", path, "--max-time", "1s", variables=[{}],
                 before={0: slow_steps}) as [rank]:
        assert rank.wait(100) == 143 and "same command goes on" in rank.text(), rank.text()
    assert len(history(tmp_path / "run")) < STEPS
    go_on(path, 1)
    same_history(whole(1).run, tmp_path / "run")


def slow_steps() -> None:
    when(["step"], lambda *_: time.sleep(0.2))


def left(path: Path) -> list[str]:
    """Processes that have the recipe on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes()
        except OSError:
            continue
        if str(path).encode() in words and int(process.parent.name) != os.getpid():
            found.append(words.replace(b"\0", b" ").decode())
    return found
