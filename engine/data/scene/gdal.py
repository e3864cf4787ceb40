"""rasterio as this engine uses it.  Import it from here: GDAL takes its settings when it is first used.

GDAL's block cache is a twentieth of the machine's memory by default, for each process; what is read here is read once.
"""

from __future__ import annotations

import os

from engine.base.errors import EngineError

os.environ.setdefault("GDAL_CACHEMAX", "64")  # MB
os.environ.setdefault("GDAL_DISABLE_READDIR_ON_OPEN", "EMPTY_DIR")  # no look for files beside each raster

try:
    import rasterio
    import rasterio.enums
    import rasterio.features
    import rasterio.shutil
    import rasterio.vrt
    import rasterio.warp
    import rasterio.windows
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import CRSError, RasterioError
except ImportError as error:
    raise EngineError(f"scenes need rasterio and rio-cogeo ({error}): pip install -e '.[scene]'") from None

RASTER_ERRORS = (RasterioError, CRSError, CPLE_BaseError)  # what GDAL and PROJ say of files and places

__all__ = ["RASTER_ERRORS", "rasterio"]
