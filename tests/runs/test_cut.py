"""From a scene to its map: chips cut out of it train a model that predicts the whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio

from engine.data.dataset import load_dataset
from tests.conftest import ROOT, Command

DESCRIPTION = ROOT / "configs" / "datasets" / "grassland.yaml"
SIZE, TILE = 640, 128


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from engine.data.made.scene import make_scene

    folder = tmp_path_factory.mktemp("made") / "scene"
    make_scene(folder, load_dataset(DESCRIPTION), SIZE, 2)
    return folder


def cut(command: Command, scene: Path, out: Path, *words: object) -> tuple[int, str, str]:
    done = command("prepare", "cut", "--scene", scene / "scene.yaml", "--target", scene / "target.tif", "--out", out,
                   *words)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("form", [[], ["--store"]], ids=["tree", "store"])
def test_from_a_scene_to_its_map(command: Command, scene: Path, tmp_path: Path, form: list[str]) -> None:
    chips, run, out = tmp_path / "chips", tmp_path / "run", tmp_path / "map.tif"
    code, said, err = cut(command, scene, chips, *form)
    assert code == 0 and f"25 chips of 25 in {chips}\n4 folds of whole blocks" in said, err
    assert "cutting: 25/25 chips" in err and (chips / "folds.png").stat().st_size > 10_000
    keys = [f"data.path={chips}", f"data.split={{scheme: file, path: {chips / 'split.json'}, fold: 0}}",
            "run.name=run", f"run.folder={tmp_path}", "model.decoder_channels=[8,8,8,8,8]", "model.attention=reference",
            "train.device=cpu", "data.readers=1", "phases=[{epochs: 6, lr: 0.003}]"]
    done = command("train", "--config", ROOT / "configs" / "grassland.yaml",
                   *(word for key in keys for word in ("--set", key)))
    assert done.returncode == 0, done.stderr
    done = command("predict", "--weights", run, "--scene", scene / "scene.yaml", "--out", out, "--device", "cpu")
    assert done.returncode == 0, done.stderr

    note = json.loads((chips / "cut.json").read_text())
    held_out = np.zeros((SIZE, SIZE), bool)
    for chip in note["chips"].values():
        held_out[chip["row"]:chip["row"] + TILE, chip["column"]:chip["column"] + TILE] |= chip["fold"] == 0
    with rasterio.open(out) as file, rasterio.open(scene / "target.tif") as target:
        assert (file.crs, file.transform, file.shape) == (target.crs, target.transform, target.shape)
        predicted, truth = file.read(1, masked=True), target.read(1, masked=True)
    corner = np.ma.getmaskarray(predicted)
    assert 0.01 < corner.mean() < 0.03 and corner[-1, -1] and truth.mask[corner].all(), "nodata stays nodata"
    both = held_out & ~corner & ~truth.mask
    rmse = np.sqrt(((predicted - truth)[both] ** 2).mean())
    assert rmse < 0.75 * truth[both].std(), "5.0 of 8.4 m were seen"  # where nothing it saw is


def test_what_cut_says_of_what_it_leaves_out(command: Command, scene: Path, tmp_path: Path) -> None:
    code, said, err = cut(command, scene, tmp_path / "a", "--min-valid", 0.95, "--balance", 2, "--folds", 2, "--block",
                          1280)
    assert code == 0 and "with too little target" in said and "over --balance" in said, err
    for words, text in ((["--lossless"], "--lossless is for --store"), (["--stride", 0], "stride 0"),
                        (["--block", 1000], "block 1000 m: is less than a chip, 1280 m"),
                        (["--folds", 30], "9 blocks with chips cannot make 30 folds")):
        code, _, err = cut(command, scene, tmp_path / "b", *words)
        assert code == 2 and text in err and "Traceback" not in err
