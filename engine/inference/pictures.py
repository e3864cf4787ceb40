"""Pictures of results: a panel per chip (what was seen, the truth, the prediction, the error) and a scatter."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from engine.base.errors import DataError
from engine.base.files import atomic_write
from engine.data.dataset import Dataset, Picture, Target
from engine.data.source import Stack

_MAP = "YlGn"
_NONE = "0.8"  # grey: no target


def quicklook(stack: Stack) -> tuple[np.ndarray, str]:
    """A step as people look at it: [H, W, 3] in 0..1 and a title.

    The first of the description's `pictures` of which there is anything: in its clearest step, where it says which band
    shows clouds, else in the first one.
    """
    dataset = stack.dataset
    for picture in dataset.pictures or (_plain(dataset),):
        number = next(n for n, sensor in enumerate(dataset.sensors) if sensor.name == picture.sensor)
        sensor = dataset.sensors[number]
        places = [sensor.bands.index(band) for band in picture.bands]
        images, absent = stack.images[number], sensor.absent[places]
        seen = [k for k, image in enumerate(images) if (image[..., places] != absent).any()]
        if not seen:
            continue
        shown = seen[0]
        if picture.clouds is not None:
            clouds = sensor.bands.index(picture.clouds)
            shown = min(seen, key=lambda k: images[k, ..., clouds].mean())
        values = images[shown][..., places].astype(np.float32)
        if sensor.nodata is not None:
            values[values == np.float32(sensor.nodata)] = np.nan
        return _colours(values, picture), f"{picture.title}, {dataset.steps[stack.months[shown]]}"
    return np.zeros((dataset.tile, dataset.tile, 3)), "nothing seen"


def _plain(dataset: Dataset) -> Picture:
    sensor = dataset.sensors[0]
    return Picture(title=sensor.name, sensor=sensor.name, bands=sensor.bands[:3 if len(sensor.bands) > 2 else 1])


def _colours(bands: np.ndarray, picture: Picture) -> np.ndarray:
    """[H, W, 1, 2 or 3], NaN for nothing seen → [H, W, 3] in 0..1; of two, their difference is the third."""
    if bands.shape[-1] == 2:
        bands = np.concatenate([bands, bands[..., :1] - bands[..., 1:]], -1)
    if picture.low is not None:
        low, high = np.array(picture.low), np.array(picture.high)
        scaled = np.clip((bands - low) / (high - low), 0, 1)
    else:
        low, high = np.nanpercentile(bands, (1, 99))
        scaled = np.clip((bands - low) / max(high - low, 1e-6), 0, 1) ** 0.7
    return np.broadcast_to(np.nan_to_num(scaled), (*scaled.shape[:2], 3))


def chip_figure(name: str, stack: Stack, prediction: np.ndarray, truth: np.ndarray | None) -> Figure:
    """Panel of one chip; `prediction` and `truth` [H, W] in the target's unit, grey where `truth` is NaN.

    A truth of nothing else is not shown.
    """
    target = stack.dataset.target
    truth = None if truth is None or np.isnan(truth).all() else truth
    image, title = quicklook(stack)
    figure = Figure(figsize=(13 if truth is not None else 7, 3.6), layout="constrained")
    axes = figure.subplots(1, 4 if truth is not None else 2)
    axes[0].imshow(image)
    axes[0].set_title(title)
    low, top = _scale(*(x for x in (truth, prediction) if x is not None))
    maps = [(truth, "truth")] if truth is not None else []
    for axis, (values, what) in zip(axes[1:], [*maps, (prediction, "prediction")]):
        shown = axis.imshow(values, cmap=_MAP, vmin=low, vmax=top)
        axis.set_title(what)
    figure.colorbar(shown, ax=axes[1:3].tolist() if truth is not None else axes[1], label=_label(target), shrink=0.85)
    if truth is not None:
        error = prediction - truth
        limit = float(np.nanpercentile(np.abs(error), 99)) or 1.0
        shown = axes[3].imshow(error, cmap="RdBu", vmin=-limit, vmax=limit)
        axes[3].set_title(f"prediction − truth, RMSE {np.sqrt(np.nanmean(error.astype(np.float64) ** 2)):.1f}")
        figure.colorbar(shown, ax=axes[3], label=target.unit, shrink=0.85)
    figure.suptitle(f"chip {name}")
    for axis in axes:
        axis.set_facecolor(_NONE)
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def months_figure(title: str, stack: Stack, labelled: bool) -> Figure:
    """Every month of a chip or a scene as `quicklook` shows it, and its label, if it has a pixel of target."""
    labelled = labelled and not np.isnan(stack.label).all()
    shown = [quicklook(stack._replace(images=tuple(images[k:k + 1] for images in stack.images),
                                      months=stack.months[k:k + 1])) for k in range(len(stack.months))]
    columns = 5
    rows = -(-(len(shown) + labelled) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (image, step) in zip(axes, shown):
        axis.imshow(image)
        axis.set_title(step, fontsize=9)
    if labelled:
        axis = axes[len(shown)]
        low, top = _scale(stack.label)
        drawn = axis.imshow(stack.label[..., 0], cmap=_MAP, vmin=low, vmax=top)
        axis.set_title(_label(stack.dataset.target), fontsize=9)
        figure.colorbar(drawn, ax=axis, shrink=0.8)
    figure.suptitle(title)
    return figure


def _label(target: Target) -> str:
    return f"{target.name}, {target.unit}" if target.unit else target.name


def _scale(first: np.ndarray, *others: np.ndarray) -> tuple[float, float]:
    """Ends of the colours of maps: from 0, or what few pixels of the first are below, to what few of all exceed."""
    values = np.concatenate([x.ravel() for x in (first, *others)])
    return _ends(float(np.nanpercentile(first, 0.5)), float(np.nanpercentile(values, 99.5)))


def _ends(low: float, top: float) -> tuple[float, float]:
    low = min(low, 0.0)
    return low, top if top > low else low + 1.0


class Scatter:
    """Predicted against true of any number of pixels, as a histogram on a fixed grid from 0, or `low` if it is less, to
    `top`."""

    def __init__(self, target: Target, top: float, low: float = 0.0, bins: int = 150):
        self._target = target
        self.edges = np.linspace(*_ends(low, top), bins + 1)
        self.counts = np.zeros((bins, bins))

    def add(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        low, top = self.edges[[0, -1]]
        true, predicted = (values.ravel().clip(low, top) for values in (truth, prediction))
        counts, _, _ = np.histogram2d(true, predicted, self.edges)  # NaN is in no bin
        self.counts += counts

    def figure(self, lines: Sequence[str]) -> Figure:
        """`lines`: what to write into the corner, such as the RMSE."""
        figure = Figure(figsize=(6, 5.2), layout="constrained")
        axis = figure.subplots()
        counts = np.ma.masked_equal(self.counts.T, 0)
        shown = axis.pcolormesh(self.edges, self.edges, counts, norm=LogNorm(vmin=1), cmap="viridis")
        axis.plot(self.edges[[0, -1]], self.edges[[0, -1]], color="black", linewidth=0.8)
        label = _label(self._target)
        axis.set(xlabel=f"true {label}", ylabel=f"predicted {label}", aspect="equal")
        axis.text(0.03, 0.97, "\n".join(lines), transform=axis.transAxes, va="top",
                  bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none"})
        figure.colorbar(shown, label="pixels")
        return figure


def save(figure: Figure, path: Path) -> None:
    """As PNG.  Raises DataError where it cannot be written."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    try:
        with atomic_write(path) as handle:
            handle.write(buffer.getvalue())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); make room, or write elsewhere") from None


def pixels(figure: Figure) -> np.ndarray:
    """The figure as [H, W, 3] uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


