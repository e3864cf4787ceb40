"""Maps of overlapping windows, joined without a line: each pixel is the mean of its windows, those counting more in
whose middle it lies.

The weight is a raised cosine over the overlap and 1 between: neighbours' weights add up to 1, and a window's is 0 where
it ends.  Windows are added in the order of rows, then columns, whoever works on them: so a pixel's value does not
depend on where work was begun.  What is held is a row of windows, and not the map.
"""

from __future__ import annotations

import numpy as np

from engine.data.scene.grid import Window, Windows


def weights(tile: int, overlap: int) -> np.ndarray:
    """[tile] float32."""
    ramp = np.sin(np.pi / 2 * (np.arange(overlap) + 0.5) / overlap) ** 2
    return np.concatenate([ramp, np.ones(tile - 2 * overlap), ramp[::-1]]).astype(np.float32)


class Blend:
    """Takes windows row by row, from any row on, and gives bands of the map: `Windows.band`.

    `layers`: numbers a pixel that are blended alike.
    """

    def __init__(self, windows: Windows, layers: int):
        self._windows = windows
        side = weights(windows.tile, windows.overlap)
        self._weight = side[:, None] * side
        shape = windows.tile, windows.width
        self._sum, self._weights = np.zeros((layers, *shape), np.float32), np.zeros(shape, np.float32)
        self._seen = np.zeros(shape, bool)

    def add(self, window: Window, values: np.ndarray, seen: np.ndarray) -> None:
        """A window of the current row: values [layers, tile, tile] float32, and where anything was seen, bool."""
        first, end = max(window.column, 0), min(window.column + self._windows.tile, self._windows.width)
        ours, theirs = slice(first, end), slice(first - window.column, end - window.column)
        self._sum[:, :, ours] += values[:, :, theirs] * self._weight[:, theirs]
        self._weights[:, ours] += self._weight[:, theirs]
        self._seen[:, ours] |= seen[:, theirs]

    def finish_row(self, number: int) -> np.ndarray:
        """The row's band, [layers, rows, width] float32, NaN where nothing was seen; then on to the next row."""
        first, end = self._windows.band(number)
        place = slice(first - self._windows.rows[number], end - self._windows.rows[number])
        with np.errstate(invalid="ignore"):
            band: np.ndarray = self._sum[:, place] / self._weights[place]  # 0 / 0 where no window saw anything
        band[:, ~self._seen[place]] = np.nan
        stride = self._windows.stride
        for held in (*self._sum, self._weights, self._seen):
            held[:-stride] = held[stride:]
            held[-stride:] = 0
        return band
