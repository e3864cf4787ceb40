"""`import engine`: what it hands out, that it costs nothing, and `engine.predict` against the command's maps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tifffile
import torch

import engine
from engine.base.distributed import leave
from engine.base.errors import ConfigError, DataError, DeviceError, WeightsError
from engine.data.dataset import load_dataset
from engine.data.index import open_index
from engine.data.made.fields import make_fields
from engine.data.made.sample import chip_id, make_sample
from engine.model.unet import BiomassUNet
from engine.model.weights import save_weights
from launch import predict as command
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")


def test_all_that_is_named_can_be_had() -> None:
    assert engine.__all__ == sorted(engine._WHERE, key=lambda name: (not name[0].isupper(), name))
    for name in engine.__all__:
        found = getattr(engine, name)
        assert found.__name__ == name and found.__module__ == engine._WHERE[name] and found.__doc__, name
    assert set(engine.__all__) <= set(dir(engine))
    assert (ROOT / "engine" / "py.typed").is_file()


def test_an_unknown_name_comes_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"module 'engine' has no attribute 'predikt'; it hands out BiomassUNet, "):
        engine.predikt  # noqa: B018
    assert not hasattr(engine, "_nothing")


def test_the_door_itself_needs_nothing() -> None:
    """Counted in modules: times are the machine's."""
    code = """
import sys
before = set(sys.modules)
import engine
print(len(set(sys.modules) - before), *{name.partition('.')[0] for name in sys.modules})
engine.Dataset
print(*{name.partition('.')[0] for name in sys.modules})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    first, second = done.stdout.splitlines()
    count, *names = first.split()
    assert int(count) < 20 and not {"torch", "numpy", "pydantic", "yaml", "nvidia"} & set(names)
    assert "pydantic" in second.split() and "torch" not in second.split()


# Prediction of arrays --------------------------------------------------------------------------------------------


class Place(NamedTuple):
    weights: Path
    data: Path
    chips: list[str]

    def images(self, *chips: str) -> np.ndarray:
        return np.stack([engine.open_chip(self.data, chip).images() for chip in chips or self.chips])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Two chips of other data than BioMassters, one of which lacks a month, and a model of it."""
    root = tmp_path_factory.mktemp("door")
    raw = load_dataset(ROOT / "configs" / "datasets" / "grassland.yaml").dump()
    data = engine.Dataset.model_validate({**raw, "tile": 64, "steps": ["May", "Jun", "Jul"]})
    make_fields(root / "data", data, 2, seed=2)
    index = open_index(root / "data")
    for number in (0, 1):
        index.chips[1].path(number, 1).unlink(missing_ok=True)
    torch.manual_seed(0)
    model = BiomassUNet("tf_mobilenetv3_small_minimal_100", [8, 8, 8, 8, 8], data.channels, tile=data.tile)
    save_weights(root / "w.safetensors", model, model.config(), {"dataset": json.dumps(data.dump())})
    return Place(root / "w.safetensors", root / "data", [chip.id for chip in index.chips])


