"""Bad input through the commands: one message that names file, chip or key and the remedy, and a non-zero exit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.base.distributed import own_device
from engine.base.errors import DeviceError, EngineError
from engine.config import load_config
from engine.data.index import open_index
from engine.data.selection.chips import select_chips
from engine.data.tiff import tiff
from engine.training.dryrun import describe
from tests.conftest import ROOT, TINY, Command

DEMO = ROOT / "configs" / "demo.yaml"


def chosen(data: Path, *overrides: str) -> tuple[list, list]:
    return select_chips(load_config(DEMO, [f"data.path={data}", "data.split.folds=4", *overrides]))


def message(result) -> str:  # type: ignore[no-untyped-def]
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_a_typo_in_a_recipe(command: Command) -> None:
    text = message(command("train", "--config", DEMO, "--set", "optimizer.learning_rate=3"))
    assert "configs/demo.yaml: unknown key 'optimizer.learning_rate'" in text


def test_a_missing_folder_and_a_missing_label(command: Command, sample: Path, tmp_path: Path) -> None:
    assert "no such folder" in message(command("train", "--config", DEMO, "--set", "data.path=/none"))
    shutil.copytree(sample, tmp_path / "data")
    gone = open_index(sample).split("train")[2]
    (tmp_path / "data" / "train_agbm" / f"{gone.id}_agbm.tif").unlink()
    (tmp_path / "data" / "train_agbm_metadata.csv").unlink()
    text = message(command("train", "--config", DEMO, "--set", f"data.path={tmp_path / 'data'}"))
    assert f"chip {gone.id} has no label" in text and "data.chips" in text


@pytest.mark.parametrize(("damage", "expected"), [("truncated", "truncated"), ("shape", "128"), ("dtype", "uint16"),
                                                  ("nan", "NaN")])
def test_damaged_files_stop_training(command: Command, sample: Path, tmp_path: Path, damage: str,
                                     expected: str) -> None:
    data = tmp_path / "data"
    chip = open_index(sample).split("train")[0]
    for folder in ("train_features", "train_agbm"):
        (data / folder).mkdir(parents=True)
        for path in (sample / folder).glob(f"{chip.id}_*"):
            shutil.copy(path, data / folder)
    path = data / "train_features" / f"{chip.id}_S1_04.tif"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-7000])
    elif damage == "shape":
        tiff.write(path, np.zeros((128, 256, 4), np.float32), 2)
    elif damage == "dtype":
        tiff.write(path, np.zeros((256, 256, 4), np.uint16), 2)
    else:
        path = data / "train_agbm" / f"{chip.id}_agbm.tif"
        tiff.write_map(path, np.full((256, 256), np.nan, np.float32))
    text = message(command("train", "--config", DEMO, *TINY, "--set", f"data.path={data}", "--set", "data.overfit=true",
                           "--set", "train.global_batch=1", "--set", f"run.folder={tmp_path}"))
    assert path.name in text and expected in text


def test_weights_that_do_not_exist_or_fit(command: Command, sample: Path, tmp_path: Path) -> None:
    text = message(command("predict", "--weights", tmp_path / "none", "--data", sample, "--out", tmp_path / "out"))
    assert str(tmp_path / "none") in text
    assert not (tmp_path / "out").exists()
    (tmp_path / "w.safetensors").write_bytes(b"\x00" * 100)
    assert "w.safetensors" in message(
        command("predict", "--weights", tmp_path / "w.safetensors", "--data", sample, "--out", tmp_path / "out"))


def test_bad_options(command: Command, sample: Path, tmp_path: Path) -> None:
    text = message(command("predict", "--weights", tmp_path, "--data", sample, "--out", tmp_path, "--tta", "id,x"))
    assert "tta ['id', 'x']: give a list of one or more of id, h, v, hv, t, r90, r270, a, each once" in text
    assert "steps=a:b" in message(command("train", "--config", DEMO, "--set", f"data.path={sample}", "--set",
                                          "data.split.folds=4", "--profile", "steps=9:3"))


def test_verify_lists_what_differs(command: Command, sample: Path, tmp_path: Path) -> None:
    assert command("prepare", "verify", "--data", sample).returncode == 0
    shutil.copytree(sample, tmp_path / "data")
    path = next((tmp_path / "data" / "train_features").glob("*_S2_*.tif"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 255
    path.write_bytes(data)
    result = command("prepare", "verify", "--data", tmp_path / "data")
    assert "1 of" in message(result) and f"{path}: cksum" in result.stderr


def test_published_splits_are_used(command: Command, sample: Path, tmp_path: Path) -> None:
    path = tmp_path / "folds.json"
    assert command("prepare", "splits", "--data", sample, "--out", path, "--folds", 4).returncode == 0
    train, validation = chosen(sample, "data.split.scheme=file", f"data.split.path={path}", "data.split.fold=2")
    assert [chip.id for chip in validation] == json.loads(path.read_text())["folds"][2]
    assert len(train) == 6 and not {c.id for c in train} & {c.id for c in validation}
    same, _ = chosen(sample, "data.split.scheme=stratified")
    assert len(same) == 6


def test_chips_can_be_chosen_and_wrong_ones_are_named(sample: Path) -> None:
    ids = [chip.id for chip in open_index(sample).split("train")]
    train, validation = chosen(sample, f"data.chips={json.dumps(ids[:2])}", "data.overfit=true")
    assert [c.id for c in train] == ids[:2] == [c.id for c in validation]
    with pytest.raises(EngineError, match="data.chips: zzz not among the 8 chips"):
        chosen(sample, "data.chips=[zzz]")


def test_data_verify_stops_before_the_first_step(sample: Path, tmp_path: Path) -> None:
    shutil.copytree(sample, tmp_path / "data")
    path = next((tmp_path / "data" / "train_agbm").glob("*.tif"))
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(EngineError, match=f"1 of .* files differ .*{path.name}: cksum"):
        chosen(tmp_path / "data", "data.verify=true")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_recipe_on_a_machine_without_one(command: Command, sample: Path) -> None:
    with pytest.raises(DeviceError, match="train.device gpu: this machine has no CUDA device"):
        own_device("gpu", 0, 1)
    assert "train.device gpu" in message(command("train", "--config", DEMO, "--set", "train.device=gpu", "--set",
                                                 f"data.path={sample}"))


def test_a_dry_run_tells_everything_without_data_or_gpu(sample: Path) -> None:
    config = load_config(ROOT / "configs" / "biomassters-zero3.yaml", ["data.path=/none", "train.device=gpu"])
    text = describe(config)
    assert "encoder      116.42 M" in text and "decoder       13.95 M" in text and '"stage": 3' in text
    assert "unknown, the data cannot be read: /none: no such folder" in text
    text = describe(load_config(DEMO, [f"data.path={sample}", "data.split.folds=4", "phases=[{epochs: 5}]"]))
    assert "phase main: 5 epochs × 3 steps on 6 chips, lr 0.001 → 0.0001, 30 chips" in text
    assert "in all 15 steps; 2 chips validate" in text
