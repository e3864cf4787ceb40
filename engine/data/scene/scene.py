"""A scene: georeferenced rasters of one place, for each sensor and step, described by a YAML file or found in a folder.

    dataset: biomassters              # built-in name or path; default: what the caller says (weights remember theirs)
    grid: {crs: EPSG:3067, resolution: 10, bounds: [xmin, ymin, xmax, ymax]}    # each default: the first raster's
    resampling: {S2: nearest}         # of rasters that do not lie on the grid; default: bilinear
    images:
      S1: rasters/S1_{step:02d}.tif   # a pattern: steps without a file are missing
      S2: {9: june.tif, July: [B2.tif, B3.tif, …]}    # step number or name → a file, or one file a band
    stac: {items: items.json, assets: {S2: [B02, B03, …]}}    # sensors from a STAC item collection on disk

A folder is a scene where its files have the names that the description gives to one chip.  Only headers are read
here; `engine.data.scene.rasters` reads pixels.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError

from engine.base.errors import DataError
from engine.base.texts import read_yaml
from engine.data.dataset import FILE, Dataset, Section, Sensor, load_dataset
from engine.data.scene.grid import Box, Grid
from engine.data.scene.headers import GridKeys, Header, box_text, extent, is_file, make_grid, read_header
from engine.data.scene.stac import StacKeys, stac_images

_STEP = re.compile(r"\{step(?::0[1-9]d)?\}")


class Raster(NamedTuple):
    """A file, and which of its bands: from 1, as GDAL counts."""

    path: Path
    bands: tuple[int, ...]


Image = tuple[tuple[Raster, ...], ...]
"""All bands of a sensor at a step.  Each part has them all, from one file or several; the first that has a value at a
pixel gives it."""


@dataclass(frozen=True)
class Scene:
    """`images`: by number of the sensor and of the step; 0 where the sensor is static.  `extents`: the part of the grid
    that each may have a value in."""

    path: Path
    dataset: Dataset
    grid: Grid
    images: Mapping[tuple[int, int], Image]
    resampling: Mapping[str, str]  # by name of the sensor
    extents: Mapping[tuple[int, int], Box]

    @property
    def months(self) -> tuple[tuple[bool, ...], ...]:
        """[sensors][T]: of which there is an image."""
        return tuple(tuple((number, 0 if sensor.static else step) in self.images
                           for step in range(self.dataset.months))
                     for number, sensor in enumerate(self.dataset.sensors))

    @property
    def files(self) -> list[Path]:
        """Each once, in order."""
        return list(dict.fromkeys(raster.path for image in self.images.values() for part in image for raster in part))

    def about(self) -> dict[str, Any]:
        """What a map of it depends on, as JSON: files by size and time of change."""
        grid = self.grid
        return {"dataset": self.dataset.dump(pictures=False), "resampling": dict(self.resampling),
                "grid": {"crs": grid.crs.to_wkt(), "transform": list(grid.transform)[:6], "width": grid.width,
                         "height": grid.height},
                "images": {f"{self.dataset.sensors[sensor].name} {self.dataset.steps[step]}":
                           [[[str(raster.path.resolve()), list(raster.bands), *_stamp(raster.path)] for raster in part]
                            for part in image] for (sensor, step), image in sorted(self.images.items())}}


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


Files = str | list[str]


class _Keys(Section):
    images: dict[str, str | list[str] | dict[str | int, Files]] = Field(default_factory=dict)
    stac: StacKeys | None = None
    dataset: str | None = None
    grid: GridKeys = GridKeys()
    resampling: dict[str, Literal["bilinear", "nearest"]] = Field(default_factory=dict)


def open_scene(path: Path | str, dataset: Dataset | None = None) -> Scene:
    """The scene that a YAML file or a folder describes; all its rasters have been opened once.

    dataset: what it holds where it does not say it itself; BioMassters where None.  Raises DataError: rasters that are
    missing, without CRS, of other bands or dtypes, or away from the grid; a grid of other pixels than the data set's.
    """
    path = Path(path)
    try:
        folder = path.is_dir()
    except OSError as error:  # too long a name
        raise DataError(f"{path}: no scene: cannot be read ({error.strerror})") from None
    if folder:
        own = path / FILE
        dataset = load_dataset(own) if own.is_file() else dataset or load_dataset("biomassters")
        return _scene(path, dataset, _of_folder(path, dataset), GridKeys(), {})
    keys = _read(path)
    if keys.dataset is not None:
        beside = path.parent / keys.dataset
        dataset = load_dataset(beside if is_file(beside) else keys.dataset)
    dataset = dataset or load_dataset("biomassters")
    names = [sensor.name for sensor in dataset.sensors]
    for name in (*keys.images, *keys.resampling, *(keys.stac.assets if keys.stac is not None else ())):
        if name not in names:
            raise DataError(f"{path}: {name!r} is no sensor of {dataset.name!r}{_nearest(name, names)}")
    images: dict[tuple[int, int], Image] = {}
    if keys.stac is not None:
        found = stac_images(path.parent, keys.stac, dataset)
        images = {key: tuple(_part(path, dataset.sensors[key[0]], places) for places in parts)
                  for key, parts in found.items()}
    for number, sensor in enumerate(dataset.sensors):
        if sensor.name in keys.images:
            images |= {(number, step): image
                       for step, image in _of_sensor(path, dataset, sensor, keys.images[sensor.name]).items()}
    if not images:
        raise DataError(f"{path}: names no rasters; give images (docs/landscapes.md)")
    return _scene(path, dataset, images, keys.grid, keys.resampling)


def _read(path: Path) -> _Keys:
    try:
        raw = read_yaml(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no scene: cannot be read ({getattr(error, 'strerror', None) or error}); give a YAML "
                        f"file, or a folder of rasters") from None
    except ValueError as error:
        raise DataError(f"{path}: is no YAML ({error})") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path}: is no scene (a mapping with images, and maybe dataset, grid, resampling)")
    try:
        return _Keys.model_validate(raw)
    except ValidationError as error:
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("dict[", "list[")))
        text = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            text = "is not a key of a scene (docs/landscapes.md lists them)"
        raise DataError(f"{path}: {key}: {text}") from None


def _of_sensor(path: Path, dataset: Dataset, sensor: Sensor, said: Any) -> dict[int, Image]:
    """The images of a sensor by step."""
    if isinstance(said, dict):
        if sensor.static:
            raise DataError(f"{path}: images.{sensor.name}: is static: give a file, or one a band, not steps")
        steps = [_step(path, dataset, sensor, key) for key in said]
        for key, step in zip(said, steps):
            if steps.count(step) > 1:
                raise DataError(f"{path}: images.{sensor.name}: {key!r} is given twice, by number and by name; leave "
                                f"one out")
        return {step: _image(path, sensor, files) for step, files in zip(steps, said.values())}
    if sensor.static:
        return {0: _image(path, sensor, said)}
    if isinstance(said, list) or len(_STEP.findall(said)) != 1 or re.search(r"[{}]", _STEP.sub("", said)):
        raise DataError(f"{path}: images.{sensor.name}: give a pattern with {{step}} or {{step:02d}} once, or a "
                        f"mapping from steps to files")
    names = {step: said.format(step=step) for step in range(dataset.months)}
    found = {step: _image(path, sensor, name) for step, name in names.items() if is_file(path.parent / name)}
    if not found:
        raise DataError(f"{path}: images.{sensor.name}: no file has a name of {said!r}, such as "
                        f"{path.parent / names[0]} (step 0 is {dataset.steps[0]})")
    return found


def _step(path: Path, dataset: Dataset, sensor: Sensor, key: str | int) -> int:
    if isinstance(key, int) and 0 <= key < dataset.months:
        return key
    if key in dataset.steps:
        return dataset.steps.index(str(key))
    raise DataError(f"{path}: images.{sensor.name}: {key!r} is no step: give a number from 0 to {dataset.months - 1}, "
                    f"or one of {', '.join(dataset.steps)}{_nearest(str(key), dataset.steps)}")


def _image(path: Path, sensor: Sensor, files: Files) -> Image:
    places = [path.parent / name for name in ([files] if isinstance(files, str) else files)]
    return (_part(path, sensor, places),)


def _part(path: Path, sensor: Sensor, places: list[Path]) -> tuple[Raster, ...]:
    bands = len(sensor.bands)
    if len(places) == 1:
        return (Raster(places[0], tuple(range(1, bands + 1))),)
    if len(places) != bands:
        raise DataError(f"{path}: images.{sensor.name}: {len(places)} files for {bands} bands "
                        f"({', '.join(sensor.bands)}); give one file of all, or one a band")
    return tuple(Raster(place, (1,)) for place in places)


def _of_folder(folder: Path, dataset: Dataset) -> dict[tuple[int, int], Image]:
    """By the names that the description gives to one chip's files."""
    found: dict[str, dict[tuple[int, int], Image]] = {}
    for file in sorted(folder.iterdir()):
        for number, (sensor, pattern) in enumerate(zip(dataset.sensors, dataset.names)):
            if match := pattern.fullmatch(file.name):
                step = 0 if sensor.static else int(match["step"])
                if step >= dataset.months:
                    raise DataError(f"{file}: step {step} does not exist; {dataset.name!r} has {dataset.months}")
                found.setdefault(match["chip"], {})[number, step] = (_part(folder, sensor, [file]),)
    if len(found) != 1:
        raise DataError(f"{folder}: holds {len(found) or 'no'} scenes{': ' * bool(found)}{', '.join(list(found)[:5])}; "
                        f"a folder of one has files named {dataset.feature_name('{chip}', 0, 0)} …, with one {{chip}}; "
                        f"others are described by a YAML file (docs/landscapes.md)")
    return next(iter(found.values()))


