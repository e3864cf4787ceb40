"""Chips out of a scene and a raster of its target, behind `launch/prepare.py cut`: a tree or a store to train on, and
folds of whole blocks of land.

Each chip appears with its label last, so a cut that was interrupted goes on with the first that has none.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from engine.base.errors import DataError
from engine.base.files import write_text
from engine.base.made import alone
from engine.base.texts import read_json
from engine.data.dataset import FILE, Dataset, Sensor, parse_dataset
from engine.data.scene.blocks import (
    Options,
    Place,
    balanced,
    block_pixels,
    check,
    foldable,
    places_of,
    runs_of,
    spatial_folds,
)
from engine.data.scene.gdal import rasterio
from engine.data.scene.grid import Box
from engine.data.scene.headers import Header, box_text, extent, read_header
from engine.data.scene.rasters import Pixels, Rasters
from engine.data.scene.scene import Image, Raster, Scene
from engine.data.selection.folds import save_folds
from engine.data.store import chip_file
from engine.data.store.pack import encode_chip, sweep, write_chip, write_manifest
from engine.data.tiff import tiff

VERSION = 1
NOTE, SPLIT = "cut.json", "split.json"


class Target:
    """The raster of the target on a scene's grid.  Raises DataError where it does not fit."""

    def __init__(self, path: Path, scene: Scene, threads: int):
        self.path, header, target = path, read_header(path), scene.dataset.target
        if header.bands != 1:
            raise DataError(f"{path}: has {header.bands} bands, a target one; take one out: gdal_translate -b 1")
        if not np.can_cast(header.dtype, target.dtype, "safe"):
            raise DataError(f"{path}: is {header.dtype}, where the target of {scene.dataset.name!r} is {target.dtype}; "
                            f"convert it: gdal_translate -ot …")
        self.extent = extent(header, scene.grid, path)
        if self.extent is None:
            raise DataError(f"{path}: lies beside the scene's grid: {box_text(header.bounds)} in {header.crs}, the "
                            f"grid {box_text(scene.grid.bounds)} in {scene.grid.crs}; give the target of this place")
        self.dataset = _described(scene.dataset, header, path)
        self._sensor = Sensor(name="target", file="{chip}.tif", bands=(target.name,), low=(0,), high=(1,), static=True,
                              dtype=target.dtype, nodata=self.dataset.target.nodata)
        self._image: Image = ((Raster(path, (1,)),),)
        self._rasters = Rasters(scene, threads)

    def read(self, box: Box) -> Pixels:
        """[h, w, 1] of the target's dtype, nodata where there is none."""
        return self._rasters.image(self._sensor, self._image, box)


def _described(dataset: Dataset, header: Header, path: Path) -> Dataset:
    """`dataset` with a nodata for its target: its own, the raster's, or one that floats can always spare."""
    target = dataset.target
    if target.nodata is not None:
        return dataset
    nodata = header.nodata if header.nodata is not None and math.isfinite(header.nodata) else None
    if nodata is None and target.dtype == "float32":
        nodata = -9999.0
    if nodata is None:
        return dataset
    return parse_dataset(dataset.dump() | {"target": target.model_dump(exclude_defaults=True) | {"nodata": nodata}},
                         f"{path}: nodata {nodata:g}")


