"""Two ranks that predict: one is slow to write, or dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from engine.model.unet import BiomassUNet
from engine.model.weights import save_weights
from tests.hosts import started, torchrun

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = BiomassUNet("tf_mobilenetv3_small_minimal_100", [8, 8, 8, 8, 8])
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path, model, model.config())
    return path


def write_slowly() -> None:
    from engine.data.tiff import tiff

    write = tiff.write_map

    def slow(*args: object) -> None:
        time.sleep(1)
        write(*args)  # type: ignore[arg-type]

    tiff.write_map = slow


def die_in_the_middle() -> None:
    from engine.data.tiff import tiff

    write, written = tiff.write_map, [0]

    def fatal(*args: object) -> None:
        written[0] += 1
        if written[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args)  # type: ignore[arg-type]

    tiff.write_map = fatal


def test_maps_are_read_when_all_are_written(weights: Path, sample: Path, tmp_path: Path) -> None:
    """One chip at a time: the slow rank's last batch is then no padding, and is written when rank 0 could read."""
    out = tmp_path / "maps"
    with started(tmp_path / "log", "predict", "--weights", weights, "--data", sample, "--out", out, "--split", "all",
                 "--device", "cpu", "--batch", 1, variables=torchrun(2), before={1: write_slowly}) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text() + ranks[1].text()
    assert len(list(out.glob("*_agbm.tif"))) == 10 == len(list((out / "pictures").glob("*.png")))
    assert (out / "scatter.png").exists() and (out / "metrics.json").exists()


def test_a_rank_that_dies_is_named(weights: Path, sample: Path, tmp_path: Path) -> None:
    out = tmp_path / "maps"
    with started(tmp_path / "log", "predict", "--weights", weights, "--data", sample, "--out", out, "--split", "all",
                 "--device", "cpu", "--batch", 1, variables=torchrun(2), before={1: die_in_the_middle}) as ranks:
        assert ranks[1].wait() == -signal.SIGKILL
        assert ranks[0].wait(60) == 2
        assert "predict.py: stopped by rank 1 on host " in ranks[0].text() and "Traceback" not in ranks[0].text()
    assert not (out / "metrics.json").exists()