@pytest.fixture(scope="module")
def maps(place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What the command predicts, [2,H,W] by --tta."""
    found = {}
    for tta in ("id", "h,hv"):
        out = tmp_path_factory.mktemp("maps")
        words = ["--weights", place.weights, "--data", place.data, "--out", out, "--tta", tta, "--device", "cpu",
                 "--pictures", 0]
        assert command.run(command.arguments().parse_args(list(map(str, words)))) == 0
        leave()
        found[tta] = np.stack([tifffile.imread(out / f"{chip}_height.tif") for chip in place.chips])
    return found


def close(found: Any, expected: Any) -> None:
    assert np.ptp(expected) > 0.1  # maps that have something in them
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_arrays_give_the_commands_maps(place: Place, maps: dict[str, np.ndarray]) -> None:
    """NaN where a band is nodata, where a sensor has no image, and throughout the month that one chip lacks."""
    images = place.images()
    assert np.isnan(images).all(axis=(2, 3, 4)).sum() == 1 and np.isnan(images[0]).any()
    before = images.copy()
    found = engine.predict(place.weights, images)
    assert isinstance(found, np.ndarray) and found.shape == (2, 64, 64) and found.dtype == np.float32
    close(found, maps["id"])
    close(engine.predict(str(place.weights), images, tta=("h", "hv"), device="cpu"), maps["h,hv"])
    assert np.abs(maps["id"] - maps["h,hv"]).max() > 0.01
    np.testing.assert_array_equal(images, before)


def test_xarray_in_xarray_out(place: Place, maps: dict[str, np.ndarray]) -> None:
    import xarray

    seen = [engine.open_chip(place.data, chip).to_xarray() for chip in place.chips]
    one = engine.predict(place.weights, seen[0])
    assert one.dims == ("y", "x") and one.name == "height" and one.attrs == {"units": "m"}
    np.testing.assert_array_equal(one["x"], seen[0]["x"])
    close(one, maps["id"][0])

    both = xarray.concat([chip["images"] for chip in seen], "chip").transpose("x", "band", "chip", "month", "y")
    found = engine.predict(place.weights, both, tta=["h", "hv"])
    assert found.dims == ("chip", "y", "x")
    close(found, maps["h,hv"])


def test_dropped_months_take_no_part(place: Place) -> None:
    images = place.images(place.chips[0])
    dropped = np.array([[True, False, False]])
    found = engine.predict(place.weights, images, dropped)
    images[:, 0] = np.nan
    np.testing.assert_array_equal(engine.predict(place.weights, images), found)
    images[:, 0] = 1e6
    np.testing.assert_array_equal(engine.predict(place.weights, images, dropped), found)
    assert np.abs(engine.predict(place.weights, images) - found).max() > 0.01


def test_other_weights_at_the_same_path_are_loaded(place: Place, tmp_path: Path) -> None:
    images, path = place.images(place.chips[0]), tmp_path / "w.safetensors"
    path.write_bytes(place.weights.read_bytes())
    first = engine.predict(path, images)
    model = engine.load_model(path)
    assert model.segmentation_head.bias is not None
    torch.nn.init.constant_(model.segmentation_head.bias, 50)
    data = open_index(place.data).dataset
    save_weights(path, model, model.config(), {"dataset": json.dumps(data.dump())})
    os.utime(path, ns=(1, 1))  # a clock may stand still between the two
    assert engine.predict(path, images).mean() > first.mean() + 20


@pytest.mark.parametrize(("change", "options", "error", "message"), [
    (lambda x: x[0], {}, DataError, r"images \[3, 9, 64, 64\]: .* trained on \[B,3,9,H,W\]: 3 steps \(May to Jul\)"),
    (lambda x: x[:, :2], {}, DataError, r"images \[2, 2, 9, 64, 64\]: .* bands B2, B3, B4, B8, B11, VV, VH, elevation"),
    (lambda x: x[:, :, 1:], {}, DataError, r"images \[2, 3, 8, 64, 64\]"),
    (lambda x: x[:0], {}, DataError, r"images \[0, 3, 9, 64, 64\]"),
    (lambda x: x[..., :50], {}, DataError, r"images of 64×50 pixels: .* needs multiples of 32"),
    (lambda x: x * np.nan, {}, DataError, "images: chip 0 has no month left"),
    (lambda x: x, {"dropped": np.array([[True] * 3, [False] * 3])}, DataError, "images: chip 0 has no month left"),
    (lambda x: x, {"dropped": np.zeros((3, 2), bool)}, DataError, r"dropped \[3, 2\]: give \[2, 3\]"),
    (lambda x: x, {"tta": ("id", "d")}, ConfigError, "give a list of one or more of id, h, v, hv"),
    (lambda x: x, {"tta": "hv"}, ConfigError, "tta 'hv': give a list"),  # which would be h and v
    (lambda x: x, {"tta": ()}, ConfigError, r"tta \(\): give a list"),
    (lambda x: x, {"device": "cuda"}, ConfigError, "device 'cuda': give auto, cpu or gpu"),
])
def test_what_does_not_fit_is_refused(place: Place, change: Any, options: dict[str, Any], error: type[Exception],
                                      message: str) -> None:
    with pytest.raises(error, match=message):
        engine.predict(place.weights, change(place.images()), **options)


def test_an_xarray_that_does_not_fit(place: Place) -> None:
    seen = engine.open_chip(place.data, place.chips[0]).to_xarray()
    with pytest.raises(DataError, match=r"takes \(month, band, y, x\) with the bands B2, B3"):
        engine.predict(place.weights, seen.isel(band=0))
    with pytest.raises(DataError, match="with the bands B2, B3"):
        engine.predict(place.weights, seen.isel(band=[1, 0, *range(2, 9)]))
    with pytest.raises(DataError, match=r"images \[1, 2, 9, 64, 64\]"):
        engine.predict(place.weights, seen.isel(month=[0, 1]))


def test_no_weights(place: Place) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        engine.predict(place.weights.parent / "none", place.images())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(place: Place) -> None:
    with pytest.raises(DeviceError, match="device gpu: torch sees no CUDA device"):
        engine.predict(place.weights, place.images(), device="gpu")


def test_the_readmes_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    """Word for word, where `make demo` has left its data and its run."""
    readme = (ROOT / "README.md").read_text()
    [block] = re.findall(r"^## In a notebook\n+```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert "engine.predict(" in block and chip_id(1, 3) in block
    make_sample(tmp_path / "data" / "demo", 4, 1)
    torch.manual_seed(0)
    model = BiomassUNet("tf_mobilenetv3_small_minimal_100", [8, 8, 8, 8, 8])
    save_weights(tmp_path / "runs" / "demo" / "weights" / "best.safetensors", model, model.config())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["agbm"].dims == ("y", "x") and names["agbm"].attrs == {"units": "t/ha"}
    assert 0 < float(re.findall(r"[\d.]+", capsys.readouterr().out)[0]) < 1000
