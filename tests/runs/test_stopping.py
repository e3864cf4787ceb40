"""Asked to stop, at any moment, by whatever: all is saved, nobody is left, and the run goes on to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, command_line, environment
from tests.hosts import history, started, torchrun

pytestmark = pytest.mark.slow

RECIPE = """
data: {{path: {data}, split: {{folds: 4}}, readers: 2}}
run: {{name: {name}, folder: {folder}}}
model: {{backbone: tf_mobilenetv3_small_minimal_100, decoder_channels: [8, 8, 8, 8, 8]}}
train: {{global_batch: 2, micro_batch: 1, precision: fp32, device: cpu}}
phases: [{{epochs: 2, lr: 0.003}}]
log: {{every: 1, chips: 1}}
"""


def recipe(folder: Path, sample: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(data=sample, name=name, folder=folder))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stopping")


@pytest.fixture(scope="module")
def whole(folder: Path, sample: Path) -> Path:
    """By two ranks, 6 steps."""
    run_on(recipe(folder, sample, "whole"))
    return folder / "whole"


def run_on(path: Path) -> None:
    with started(path.parent / "log", "train", "--config", path, variables=torchrun(2)) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text() + ranks[1].text()


def same(one: Path, other: Path) -> None:
    """Steps and parameters to the bit.  Statistics of BatchNorm are averaged over ranks where something is saved: of
    those the mean is the same, up to rounding."""
    assert history(one) == history(other)
    for a, b in zip(history(one, "validation"), history(other, "validation")):
        assert a["rmse_per_chip"] == pytest.approx(b["rmse_per_chip"], rel=1e-6)
    ours, theirs = (load_file(run / "weights" / "last.safetensors") for run in (one, other))
    for name in ours:
        equal = torch.allclose if "running" in name else torch.equal
        assert equal(ours[name], theirs[name]), name


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_deepspeed_command_leaves_nobody(folder: Path, sample: Path, whole: Path, number: signal.Signals) -> None:
    path = recipe(folder, sample, f"launcher-{number.name}")
    run = path.with_suffix("")
    launcher = subprocess.Popen(command_line("train", "--config", path, ranks=2), cwd=ROOT, env=environment(),
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 200
    while not (run / "history.jsonl").exists() or not history(run):
        assert launcher.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    launcher.send_signal(number)
    launcher.wait(60)
    end = time.monotonic() + 30
    while left(path) and time.monotonic() < end:
        time.sleep(0.1)
    assert left(path) == []
    assert len(list((run / "checkpoints").glob("step-*"))) >= 1
    run_on(path)
    same(whole, run)


@pytest.mark.parametrize("moment", ["start-up", "validation"])
def test_one_rank_is_asked_and_all_stop(folder: Path, sample: Path, whole: Path, moment: str) -> None:
    path = recipe(folder, sample, moment)
    run = path.with_suffix("")
    with started(folder / "log", "train", "--config", path, variables=torchrun(2),
                 before={0: slow_validation, 1: slow_validation} if moment == "validation" else None) as ranks:
        if moment == "validation":
            ranks[0].until(lambda: (run / "validating").exists())
        else:
            ranks[1].until(lambda: (run / "config.yaml").exists())
        ranks[1].signal(signal.SIGUSR1)
        assert [rank.wait(60) for rank in ranks] == [143, 143], ranks[0].text() + ranks[1].text()
        assert f"with everything saved in {run}" in ranks[0].text()
    assert not history(run, "validation")
    run_on(path)
    same(whole, run)


def slow_validation() -> None:
    """Says that it has begun, and takes its time."""
    from engine import trainer

    seen = trainer.Trainer._seen

    def slow(self: trainer.Trainer, *args: object) -> None:
        (self.folder / "validating").touch()
        time.sleep(2)
        seen(self, *args)  # type: ignore[arg-type]

    trainer.Trainer._seen = slow  # type: ignore[assignment, method-assign]


def test_the_time_is_over(folder: Path, sample: Path, whole: Path) -> None:
    path = recipe(folder, sample, "time")
    with started(folder / "log", "train", "--config", path, "--max-time", "1s", variables=torchrun(2)) as ranks:
        assert [rank.wait(100) for rank in ranks] == [143, 143], ranks[0].text()
    run_on(path)
    same(whole, path.with_suffix(""))
