"""Pixels of a scene's rasters on its grid: read as they lie where they lie on it, else warped while they are read.

A raster is warped by GDAL (`WarpedVRT`): bilinear, or nearest where the scene says so; a value next to nodata is made
of those that there are.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.base.errors import DataError
from engine.data.dataset import Sensor
from engine.data.scene.gdal import RASTER_ERRORS, rasterio
from engine.data.scene.grid import Box
from engine.data.scene.scene import Image, Raster, Scene

OPEN = 400  # files at once, over all threads: many systems allow a process 1,024
_WHOLE = 1e-3  # pixels: how far a raster may lie off the grid and still be taken as it is


class Pixels(NamedTuple):
    """A part of the grid, of one image."""

    values: np.ndarray  # [h, w, bands] in the sensor's dtype, `Sensor.absent` where there is none
    seen: np.ndarray  # [h, w] bool: some band has a value


class _Opened(NamedTuple):
    raster: Any  # rasterio's dataset, or a WarpedVRT of it
    row: int  # of the grid, where its first row lies
    column: int
    nodata: tuple[float | None, ...]  # of each band
    alpha: bool  # a band behind the others says where it has values
    masked: bool  # a mask beside the bands does
    source: Any


class Rasters:
    """Reads a scene from any number of threads, at most `threads`; each opens files of its own."""

    def __init__(self, scene: Scene, threads: int):
        self._scene, self._most = scene, max(8, OPEN // threads)
        self._own = threading.local()

    def read(self, sensor: int, step: int, box: Box) -> Pixels:
        """Raises DataError naming the file that cannot be read, or holds infinity."""
        return self.image(self._scene.dataset.sensors[sensor], self._scene.images[sensor, step], box)

    def image(self, sensor: Sensor, image: Image, box: Box) -> Pixels:
        """As `read`, of an image that the scene need not hold."""
        values = np.empty((box.height, box.width, len(sensor.bands)), sensor.values)
        values[...] = sensor.absent
        seen = np.zeros((box.height, box.width), bool)
        for part in image:
            first = 0
            before = seen.copy() if len(image) > 1 else None
            for raster in part:
                bands = slice(first, first := first + len(raster.bands))
                self._into(values[..., bands], seen, raster, sensor, box, before)
            if seen.all():
                break
        return Pixels(values, seen)

    def _into(self, values: np.ndarray, seen: np.ndarray, raster: Raster, sensor: Sensor, box: Box,
              before: np.ndarray | None) -> None:
        """Fill `values` [h, w, some bands] where the raster has any and nothing was seen `before`."""
        opened = self._open(raster.path, sensor)
        top, left = max(box.row, opened.row), max(box.column, opened.column)
        bottom = min(box.row + box.height, opened.row + opened.raster.height)
        right = min(box.column + box.width, opened.column + opened.raster.width)
        if top >= bottom or left >= right:
            return
        window = rasterio.windows.Window(left - opened.column, top - opened.row, right - left, bottom - top)
        try:
            found = opened.raster.read(raster.bands, window=window)
            covered = (opened.raster.read(opened.raster.count, window=window) > 0 if opened.alpha else
                       opened.raster.dataset_mask(window=window) > 0 if opened.masked else None)
        except RASTER_ERRORS as error:
            raise DataError(f"{raster.path}: cannot be read at rows {top - opened.row} to {bottom - opened.row} of its "
                            f"place on the grid ({error}); it is damaged or cut short: make it again") from None
        place = np.s_[top - box.row:bottom - box.row, left - box.column:right - box.column]
        there = _values(found, [opened.nodata[band - 1] for band in raster.bands], sensor, raster.path)
        if covered is not None:
            there = covered[None] & (True if there is None else there)
        if before is not None:
            there = ~before[place][None] & (np.ones(found.shape, bool) if there is None else there)
        if there is None:
            values[place] = np.moveaxis(found, 0, -1)
            seen[place] = True
        else:
            np.copyto(values[place], np.moveaxis(found, 0, -1), where=np.moveaxis(there, 0, -1))
            seen[place] |= there.any(0)

    def _open(self, path: Path, sensor: Sensor) -> _Opened:
        held: OrderedDict[Path, _Opened] = self._own.__dict__.setdefault("held", OrderedDict())
        if path in held:
            held.move_to_end(path)
            return held[path]
        while len(held) >= self._most:
            _, old = held.popitem(last=False)
            old.raster.close()
            old.source.close()
        try:
            held[path] = self._opened(path, sensor)
        except RASTER_ERRORS as error:
            raise DataError(f"{path}: cannot be opened ({error}); was it changed meanwhile?") from None
        return held[path]

    def _opened(self, path: Path, sensor: Sensor) -> _Opened:
        grid, source = self._scene.grid, rasterio.open(path)
        own = None if sensor.nodata is None or not _holds(source.dtypes[0], sensor.nodata) else sensor.nodata
        nodata = tuple(own if value is None else value for value in source.nodatavals)
        masked = rasterio.enums.MaskFlags.per_dataset in source.mask_flag_enums[0]
        if source.crs == grid.crs:
            column, row = ~grid.transform * (source.transform.c, source.transform.f)
            ours, theirs = (np.array(transform)[[0, 1, 3, 4]] for transform in (grid.transform, source.transform))
            size = np.abs(ours).max()
            drift = np.abs(ours - theirs).max() / size * max(source.width, source.height)
            if max(abs(column - round(column)), abs(row - round(row)), drift) < _WHOLE:
                return _Opened(source, round(row), round(column), nodata, False, masked, source)
        method = rasterio.enums.Resampling[self._scene.resampling.get(sensor.name, "bilinear")]
        # Each band has holes of its own: an orbit, a detector
        known = {"add_alpha": True} if masked or nodata[0] is None else {"src_nodata": nodata[0], "nodata": nodata[0],
                                                                         "UNIFIED_SRC_NODATA": "NO"}
        if len({repr(value) for value in nodata}) > 1:
            raise DataError(f"{path}: does not lie on the grid, and its bands have other nodata each "
                            f"({', '.join(map(str, nodata))}): GDAL warps with one; give one file a band")
        warped = rasterio.vrt.WarpedVRT(source, crs=grid.crs, transform=grid.transform, width=grid.width,
                                        height=grid.height, resampling=method, **known)
        return _Opened(warped, 0, 0, nodata, "add_alpha" in known, False, source)


def _holds(dtype: Any, value: float) -> bool:
    """Whether a raster of `dtype` can hold `value`: bytes cannot be −9999, and would take 241 for it."""
    kind = np.dtype(dtype)
    return kind.kind == "f" or (float(value).is_integer() and np.iinfo(kind).min <= value <= np.iinfo(kind).max)


def _values(found: np.ndarray, nodata: Sequence[float | None], sensor: Sensor, path: Path) -> np.ndarray | None:
    """Where [bands, h, w] has values, bool; None: everywhere."""
    marks = [{mark for mark in (own, sensor.nodata) if mark is not None and not np.isnan(mark)
              and _holds(found.dtype, mark)} for own in nodata]
    there = np.ones(found.shape, bool) if any(marks) else None
    if there is not None:
        for band, here, own in zip(found, there, marks):
            for mark in own:
                here &= band != found.dtype.type(mark)
    if found.dtype.kind == "f" and not np.isfinite(found.sum()):
        if np.isinf(found).any():
            raise DataError(f"{path}: holds infinity; write nodata where nothing was seen")
        there = ~np.isnan(found) & (True if there is None else there)
    return there