def cut(scene: Scene, target: Path, out: Path, options: Options, *, workers: int = 4,
        progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Write the chips of `scene` with the target at `target` into `out`, its description, `split.json` and `cut.json`,
    whose content is returned.  `progress(done, total)` counts places of chips.

    Raises ConfigError for options that cannot be, and DataError: a target that does not fit, no chip that is left,
    fewer blocks than folds, a folder that holds anything else or cannot be written.
    """
    check(options, workers)
    truth = Target(target, scene, workers)
    side = block_pixels(options, scene.grid, truth.dataset.tile)
    note = {"version": VERSION, "scene": str(scene.path), "target": str(target), "block_pixels": side,
            "options": asdict(options), "of": _fingerprint(scene, target),
            "grid": {"crs": scene.grid.crs.to_string(), "transform": list(scene.grid.transform)[:6],
                     "height": scene.grid.height, "width": scene.grid.width}}
    try:
        writer = _Writer(scene, truth, out, options, workers)
        with alone(out):
            _claim(out, note)
            places = list(places_of(scene.grid, truth.dataset.tile, options.stride, side))
            means = _survey(truth, places, options, workers)
            chosen = balanced(means, options.balance, options.seed)
            foldable(chosen, options, len(places))
            written = _all(writer, chosen, workers, progress)
            kept = {place: means[place] for place in chosen if place in written}
            folds = spatial_folds(kept, options, len(places))
            how = {"scheme": "blocks", "block_metres": side * scene.grid.pixel_metres[0], "folds": options.folds,
                   "seed": options.seed, "chips": len(kept)}
            writer.finish()
            save_folds(out / SPLIT, folds, how)
            number = {chip: fold for fold, chips in enumerate(folds) for chip in chips}
            note |= {"places": len(places), "without_target": len(places) - len(means),
                     "over_balance": len(means) - len(chosen), "without_images": len(chosen) - len(kept),
                     "chips": {place.id: {"row": place.row, "column": place.column, "fold": number[place.id],
                                          "mean": round(mean, 4)} for place, mean in kept.items()}}
            write_text(out / NOTE, json.dumps(note, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error}); make room or choose another folder, and give the command "
                        f"again: it goes on where it stopped") from None
    return note


def _survey(truth: Target, places: Sequence[Place], options: Options, workers: int) -> dict[Place, float]:
    """Means of the target, of those places that have enough of it."""
    tile, most = truth.dataset.tile, truth.extent
    assert most is not None

    def mean(place: Place) -> float | None:
        if not (most.row < place.row + tile and place.row < most.row + most.height
                and most.column < place.column + tile and place.column < most.column + most.width):
            return None
        found = truth.read(Box(place.row, place.column, tile, tile))
        # Without a nodata there is no way to say where the target is unknown
        enough = 1.0 if truth.dataset.target.nodata is None else options.min_valid
        if not found.seen.any() or found.seen.mean() < enough:
            return None
        return float(found.values[found.seen].mean(dtype=np.float64))

    with ThreadPoolExecutor(workers) as pool:
        return {place: value for place, value in zip(places, pool.map(mean, places)) if value is not None}


def _all(writer: _Writer, chosen: Sequence[Place], workers: int,
         progress: Callable[[int, int], None] | None) -> set[Place]:
    """Write all; those that had enough images."""
    done, written = 0, set()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="cut")
    try:
        futures = {pool.submit(writer.write, run): run for run in runs_of(chosen, writer.tile)}
        for future in as_completed(futures):
            written |= future.result()
            done += len(futures[future])
            if progress is not None:
                progress(done, len(chosen))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return written


class _Writer:
    """Chips as files, in either form."""

    def __init__(self, scene: Scene, truth: Target, out: Path, options: Options, threads: int):
        self._scene, self._truth, self._out, self._options = scene, truth, out, options
        self._dataset, self._rasters = truth.dataset, Rasters(scene, threads)
        self.tile = truth.dataset.tile

    def write(self, run: list[Place]) -> set[Place]:
        """Those of a run that are whole, now or before; the others have too little of an image."""
        todo = [place for place in run if not self._whole(place).exists()]
        written = set(run) - set(todo)
        if not todo:
            return written
        tile, row, column = self.tile, todo[0].row, todo[0].column
        box = Box(row, column, tile, todo[-1].column + tile - column)
        pixels = {key: self._rasters.read(*key, box) for key in self._scene.images}
        label = self._truth.read(box).values
        for place in todo:
            part = np.s_[:, place.column - column:place.column - column + tile]
            files, seen = {}, np.zeros((tile, tile), bool)
            for (number, step), found in pixels.items():
                sensor = self._dataset.sensors[number]
                if sensor.static or found.seen[part].any():
                    files[self._dataset.feature_name(place.id, number, step)] = self._tiff(
                        found.values[part], place, sensor.nodata)
                    if not sensor.static:
                        seen |= found.seen[part]
            if seen.any() and seen.mean() >= self._options.min_valid:
                name, nodata = self._dataset.label_name(place.id), self._dataset.target.nodata
                self._put(place, files | {name: self._tiff(label[part], place, nodata)})
                written.add(place)
        return written

    def _whole(self, place: Place) -> Path:
        """The file that a chip has when it is whole."""
        if self._options.form == "tiff":
            return self._out / self._dataset.folders.target / self._dataset.label_name(place.id)
        return self._out / chip_file.CHIPS / f"{place.id}{chip_file.SUFFIX}"

    def _put(self, place: Place, files: dict[str, bytes]) -> None:
        """`files`: the label last."""
        whole = self._whole(place)
        if self._options.form != "tiff":
            write_chip(whole, encode_chip(place.id, "train", self._dataset, files, self._options.form))
            return
        for name, data in files.items():
            path = self._out / self._dataset.folders.train / name
            tiff.write_bytes(whole if name == whole.name else path, data)

    def _tiff(self, image: np.ndarray, place: Place, nodata: float | None) -> bytes:
        """A GeoTIFF of [tile, tile, bands]: bare pixels behind the header, as `engine.data.tiff.tiff` reads fastest."""
        height, width, bands = image.shape
        # In one strip: of several, GDAL puts those that are empty behind the others, and takes the last for a whole one
        profile = {"driver": "GTiff", "height": height, "width": width, "count": bands, "dtype": image.dtype,
                   "nodata": nodata, "interleave": "pixel", "blockysize": height, "crs": self._scene.grid.crs,
                   "transform": self._scene.grid.part(place.row, place.column)}
        with rasterio.MemoryFile() as memory:
            with memory.open(**profile) as file:
                file.write(np.moveaxis(image, -1, 0))
            return bytes(memory.getbuffer())

    def finish(self) -> None:
        """What makes the folder one that can be trained on."""
        if self._options.form == "tiff":
            text = yaml.safe_dump(self._dataset.dump(), sort_keys=False, allow_unicode=True)
            write_text(self._out / FILE, text)
        else:
            write_manifest(self._out, self._dataset, self._options.form)


def _fingerprint(scene: Scene, target: Path) -> int:
    """Of what is cut: files by place, size and time of change."""
    status = target.stat()
    about = {"scene": scene.about(), "target": [str(target.resolve()), status.st_size, status.st_mtime_ns]}
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _claim(out: Path, note: dict[str, Any]) -> None:
    """Mark `out` as being cut, or refuse a folder that holds something else."""
    path = out / NOTE
    if path.is_file():
        try:
            found = read_json(path)
            differs = [key for key in note if found[key] != json.loads(json.dumps(note[key]))]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: cannot be read ({error!r}); remove {out} or choose another folder") from None
        if differs:
            raise DataError(f"{out}: was cut otherwise ({', '.join(differs)} differ, see {NOTE}); remove it or choose "
                            f"another folder")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is not empty and nothing that was cut; choose another folder")
    sweep(out / chip_file.CHIPS)
    for part in (*out.glob(".*.part"), *out.glob("*/.*.tif.*.part")):  # left by a run that was killed
        part.unlink()
    write_text(path, json.dumps(note, indent=1) + "\n")
