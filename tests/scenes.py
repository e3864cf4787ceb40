"""Small scenes for tests: another data set than BioMassters, of windows of 64 pixels, in small rasters."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
import yaml

from engine.data.dataset import Dataset, Sensor, parse_dataset
from engine.model.unet import BiomassUNet
from engine.model.weights import save_weights

TILE = 64
CRS = "EPSG:32635"
ORIGIN = 500_000.0, 6_800_000.0  # of the upper left corner, metres

DATASET: Dataset = parse_dataset({
    "name": "moor", "tile": TILE, "pixel_metres": 10, "steps": ["May", "June", "July"],
    "sensors": [
        {"name": "radar", "file": "{chip}_radar_{step:02d}.tif", "dtype": "float32", "nodata": -9999,
         "bands": ["VV", "VH"], "low": [-25, -30], "high": [5, 0], "packed_step": 0.01},
        {"name": "optical", "file": "{chip}_optical_{step:02d}.tif", "dtype": "uint16",
         "bands": ["red", "nir", "swir"], "low": [0, 0, 0], "high": [10000, 10000, 10000]},
        {"name": "relief", "file": "{chip}_relief.tif", "dtype": "float32", "static": True, "bands": ["height"],
         "low": [0], "high": [500]}],
    "target": {"name": "carbon", "unit": "t/ha", "file": "{chip}_carbon.tif"}}, "tests/scenes.py")


def waves(height: int, width: int, seed: int) -> np.ndarray:
    """[height, width] float64 in 0..1: smooth, the same function of position at any size."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    total = sum(np.sin(2 * np.pi * (a * x + b * y) + c)
                for a, b, c in rng.uniform([-0.03, -0.03, 0], [0.03, 0.03, 6.3], (12, 3)))
    return 0.5 + np.asarray(total) / 24


def image(dataset: Dataset, sensor: Sensor, step: int, height: int, width: int) -> np.ndarray:
    """[height, width, bands] in the sensor's dtype, without a hole."""
    number = dataset.sensors.index(sensor)
    bands = [low + (high - low) * (0.2 + 0.6 * waves(height, width, 100 * number + 10 * step + band))
             for band, (low, high) in enumerate(zip(sensor.low, sensor.high))]
    noise = np.random.default_rng([number, step]).normal(0, 0.02, (height, width, len(bands)))
    return (np.stack(bands, -1) + noise * sensor.span).astype(sensor.values)


def write_raster(path: Path, values: np.ndarray, *, nodata: float | None = None, crs: str = CRS,
                 transform: Any = None, **options: Any) -> Path:
    """[H, W, bands] or [H, W]."""
    values = values if values.ndim == 3 else values[..., None]
    height, width, bands = values.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate", **options}
    with rasterio.open(path, "w", driver="GTiff", height=height, width=width, count=bands, dtype=values.dtype,
                       nodata=nodata, crs=crs, transform=transform or place(), **options) as raster:
        raster.write(np.moveaxis(values, -1, 0))
    return path


def place(x: float = 0, y: float = 0, resolution: float = 10) -> Any:
    """The transform of rasters whose corner lies that many metres right of and below ORIGIN."""
    return rasterio.transform.from_origin(ORIGIN[0] + x, ORIGIN[1] - y, resolution, resolution)


def make_scene(folder: Path, height: int = 150, width: int = 170, dataset: Dataset = DATASET,
               hole: bool = True) -> Path:
    """Its YAML file.  hole: the lower right corner has no value in any step, and a strip of the first step has none in
    the first sensor; the last step of the second sensor is missing."""
    names: dict[str, str] = {}
    for number, sensor in enumerate(dataset.sensors):
        names[sensor.name] = f"rasters/{sensor.name}{'' if sensor.static else '_{step:02d}'}.tif"
        for step in range(1 if sensor.static else dataset.months):
            if number == 1 and step == dataset.months - 1:
                continue
            values = image(dataset, sensor, step, height, width)
            nodata = sensor.nodata if sensor.nodata is not None else 0 if not sensor.static else None
            if hole and nodata is not None:
                y, x = np.mgrid[0:height, 0:width]
                values[(y > 0.7 * height) & (x + y > 0.6 * (height + width))] = nodata
                if number == step == 0:
                    values[:, :30] = nodata
            write_raster(folder / names[sensor.name].format(step=step), values, nodata=nodata)
    (folder / "dataset.yaml").write_text(yaml.safe_dump(dataset.dump()))
    path = folder / "scene.yaml"
    path.write_text(yaml.safe_dump({"dataset": "dataset.yaml", "images": names}, sort_keys=False))
    return path


@functools.cache
def model(seed: int = 0, dataset: Dataset = DATASET) -> BiomassUNet:
    """A tiny one, whose normalisations have seen images, so that it answers with what it sees."""
    torch.manual_seed(seed)
    made = BiomassUNet(backbone="tf_mobilenetv3_small_minimal_100", decoder_channels=[16, 12, 8, 8, 8],
                       in_channels=dataset.channels, tile=dataset.tile)
    with torch.no_grad():
        made.segmentation_head.weight.mul_(200)
        for _ in range(20):
            made(torch.rand(4, dataset.months, dataset.channels, dataset.tile, dataset.tile))
    return made.eval()


def write_weights(path: Path, seed: int = 0, dataset: Dataset = DATASET) -> Path:
    made = model(seed, dataset)
    save_weights(path, made, made.config(), {"dataset": json.dumps(dataset.dump())})
    return path
