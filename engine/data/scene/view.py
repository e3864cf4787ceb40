"""A scene for people who want to look: where it lies, which steps it has, how much of it has values, a small copy."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

from engine.data.dataset import LABEL_DTYPE
from engine.data.scene.gdal import rasterio
from engine.data.scene.grid import Box, Grid
from engine.data.scene.headers import moved
from engine.data.scene.rasters import Pixels, Rasters
from engine.data.scene.scene import Scene
from engine.data.source import Stack

LARGEST = 512  # pixels a side of the small copy


@dataclass(frozen=True)
class SceneView:
    """What is read is a copy of LARGEST pixels a side at most, of the pixels nearest to its own."""

    scene: Scene

    @functools.cached_property
    def pixels(self) -> dict[tuple[int, int], Pixels]:
        """Each image's small copy.  Raises DataError naming a file that cannot be read."""
        grid = self.scene.grid
        factor = max(1.0, max(grid.height, grid.width) / LARGEST)
        height, width = (max(1, round(length / factor)) for length in (grid.height, grid.width))
        scale = rasterio.Affine.scale(grid.width / width, grid.height / height)
        small = dataclasses.replace(self.scene, grid=Grid(grid.crs, grid.transform * scale, width, height),
                                    resampling={sensor.name: "nearest" for sensor in self.scene.dataset.sensors})
        rasters = Rasters(small, 1)
        return {(sensor, step): rasters.read(sensor, step, Box(0, 0, height, width))
                for sensor, step in self.scene.images}

    @property
    def stack(self) -> Stack:
        """For `engine.inference.pictures`: the steps that have an image."""
        dataset, pixels = self.scene.dataset, self.pixels
        months = sorted({step for number, step in pixels if not dataset.sensors[number].static})
        height, width = next(iter(pixels.values())).seen.shape
        images = []
        for number, sensor in enumerate(dataset.sensors):
            found = np.empty((len(months), height, width, len(sensor.bands)), sensor.values)
            found[...] = sensor.absent
            for slot, step in enumerate(months):
                key = number, 0 if sensor.static else step
                if key in pixels:
                    found[slot] = pixels[key].values
            images.append(found)
        return Stack(dataset, tuple(images), np.zeros((height, width, 1), LABEL_DTYPE), np.array(months))

    def table(self) -> str:
        """Place, steps, and the share of pixels with a value, as text."""
        scene, dataset, grid = self.scene, self.scene.dataset, self.scene.grid
        west, south, east, north = grid.bounds
        left, below, right, above = moved(grid.crs, rasterio.crs.CRS.from_epsg(4326), grid.bounds)
        size = sum(path.stat().st_size for path in scene.files)
        lines = [f"scene {scene.path}: {dataset.name!r}, {grid.height:,} × {grid.width:,} pixels of "
                 f"{grid.pixel_metres[0]:g} m, {len(scene.files)} files of {size / 1e9:.3f} GB",
                 f"{grid.crs.to_string()}: x {west:.10g} to {east:.10g}, y {south:.10g} to {north:.10g}",
                 f"longitude {left:.4f} to {right:.4f}, latitude {below:.4f} to {above:.4f}", "",
                 "pixels with a value (– is no file):"]
        wide = max(10, *(len(step) + 1 for step in dataset.steps))
        moving = [(number, sensor) for number, sensor in enumerate(dataset.sensors) if not sensor.static]
        lines.append(" " * wide + "".join(f"{sensor.name:>10}" for _, sensor in moving))
        for step, name in enumerate(dataset.steps):
            shares = [self._share(number, step) for number, _ in moving]
            lines.append(f"{name:<{wide}}" + "".join(f"{share:>10}" for share in shares))
        lines += [f"{sensor.name}: {self._share(number, 0)}" for number, sensor in enumerate(dataset.sensors)
                  if sensor.static]
        seen = np.any([self.pixels[key].seen for key in self.pixels if not dataset.sensors[key[0]].static], 0)
        return "\n".join([*lines, "", f"without a value in any step: {1 - seen.mean():.1%}"])

    def _share(self, sensor: int, step: int) -> str:
        found = self.pixels.get((sensor, step))
        return "–" if found is None else f"{found.seen.mean():.1%}"
