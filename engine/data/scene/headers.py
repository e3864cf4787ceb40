"""What a raster's header says, and the grid that follows from it and from what a scene asks for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from engine.base.errors import DataError
from engine.data.dataset import Dataset, Section
from engine.data.scene.gdal import RASTER_ERRORS, parse_crs, rasterio
from engine.data.scene.grid import Box, Grid

RESOLUTION = 0.01  # relative: how far the grid's pixels may be from what a model was trained on
LARGEST = 4.1e7  # metres: around the Earth
FARTHEST = 1e12  # in any unit: what a raster's place is below
_WHOLE = 1e-3  # pixels: what rounding may move


class GridKeys(Section):
    """What a scene says of its grid; the rest is the first raster's."""

    crs: str | int | None = None
    resolution: Annotated[float, Field(gt=0)] | None = None
    bounds: tuple[float, float, float, float] | None = None


class Header(NamedTuple):
    """Of a raster."""

    crs: Any
    transform: Any
    width: int
    height: int
    bands: int
    dtype: np.dtype[Any]
    nodata: float | None

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        return tuple(rasterio.transform.array_bounds(self.height, self.width, self.transform))


def is_file(path: Path) -> bool:
    """False too where the disk cannot have such a name: pathlib raises where it is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """Raises DataError where there is no raster, or one without a place on Earth."""
    if not is_file(path):
        raise DataError(f"{path}: no such file; mend its name in the scene, or bring it there")
    try:
        with rasterio.open(path) as raster:
            if raster.driver == "VRT" and path.suffix.lower() != ".vrt":
                raise DataError(f"{path}: is a VRT, which reads other files, under another name; call it .vrt if it is "
                                f"yours, else bring the raster itself")
            if len(set(raster.dtypes)) > 1:
                raise DataError(f"{path}: its bands are {', '.join(raster.dtypes)}; give bands of one type, or one "
                                f"file a band")
            found = Header(raster.crs, raster.transform, raster.width, raster.height, raster.count,
                           np.dtype(raster.dtypes[0]), raster.nodata)
    except RASTER_ERRORS as error:
        raise DataError(f"{path}: is no raster that GDAL reads ({error}); make it again") from None
    place = np.array(found.transform)[:6]
    if found.crs is None or found.transform.is_identity or found.transform.is_degenerate \
            or not (np.abs(place) < FARTHEST).all():  # NaN fails too
        raise DataError(f"{path}: has no CRS or no place; give it one: gdal_edit.py -a_srs EPSG:… -a_ullr …")
    return found


def extent(header: Header, grid: Grid, of: Path | str = "a raster") -> Box | None:
    """The part of the grid that the raster covers, or the box around it; None: it lies beside the grid."""
    bounds = header.bounds if header.crs == grid.crs else moved(header.crs, grid.crs, header.bounds, of)
    west, south, east, north = bounds
    corners = [~grid.transform * corner for corner in ((west, north), (east, north), (west, south), (east, south))]
    (left, right), (top, bottom) = ((min(axis), max(axis)) for axis in zip(*corners))
    first, end = max(0, math.floor(top + _WHOLE)), min(grid.height, math.ceil(bottom - _WHOLE))
    before, behind = max(0, math.floor(left + _WHOLE)), min(grid.width, math.ceil(right - _WHOLE))
    return Box(first, before, end - first, behind - before) if end > first and behind > before else None


def moved(crs: Any, to: Any, bounds: tuple[float, float, float, float],
          of: Path | str = "a raster") -> tuple[float, float, float, float]:
    """A box, that of `of`, in another CRS.  Raises DataError where it has no place there."""
    try:
        found, why = tuple(rasterio.warp.transform_bounds(crs, to, *bounds)), "it is beyond its ends"
    except RASTER_ERRORS as error:
        found, why = (), str(error)
    if not found or not np.isfinite(found).all():
        raise DataError(f"{of}: {box_text(bounds)} in {crs} has no place in {to} ({why}); set grid.crs in the scene, "
                        f"or mend the raster's own: gdal_edit.py -a_srs EPSG:…")
    return found


def make_grid(path: Path | str, first: Header, keys: GridKeys, dataset: Dataset) -> Grid:
    """The grid of the scene at `path`, as errors name it, whose first raster has the header `first`.

    Raises DataError where it is empty, in degrees, or of other pixels than the data set's.
    """
    try:
        crs = first.crs if keys.crs is None else parse_crs(keys.crs)
    except RASTER_ERRORS as error:
        raise DataError(f"{path}: grid.crs {keys.crs!r}: {error}") from None
    if not crs.is_projected:
        west, south, east, north = first.bounds
        zone = int(((west + east) / 2 + 180) // 6) + 1
        near = f", here EPSG:{32600 + zone if south + north > 0 else 32700 + zone}" if crs == first.crs else ""
        raise DataError(f"{path}: the grid is in degrees ({crs}), the model knows pixels of {dataset.pixel_metres:g} "
                        f"m: give the scene a grid in metres, grid: {{crs: EPSG:…}}{near}")
    if keys.crs is None and keys.resolution is None and keys.bounds is None:
        grid = Grid(crs, first.transform, first.width, first.height)
    else:
        grid = _asked(path, crs, first, keys, dataset)
    for size in grid.pixel_metres:
        if abs(size / dataset.pixel_metres - 1) > RESOLUTION:
            raise DataError(f"{path}: the grid's pixels are {size:g} m, those of {dataset.name!r} "
                            f"{dataset.pixel_metres:g} m: a model knows what it was trained on; set grid: "
                            f"{{resolution: …}} in the scene, and rasters are warped to it")
    return grid


def _asked(path: Path | str, crs: Any, first: Header, keys: GridKeys, dataset: Dataset) -> Grid:
    resolution = keys.resolution or dataset.pixel_metres / crs.linear_units_factor[1]
    bounds = keys.bounds or (first.bounds if crs == first.crs else moved(first.crs, crs, first.bounds, path))
    west, south, east, north = bounds
    # Bounds that are not given come to whole pixels, as gdalwarp -tap has them
    if keys.bounds is None and crs != first.crs:
        west, north = np.floor(west / resolution) * resolution, np.ceil(north / resolution) * resolution
    if keys.bounds is None:
        south, north = sorted((south, north))  # a raster may be south up
    sides = float(east - west), float(north - south)
    if not all(abs(side) * crs.linear_units_factor[1] <= LARGEST for side in sides):  # or they are no numbers
        raise DataError(f"{path}: grid.bounds {box_text(bounds)} in {crs} are larger than the Earth; give xmin, ymin, "
                        f"xmax, ymax in its units, or another grid.crs")
    width, height = (round(min(side / resolution, 1e15)) for side in sides)
    if width < 1 or height < 1:
        raise DataError(f"{path}: grid.bounds {box_text(bounds)} with pixels of {resolution:g} are empty; give xmin, "
                        f"ymin, xmax, ymax in the units of {crs}")
    return Grid(crs, rasterio.transform.from_origin(float(west), float(north), resolution, resolution), width, height)


def box_text(bounds: Iterable[float]) -> str:
    return "[" + ", ".join(f"{value:.10g}" for value in bounds) + "]"
