"""Rasters of a scene from a STAC item collection on disk: which asset of which item is which sensor's step.

An item belongs to the step that is named like the month of its date.  Where several do (tiles side by side, passes of
one month), the least cloudy comes first and the others fill what it lacks.  Items: https://stacspec.org; pystac reads
them, and GDAL the assets: no other library is needed.
"""

from __future__ import annotations

import calendar
from pathlib import Path
from typing import Any

from engine.base.errors import DataError, EngineError
from engine.base.texts import read_json
from engine.data.dataset import Dataset, Section

_MONTHS = {name.lower(): number for names in (calendar.month_name, calendar.month_abbr)
           for number, name in enumerate(names) if name}


class StacKeys(Section):
    """items: the collection's JSON file.  assets: of each sensor one asset with all bands, or one a band."""

    items: str
    assets: dict[str, list[str]]


def stac_images(folder: Path, keys: StacKeys, dataset: Dataset) -> dict[tuple[int, int], list[list[Path]]]:
    """By sensor and step the parts of an image, each the files of its bands; names are relative to `folder`, hrefs to
    the collection.

    Raises DataError: a file that is no item collection, steps that are no months, assets that nothing has or that are
    not on this machine.
    """
    path = folder / keys.items
    items = _read(path)
    found: dict[tuple[int, int], list[list[Path]]] = {}
    for item in sorted(items, key=_clouds):
        for name, assets in keys.assets.items():
            number = [sensor.name for sensor in dataset.sensors].index(name)
            if all(asset in item.assets for asset in assets):
                step = 0 if dataset.sensors[number].static else _step(path, item, dataset)
                if step is not None:
                    places = [_place(path, item, asset) for asset in assets]
                    found.setdefault((number, step), []).append(places)
    for name, assets in keys.assets.items():
        if not any(dataset.sensors[number].name == name for number, _ in found):
            known = sorted({asset for item in items for asset in item.assets})
            raise DataError(f"{path}: no item of these months has the assets {', '.join(assets)} of {name}; its items "
                            f"have {', '.join(known[:20])}")
    return found


def _read(path: Path) -> list[Any]:
    try:
        import pystac
    except ImportError:
        raise EngineError("a scene from STAC items needs pystac: pip install -e '.[stac]'") from None
    try:
        return list(pystac.ItemCollection.from_dict(read_json(path)))
    except Exception as error:  # whatever it finds wrong
        raise DataError(f"{path}: is no STAC item collection ({type(error).__name__}: {error})") from None


def _clouds(item: Any) -> tuple[float, str, str]:
    clouds, date = item.properties.get("eo:cloud_cover"), item.datetime or item.common_metadata.start_datetime
    return clouds if isinstance(clouds, (int, float)) else 0.0, str(date), str(item.id)


def _step(path: Path, item: Any, dataset: Dataset) -> int | None:
    """None: an item of a month that the data set has not."""
    months = [_MONTHS.get(step.lower()) for step in dataset.steps]
    if None in months:
        raise DataError(f"{path}: items belong to steps by their month, and {dataset.name!r} has steps "
                        f"{', '.join(dataset.steps[:4])} …; list the files under images instead")
    date = item.datetime or item.common_metadata.start_datetime
    return months.index(date.month) if date.month in months else None


def _place(path: Path, item: Any, asset: str) -> Path:
    href = str(item.assets[asset].href).removeprefix("file://")
    if "://" in href:
        raise DataError(f"{path}: asset {asset} of item {item.id} is not on this machine ({href}); download the items, "
                        f"with their assets, first")
    return path.parent / href
