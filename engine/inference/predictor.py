"""Batch inference: weights and a data folder in; maps, metrics and pictures out."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine.base.distributed import Threads, own_cores, rank, share_of_host, together
from engine.base.errors import DataError
from engine.base.files import write_text
from engine.base.progress import Progress
from engine.base.texts import read_yaml
from engine.config import parse_config
from engine.data.batch import Batch
from engine.data.dataset import Dataset, described, differences
from engine.data.forms import open_source, read_label
from engine.data.index import Chip, open_index
from engine.data.loader import Loader
from engine.data.selection.chips import select_chips
from engine.data.source import Source
from engine.data.tiff import tiff
from engine.inference import made, pictures
from engine.inference.chips import Forward, evaluation_requests, predict_chips
from engine.inference.cudagraphs import Graphed
from engine.inference.fold import optimize_for_inference
from engine.inference.one_by_one import OneByOne, samples_at_once
from engine.model import weights
from engine.run.background import Background

VIEWS_AT_ONCE = 4  # of a batch in one forward pass, on a GPU
SCALED_BY = 64  # labels that the scatter's axes are chosen by


def choose_chips(data: Path, split: str, run: Path) -> list[Chip]:
    """The chips of `data` to predict with the weights `run`, whose description `data` is read by if it has none.

    `split`: "train", "test" or "all" of what lies there; "validation": those that `run`, a run folder or one of its
    weights, held out; "auto": test chips where there are any, else all.  Raises DataError where that is none.
    """
    if split == "validation":
        recipe = (run if run.is_dir() else run.parent.parent) / "config.yaml"
        if not recipe.is_file():
            raise DataError(f"--split validation: {run} is not a run's folder (no config.yaml), nor in its weights/, "
                            f"so nothing says which chips were held out; give --weights a run folder, or another "
                            f"--split")
        try:
            raw = read_yaml(recipe)
            raw["data"]["path"] = str(data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{recipe}: is damaged ({error}), so nothing says which chips were held out; bring it "
                            f"back, or give another --split") from None
        return select_chips(parse_config(raw, str(recipe)))[1]
    index = open_index(data, described(weights.read_notes(run), str(run)))
    chips = list(index.chips) if split == "all" else index.split(split if split != "auto" else "test")
    if not chips and split == "auto":
        chips = list(index.chips)
    if not chips:
        raise DataError(f"{data}: no chips of split {split!r}; it holds {len(index)} others, see --split all")
    return chips


def predict(weights_path: Path, chips: Sequence[Chip], out: Path, *, device: torch.device, precision: str = "fp32",
            tta: Sequence[str] = ("id",), batch_size: int | None = None, n_pictures: int = 16,
            nodata_months: str = "fail", readers: Threads = "auto", threads: Threads = "auto",
            backbone: str | None = None, optimize: bool = True, compile: bool = False,
            cuda_graphs: bool = False) -> dict[str, float]:
    """Write a map for every chip into `out`, by the name of its label: float32, in the target's unit; where labels
    exist, metrics and pictures as well.  Maps that an earlier call with the same arguments has written there stay.

    optimize: predict with `engine.inference.fold.optimize_for_inference` of the model and, on a GPU, up to
    VIEWS_AT_ONCE views in one batch, on a CPU one chip a core (`engine.inference.one_by_one`); False: with the model as
    it trains.  compile: its blocks too, which takes minutes at first and pays for thousands of chips.  cuda_graphs:
    replay `engine.inference.cudagraphs`, which pays for small batches on a GPU.
    Returns the metrics, empty where no label holds a pixel of target.  Under a launcher, ranks share the chips.  Raises
    WeightsError, DataError (also where `out` holds other maps), DeviceError (cuda_graphs without a GPU).
    """
    backend = "gpu" if device.type == "cuda" else "cpu"
    batch_size = batch_size or samples_at_once(device)
    alone = optimize and backend == "cpu" and not compile  # what else is in its batch does not change a map
    with together():
        model = weights.load_model(weights_path, device, backbone).eval()
        _fit(described(weights.read_notes(weights_path), str(weights_path)), chips[0], weights_path)
        if optimize:
            model = optimize_for_inference(model, "bf16" if precision == "bf16" else "fp32", compile)
        forward: Forward = Graphed(model) if cuda_graphs else model
        if alone:
            forward = OneByOne(forward, own_cores())
        source = open_source(chips, nodata_months=nodata_months, backend=backend)
        options = {"tta": list(tta), "precision": precision, "batch": None if alone else batch_size, "device": backend,
                   "nodata_months": nodata_months, "backbone": backbone, "optimize": optimize, "compile": compile,
                   "cuda_graphs": cuda_graphs}
        goes_on = rank() == 0 and made.claim(out, made.description(weights_path, chips, source, options))
        loader = Loader(source, batch_size=batch_size, device=device, backend=backend, precision=precision, warp=False,
                        readers=share_of_host(readers), threads=share_of_host(threads))
    share = sum(request.valid for requests in evaluation_requests(chips, batch_size) for request in requests)
    with Progress("predicting", share, "chip", quiet=rank() != 0) as progress, Writer(out, progress) as writer:
        if goes_on:
            progress.say(f"{out}: goes on; maps that are there and whole stay")
        table = predict_chips(forward, loader, chips, micro_batch=batch_size, tta=tta, precision=precision,
                              device=device, views_at_once=VIEWS_AT_ONCE if optimize and backend == "gpu" else 1,
                              each=writer.add, made=writer.written)
        with together():  # all have written before anyone reads
            writer.finish()
    per_chip = table.per_chip()
    metrics = table.metrics() if len(per_chip) else {}
    if rank() == 0:
        if metrics:
            _write_metrics(out / "metrics.json", metrics, per_chip, chips, tta, precision)
        _draw(out, chips, source, n_pictures, metrics)
    return metrics


def _fit(trained: Dataset, chip: Chip, path: Path) -> None:
    """Raises DataError where the images of `chip` are others than the weights at `path` were trained on."""
    other = differences(trained, chip.dataset)
    if other:
        raise DataError(f"{chip.folder}: does not hold what {path} was trained on: {'; '.join(other[:3])}; give data "
                        f"of {trained.name!r}, or other weights")


class Writer:
    """Writes a batch's maps while the device already works on the next one, on a thread of its own."""

    def __init__(self, out: Path, progress: Progress):
        self._out, self._progress = out, progress
        self._waiting: deque[_Pending] = deque()
        self._background = Background()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._background.close()

    def written(self, chips: Sequence[Chip]) -> np.ndarray | None:
        """The maps [N, H, W] of `chips` where all of them were written by an earlier call."""
        maps = made.whole_maps(self._out, chips)
        if maps is not None:
            self._progress.skip(len(maps))
        return maps

    def add(self, batch: Batch, prediction: torch.Tensor) -> None:
        maps, valid = (tensor.to("cpu", non_blocking=True) for tensor in (prediction[:, 0], batch.valid))
        done = None
        if prediction.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()  # behind both copies
        self._waiting.append(_Pending(batch.chips, maps, valid, done))
        if len(self._waiting) > 1:
            self._write(self._waiting.popleft())

    def finish(self) -> None:
        """Wait until all is written.  Raises DataError where something could not be, as a later `add` would."""
        while self._waiting:
            self._write(self._waiting.popleft())
        self._background.finish()

    def _write(self, pending: _Pending) -> None:
        if pending.done is not None:
            pending.done.synchronize()
        self._background.do(self._files, pending.chips, pending.maps.numpy(), pending.valid.tolist())

    def _files(self, chips: list[Chip], maps: np.ndarray, valid: list[bool]) -> None:
        for chip, values, wanted in zip(chips, maps, valid):
            if wanted:
                tiff.write_map(_place(self._out, chip), values)
                self._progress.advance()


