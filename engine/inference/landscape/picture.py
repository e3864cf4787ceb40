"""A map at a glance: colours, a colour bar, a scale and where it lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.data.dataset import Target
from engine.data.scene.gdal import rasterio
from engine.data.scene.grid import Grid

LARGEST = 1200  # pixels a side


def map_figure(path: Path, target: Target, title: str) -> Figure:
    """A panel for each band of the map at `path`, read from its overviews; white where there is no value."""
    with rasterio.open(path) as raster:
        grid = Grid(raster.crs, raster.transform, raster.width, raster.height)
        shrink = max(1.0, max(raster.width, raster.height) / LARGEST)
        shape = max(1, round(raster.height / shrink)), max(1, round(raster.width / shrink))
        layers = raster.read(out_shape=(raster.count, *shape), masked=True,
                             resampling=rasterio.enums.Resampling.average)
        names = raster.descriptions
    aspect = min(max(shape[1] / shape[0], 0.3), 3.0)
    figure = Figure(figsize=(len(layers) * (5 * aspect + 1.6), 5.6), layout="constrained")
    panels = figure.subplots(1, len(layers), squeeze=False)[0]
    for axis, layer, name, colours in zip(panels, layers, names, ("YlGn", "magma")):
        values = layer.compressed()
        low, high = np.percentile(values, (0.5, 99.5)) if values.size else (0.0, 1.0)
        low = min(0.0, float(low))
        shown = axis.imshow(layer, cmap=colours, vmin=low, vmax=max(float(high), low + 1e-6))
        axis.set_title(name)
        axis.set_xticks([])
        axis.set_yticks([])
        figure.colorbar(shown, ax=axis, label=target.unit, shrink=0.85)
        _scale(axis, shape, grid.pixel_metres[0] * grid.width / shape[1])
    figure.suptitle(f"{title}   {grid.crs.to_string()[:40]}")
    return figure


def folds_figure(path: Path, target: Target, grid: Grid, chips: Mapping[str, Mapping[str, int]], tile: int) -> Figure:
    """The target at `path` on `grid`, under the chips in the colours of their folds: each has its `row`, `column` and
    `fold`."""
    shrink = max(1.0, max(grid.width, grid.height) / LARGEST)
    height, width = max(1, round(grid.height / shrink)), max(1, round(grid.width / shrink))
    down, right = grid.height / height, grid.width / width
    with rasterio.open(path) as raster:
        nodata = raster.nodata if raster.nodata is not None else target.nodata
        place = grid.transform * rasterio.Affine.scale(right, down)
        with rasterio.vrt.WarpedVRT(raster, crs=grid.crs, transform=place, width=width, height=height,
                                    src_nodata=nodata, nodata=nodata,
                                    resampling=rasterio.enums.Resampling.average) as small:
            truth = small.read(1, masked=True)  # of which there is some: chips were cut
    folds = np.full((height, width), np.nan)
    for chip in chips.values():
        rows, columns = ((round(first / step), round((first + tile) / step))
                         for first, step in ((chip["row"], down), (chip["column"], right)))
        folds[slice(*rows), slice(*columns)] = chip["fold"] % 10
    figure = Figure(figsize=(7.2, 6), layout="constrained")
    axis = figure.subplots()
    low, high = np.percentile(truth.compressed(), (0.5, 99.5))
    axis.imshow(truth, cmap="Greys", vmin=low, vmax=max(float(high), float(low) + 1e-6))
    axis.imshow(folds, cmap="tab10", vmin=-0.5, vmax=9.5, alpha=0.35, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    counts = np.bincount([chip["fold"] for chip in chips.values()])
    for fold, count in enumerate(counts):
        axis.plot([], [], "s", color=f"C{fold % 10}", label=f"fold {fold}: {count} chips")
    figure.legend(loc="outside right upper")
    axis.set_title(target.name)
    _scale(axis, (height, width), grid.pixel_metres[0] * right)
    return figure


def _scale(axis: Axes, shape: tuple[int, int], metres: float) -> None:
    """A bar of a round length, about a fifth of the picture; metres: a pixel's."""
    wanted = shape[1] * metres / 5
    power = 10 ** np.floor(np.log10(wanted))
    length = float(power * max(step for step in (1, 2, 5) if step * power <= wanted))
    width, left, bottom = length / metres, 0.04 * shape[1], 0.96 * shape[0]
    axis.plot([left, left + width], [bottom, bottom], color="black", linewidth=3, solid_capstyle="butt")
    text = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    axis.text(left + width / 2, bottom - 0.015 * shape[0], text,
              ha="center", va="bottom", bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1})
