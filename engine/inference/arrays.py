"""Prediction of arrays, for notebooks: `engine.predict`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.base.errors import ConfigError, DataError, DeviceError, WeightsError
from engine.data.batch import Batch
from engine.data.dataset import Dataset, Sensor, described
from engine.inference.chips import chosen_views, predict_batch
from engine.inference.fold import optimize_for_inference
from engine.model.unet import BiomassUNet
from engine.model.weights import load_model, read_notes


def predict(weights: str | Path, images: Any, dropped: np.ndarray | None = None, tta: Sequence[str] = ("id",),
            device: str = "auto") -> Any:
    """Maps [B,H,W] float32, in the target's unit, of images [B,T,C,H,W] in the files' units, NaN or the description's
    nodata for nothing seen.

    weights: a run folder, a safetensors file, or the winner's.  images: NumPy, or xarray as `engine.open_chip(…)
    .to_xarray()` gives it (`images` (month, band, y, x)), for which an xarray (y, x) comes back.  dropped [B,T] bool:
    months that do not take part; None: those of which nothing was seen, static sensors aside.  tta: views to average
    over, of `engine.inference.chips.VIEWS`, or d4, all.  device: "auto", "cpu" or "gpu".  The model is kept until other
    weights are asked for.
    Raises DataError (other bands or months than the weights were trained on, no month left, infinity), WeightsError,
    ConfigError (tta, device), DeviceError (no GPU).
    """
    views = chosen_views(tta)
    place = _device(device)
    files = [Path(weights), *Path(weights).glob("weights/*")]
    stamp = max((path.stat().st_mtime_ns for path in files if path.exists()), default=0)
    model, dataset = _loaded(str(weights), stamp, str(place))
    if hasattr(images, "to_dataset") or hasattr(images, "data_vars"):
        return _of_xarray(weights, images, dataset, dropped, tta, device)
    values = np.asarray(images, np.float32)
    if values.ndim != 5 or values.shape[1:3] != (dataset.months, dataset.channels) or not values.size:
        raise DataError(f"images {list(values.shape)}: {weights} was trained on [B,{dataset.months},{dataset.channels},"
                        f"H,W]: {dataset.months} steps ({dataset.steps[0]} to {dataset.steps[-1]}) of the bands "
                        f"{', '.join(dataset.bands)}")
    low, span, nodata, moving = (np.concatenate(arrays)[:, None, None] for arrays in zip(*map(_bands, dataset.sensors)))
    nothing = np.isnan(values) | (values == nodata)
    if np.isinf(values).any():
        raise DataError("images: hold infinity; give NaN for what was not seen")
    gone = np.asarray(nothing[:, :, moving[:, 0, 0]].all(axis=(2, 3, 4)) if dropped is None else dropped, bool)
    if gone.shape != values.shape[:2]:
        raise DataError(f"dropped {list(gone.shape)}: give {list(values.shape[:2])}, each a month of a chip")
    empty = np.flatnonzero(gone.sum(1) == gone.shape[1])
    if empty.size:
        raise DataError(f"images: chip {empty[0]} has no month left to predict from")
    scaled = np.where(nothing, 0, (values - low) / span).astype(np.float32)
    scaled[gone] = 0
    unused = torch.empty(0)
    batch = Batch(torch.from_numpy(scaled).to(place), torch.from_numpy(gone), unused, unused, unused, [])
    return predict_batch(model, batch, views, "fp32")[:, 0].float().cpu().numpy()


def _bands(sensor: Sensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """[bands] each: low, span, nodata (NaN for none), and whether there is an image a step."""
    bands = len(sensor.bands)
    nodata = np.full(bands, np.nan if sensor.nodata is None else sensor.nodata, np.float32)
    return sensor.zero, sensor.span, nodata, np.full(bands, not sensor.static)


def _of_xarray(weights: str | Path, images: Any, dataset: Dataset, dropped: np.ndarray | None, tta: Sequence[str],
               device: str) -> Any:
    import xarray

    if hasattr(images, "data_vars") and "images" not in images:
        raise DataError(f"the xarray has {', '.join(map(str, images.data_vars))} and no 'images'; give the DataArray")
    array = images["images"] if hasattr(images, "data_vars") else images
    lacking = {"month", "band", "y", "x"} - set(array.dims)
    if lacking or [str(band) for band in array["band"].values] != list(dataset.bands):
        raise DataError(f"the xarray has dimensions {', '.join(map(str, array.dims))}; {weights} takes (month, band, "
                        f"y, x) with the bands {', '.join(dataset.bands)}")
    array = array.transpose(..., "month", "band", "y", "x")
    values = array.values.reshape(-1, *array.shape[-4:])
    maps = predict(weights, values, dropped, tta, device).reshape(*array.shape[:-4], *array.shape[-2:])
    kept = [name for name in array.dims if name not in ("month", "band")]
    return xarray.DataArray(maps, {name: array[name] for name in kept if name in array.coords}, kept,
                            dataset.target.name.lower(), {"units": dataset.target.unit})


def _device(wanted: str) -> torch.device:
    if wanted not in ("auto", "cpu", "gpu"):
        raise ConfigError(f"device {wanted!r}: give auto, cpu or gpu")
    if wanted == "gpu" and not torch.cuda.is_available():
        raise DeviceError("device gpu: torch sees no CUDA device here; give cpu, or auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=1)
def _loaded(weights: str, stamp: int, device: str) -> tuple[BiomassUNet, Dataset]:
    """The model of a file that was last written at `stamp`."""
    model, dataset = load_model(weights, device), described(read_notes(weights), weights)
    if model.in_channels != dataset.channels:
        raise WeightsError(f"{weights}: a model of {model.in_channels} bands, and it does not say which: its note "
                           f"'dataset' is missing (engine.model.weights.save_weights, extra=)")
    return optimize_for_inference(model), dataset
