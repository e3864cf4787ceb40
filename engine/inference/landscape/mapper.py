"""A map of a landscape: weights and a scene in, one Cloud-Optimised GeoTIFF out, with a picture and what it adds up to.

The scene is cut into windows of the size that the weights were trained with, since what a network answers depends on it
(squeeze-and-excitation averages over the window).  Windows take the path of chips: read ahead, made into batches by
DALI, run through the model.  They are blended row by row, and every finished band of rows is a file beside the map
(`engine.inference.landscape.bands`): a run that was killed goes on with the bands that are missing, and ranks share
them.  A band is a pure function of scene, weights and options; so is the map, however it came about.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.base.distributed import Threads, from_rank_0, own_cores, rank, share_of_host, together, world
from engine.base.errors import ConfigError, DataError
from engine.base.files import fsync, write_text
from engine.base.made import alone, claim
from engine.base.progress import Progress
from engine.data.batch import Batch, Request
from engine.data.dataset import Dataset, described, differences
from engine.data.loader import Loader
from engine.data.scene.gdal import RASTER_ERRORS, rasterio
from engine.data.scene.grid import Window, Windows
from engine.data.scene.scene import Scene, open_scene
from engine.data.scene.source import SceneSource
from engine.inference import pictures
from engine.inference.chips import Forward, predict_views
from engine.inference.fold import optimize_for_inference
from engine.inference.landscape.area import Area, read_zones
from engine.inference.landscape.bands import NODATA, ROOM, Bands, write_cog
from engine.inference.landscape.blend import Blend
from engine.inference.landscape.picture import map_figure
from engine.inference.one_by_one import OneByOne, samples_at_once
from engine.model import weights
from engine.run.background import Background

OVERLAP = 0.25  # of a window; why: docs/landscapes.md


@dataclass(frozen=True)
class Options:
    """How to predict.  overlap: pixels, an even number up to half a window; None: OVERLAP of it.  spread: a second band
    with the standard deviation over all views of all weights.  batch: windows at once; None: what
    serves."""

    tta: tuple[str, ...] = ("id",)
    precision: str = "fp32"
    overlap: int | None = None
    spread: bool = False
    batch: int | None = None
    backbone: str | None = None
    compile: bool = False


def predict_scene(weights_paths: Sequence[Path], scene_path: Path, out: Path, options: Options, *,
                  device: torch.device, zones: Path | None = None, readers: Threads = "auto",
                  threads: Threads = "auto") -> dict[str, Any]:
    """Write the map `out` (.tif), averaged over the weights, and beside it a picture (.png) and what it adds up to
    (.json), which is returned.

    Where `out` is a map of this scene by these weights and options already, only the last two are made.  Under a
    launcher, ranks share the work; rank 0 alone gets the result (others an empty one).  Raises DataError,
    WeightsError, ConfigError.
    """
    if out.suffix.lower() not in (".tif", ".tiff"):
        raise ConfigError(f"--out {out}: a map is a GeoTIFF; give a name that ends in .tif")
    if zones is not None and zones.resolve() == out.with_suffix(".json").resolve():
        raise ConfigError(f"--zones {zones}: is where the map's own numbers go; give --out or the zones another name")
    with together():
        models, trained = _models(weights_paths, options, device)
        scene = open_scene(scene_path, trained)
        _fit(trained, scene, weights_paths[0])
        windows = Windows(scene.grid.height, scene.grid.width, trained.tile, _overlap(options, trained.tile))
        polygons = read_zones(zones, scene.grid) if zones is not None else []
    about = _about(weights_paths, scene, options, windows, device)
    bands = Bands(out.with_name(f"{out.name}.parts"), windows, 2 if options.spread else 1)
    with ExitStack() as held:
        missing: list[int] | None = None
        with together():
            if rank() == 0 and not _is_made(out, about):
                held.enter_context(alone(bands.folder))
                claim(bands.folder, about, f"remove {bands.folder} to begin anew, or give another --out")
                missing = bands.missing
        missing = from_rank_0(missing)
        if missing is not None:
            mine = share(missing, [_cost(scene, windows, number) for number in missing], world(), rank())
            Mapper(models, scene, windows, bands, options, device, readers, threads).run(mine)
        with together():
            pass  # all have written
        if rank() != 0:
            return {}
        area = Area(scene.grid, trained.target.unit, polygons)
        if missing is not None:
            if bands.missing:
                raise DataError(f"{bands.folder}: {len(bands.missing)} of {len(missing)} bands that other ranks have "
                                f"made are not there; put --out on a disk that all hosts share")
            beside = out.with_name(f".{out.name}.part.tif")
            try:
                write_cog(bands, windows, scene.grid, beside, _layers(trained, options), _tags(trained, about))
                measure(beside, windows, area, bands)
                result = _finish(out, beside, area, about, trained)
                beside.replace(out)
                fsync(out.parent)
            finally:
                for part in out.parent.iterdir():
                    if part.name.startswith(beside.name):  # what GDAL puts beside it, too
                        part.unlink()
        else:
            measure(out, windows, area)
            result = _finish(out, out, area, about, trained)
        shutil.rmtree(bands.folder, ignore_errors=True)
    return result


# What is to be made -----------------------------------------------------------------------------------------------


def _models(paths: Sequence[Path], options: Options, device: torch.device) -> tuple[list[Forward], Dataset]:
    """Ready to predict, and what they were trained on."""
    models: list[Forward] = []
    descriptions = [described(weights.read_notes(path), str(path)) for path in paths]
    for path, other in zip(paths, descriptions):
        wrong = differences(descriptions[0], other)
        if wrong or other.target.name != descriptions[0].target.name:
            raise DataError(f"{path}: was trained on other data than {paths[0]} "
                            f"({'; '.join(wrong[:3]) or f'its target is {other.target.name}'}); an ensemble's weights "
                            f"take the same images and mean the same")
        model = weights.load_model(path, device, options.backbone).eval()
        model = optimize_for_inference(model, "bf16" if options.precision == "bf16" else "fp32", options.compile)
        models.append(OneByOne(model, own_cores()) if _alone(options, device) else model)
    return models, descriptions[0]


def _fit(trained: Dataset, scene: Scene, path: Path) -> None:
    other = differences(trained, scene.dataset)
    if other:
        raise DataError(f"{scene.path}: does not hold what {path} was trained on: {'; '.join(other[:3])}; give a scene "
                        f"of {trained.name!r}, or other weights")


def _overlap(options: Options, tile: int) -> int:
    overlap = round(OVERLAP * tile / 2) * 2 if options.overlap is None else options.overlap
    if not 0 <= overlap <= tile // 2 or overlap % 2:
        raise ConfigError(f"--overlap {overlap}: give an even number of pixels from 0 to {tile // 2}, half a window of "
                          f"the weights")
    return overlap


def _about(paths: Sequence[Path], scene: Scene, options: Options, windows: Windows,
           device: torch.device) -> dict[str, Any]:
    """What every byte of the map follows from, as JSON."""
    return {"weights": [weights.identify(path) for path in paths], "tta": list(options.tta),
            "precision": options.precision, "overlap": windows.overlap, "spread": options.spread,
            "device": device.type, "compile": options.compile, "scene": scene.about(),
            **({} if _alone(options, device) else {"batch": _batch(options, device)})}


def _alone(options: Options, device: torch.device) -> bool:
    """Whether each window goes through the model by itself; else a batch's are convolved together."""
    return device.type == "cpu" and not options.compile


