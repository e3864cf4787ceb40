"""The data path in plain NumPy: the truth that the DALI pipeline is held to.  Slow, and meant to be read."""

from __future__ import annotations

import numpy as np

from engine.data.source import Stack


def transform(stack: Stack, matrix: np.ndarray | None, steps: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Images [T, H, W, C] float32 and label [H, W] float32 of one chip.

    Normalised as the description says; nodata becomes 0 after scaling; `matrix` is `engine.data.plan.Draw`'s (None: not
    warped).  Slot k holds step `stack.months[k]`; slots without a step are zero.  The label is NaN where there is no
    target, and after the warp where that has a weight.  `steps`: floats with a `packed_step` are rounded to whole steps
    first, and again by the warp, as in a packed store.
    """
    dataset, scaled = stack.dataset, []
    for sensor, values in zip(dataset.sensors, stack.images):
        if sensor.nodata is not None:
            values = np.where(values == sensor.values.type(sensor.nodata), sensor.zero.astype(sensor.values), values)
        step = sensor.packed_step if steps else None
        if step:
            values = np.rint(values.astype(np.float64) / step)
        if matrix is not None:
            values = warp(values.astype(np.float32), matrix)
            if sensor.dtype != "float32":
                values = np.rint(values).astype(sensor.values)  # warped in the files' integers
        if step:
            values = np.rint(values) * step
        scaled.append(((values - sensor.zero) / sensor.span).astype(np.float32))
    images = np.zeros((dataset.months, *stack.label.shape[:2], dataset.channels), np.float32)
    images[:len(stack.months)] = np.concatenate(scaled, axis=-1)
    label = stack.label if matrix is None else warp(stack.label[None], matrix)[0]
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

    def mixed(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
        return np.where(share == 0, first, first * (1 - share) + second * share)  # 0 × NaN is nothing here

    top = mixed(at(y0, x0), at(y0, x0 + 1), fx)
    bottom = mixed(at(y0 + 1, x0), at(y0 + 1, x0 + 1), fx)
    return mixed(top, bottom, fy).astype(np.float32)


def _mirror(index: np.ndarray, size: int) -> np.ndarray:
    period = 2 * size - 2
    index = np.abs(index) % period
    return np.where(index < size, index, period - index)