def _scene(path: Path, dataset: Dataset, images: Mapping[tuple[int, int], Image], keys: GridKeys,
           resampling: Mapping[str, str]) -> Scene:
    if all(dataset.sensors[number].static for number, _ in images):
        raise DataError(f"{path}: has no image of {', '.join(s.name for s in dataset.sensors if not s.static)}")
    for number, sensor in enumerate(dataset.sensors):
        if sensor.static and (number, 0) not in images:
            raise DataError(f"{path}: has no {sensor.name}, which {dataset.name!r} needs")
    headers: dict[Path, Header] = {}
    for (number, _), image in images.items():
        for raster in (raster for part in image for raster in part):
            if raster.path not in headers:
                headers[raster.path] = read_header(raster.path)
            _check(raster, headers[raster.path], dataset.sensors[number])
    first = next(iter(headers))  # whose the grid is, and so its mistakes
    grid = make_grid(f"{path}, whose first raster is {first}", headers[first], keys, dataset)
    boxes: dict[Path, Box] = {}
    for file, header in headers.items():
        box = extent(header, grid, file)
        if box is None:
            raise DataError(f"{file}: lies beside the scene's grid: {box_text(header.bounds)} in {header.crs}, the "
                            f"grid {box_text(grid.bounds)} in {grid.crs}; take it out, set grid in the scene, or see "
                            f"whether the place of the first raster is right, {first}")
        boxes[file] = box
    extents = {key: _around([boxes[raster.path] for part in image for raster in part]) for key, image in images.items()}
    return Scene(path, dataset, grid, images, resampling, extents)


def _around(boxes: list[Box]) -> Box:
    top, left = min(box.row for box in boxes), min(box.column for box in boxes)
    return Box(top, left, max(box.row + box.height for box in boxes) - top,
               max(box.column + box.width for box in boxes) - left)


def _check(raster: Raster, header: Header, sensor: Sensor) -> None:
    wanted = len(sensor.bands) if len(raster.bands) > 1 else 1
    if header.bands != wanted:
        raise DataError(f"{raster.path}: has {header.bands} bands, not the {wanted} of {sensor.name} "
                        f"({', '.join(sensor.bands)}); see gdal_translate -b")
    if not np.can_cast(header.dtype, sensor.values, "safe"):
        raise DataError(f"{raster.path}: is {header.dtype}, where {sensor.name} is {sensor.dtype}; convert it, without "
                        f"changing its unit ({sensor.unit or 'as in training'}): gdal_translate -ot …")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; is it {near[0]!r}?" if near else f"; it has {', '.join(known)}"
