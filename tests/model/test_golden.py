"""Golden files hold us to the winner and to real files where ../shared is not: tests/golden/make.py says how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from engine.data.biomassters import AGBM_IGNORE_ABOVE, S1_NODATA
from engine.data.tiff import tiff
from engine.training.losses import LOSSES
from tests.golden.make import BACKBONES, GOLDEN, MONTHS, STRIP_ROWS, TREE, data_numbers, model_numbers, read_crop

Numbers = dict[str, Any]
FILES = sorted(TREE.rglob("*.tif"))


pytestmark = pytest.mark.usefixtures("one_thread")


def load(name: str) -> Numbers:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


# --- the model --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=BACKBONES)
def computed(request: pytest.FixtureRequest) -> tuple[Numbers, Numbers]:
    return model_numbers(request.param), load(request.param)


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    """Within 1e-9 of the largest value."""
    assert got.dtype == expected.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_outputs_and_losses(computed: tuple[Numbers, Numbers]) -> None:
    got, expected = computed
    assert_close(got["eval"], expected["eval"])
    assert_close(got["eval masked"], expected["eval masked"])
    assert np.abs(expected["eval"] - expected["eval masked"]).max() > 0.01 * np.abs(expected["eval"]).max()
    for name, loss, golden in zip(LOSSES, got["losses"], expected["losses"], strict=True):
        assert loss == pytest.approx(golden, rel=1e-9), name


@pytest.mark.parametrize("way", ["kept", "zeroed"])  # our BatchNorm sees kept months, the winner's all
def test_a_training_step(computed: tuple[Numbers, Numbers], way: str) -> None:
    got, expected = computed
    assert_close(got[f"{way}: out"], expected[f"{way}: out"])
    assert got[f"{way}: loss"] == pytest.approx(expected[f"{way}: loss"], rel=1e-9)
    assert got[f"{way}: norm"] == pytest.approx(expected[f"{way}: norm"], rel=1e-9)
    for names, kind in (("parameters", "gradients"), ("buffers", "statistics")):
        assert got[names].tolist() == expected[names].tolist()  # the names, too, are the winner's
        # a bias before a softmax has no gradient but what rounding leaves
        floor = 1e-15 * expected[f"{way}: {kind}"].max()
        for name, found, golden in zip(got[names], got[f"{way}: {kind}"], expected[f"{way}: {kind}"], strict=True):
            np.testing.assert_allclose(found, golden, rtol=0, atol=1e-9 * golden[0] + floor, err_msg=name)


# --- the data ---------------------------------------------------------------------------------------------------------

def kind_of(path: Path) -> str:
    return next(kind for kind in STRIP_ROWS if f"_{kind}" in path.stem)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_three_layouts_of_real_files(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert (page.rowsperstrip, page.compression, page.planarconfig) == (STRIP_ROWS[kind_of(path)], 1, 1)
        truth = page.asarray()
    monkeypatch.setattr(tiff, "_read_any", lambda *_: pytest.fail("the slow way was taken"))
    got = np.full_like(truth, 77)
    tiff.read_into(path, got)
    np.testing.assert_array_equal(got, truth)
    tiff.write(tmp_path / "copy.tif", got, STRIP_ROWS[kind_of(path)])
    assert (tmp_path / "copy.tif").read_bytes() == path.read_bytes()


def test_real_values_are_read_and_normalised() -> None:
    assert len(FILES) == 2 * len(MONTHS) + 1
    got, expected = data_numbers(), load("data")
    assert got.keys() == expected.keys()
    for key in ("s1", "s2", "label", "months"):
        assert np.array_equal(got[key], expected[key]), key
    for key in expected.keys() - {"s1", "s2", "label", "months"}:
        # one part in 2^23 is what float32 can tell apart near 1; labels go to 516
        np.testing.assert_allclose(got[key], expected[key], rtol=2**-23, atol=2**-23, err_msg=key)


def test_the_crop_has_what_makes_real_data_hard() -> None:
    stack = read_crop()
    assert stack.months.tolist() == list(MONTHS)
    blank = (stack.images[0] == S1_NODATA).all((1, 2))
    assert blank.tolist() == [[False, False, True, True], [False] * 4]
    assert (stack.label > AGBM_IGNORE_ABOVE).any() and stack.images[1][..., -1].any()
