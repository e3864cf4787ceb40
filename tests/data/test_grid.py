"""The windows of a grid: everything is covered, once where it counts, and the scene is mirrored beyond its border."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.scene.gdal import rasterio
from engine.data.scene.grid import Grid, Windows, mirrored

sizes = st.integers(1, 700)
overlaps = st.sampled_from([0, 2, 16, 30, 32])


@given(sizes, sizes, overlaps)
def test_windows_cover_the_grid_with_half_an_overlap_to_spare(height: int, width: int, overlap: int) -> None:
    windows = Windows(height, width, 64, overlap)
    for places, length in ((windows.rows, height), (windows.columns, width)):
        assert places[0] <= -(overlap // 2) and places[-1] + 64 >= length + overlap // 2
        assert all(b - a == windows.stride for a, b in pairwise(places))
        assert places[0] > -64 and places[-1] < length  # none shows nothing but its mirror
        assert (len(places) - 1) * windows.stride < length  # fewer would not do


@given(sizes, overlaps)
def test_bands_are_the_grid_cut_in_order(height: int, overlap: int) -> None:
    windows = Windows(height, 10, 64, overlap)
    bands = [windows.band(number) for number in range(len(windows.rows))]
    assert bands[0][0] == 0 and bands[-1][1] == height
    assert all(a[1] == b[0] for a, b in pairwise(bands)) and all(first < end for first, end in bands)
    for number, (first, end) in enumerate(bands):
        later = windows.rows[number + 1:]
        assert all(row >= end for row in later)  # a band is finished when its row of windows is
        earlier = windows.rows[:max(0, number - 1)]
        assert all(row + 64 <= first for row in earlier)  # and needs no more than the row before


@given(st.integers(-200, 200), st.integers(1, 300), st.integers(2, 90))
def test_mirrored_is_numpys_reflection(first: int, count: int, length: int) -> None:
    before, behind = max(0, -first), max(0, first + count - length)
    padded = np.pad(np.arange(length), (before, behind), mode="reflect")
    assert np.array_equal(mirrored(first, count, length), padded[first + before:first + before + count])


def test_pixels_are_measured_in_metres_along_their_sides() -> None:
    turned = rasterio.Affine.rotation(30) * rasterio.Affine.scale(10, -20)
    for code, unit in ((32635, 1), (2264, 0.3048006096)):  # North Carolina has US survey feet
        grid = Grid(rasterio.crs.CRS.from_epsg(code), turned, 3, 2)
        assert grid.pixel_metres == pytest.approx((10 * unit, 20 * unit))
        assert grid.pixel_hectares == pytest.approx(0.02 * unit ** 2)


def test_a_grid_of_one_pixel() -> None:
    assert mirrored(-3, 5, 1).tolist() == [0] * 5
