"""`engine.predict`: arrays in the files' units give what the same images give from files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import engine
from engine.base.errors import DataError, WeightsError
from engine.data.made.fields import make_fields
from engine.model.unet import BiomassUNet
from engine.model.weights import save_weights
from tests.data.test_dataset import RADAR, TERRAIN, small

DATA = small()
STATIC = slice(-len(DATA.sensors[TERRAIN].bands), None)
FIRST_RADAR = len(DATA.sensors[0].bands)


def saved(path: Path, **notes: str) -> Path:
    torch.manual_seed(0)
    model = BiomassUNet("tf_mobilenetv3_small_minimal_100", [8, 8, 8, 8, 8], DATA.channels, tile=DATA.tile)
    save_weights(path, model, model.config(), notes)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("weights") / "w.safetensors", dataset=json.dumps(DATA.dump()))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """[1,T,C,H,W] of a made chip, all of it seen."""
    root = tmp_path_factory.mktemp("data")
    make_fields(root, DATA, 1, seed=1)
    chip = next(iter(engine.open_index(root).chips))
    return np.nan_to_num(engine.open_chip(root, chip.id).images(), nan=1.0)[None]


def test_a_month_of_which_only_static_images_are_there_takes_no_part(weights: Path, images: np.ndarray) -> None:
    """As in training, where the plan counts images of the month."""
    static_alone = images.copy()
    static_alone[:, 1, :STATIC.start] = np.nan
    without = engine.predict(weights, images, np.array([[False, True]]), device="cpu")
    assert np.array_equal(engine.predict(weights, static_alone, device="cpu"), without)
    assert not np.array_equal(engine.predict(weights, images, device="cpu"), without)


def test_nodata_is_nothing_as_nan_is(weights: Path, images: np.ndarray) -> None:
    nodata = DATA.sensors[RADAR].nodata
    assert nodata is not None
    marked, blank = images.copy(), images.copy()
    marked[:, 0, FIRST_RADAR, :9], blank[:, 0, FIRST_RADAR, :9] = nodata, np.nan
    assert np.array_equal(engine.predict(weights, marked, device="cpu"), engine.predict(weights, blank, device="cpu"))


def test_what_cannot_be_predicted(weights: Path, images: np.ndarray, tmp_path: Path) -> None:
    endless = images.copy()
    endless[0, 0, 0, 0, 0] = np.inf
    with pytest.raises(DataError, match="hold infinity; give NaN"):
        engine.predict(weights, endless, device="cpu")
    with pytest.raises(DataError, match="40×40 pixels"):
        engine.predict(weights, np.zeros((1, 2, DATA.channels, 40, 40)), device="cpu")
    with pytest.raises(WeightsError, match="does not say which: its note 'dataset' is missing"):
        engine.predict(saved(tmp_path / "w.safetensors"), np.zeros((1, 12, 15, 32, 32)), device="cpu")
