"""The script that people write to map a landscape, as a baseline: rasterio, NumPy, windows blended in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.data.biomassters import SENSORS, TILE, T
from engine.data.scene.gdal import rasterio

Predict = Callable[[Tensor, Tensor], Tensor]  # (images [B,T,C,H,W], dropped [B,T]) -> [B,H,W]


def map_scene(rasters: dict[tuple[str, int], Path], out: Path, predict: Predict, *, overlap: int, batch: int) -> None:
    """One map of rasters on one grid, by name of the sensor and step: windows at multiples of the stride, the last
    ones moved in; a raised cosine as weight; all of the map in memory."""
    with rasterio.open(next(iter(rasters.values()))) as first:
        height, width, profile = first.height, first.width, first.profile
    total, weight = np.zeros((2, height, width), np.float32)
    side = np.sin(np.pi * (np.arange(TILE) + 0.5) / TILE) ** 2
    window = np.outer(side, side).astype(np.float32)
    opened = {key: rasterio.open(path) for key, path in rasters.items()}
    for places in _batched(list(_places(height, width, TILE - overlap)), batch):
        images = np.stack([_read(opened, *place) for place in places])
        dropped = torch.zeros(len(images), T, dtype=torch.bool)
        for (row, column), values in zip(places, predict(torch.from_numpy(images), dropped).cpu().numpy()):
            total[row:row + TILE, column:column + TILE] += values * window
            weight[row:row + TILE, column:column + TILE] += window
    profile.update(count=1, dtype="float32", nodata=-9999.0)
    with rasterio.open(out, "w", **profile) as raster:
        raster.write(total / weight, 1)
    for raster in opened.values():
        raster.close()


def _places(height: int, width: int, stride: int) -> Iterator[tuple[int, int]]:
    rows, columns = ([*range(0, length - TILE, stride), length - TILE] for length in (height, width))
    return ((row, column) for row in rows for column in columns)


def _batched(places: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    return (places[first:first + size] for first in range(0, len(places), size))


def _read(opened: dict[tuple[str, int], rasterio.DatasetReader], row: int, column: int) -> np.ndarray:
    """[T, C, tile, tile] float32, scaled."""
    images = np.zeros((T, sum(len(sensor.bands) for sensor in SENSORS), TILE, TILE), np.float32)
    place = rasterio.windows.Window(column, row, TILE, TILE)
    first = 0
    for sensor in SENSORS:
        bands = slice(first, first := first + len(sensor.bands))
        for step in range(T):
            if (sensor.name, step) in opened:
                values = opened[sensor.name, step].read(window=place).astype(np.float32)
                scaled = (values - sensor.zero[:, None, None]) / sensor.span[:, None, None]
                images[step, bands] = scaled if sensor.nodata is None else np.where(values == sensor.nodata, 0, scaled)
    return images
