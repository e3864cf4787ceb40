"""Training and predicting on a GPU, rehearsed as whole commands (see `tests.rehearsal.run`), beside the same on the
CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import rasterio
import tifffile
import torch

from engine.data.index import open_index
from engine.inference.landscape.mapper import Options, predict_scene
from engine.inference.predictor import predict
from engine.model.unet import BiomassUNet
from engine.model.weights import save_weights
from tests.conftest import ROOT, TINY, environment
from tests.hosts import history, started
from tests.rehearsal.state import PEAK
from tests.scenes import make_scene, write_weights

pytestmark = pytest.mark.slow

RECIPE = """
data: {{path: {data}, split: {{folds: 4}}, readers: 2}}
run: {{folder: {folder}}}
model: {{attention: reference}}
train: {{global_batch: 2, micro_batch: 1, precision: bf16, compile: false, ema: 0.9}}
phases: [{{epochs: 1, lr: 0.003}}]
log: {{every: 2, chips: 1}}
"""


class Runs(NamedTuple):
    """Folders, and what `tests.rehearsal.run` reports."""

    gpu: Path
    cpu: Path
    report: dict[str, Any]
    maps: Path
    maps_report: dict[str, Any]
    weights: Path
    scene: Path
    landscape: Path  # the map of it
    landscape_report: dict[str, Any]


@pytest.fixture(scope="module")
def runs(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Training and predicting "on a GPU", beside the training on the CPU."""
    folder = tmp_path_factory.mktemp("rehearsed")
    (folder / "recipe.yaml").write_text(RECIPE.format(data=sample, folder=folder))
    torch.manual_seed(0)
    model = BiomassUNet("tf_mobilenetv3_small_minimal_100", [8] * 5)
    save_weights(folder / "w.safetensors", model.state_dict(), model.config(), {})
    train = ["--config", folder / "recipe.yaml", *TINY]
    commands = {
        "train": [*train, "--set", "train.device=gpu", "--set", "run.name=gpu", "--profile", "steps=2:3"],
        "predict": ["--weights", folder / "w.safetensors", "--data", sample, "--split", "test", "--out",
                    folder / "maps", "--device", "gpu", "--batch", 1, "--pictures", 0, "--cuda-graphs"]}
    scene = make_scene(folder / "scene", 100, 130)
    commands["scene"] = ["--weights", write_weights(folder / "scene.safetensors"), "--scene", scene, "--out",
                         folder / "map.tif", "--device", "gpu", "--batch", 2, "--tta", "id,r90", "--overlap", 32]
    env = {name: value for name, value in environment().items() if name != "DS_ACCELERATOR"}  # found, as on a GPU
    rehearsed = [subprocess.Popen([sys.executable, "-m", "tests.rehearsal.run", folder / f"{name}.json",
                                   "predict" if name == "scene" else name, *map(str, words)], cwd=ROOT, env=env,
                                  text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                 for name, words in commands.items()]
    try:
        with started(folder / "log", "train", *train, "--set", "train.device=cpu", "--set", "run.name=cpu",
                     variables=[{}]) as [rank]:
            assert rank.wait(500) == 0, rank.text()
        for run in rehearsed:
            out, _ = run.communicate(timeout=500)
            assert run.returncode == 0, out[-6000:]
    finally:
        for run in rehearsed:
            run.kill()
    reports = [json.loads((folder / f"{name}.json").read_text()) for name in commands]
    return Runs(folder / "gpu", folder / "cpu", reports[0], folder / "maps", reports[1], folder / "w.safetensors",
                scene, folder / "map.tif", reports[2])


def test_a_run_on_a_gpu_trains_as_on_the_cpu(runs: Runs) -> None:
    """Of gradients the first alone: AdamW's first step keeps their signs, and images in bfloat16 come by way of DALI's
    float16."""
    for kind, names in (("step", ("step", "loss", "lr")), ("validation", ("rmse_per_chip", "mae"))):
        one, other = ([[row[name] for name in names] for row in history(run, kind)] for run in (runs.gpu, runs.cpu))
        assert len(one) == (3 if kind == "step" else 1)
        np.testing.assert_allclose(one, other, rtol=5e-3)
    first, expected = (history(run)[0]["grad_norm"] for run in (runs.gpu, runs.cpu))
    assert first == pytest.approx(expected, rel=0.02)


def test_a_step_never_waits_for_the_device(runs: Runs) -> None:
    assert runs.report["steps"] == [[], [], []]


def test_everything_is_asked_of_the_gpu(runs: Runs) -> None:
    for report in (runs.report, runs.maps_report, runs.landscape_report):
        assert (report["backend"], report["device_id"]) == ("nccl", "cuda:0")
        assert report["accelerator"] == "CUDA_Accelerator"
    assert runs.report["devices"] == ["cuda:0"]
    assert runs.report["allreduce"] is False  # one rank at stage 0 has nothing to add up
    assert runs.report["benchmark"] is True


def test_what_is_measured_goes_into_the_history(runs: Runs) -> None:
    rows = history(runs.gpu, "speed")
    assert [row["step"] for row in rows] == [2, 3]
    assert all(row["chips_per_second"] > 0 and 0 <= row["data_wait_share"] <= 1 for row in rows)
    assert all(row["memory_gib"] == PEAK / 2**30 for row in rows)


def test_a_profile_is_of_the_gpu(runs: Runs) -> None:
    assert runs.report["profiled"] == [["CPU", "CUDA"]]
    assert "aten::" in (runs.gpu / "profile" / "steps-2-3.txt").read_text()


def test_predicting_on_a_gpu_gives_the_maps_of_the_cpu(runs: Runs, sample: Path, tmp_path: Path) -> None:
    chips = open_index(sample).split("test")
    predict(runs.weights, chips, tmp_path, device=torch.device("cpu"), batch_size=1, n_pictures=0)
    assert len(chips) == len(list(runs.maps.glob("*.tif"))) == 2
    for chip in chips:
        one, other = (tifffile.imread(folder / f"{chip.id}_agbm.tif") for folder in (runs.maps, tmp_path))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)
    assert sum(call.startswith("capture") for call in runs.maps_report["calls"]) == 1  # both keep all months


def test_a_landscape_on_a_gpu_is_that_of_the_cpu(runs: Runs, tmp_path: Path) -> None:
    """Where windows, and two views of each, share a forward pass."""
    predict_scene([runs.landscape.with_name("scene.safetensors")], runs.scene, tmp_path / "map.tif",
                  Options(tta=("id", "r90"), overlap=32), device=torch.device("cpu"))
    one, other = (rasterio.open(path).read(1) for path in (runs.landscape, tmp_path / "map.tif"))
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=0.05)
    assert np.ptp(other[other > -9999]) > 20 and (other == -9999).any()
