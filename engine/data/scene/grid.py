"""The grid that a scene's rasters are brought to and that its map has, and the windows it is cut into.

Shape legend: H rows and W columns of the grid; a window is a square of `tile` pixels that may reach beyond it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from engine.data.scene.gdal import rasterio


@dataclass(frozen=True)
class Grid:
    """North up or not, in a CRS of metres or feet.  `transform`: (column, row) → (x, y), an `affine.Affine`."""

    crs: Any  # rasterio.crs.CRS
    transform: Any
    width: int
    height: int

    @property
    def pixel_metres(self) -> tuple[float, float]:
        """Width and height of a pixel."""
        t, (_, factor) = self.transform, self.crs.linear_units_factor
        return float(np.hypot(t.a, t.d)) * factor, float(np.hypot(t.b, t.e)) * factor

    @property
    def pixel_hectares(self) -> float:
        width, height = self.pixel_metres
        return width * height / 1e4

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east, north."""
        return tuple(rasterio.transform.array_bounds(self.height, self.width, self.transform))

    def part(self, row: int, column: int) -> Any:
        """The transform of a part whose first pixel is that one."""
        return self.transform * rasterio.Affine.translation(column, row)


class Box(NamedTuple):
    """A part of the grid."""

    row: int
    column: int
    height: int
    width: int


class Window(NamedTuple):
    """`row`, `column`: of its first pixel, which may lie outside of the grid."""

    row: int
    column: int


class Windows(NamedTuple):
    """A grid cut into windows of `tile` pixels, `overlap` of which, at most half, each shares with its neighbour.

    The windows lie centred, and reach beyond the grid by at least half an overlap on each side: no pixel of the grid
    lies at a window's edge only.
    """

    height: int
    width: int
    tile: int
    overlap: int

    @property
    def stride(self) -> int:
        return self.tile - self.overlap

    @property
    def rows(self) -> list[int]:
        """First rows of windows."""
        return _places(self.height, self.tile, self.overlap)

    @property
    def columns(self) -> list[int]:
        return _places(self.width, self.tile, self.overlap)

    def in_row(self, number: int) -> Iterator[Window]:
        row = self.rows[number]
        return (Window(row, column) for column in self.columns)

    def band(self, number: int) -> tuple[int, int]:
        """The rows of the grid, one at least, that no later window than those of row `number` touches, and no earlier
        band has: first, end."""
        rows = self.rows
        return max(0, rows[number]), rows[number] + self.stride if number + 1 < len(rows) else self.height


def _places(length: int, tile: int, overlap: int) -> list[int]:
    stride = tile - overlap
    count = -(-length // stride)
    first = -((count * stride + overlap - length) // 2)
    return [first + n * stride for n in range(count)]


def mirrored(first: int, count: int, length: int) -> np.ndarray:
    """The places first … first + count − 1 of an axis of `length`, those beyond its ends mirrored at the last pixel."""
    period = max(1, 2 * length - 2)
    place = np.abs(np.arange(first, first + count)) % period
    return np.where(place < length, place, period - place)
