"""A made-up scene of any size, behind `launch/prepare.py sample-scene`: georeferenced rasters of every sensor and step,
a target, and the `scene.yaml` that names them.

The land is `engine.data.made.landscape`'s; this module decides what of it was seen, and writes.  Rasters are made one
by one, tile by tile, so that memory does not grow with the scene, and appear whole: a run that was interrupted goes on
with the first that is not there.  The bytes repeat on one machine with one numpy and one GDAL.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from engine.base.errors import ConfigError, DataError
from engine.base.files import fsync, write_text
from engine.base.texts import read_json
from engine.data.biomassters import BIOMASSTERS, S1, S2
from engine.data.dataset import FILE, Dataset, Sensor, Target
from engine.data.made import forest, sample
from engine.data.made.fields import MISSING
from engine.data.made.landscape import SCENE, Landscape, landscape
from engine.data.made.lattice import BLOCK
from engine.data.scene.gdal import RASTER_ERRORS, rasterio

VERSION = 1  # of what is drawn; raise it with every change of the pixels
NOTE, YAML, TARGET = "scene.json", "scene.yaml", "target.tif"
CRS = "EPSG:3067"  # Finland's: ETRS89 / TM35FIN
WEST, NORTH = 380_000.0, 7_100_000.0  # metres; 200 km to the south and east still are Finland
GAP = 0.25  # of a sensor's steps end at a slanted edge within the scene


class Strip(NamedTuple):
    """What lies between two slanted lines, or beyond one, in sides of the scene along `angle` (degrees, 0 east, 90
    south) from its first corner."""

    angle: float
    start: float
    end: float = math.inf

    def covers(self, size: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Bool [rows, columns] of the pixels in 1-d `rows` and `columns`."""
        down, right = math.sin(math.radians(self.angle)) / size, math.cos(math.radians(self.angle)) / size
        along = (rows * down)[:, None] + columns * right
        return (along >= self.start) & (along < self.end)


class Gap(NamedTuple):
    strip: Strip
    bands: slice
    value: float


HOLE = Strip(30, 1.24)  # a corner of which nothing is known: its sides are 0.15 and 0.25 of the scene's
UNLABELLED = Strip(60, 0.45, 0.5)  # seen, but without a target