def _batch(options: Options, device: torch.device) -> int:
    return options.batch or samples_at_once(device)


def _is_made(out: Path, about: dict[str, Any]) -> bool:
    """Raises DataError where `out` is something else."""
    if not out.exists():
        return False
    try:
        with rasterio.open(out) as raster:
            made = raster.tags().get("MADE")
    except RASTER_ERRORS:
        made = None
    if made != _digest(about):
        raise DataError(f"{out}: is there already, and is no map of this scene by these weights and options; remove "
                        f"it, or give another --out")
    return True


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _layers(dataset: Dataset, options: Options) -> list[tuple[str, str]]:
    target = dataset.target
    spread = [(f"{target.name}, standard deviation over views", target.unit)] if options.spread else []
    return [(target.name, target.unit), *spread]


def _tags(dataset: Dataset, about: dict[str, Any]) -> dict[str, str]:
    return {"TIFFTAG_SOFTWARE": "biomass-engine", "TARGET": dataset.target.name, "UNITS": dataset.target.unit,
            "MODEL": ", ".join(one["path"] for one in about["weights"]),
            "MODEL_SHA256": ", ".join(one["sha256"] for one in about["weights"]), "TTA": ", ".join(about["tta"]),
            "MADE": _digest(about)}


# The work -----------------------------------------------------------------------------------------------------------


def share(numbers: Sequence[int], costs: Sequence[float], ranks: int, rank: int) -> list[int]:
    """Which of the bands `numbers`, in order, are this rank's: a run of them, of about equal cost."""
    ends = np.cumsum(costs)
    middle = ends - np.array(costs) / 2
    owner = np.minimum((middle / max(ends[-1], 1e-9) * ranks).astype(int), ranks - 1) if len(numbers) else []
    return [number for number, owned in zip(numbers, owner) if owned == rank]


def _cost(scene: Scene, windows: Windows, number: int) -> float:
    """Images that the windows of a row have, by the rasters' extents."""
    row = windows.rows[number]
    return 1 + sum(extent.row < row + windows.tile and extent.row + extent.height > row
                   for extent in scene.extents.values())


class _Waiting(NamedTuple):
    """A batch on its way from the device."""

    places: list[tuple[int, int]]  # row and column of its windows
    seen: list[np.ndarray]
    values: torch.Tensor  # [n, layers, tile, tile], on the host when `done`
    done: Any  # torch.cuda.Event, or None


