"""What a map adds up to: mean, total and area, of all of it and of the polygons of a GeoJSON file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.base.errors import DataError
from engine.base.texts import read_json
from engine.data.scene.gdal import RASTER_ERRORS, parse_crs, rasterio
from engine.data.scene.grid import Grid


class Zone(NamedTuple):
    """A polygon of a GeoJSON file, on the grid."""

    name: str
    shape: dict[str, Any]  # in the grid's CRS
    first: int  # row of the grid
    end: int


class Area:
    """Adds up bands of a map, in order.  `unit`: of the target; of one a hectare (t/ha) there is a total."""

    def __init__(self, grid: Grid, unit: str, zones: list[Zone]):
        self._grid, self._unit, self._zones = grid, unit, zones
        self._whole = _Sums()
        self._of_zones = [_Sums() for _ in zones]

    def add(self, first: int, values: np.ndarray) -> None:
        """Rows from `first` on, [rows, width] float32, NaN where there is no value."""
        self._whole.add(values)
        rows, width = values.shape
        for zone, sums in zip(self._zones, self._of_zones):
            if zone.first < first + rows and zone.end > first:
                inside = rasterio.features.geometry_mask([zone.shape], (rows, width), self._grid.part(first, 0),
                                                         invert=True)  # pixels whose centre lies in it
                sums.add(values[inside])

    def result(self) -> dict[str, Any]:
        """As JSON: hectares, and mean, smallest, largest and total where there are values."""
        found = self._numbers(self._whole)
        if self._zones:
            found["zones"] = [{"name": zone.name, **self._numbers(sums)}
                              for zone, sums in zip(self._zones, self._of_zones)]
        return found

    def _numbers(self, sums: _Sums) -> dict[str, Any]:
        hectare = self._grid.pixel_hectares
        found: dict[str, Any] = {"unit": self._unit, "area_ha": sums.pixels * hectare,
                                 "area_without_value_ha": (sums.pixels - sums.valued) * hectare}
        if sums.valued:
            total = math.fsum(sums.totals)
            found |= {"mean": total / sums.valued, "smallest": sums.low, "largest": sums.high}
            if self._unit.endswith("/ha"):
                found["total"] = total * hectare
                found["total_unit"] = self._unit.removesuffix("/ha")
        return found


class _Sums:
    def __init__(self) -> None:
        self.pixels = self.valued = 0
        self.totals: list[float] = []
        self.low, self.high = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        there = values[~np.isnan(values)]
        self.pixels, self.valued = self.pixels + values.size, self.valued + there.size
        if there.size:
            self.totals.append(float(there.sum(dtype=np.float64)))
            self.low, self.high = min(self.low, float(there.min())), max(self.high, float(there.max()))


def summary(found: dict[str, Any]) -> str:
    """For people, of `Area.result` or one of its zones."""
    unit, nothing = found["unit"], f"{found['area_without_value_ha']:,.2f} ha without a value"
    if "mean" not in found:
        return f"no value; {nothing}"
    total = ""
    if "total" in found:
        mega = found["total_unit"] == "t" and found["total"] >= 1e4
        total = (f", in all {found['total'] / 1e6:,.4g} Mt" if mega else
                 f", in all {found['total']:,.4g} {found['total_unit']}")
    area = found["area_ha"] - found["area_without_value_ha"]
    return f"mean {found['mean']:.4g} {unit} over {area:,.2f} ha{total}; {nothing}"


def read_zones(path: Path, grid: Grid) -> list[Zone]:
    """Polygons of a GeoJSON file, in longitude and latitude (RFC 7946) or in the CRS that it names.

    Raises DataError for a file that is none, holds other shapes, or one that lies outside of the grid.
    """
    try:
        raw = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); give a GeoJSON file of "
                        f"polygons") from None
    try:
        features = raw["features"] if raw["type"] == "FeatureCollection" else [raw]
        crs = parse_crs((raw.get("crs") or {}).get("properties", {}).get("name", "OGC:CRS84"))
        zones = [_zone(path, number, feature, crs, grid) for number, feature in enumerate(features, 1)]
    # GDAL says SystemError of infinite coordinates
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, SystemError,
            *RASTER_ERRORS) as error:
        raise DataError(f"{path}: is no GeoJSON of polygons ({error!r}); see RFC 7946") from None
    if not zones:
        raise DataError(f"{path}: holds no polygon; give some, or leave --zones out")
    return zones


def _zone(path: Path, number: int, feature: dict[str, Any], crs: Any, grid: Grid) -> Zone:
    shape = feature["geometry"] if feature["type"] == "Feature" else feature
    said = feature.get("properties") or {}
    name = str(next((said[key] for key in ("name", "id", "NAME") if said.get(key) is not None),
                    feature.get("id", number)))
    if shape["type"] not in ("Polygon", "MultiPolygon"):
        raise DataError(f"{path}: zone {name} is a {shape['type']}; give polygons")
    for polygon in [shape["coordinates"]] if shape["type"] == "Polygon" else shape["coordinates"]:
        if any(ring[0] != ring[-1] for ring in polygon):  # GDAL would close it by itself
            raise DataError(f"{path}: zone {name} has a ring that is not closed: its last position has to be its first")
    outside = (f"{path}: zone {name} lies outside of the map; take it out, or see whether its coordinates are in "
               f"{crs.to_string()}")
    try:
        moved = rasterio.warp.transform_geom(crs, grid.crs, shape)
    except RASTER_ERRORS as error:
        raise DataError(f"{outside} ({error})") from None
    west, south, east, north = rasterio.features.bounds(moved)
    corners = [~grid.transform * corner for corner in ((west, north), (east, north), (west, south), (east, south))]
    columns, rows = zip(*corners)
    first, end = math.floor(min(rows)), math.ceil(max(rows))
    if not np.isfinite([*columns, *rows]).all() or end <= 0 or first >= grid.height or max(columns) <= 0 \
            or min(columns) >= grid.width:
        raise DataError(outside)
    return Zone(name, moved, max(first, 0), min(end, grid.height))
