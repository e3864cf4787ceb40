"""The data path in plain NumPy: the truth that the DALI pipeline is held to.  Slow, and meant to be read."""

from __future__ import annotations

import numpy as np

from engine.data.dataset import S1, S1_NODATA, S2, C, T
from engine.data.source import Stack
from engine.data.store.chip_file import CODE_STEP


def transform(stack: Stack, matrix: np.ndarray | None, steps: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Images [T, H, W, C] float32 and label [H, W] float32 of one chip.

    Normalised as the 1st-place solution does; nodata becomes 0 after scaling; `matrix` is `engine.data.plan.Draw`'s
    (None: not warped).  Slot k holds month `stack.months[k]`; slots without a month are zero.  `steps`: Sentinel-1
    is rounded to whole steps of 0.01 dB first, and again by the warp, as in a packed store.
    """
    s1, s2, label = np.where(stack.s1 == S1_NODATA, S1.low, stack.s1), stack.s2, stack.label
    if steps:
        s1 = np.rint(s1.astype(np.float64) / CODE_STEP)
    if matrix is not None:
        s1 = warp(s1, matrix)
        s2 = np.rint(warp(s2.astype(np.float32), matrix)).astype(np.uint16)  # warped in the files' integer counts
        label = warp(label[None], matrix)[0]
    if steps:
        s1 = np.rint(s1) * CODE_STEP
    s1 = ((s1 - S1.low) / (S1.high - S1.low)).astype(np.float32)
    images = np.zeros((T, *s1.shape[1:3], C), np.float32)
    images[:len(s1)] = np.concatenate([s1, s2 / S2.high], axis=-1)
    return images, label[:, :, 0]


def warp(frames: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Bilinear warp of [F, H, W, C] with a mirrored border (the edge pixel itself not repeated)."""
    _, height, width, _ = frames.shape
    y, x = np.mgrid[0:height, 0:width] + 0.5
    matrix = matrix.astype(np.float64)
    sx = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2] - 0.5
    sy = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2] - 0.5
    x0, y0 = np.floor(sx).astype(int), np.floor(sy).astype(int)
    fx, fy = (sx - x0)[..., None], (sy - y0)[..., None]

    def at(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return frames[:, _mirror(rows, height), _mirror(columns, width)].astype(np.float64)

    top = at(y0, x0) * (1 - fx) + at(y0, x0 + 1) * fx
    bottom = at(y0 + 1, x0) * (1 - fx) + at(y0 + 1, x0 + 1) * fx
    return (top * (1 - fy) + bottom * fy).astype(np.float32)


def _mirror(index: np.ndarray, size: int) -> np.ndarray:
    period = 2 * size - 2
    index = np.abs(index) % period
    return np.where(index < size, index, period - index)