class Mapper:
    """Makes bands of a map."""

    def __init__(self, models: list[Forward], scene: Scene, windows: Windows, bands: Bands, options: Options,
                 device: torch.device, readers: Threads, threads: Threads):
        backend = "gpu" if device.type == "cuda" else "cpu"
        self._models, self._windows, self._bands, self._options = models, windows, bands, options
        self._batch = min(_batch(options, device), len(windows.columns))
        readers = share_of_host(readers)
        self._source = SceneSource(scene, windows, readers)
        self._loader = Loader(self._source, batch_size=self._batch, device=device, backend=backend,
                              precision=options.precision, warp=False, readers=readers,
                              threads=share_of_host(threads))
        self._alone = _alone(options, device)
        self._at_once = min(4, len(options.tta)) if device.type == "cuda" else 1

    def run(self, mine: Sequence[int]) -> None:
        """Make the bands `mine`.  What other ranks cannot do is not waited for."""
        # A band takes the windows of its own row and of the one before
        rows = sorted({row for number in mine for row in (number - 1, number) if row >= 0 and self._windows.overlap}
                      | set(mine))
        batches = list(self._batches(rows))
        last = len(self._windows.columns) - 1
        with Progress("mapping", sum(map(len, batches)), "window", quiet=rank() != 0) as progress:
            writer = Background()
            try:
                # After a gap in `rows` it holds an older row's end, which no band of `mine` is made of
                blend = Blend(self._windows, self._bands.layers)
                for waiting in self._predicted(batches):
                    for (row, column), values, seen in zip(waiting.places, waiting.values.numpy(), waiting.seen):
                        if seen.any():
                            blend.add(Window(self._windows.rows[row], self._windows.columns[column]), values, seen)
                        if column == last:
                            band = blend.finish_row(row)
                            if row in mine:
                                writer.do(self._bands.write, row, band)
                    progress.advance(len(waiting.places))
                writer.finish()
            finally:
                writer.close()

    def _batches(self, rows: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Windows by row and column, a batch each.  Where those of a batch are convolved together, none holds windows
        of two rows: whichever rank has a row, its batches are the same."""
        columns = range(len(self._windows.columns))
        runs = ([[(row, column) for row in rows for column in columns]] if self._alone else
                [[(row, column) for column in columns] for row in rows])
        return (run[first:first + self._batch] for run in runs for first in range(0, len(run), self._batch))

    def _predicted(self, batches: Sequence[list[tuple[int, int]]]) -> Iterator[_Waiting]:
        """Each batch when the next one has been given to the device."""
        requests = ([Request(self._source.chip(*place)) for place in batch] for batch in batches)
        waiting: deque[_Waiting] = deque()
        for places, batch in zip(batches, self._loader.batches(requests)):
            waiting.append(self._predict(batch, places))
            if len(waiting) > 1:
                yield _arrived(waiting.popleft())
        while waiting:
            yield _arrived(waiting.popleft())

    def _predict(self, batch: Batch, places: list[tuple[int, int]]) -> _Waiting:
        seen = [self._source.seen.pop(chip.id) for chip in batch.chips]
        if not any(mask.any() for mask in seen):
            return _Waiting(places, seen, torch.empty(len(seen), self._bands.layers, 0, 0), None)
        options = self._options
        views = torch.cat([view for model in self._models
                           for view in predict_views(model, batch, options.tta, options.precision, self._at_once)], 1)
        # [n, 1, tile, tile] of each view of each model, added in their order
        values = views.mean(1, keepdim=True)
        if options.spread:
            values = torch.cat([values, views.std(1, correction=0, keepdim=True)], 1)
        host, done = values.to("cpu", non_blocking=True), None
        if values.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return _Waiting(places, seen, host, done)


def _arrived(waiting: _Waiting) -> _Waiting:
    if waiting.done is not None:
        waiting.done.synchronize()
    return waiting


# The end --------------------------------------------------------------------------------------------------------------


def measure(path: Path, windows: Windows, area: Area, bands: Bands | None = None) -> None:
    """Add the map at `path` to `area`.  bands: what it was made from, which it is compared with.

    Raises DataError where it cannot be read, or differs: a disk that was full may have kept less than it was given.
    """
    count = len(windows.rows)
    with Progress("measuring", count, "band") as progress, rasterio.open(path) as raster:
        for number in range(count):
            first, end = windows.band(number)
            try:
                values = raster.read(window=rasterio.windows.Window(0, first, windows.width, end - first))
            except RASTER_ERRORS as error:
                raise DataError(f"{path}: cannot be read ({error}); make it again") from None
            if bands is not None and not np.array_equal(np.moveaxis(values, 0, -1), bands.read(number)):
                raise DataError(f"{path}: does not hold what was written; make room or mend the disk, then run the "
                                f"same command again")
            area.add(first, np.where(values[0] == NODATA, np.float32(np.nan), values[0]))
            progress.advance()


def _finish(out: Path, raster: Path, area: Area, about: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    result = area.result()
    content = {"map": out.name, "target": dataset.target.name, **result, "weights": about["weights"],
               "tta": about["tta"], "precision": about["precision"], "overlap": about["overlap"],
               "scene": about["scene"]["images"]}
    numbers = out.with_suffix(".json")
    try:
        write_text(numbers, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{numbers}: cannot be written ({error.strerror}); {ROOM}") from None
    pictures.save(map_figure(raster, dataset.target, out.name), out.with_suffix(".png"))
    return result
