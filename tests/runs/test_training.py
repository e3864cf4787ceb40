"""Whole runs through the commands: training, two ranks, predicting."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from safetensors.torch import load_file

from engine.inference.predictor import choose_chips
from tests.conftest import ROOT, Command, command_line, environment, once
from tests.hosts import forked, started, torchrun

pytestmark = pytest.mark.slow

RECIPE = """
data: {{path: {data}, split: {{folds: 4}}, readers: 2}}
run: {{name: {name}, folder: {folder}}}
model: {{backbone: tf_mobilenetv3_small_minimal_100, decoder_channels: [8, 8, 8, 8, 8]}}
train: {{global_batch: 2, micro_batch: 1, precision: fp32, device: cpu, ema: 0.6}}
phases:
- {{name: first, epochs: 1, lr: 0.003}}
- {{name: second, epochs: 1, lr: 0.001, train_on: all, start_from: last-ema}}
checkpoint: {{every_steps: 1}}
log: {{every: 1, chips: 1}}
"""


def recipe(folder: Path, sample: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(data=sample, name=name, folder=folder))
    return path


def history(run: Path, kind: str = "step") -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "kind"} for row in rows if row["kind"] == kind]


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Path:
    """An uninterrupted run of one rank: 3 steps on the fold, 4 on all chips."""

    def train(folder: Path) -> None:
        line = command_line("train", "--config", recipe(folder, sample, "whole"), "--profile", "steps=1:3")
        succeed(subprocess.run(line, cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=300))

    return once(tmp_path_factory, "trained", train) / "whole"


def test_what_a_run_leaves(whole: Path, sample: Path) -> None:
    assert [row["step"] for row in history(whole)] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["lr"] for row in history(whole)] == [0.003] * 3 + [0.001] * 4
    assert all(np.isfinite([row["loss"], row["grad_norm"]]).all() for row in history(whole))
    assert len(history(whole, "validation")) == 1 and len(history(whole, "seen_in_training")) == 1
    [raw], [ema] = history(whole, "validation"), history(whole, "validation_ema")
    assert raw["rmse_per_chip"] != ema["rmse_per_chip"] == pytest.approx(raw["rmse_per_chip"], rel=0.2)
    names = {path.name for path in (whole / "weights").iterdir()}
    assert names == {f"{a}{b}{c}.safetensors" for a in ("", "first-", "second-") for b in ("best", "last")
                     for c in ("", "-ema")}
    held_out = [[chip.id for chip in choose_chips(sample, "validation", weights)]
                for weights in (whole, whole / "weights" / "best-ema.safetensors")]
    assert held_out[0] == held_out[1] != []
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == ["step-00000006", "step-00000007"]
    assert (whole / "config.yaml").exists()
    assert "aten::" in (whole / "profile" / "steps-1-3.txt").read_text()
    assert (whole / "profile" / "steps-1-3.json.gz").stat().st_size > 1000


def test_tensorboard_has_everything(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/grad_norm", "train/lr", "train/skipped_updates", "speed/chips_per_second",
            "speed/data_wait_share", "speed/memory_gib", "validation/rmse_per_chip", "validation/rmse_pooled",
            "validation/mae", "validation/r2", "validation/bias"} <= tags
    assert len(events.Tags()["images"]) == 1
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7]


def same_run(a: Path, b: Path) -> None:
    for kind in ("step", "validation", "validation_ema", "seen_in_training"):
        assert history(a, kind) == history(b, kind)
    for name in ("second-last", "second-last-ema"):
        ours, theirs = (load_file(run / "weights" / f"{name}.safetensors") for run in (a, b))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def kill(path: Path, steps: int, *options: object, before: Callable[[], None] | None = None) -> None:
    """Start the run of the recipe `path` and, once it has done so many steps, end it by SIGKILL.  before: what it does
    first."""
    run = path.with_suffix("")
    with started(path.parent / "log", "train", "--config", path, *options, variables=[{}],
                 before={0: before} if before else None) as [rank]:
        rank.until(lambda: (run / "history.jsonl").exists() and len(history(run)) >= steps)
        rank.signal(signal.SIGKILL)
        assert rank.wait() == -signal.SIGKILL, "the run ended before it could be killed"


def by(ranks: int, path: Path, *options: object, before: Callable[[], None] | None = None) -> str:
    """What the first rank printed in the run of the recipe `path` by so many."""
    with started(path.parent / "log", "train", "--config", path, *options, variables=torchrun(ranks),
                 before=dict.fromkeys(range(ranks), before) if before else None) as started_ranks:
        codes = [rank.wait() for rank in started_ranks]
        assert not any(codes), "".join(rank.text() for rank in started_ranks)
        return started_ranks[0].text()


@pytest.mark.parametrize("stage", [0, 2])
def test_two_ranks_give_the_losses_of_one(whole: Path, folder: Path, sample: Path, command: Command,
                                          stage: int) -> None:
    """Global batches of 2 chips either way: one rank accumulates two, two ranks take one each; once as the deepspeed
    launcher starts them."""
    path = recipe(folder, sample, f"two-{stage}")
    if stage == 0:
        succeed(command("train", "--config", path, ranks=2))
    else:
        by(2, path, "--set", f"train.zero_stage={stage}")
    ours, theirs = (history(run) for run in (folder / f"two-{stage}", whole))
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], rtol=1e-4)
    np.testing.assert_allclose([r["grad_norm"] for r in ours], [r["grad_norm"] for r in theirs], rtol=0.02)


def test_accumulation_over_two_ranks(folder: Path, sample: Path) -> None:
    """Global batches of 4 chips: two ranks × two accumulated under ZeRO-2, against one rank × four."""
    options = ["--set", "phases=[{epochs: 2, lr: 0.003}]", "--set", "data.split.folds=2", "--set", "validate.every=2",
               "--set", "checkpoint.every_steps=null", "--set", "train.global_batch=4"]
    succeed(forked("train", "--config", recipe(folder, sample, "one-by-four"), *options))
    by(2, recipe(folder, sample, "two-by-two"), *options, "--set", "train.zero_stage=2")
    one, two = (history(folder / name) for name in ("one-by-four", "two-by-two"))
    assert len(one) == 2
    np.testing.assert_allclose([r["loss"] for r in two], [r["loss"] for r in one], rtol=1e-4)


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (3, "fp32"), (0, "bf16"), (0, "fp16"), (2, "fp16")])
def test_every_stage_and_precision_trains_resumes_and_exports(folder: Path, sample: Path, whole: Path, stage: int,
                                                              precision: str, command: Command) -> None:
    name = f"stage-{stage}-{precision}"
    path = recipe(folder, sample, name)
    options = ["--set", f"train.zero_stage={stage}", "--set", f"train.precision={precision}",
               "--set", "phases=[{name: first, epochs: 1, lr: 0.003}]", "--set", "checkpoint.every_steps=null"]
    succeed(command("train", "--config", path, *options))
    ours, theirs = history(folder / name), history(whole)[:3]
    tolerance = 1e-4 if precision == "fp32" else 0.02
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], rtol=tolerance)
    # Only the first norm: gradients of float32 wander between memory layouts, and AdamW's first step keeps their signs
    assert ours[0]["grad_norm"] == pytest.approx(theirs[0]["grad_norm"], rel=1e-3 if precision == "fp32" else 0.05)
    state = load_file(folder / name / "weights" / "last.safetensors")
    reference = load_file(whole / "weights" / "first-last.safetensors")
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in reference.items()}
    assert all(v.dtype in (torch.float32, torch.int64) for v in state.values())


def test_a_run_of_another_recipe_is_not_overwritten(whole: Path, folder: Path, command: Command) -> None:
    result = command("train", "--config", whole.parent / "whole.yaml", "--set", "optimizer.lr=0.5")
    assert result.returncode == 2
    assert "holds a run of another recipe (optimizer.lr changed)" in result.stderr and "--restart" in result.stderr


def test_predicting_from_a_run(whole: Path, sample: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "maps"
    succeed(command("predict", "--weights", whole, "--data", sample, "--out", out, "--split", "validation",
                    "--tta", "id,h,v,hv", "--device", "cpu", "--batch", 3))
    metrics = json.loads((out / "metrics.json").read_text())
    maps = sorted(path.name for path in out.glob("*.tif"))
    assert len(maps) == 2 == len(metrics["chips"])
    errors = []
    for name in maps:
        prediction = tifffile.imread(out / name)
        assert prediction.shape == (256, 256) and prediction.dtype == np.float32
        errors.append(np.sqrt(np.mean((prediction - tifffile.imread(sample / "train_agbm" / name)) ** 2.0)))
    assert metrics["metrics"]["rmse_per_chip"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert (out / "scatter.png").stat().st_size > 5000
    assert len(list((out / "pictures").glob("*.png"))) == 2


def test_predicting_chips_without_labels(whole: Path, sample: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "maps"
    succeed(command("predict", "--weights", whole / "weights" / "best.safetensors", "--data", sample, "--out", out,
                    "--device", "cpu"))
    assert len(list(out.glob("*_agbm.tif"))) == 2 and not (out / "metrics.json").exists()
    assert len(list((out / "pictures").glob("*.png"))) == 2


def test_validation_and_prediction_agree(whole: Path, sample: Path, tmp_path: Path, command: Command) -> None:
    succeed(command("predict", "--weights", whole / "weights" / "first-last.safetensors", "--data", sample, "--out",
                    tmp_path, "--split", "train", "--device", "cpu", "--batch", 1, "--pictures", 0))
    chips = json.loads((tmp_path / "metrics.json").read_text())["chips"]
    from engine.data.selection.folds import kfold

    fold = kfold(list(chips), 4)[0]
    score = np.mean([chips[chip]["rmse"] for chip in fold])
    # predict.py folds BatchNorm into the convolutions, validation does not
    assert score == pytest.approx(history(whole, "validation")[0]["rmse_per_chip"], rel=1e-4)


def test_the_real_chip_overfits_and_predicts(real_data: Path, tmp_path: Path, command: Command) -> None:
    succeed(command("train", "--config", ROOT / "configs" / "demo.yaml", "--set", f"data.path={real_data}",
                    "--set", "data.chips=[0060c0a5]", "--set", "data.overfit=true", "--set", "train.global_batch=1",
                    "--set", "train.device=cpu", "--set", f"run.folder={tmp_path}", "--set", "run.name=real",
                    "--set", "phases=[{epochs: 40, lr: 0.01}]", "--set", "validate.every=40",
                    "--set", "augment={hflip: 0, rot90: false, rotate: 0, month_dropout: 0}"))
    losses = [row["loss"] for row in history(tmp_path / "real")]
    score = history(tmp_path / "real", "validation")[0]
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
    succeed(command("predict", "--weights", tmp_path / "real", "--data", real_data, "--out", tmp_path / "maps",
                    "--split", "validation", "--device", "cpu"))
    metrics = json.loads((tmp_path / "maps" / "metrics.json").read_text())
    assert list(metrics["chips"]) == ["0060c0a5"]
    assert metrics["metrics"]["rmse_per_chip"] == pytest.approx(score["rmse_per_chip"], rel=1e-4)
