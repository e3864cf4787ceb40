from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from engine.base.errors import DataError
from engine.data.biomassters import BIOMASSTERS, TILE, T
from engine.data.index import open_index
from engine.data.source import Stack, empty_stack
from engine.data.tiff import tiff
from engine.data.tiff.source import TiffSource
from engine.inference.pictures import Scatter, chip_figure, months_figure, pixels, quicklook, save
from tests.data.test_dataset import small


def test_a_panel_shows_all_four_and_says_which_chip(sample: Path, tmp_path: Path) -> None:
    chip = open_index(sample).split("train")[0]
    stack = TiffSource(BIOMASSTERS).read(chip, np.ones(T, bool), empty_stack(BIOMASSTERS))
    truth = stack.label[..., 0]
    figure = chip_figure(chip.id, stack, truth + 3, truth)
    titles = [axis.get_title() for axis in figure.axes]
    assert [t for t in titles if t][1:] == ["truth", "prediction", "prediction − truth, RMSE 3.0"]
    assert figure.get_suptitle() == f"chip {chip.id}"
    image = pixels(figure)
    assert image.dtype == np.uint8 and image.shape[2] == 3 and image.std() > 10
    save(figure, tmp_path / "a" / "panel.png")
    assert (tmp_path / "a" / "panel.png").read_bytes()[:4] == b"\x89PNG"
    assert len([a for a in chip_figure(chip.id, stack, truth, None).axes if a.get_title()]) == 2


def test_the_clearest_month_is_shown(sample: Path) -> None:
    chip = open_index(sample).split("train")[0]
    stack = TiffSource(BIOMASSTERS).read(chip, np.ones(T, bool), empty_stack(BIOMASSTERS))
    stack.images[1][:, :, :, 10] = 90
    stack.images[1][8, :, :, 10] = 1
    image, title = quicklook(stack)
    assert title == "Sentinel-2, May" and image.shape == (TILE, TILE, 3) and 0 <= image.min() < image.max() <= 1
    stack.images[1][:] = 0
    assert quicklook(stack)[1] == "Sentinel-1, September"


def test_what_was_not_seen_does_not_stretch_the_colours() -> None:
    data = small(pictures=...)
    stack = empty_stack(data)
    for images in stack.images:
        images[...] = np.linspace(300, 2000, data.tile).astype(images.dtype)[:, None, None]
    whole, _ = quicklook(stack)
    stack.images[0][:, :3] = data.sensors[0].nodata
    holed, _ = quicklook(stack)
    assert not holed[:3].any() and np.ptp(holed[3:]) > 0.99, "black, and the rest from 0 to 1"
    assert np.abs(holed[3:] - whole[3:]).max() < 0.3


def test_the_scatter_counts_every_pixel() -> None:
    scatter = Scatter(BIOMASSTERS.target, 450.0)
    rng = np.random.default_rng(0)
    for _ in range(3):
        truth = rng.gamma(2, 30, (64, 64)).astype(np.float32)
        scatter.add(truth - 20, truth + 1000)  # beyond the edges: counted there
    assert scatter.counts.sum() == 3 * 64 * 64
    scatter = Scatter(BIOMASSTERS.target, 450.0)
    scatter.add(np.full((4, 4), 100.0), np.full((4, 4), 200.0))
    row, column = (int(i[0]) for i in np.nonzero(scatter.counts))
    assert scatter.edges[row] <= 200 < scatter.edges[row + 1], "rows are the truth"
    assert scatter.edges[column] <= 100 < scatter.edges[column + 1]
    assert pixels(scatter.figure(["a line"])).std() > 1


def nothing_seen() -> Stack:
    """One month of nodata."""
    stack = empty_stack(BIOMASSTERS)
    for sensor, images in zip(BIOMASSTERS.sensors, stack.images):
        images[...] = sensor.absent
    return stack._replace(images=tuple(images[:1] for images in stack.images), months=stack.months[:1])


def test_no_target_is_grey_and_out_of_scales_and_errors() -> None:
    stack = nothing_seen()
    truth = np.random.default_rng(0).uniform(10, 90, (TILE, TILE)).astype(np.float32)
    whole = chip_figure("a", stack, truth + 3, truth)
    holed = truth.copy()
    holed[:, :128] = np.nan
    figure = chip_figure("a", stack, truth + 3, holed)
    titles = [axis.get_title() for axis in figure.axes]
    assert "prediction − truth, RMSE 3.0" in titles
    for old, new in zip(whole.axes[1:4], figure.axes[1:4]):
        assert new.images[0].get_clim() == pytest.approx(old.images[0].get_clim(), rel=0.01)
    grey, before = ((pixels(one) == 204).all(-1).mean() for one in (figure, whole))  # 204: 0.8 of 255
    assert before < 0.001 and 0.1 < grey < 0.3

    nothing = np.full_like(truth, np.nan)
    assert len([a for a in chip_figure("a", stack, truth, nothing).axes if a.get_title()]) == 2
    stack.label[..., 0] = holed
    assert pixels(months_figure("a", stack, True)).std() > 1
    stack.label[..., 0] = nothing
    assert len(months_figure("a", stack, True).axes) == 5, "no bar of colours"

    scatter = Scatter(BIOMASSTERS.target, 100.0)
    scatter.add(truth, holed)
    assert scatter.counts.sum() == TILE * 128 == np.trace(scatter.counts)


def test_scales_begin_below_zero_where_the_target_does() -> None:
    stack = nothing_seen()
    cold = np.linspace(-20, -5, TILE * TILE, dtype=np.float32).reshape(TILE, TILE)
    figure = chip_figure("a", stack, cold, cold)
    assert figure.axes[1].images[0].get_clim() == figure.axes[2].images[0].get_clim() == pytest.approx((-20, -5), 0.02)
    figure = chip_figure("a", stack, cold, -cold)
    assert figure.axes[1].images[0].get_clim()[0] == 0, "of a target above 0, whatever is predicted"
    stack.label[..., 0] = cold
    assert months_figure("a", stack, True).axes[1].images[0].get_clim() == pytest.approx((-20, -5), 0.02)

    scatter = Scatter(BIOMASSTERS.target, -5.0, -20.0)
    scatter.add(cold, cold)
    assert (scatter.edges[0], scatter.edges[-1]) == (-20, -5)
    assert (scatter.counts.diagonal() > 0).all() and scatter.counts.sum() == cold.size
    assert Scatter(BIOMASSTERS.target, 450.0, 30.0).edges[0] == 0


def test_a_map_is_written_as_the_challenge_wants_it(tmp_path: Path) -> None:
    import tifffile

    values = np.random.default_rng(0).random((TILE, TILE), np.float32)
    tiff.write_map(tmp_path / "m.tif", values)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "m.tif"), values)


def test_a_picture_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/look.png: cannot be written \(.*\); make room, or write elsewhere"):
        save(Figure(), tmp_path / "file" / "look.png")
