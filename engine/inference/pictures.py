"""Pictures of results: a panel per chip (what was seen, the truth, the prediction, the error) and a scatter."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from engine.base.files import atomic_write
from engine.data.dataset import MONTHS, S1_NODATA
from engine.data.source import Stack

_BIOMASS = "YlGn"


def quicklook(stack: Stack) -> tuple[np.ndarray, str]:
    """The clearest month as people look at it: [H, W, 3] in 0..1 and a title.

    Sentinel-2 in natural colour from the month with the lowest mean cloud probability; Sentinel-1 in false colour
    (VV, VH, VV − VH) where no optical image exists.
    """
    seen = [k for k in range(len(stack.months)) if stack.s2[k].any()]
    if seen:
        clearest = min(seen, key=lambda k: stack.s2[k, ..., 10].mean())
        rgb = stack.s2[clearest][..., [2, 1, 0]].astype(np.float32)
        low, high = np.percentile(rgb, (1, 99))
        return np.clip((rgb - low) / max(high - low, 1), 0, 1) ** 0.7, f"Sentinel-2, {MONTHS[stack.months[clearest]]}"
    s1 = stack.s1[0]
    pair = s1[..., :2] if (s1[..., 0] != S1_NODATA).any() else s1[..., 2:]
    vv, vh = pair[..., 0], pair[..., 1]
    scaled = [np.clip((x - low) / (high - low), 0, 1)
              for x, low, high in ((vv, -20, 0), (vh, -28, -5), (vv - vh, 2, 12))]
    return np.stack(scaled, -1), f"Sentinel-1, {MONTHS[stack.months[0]]}"


def chip_figure(name: str, stack: Stack, prediction: np.ndarray, truth: np.ndarray | None) -> Figure:
    """Panel of one chip; `prediction` and `truth` [H, W] t/ha."""
    image, title = quicklook(stack)
    figure = Figure(figsize=(13 if truth is not None else 7, 3.6), layout="constrained")
    axes = figure.subplots(1, 4 if truth is not None else 2)
    axes[0].imshow(image)
    axes[0].set_title(title)
    top = float(np.percentile(np.concatenate([x.ravel() for x in (prediction, truth) if x is not None]), 99.5))
    maps = [(truth, "truth")] if truth is not None else []
    for axis, (values, what) in zip(axes[1:], [*maps, (prediction, "prediction")]):
        shown = axis.imshow(values, cmap=_BIOMASS, vmin=0, vmax=max(top, 1))
        axis.set_title(what)
    figure.colorbar(shown, ax=axes[1:3].tolist() if truth is not None else axes[1], label="AGBM, t/ha", shrink=0.85)
    if truth is not None:
        error = prediction - truth
        limit = max(float(np.percentile(np.abs(error), 99)), 1)
        shown = axes[3].imshow(error, cmap="RdBu", vmin=-limit, vmax=limit)
        axes[3].set_title(f"prediction − truth, RMSE {np.sqrt(np.mean(error.astype(np.float64) ** 2)):.1f}")
        figure.colorbar(shown, ax=axes[3], label="t/ha", shrink=0.85)
    figure.suptitle(f"chip {name}")
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def months_figure(name: str, stack: Stack, labelled: bool) -> Figure:
    """Every month of a chip as `quicklook` shows it, and its label."""
    shown = [quicklook(stack._replace(s1=stack.s1[k:k + 1], s2=stack.s2[k:k + 1], months=stack.months[k:k + 1]))
             for k in range(len(stack.months))]
    columns = 5
    rows = -(-(len(shown) + labelled) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (image, title) in zip(axes, shown):
        axis.imshow(image)
        axis.set_title(title, fontsize=9)
    if labelled:
        axis = axes[len(shown)]
        drawn = axis.imshow(stack.label[..., 0], cmap=_BIOMASS, vmin=0,
                            vmax=max(float(np.percentile(stack.label, 99.5)), 1))
        axis.set_title("AGBM, t/ha", fontsize=9)
        figure.colorbar(drawn, ax=axis, shrink=0.8)
    figure.suptitle(f"chip {name}")
    return figure


class Scatter:
    """Predicted against true of any number of pixels, as a histogram on a fixed grid."""

    def __init__(self, top: float = 450.0, bins: int = 150):
        self.edges = np.linspace(0, top, bins + 1)
        self.counts = np.zeros((bins, bins))

    def add(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        top = self.edges[-1]
        counts, _, _ = np.histogram2d(truth.ravel().clip(0, top), prediction.ravel().clip(0, top), self.edges)
        self.counts += counts

    def figure(self, lines: Sequence[str]) -> Figure:
        """`lines`: what to write into the corner, such as the RMSE."""
        figure = Figure(figsize=(6, 5.2), layout="constrained")
        axis = figure.subplots()
        counts = np.ma.masked_equal(self.counts.T, 0)
        shown = axis.pcolormesh(self.edges, self.edges, counts, norm=LogNorm(vmin=1), cmap="viridis")
        axis.plot([0, self.edges[-1]], [0, self.edges[-1]], color="black", linewidth=0.8)
        axis.set(xlabel="true AGBM, t/ha", ylabel="predicted AGBM, t/ha", aspect="equal")
        axis.text(0.03, 0.97, "\n".join(lines), transform=axis.transAxes, va="top",
                  bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none"})
        figure.colorbar(shown, label="pixels")
        return figure


def save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    with atomic_write(path) as handle:
        handle.write(buffer.getvalue())


def pixels(figure: Figure) -> np.ndarray:
    """The figure as [H, W, 3] uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