class _Pending(NamedTuple):
    chips: list[Chip]
    maps: torch.Tensor  # [B, H, W]
    valid: torch.Tensor  # [B]
    done: torch.cuda.Event | None


def _write_metrics(path: Path, metrics: dict[str, float], per_chip: np.ndarray, chips: Sequence[Chip],
                   tta: Sequence[str], precision: str) -> None:
    names = [name for name in per_chip.dtype.names or () if name != "row"]
    rows = {chips[int(row["row"])].id: {name: float(row[name]) for name in names} for row in per_chip}
    content = {"metrics": metrics, "tta": list(tta), "precision": precision, "chips": rows}
    write_text(path, json.dumps(content, indent=1) + "\n")


def _draw(out: Path, chips: Sequence[Chip], source: Source, n_pictures: int, metrics: dict[str, float]) -> None:
    """Panels of the first chips, and one scatter over all that have a label; read back from the maps written."""
    labelled = [chip for chip in chips if chip.label is not None]
    some = [label for label in (read_label(chip) for chip in labelled[:SCALED_BY]) if not np.isnan(label).all()]
    ends = [(float(np.nanpercentile(x, 0.1)), float(np.nanpercentile(x, 99.9))) for x in some] or [(0.0, 1.0)]
    scatter = pictures.Scatter(chips[0].dataset.target, max(top for _, top in ends), min(low for low, _ in ends))
    for chip in labelled:
        scatter.add(_read_map(out, chip), read_label(chip))
    if metrics:
        lines = [f"{metrics['n_chips']} chips", f"RMSE {metrics['rmse_per_chip']:.2f} (mean over chips)",
                 f"RMSE {metrics['rmse_pooled']:.2f} (pooled)",
                 f"predicting the mean {metrics['rmse_of_mean']:.2f}", f"R² {metrics['r2']:.3f}"]
        pictures.save(scatter.figure(lines), out / "scatter.png")
    for chip in chips[:n_pictures]:
        stack = source.stack(chip)
        truth = stack.label[..., 0] if chip.label is not None else None
        figure = pictures.chip_figure(chip.id, stack, _read_map(out, chip), truth)
        pictures.save(figure, out / "pictures" / f"{chip.id}.png")


def _place(out: Path, chip: Chip) -> Path:
    return made.map_path(out, chip.dataset, chip.id)


def _read_map(out: Path, chip: Chip) -> np.ndarray:
    return made.read_map(_place(out, chip), chip.dataset)