def make_scene(out: Path | str, dataset: Dataset, size: int, seed: int,
               progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Write a scene of `size` × `size` pixels of `dataset` into `out`, and return the content of scene.json.

    `progress(done, total)` counts tiles of the rasters that are not there yet.  Raises ConfigError for an impossible
    size or seed and DataError for a folder that holds anything else or cannot be written.
    """
    out = Path(out)
    if size < dataset.tile or seed < 0:
        raise ConfigError(f"size {size}, seed {seed}: a scene of {dataset.name!r} has at least {dataset.tile} pixels a "
                          f"side, its tile, and the seed is at least 0")
    key = zlib.crc32(json.dumps(dataset.dump(pictures=False), sort_keys=True).encode())
    note: dict[str, Any] = {"version": VERSION, "dataset": dataset.name, "description": key, "size": size, "seed": seed}
    land, there = landscape(dataset, seed), steps_seen(dataset, seed)
    try:
        _claim(out, note)
        target = dataset.target
        jobs = [Raster(out / TARGET, size, dataset.pixel_metres, np.dtype(target.dtype), nodata(target),
                       (target.name,))]
        draws = [_target(land, jobs[0])]
        images: dict[str, str] = {}
        for index, sensor in enumerate(dataset.sensors):
            images[sensor.name] = f"rasters/{sensor.name}{'' if sensor.static else '_{step:02d}'}.tif"
            for step in there[index]:
                raster = Raster(out / images[sensor.name].format(step=step), size, dataset.pixel_metres, sensor.values,
                                nodata(sensor), sensor.bands)
                jobs.append(raster)
                draws.append(_image(land, raster, sensor, step, gaps(dataset, seed, index, step)))
        left = [(raster, draw) for raster, draw in zip(jobs, draws) if not raster.path.exists()]
        done, total = 0, len(left) * len(jobs[0].tiles())
        for raster, draw in left:
            for _ in _write(raster, draw):
                done += 1
                if progress is not None:
                    progress(done, total)
        if dataset != BIOMASSTERS:
            write_text(out / FILE, yaml.safe_dump(dataset.dump(), sort_keys=False, allow_unicode=True))
        side = size * dataset.pixel_metres
        scene = {"dataset": dataset.name if dataset == BIOMASSTERS else FILE,
                 "grid": {"crs": CRS, "resolution": dataset.pixel_metres,
                          "bounds": [WEST, NORTH - side, WEST + side, NORTH]}, "images": images}
        write_text(out / YAML, yaml.safe_dump(scene, sort_keys=False, allow_unicode=True))
        note |= {"complete": True, "rasters": len(jobs), "bytes": sum(raster.path.stat().st_size for raster in jobs)}
        write_text(out / NOTE, json.dumps(note, indent=2) + "\n")
    except (OSError, *RASTER_ERRORS) as error:
        raise DataError(f"{out}: cannot be written ({error}); make room or choose another folder, and give the command "
                        f"again: it goes on where it stopped") from None
    return note


def steps_seen(dataset: Dataset, seed: int) -> list[list[int]]:
    """Of each sensor, the steps of which there is a raster: for BioMassters as in one of the challenge's patterns."""
    rng, found = forest.generator(seed, SCENE, 16), []
    patterns = {pattern: count for pattern, count in sample.S2_PATTERNS["train"].items() if "0" in pattern}
    for sensor in dataset.sensors:
        seen = np.ones(1 if sensor.static else dataset.months, bool)
        if dataset == BIOMASSTERS and sensor == S2:
            chosen = rng.choice(list(patterns), p=np.array(list(patterns.values())) / sum(patterns.values()))
            seen = np.array([month == "1" for month in chosen])
        elif dataset != BIOMASSTERS and not sensor.static:
            seen = rng.random(dataset.months) >= MISSING
            seen[-1] |= not seen.any()
        found.append(np.flatnonzero(seen).tolist())
    return found


def gaps(dataset: Dataset, seed: int, index: int, step: int) -> list[Gap]:
    """What is not seen in a step of sensor `index`, and noise in the probability of clouds."""
    sensor, rng = dataset.sensors[index], forest.generator(seed, SCENE, 17, index)
    steps = [] if sensor.static else steps_seen(dataset, seed)[index]
    found = []
    for one in rng.permutation(steps)[:math.ceil(GAP * len(steps))]:
        edge = Strip(float(rng.uniform(15, 40)), float(rng.uniform(0.5, 1.0)))
        orbit = 2 * int(rng.integers(0, 2))
        bands = slice(orbit, orbit + 2) if dataset == BIOMASSTERS and sensor == S1 else slice(None)
        found += [Gap(edge, bands, nodata(sensor))] if one == step else []
    if dataset == BIOMASSTERS and sensor == S2 and step == steps[-1]:
        found.append(Gap(Strip(80, 0.2, 0.25), slice(-1, None), 255))
    return [*found, Gap(HOLE, slice(None), nodata(sensor))]


def nodata(of: Sensor | Target) -> float:
    """A raster's: the description's, or a value that no image then has."""
    nothing = {"f": -9999.0, "u": 0.0, "i": float(np.iinfo("i2").min)}[np.dtype(of.dtype).kind]
    return nothing if of.nodata is None else of.nodata


class Raster(NamedTuple):
    """A file to be made: size² pixels of `metres`, a band per name."""

    path: Path
    size: int
    metres: float
    dtype: np.dtype[Any]
    nodata: float
    bands: tuple[str, ...]

    @property
    def tile(self) -> int:
        """Of the file: whole blocks of the landscape."""
        return 2 * BLOCK if self.size >= 2 * BLOCK else BLOCK

    def tiles(self) -> list[Any]:
        """Windows of rasterio, row by row."""
        starts = range(0, self.size, self.tile)
        return [rasterio.windows.Window(left, top, min(self.tile, self.size - left), min(self.tile, self.size - top))
                for top in starts for left in starts]


Draw = Callable[[Any], np.ndarray]


def _image(land: Landscape, raster: Raster, sensor: Sensor, step: int, gaps: list[Gap]) -> Draw:
    """A tile of an image, [h, w, bands]."""
    def draw(window: Any) -> np.ndarray:
        image = _seen(_joined(window, lambda block: land.image(sensor, step, block)), raster.nodata)
        for gap in gaps:
            mask = gap.strip.covers(raster.size, *_places(window))
            image[..., gap.bands][mask] = gap.value
        return image

    return draw


def _target(land: Landscape, raster: Raster) -> Draw:
    """A tile of the target, [h, w, 1]."""
    def draw(window: Any) -> np.ndarray:
        label = _seen(_joined(window, land.label), raster.nodata)
        for strip in (HOLE, UNLABELLED):
            label[strip.covers(raster.size, *_places(window))] = raster.nodata
        return label[..., None]

    return draw


def _joined(window: Any, draw: Callable[[tuple[int, int]], np.ndarray]) -> np.ndarray:
    """The blocks of a window that begins with one, cropped to it."""
    rows, columns = (range(start // BLOCK, -(-(start + length) // BLOCK))
                     for start, length in ((window.row_off, window.height), (window.col_off, window.width)))
    whole = np.concatenate([np.concatenate([draw((i, j)) for j in columns], 1) for i in rows], 0)
    return whole[:window.height, :window.width]


def _places(window: Any) -> tuple[np.ndarray, np.ndarray]:
    return window.row_off + np.arange(window.height), window.col_off + np.arange(window.width)


def _seen(image: np.ndarray, nodata: float) -> np.ndarray:
    """`image` with what happens to be `nodata` moved to the value beside it."""
    beside = np.nextafter(np.float32(nodata), np.float32(0)) if image.dtype.kind == "f" else nodata + (
        1 if nodata <= 0 else -1)
    return np.where(image == nodata, np.array(beside, image.dtype), image)


def _write(raster: Raster, draw: Draw) -> Iterator[None]:
    """Make one file, yielding after every tile; it appears when it is whole."""
    raster.path.parent.mkdir(parents=True, exist_ok=True)
    beside = raster.path.with_name(f".{raster.path.name}.{os.getpid()}.part")
    profile = {"driver": "GTiff", "width": raster.size, "height": raster.size, "count": len(raster.bands),
               "dtype": raster.dtype.newbyteorder("="), "nodata": raster.nodata, "crs": CRS,
               "transform": rasterio.Affine(raster.metres, 0, WEST, 0, -raster.metres, NORTH), "tiled": True,
               "blockxsize": raster.tile, "blockysize": raster.tile, "interleave": "band", "bigtiff": "IF_SAFER",
               # Level 6 takes 1.4 to 2.4 times as long and saves nothing; predictors save 8 to 17 %
               "compress": "deflate", "zlevel": 1, "predictor": 3 if raster.dtype.kind == "f" else 2}
    sums = []
    try:
        with rasterio.open(beside, "w", **profile) as file:
            file.descriptions = raster.bands
            for window, image in _ahead(raster.tiles(), draw):
                bands = np.ascontiguousarray(np.moveaxis(image, -1, 0))
                sums.append(zlib.crc32(bands.data))
                file.write(bands, window=window)
                yield
        # rasterio says nothing where a full disk ends what GDAL still writes on closing
        with rasterio.open(beside) as file:
            for window, written in zip(raster.tiles(), sums):
                if zlib.crc32(file.read(window=window)) != written:
                    raise OSError(f"{raster.path.name}: what was written is not what can be read")
        fsync(beside)
        beside.replace(raster.path)
        fsync(raster.path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _ahead(windows: list[Any], draw: Draw) -> Iterator[tuple[Any, np.ndarray]]:
    """Tiles in order, drawn by a few threads, each at most one ahead."""
    threads = min(os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[Any, Future[np.ndarray]]] = deque()
        for window in windows:
            waiting.append((window, pool.submit(draw, window)))
            if len(waiting) > threads:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def _claim(out: Path, note: dict[str, Any]) -> None:
    """Mark `out` as a scene in the making, or refuse a folder that holds something else."""
    path = out / NOTE
    if path.is_file():
        try:
            found = read_json(path)
            same = all(found[key] == value for key, value in note.items())
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: cannot be read ({error!r}); remove {out} or choose another folder") from None
        if not same:
            made = ", ".join(f"{key} {found.get(key)}" for key in note if key != "description")
            raise DataError(f"{out}: holds another scene ({made}); remove it or choose another folder")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is not empty and no scene; choose another folder")
    for part in out.glob("**/.*.part"):  # left by a run that was killed
        part.unlink()
    write_text(path, json.dumps(note) + "\n")
