"""rasterio as this engine uses it.  Import it from here: GDAL takes its settings when it is first used.

GDAL's block cache is a twentieth of the machine's memory by default, for each process; what is read here is read once.
A raster may name others, as a VRT does, and some formats are nothing but the address of a server: what somebody else
wrote reads no network here.  Who wants that sets the two variables themselves.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from engine.base.errors import EngineError

os.environ.setdefault("GDAL_CACHEMAX", "64")  # MB
os.environ.setdefault("GDAL_DISABLE_READDIR_ON_OPEN", "EMPTY_DIR")  # no look for files beside each raster
os.environ.setdefault("CPL_VSIL_CURL_ALLOWED_FILENAME", "none")  # of /vsicurl/, /vsis3/ and their like
os.environ.setdefault("GDAL_SKIP", "HTTP WMS WMTS WCS DAAS EEDA EEDAI PLMOSAIC STACIT STACTA")  # formats

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

__all__ = ["RASTER_ERRORS", "parse_crs", "rasterio"]

_NAMES_OF_CRS = ("http://www.opengis.net/def/crs/", "http://opengis.net/def/crs/", "https://www.opengis.net/def/crs/",
                 "https://opengis.net/def/crs/")


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a description is longer than any name of a file
        return False


def parse_crs(text: object) -> Any:
    """A CRS by its name or description, as GDAL knows them.  Raises CRSError, also for a file or an address on the
    network, which GDAL would read."""
    if isinstance(text, str) and (_exists(text) or ("://" in text and not text.startswith(_NAMES_OF_CRS))):
        raise CRSError(f"{text[:80]!r} is a place and no CRS")
    return rasterio.crs.CRS.from_user_input(text)
