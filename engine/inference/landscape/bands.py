"""A map in the making: bands of rows, a file each, so that several ranks can write and a killed run can go on.

Bands become one Cloud-Optimised GeoTIFF in the end, by GDAL from a virtual mosaic of them.  (GDAL's COG driver, given
a raster that is written to, would hold all of it in memory: 251 MiB more for 192 MiB more of raster; copied from files
it holds a few blocks.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from rio_cogeo.cogeo import cog_validate

from engine.base.errors import DataError
from engine.base.files import fsync, write_text
from engine.data.scene.gdal import RASTER_ERRORS, rasterio
from engine.data.scene.grid import Grid, Windows
from engine.data.tiff import tiff

NODATA = -9999.0
BLOCK = 512

ROOM = "make room, then run the same command again: it goes on from there"


class Bands:
    """The bands of a map of `layers` numbers a pixel, in `folder`."""

    def __init__(self, folder: Path, windows: Windows, layers: int):
        self.folder, self._windows, self.layers = folder, windows, layers

    def path(self, number: int) -> Path:
        return self.folder / f"band_{number:05d}.tif"

    def shape(self, number: int) -> tuple[int, int, int]:
        first, end = self._windows.band(number)
        return end - first, self._windows.width, self.layers

    @property
    def missing(self) -> list[int]:
        """Those that are not there.  Files are whole or absent."""
        return [number for number in range(len(self._windows.rows)) if not self.path(number).exists()]

    def write(self, number: int, band: np.ndarray) -> None:
        """[layers, rows, width] float32, NaN for none, which is overwritten.  Raises DataError where it cannot be
        written."""
        np.copyto(band, np.float32(NODATA), where=np.isnan(band))
        try:
            tiff.write(self.path(number), np.moveaxis(band, 0, -1), rows_per_strip=1)
        except DataError as error:
            raise DataError(f"{error}; {ROOM}") from None

    def read(self, number: int) -> np.ndarray:
        """[rows, width, layers] float32, NODATA for none."""
        values = np.empty(self.shape(number), np.float32)
        tiff.read_into(self.path(number), values)
        return values


def write_cog(bands: Bands, windows: Windows, grid: Grid, path: Path, names: Sequence[tuple[str, str]],
              tags: Mapping[str, str]) -> None:
    """The bands as a Cloud-Optimised GeoTIFF at `path`; names: of each layer, and its unit.

    Memory does not grow with the map.  Raises DataError where the disk is full or GDAL's file is not valid.
    """
    mosaic = bands.folder / "map.vrt"
    # Of a map a few pixels wide the overviews are one pixel wide, all of them: those are no valid ones
    shrink = max(grid.width, grid.height) / BLOCK
    overviews = {"overviews": "NONE"} if min(grid.width, grid.height) < 4 * shrink else {}
    try:
        write_text(mosaic, _mosaic(bands, windows, grid, names, tags))
        rasterio.shutil.copy(mosaic, path, driver="COG", compress="DEFLATE", predictor="FLOATING_POINT",
                             blocksize=BLOCK, overview_resampling="average", bigtiff="IF_SAFER", num_threads=1,
                             **overviews)
        valid, errors, _ = cog_validate(path, quiet=True, strict=not overviews)
    except (*RASTER_ERRORS, OSError) as error:
        raise DataError(f"{path}: cannot be written ({error}); make room, or remove a file of {bands.folder} that is "
                        f"damaged, then run the same command again") from None
    if not valid:
        raise DataError(f"{path}: is no valid Cloud-Optimised GeoTIFF ({'; '.join(errors)}); is the disk full? {ROOM}")
    fsync(path)


def _mosaic(bands: Bands, windows: Windows, grid: Grid, names: Sequence[tuple[str, str]],
            tags: Mapping[str, str]) -> str:
    """GDAL's virtual format: https://gdal.org/drivers/raster/vrt.html"""
    width = grid.width
    lines = [f'<VRTDataset rasterXSize="{width}" rasterYSize="{grid.height}">',
             f"<SRS>{escape(grid.crs.to_wkt())}</SRS>",
             f"<GeoTransform>{', '.join(repr(float(x)) for x in grid.transform.to_gdal())}</GeoTransform>",
             "<Metadata>",
             *(f'<MDI key="{escape(key)}">{escape(value)}</MDI>' for key, value in tags.items()),
             "</Metadata>"]
    for layer, (name, unit) in enumerate(names, 1):
        lines += [f'<VRTRasterBand dataType="Float32" band="{layer}">', f"<Description>{escape(name)}</Description>",
                  f"<UnitType>{escape(unit)}</UnitType>", f"<NoDataValue>{NODATA:g}</NoDataValue>"]
        for number in range(len(windows.rows)):
            first, end = windows.band(number)
            size = f'xSize="{width}" ySize="{end - first}"'
            lines += ["<SimpleSource>",
                      f'<SourceFilename relativeToVRT="1">{bands.path(number).name}</SourceFilename>',
                      f"<SourceBand>{layer}</SourceBand>",
                      f'<SourceProperties RasterXSize="{width}" RasterYSize="{end - first}" DataType="Float32" '
                      f'BlockXSize="{width}" BlockYSize="1"/>',
                      f'<SrcRect xOff="0" yOff="0" {size}/>', f'<DstRect xOff="0" yOff="{first}" {size}/>',
                      "</SimpleSource>"]
        lines.append("</VRTRasterBand>")
    return "\n".join([*lines, "</VRTDataset>", ""])
