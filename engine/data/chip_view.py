"""A chip for people who want to look: NumPy arrays, xarray, a table.  Training does not come through here."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.base.errors import DataError, EngineError
from engine.data.dataset import Dataset
from engine.data.forms import open_source
from engine.data.index import Chip, open_index
from engine.data.source import Stack
from engine.data.store import chip_file
from engine.data.store.source import bytes_stored

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True)
class ChipView:
    """One chip.  Only months that have an image are in `stack`; `stack.months` says which."""

    chip: Chip
    stack: Stack

    @property
    def dataset(self) -> Dataset:
        return self.chip.dataset

    def images(self) -> np.ndarray:
        """[T, C, H, W] float32 in the files' units, NaN where there is no value."""
        dataset, slots = self.dataset, self.stack.months
        images = np.full((dataset.months, dataset.channels, dataset.tile, dataset.tile), np.nan, np.float32)
        first = 0
        for number, sensor in enumerate(dataset.sensors):
            bands = slice(first, first := first + len(sensor.bands))
            for image, t in zip(self.stack.images[number], slots):
                if self.chip.months[number][t]:
                    seen = image if sensor.nodata is None else np.where(image == sensor.nodata, np.nan, image)
                    images[t, bands] = seen.transpose(2, 0, 1)
        return images

    def to_xarray(self) -> xarray.Dataset:
        """`images` (month, band, y, x) and, where there is a label, a variable of the target's name (y, x), NaN where
        it is nodata.  x and y in metres from the upper left corner: chips have no place of their own."""
        try:
            import xarray
        except ImportError:
            raise EngineError("to_xarray needs xarray: pip install -e '.[xarray]'") from None
        dataset, target = self.dataset, self.dataset.target
        metres = (np.arange(dataset.tile) + 0.5) * dataset.pixel_metres
        variables = {"images": (("month", "band", "y", "x"), self.images())}
        if self.chip.label is not None:
            variables[target.name.lower()] = (  # type: ignore[assignment]
                ("y", "x"), self.stack.label[..., 0], {"units": target.unit})
        return xarray.Dataset(variables, {"month": list(dataset.steps), "band": list(dataset.bands), "y": metres,
                                          "x": metres}, {"chip": self.chip.id, "split": self.chip.split})

    def table(self) -> str:
        """Steps and bands with their ranges, and the bytes that they take, as text."""
        size, taken = self._bytes()
        lines = [f"chip {self.chip.id} ({self.chip.split}), {size / 1e6:.2f} MB: {taken}"]
        images, first = self.images(), 0
        wide = max(10, *(len(step) + 1 for step in self.dataset.steps))
        for sensor in self.dataset.sensors:
            bands = slice(first, first := first + len(sensor.bands))
            lines += ["", f"{sensor.name}{', ' if sensor.unit else ''}{sensor.unit}: smallest … mean … largest of each "
                          f"band, nodata left out", " " * wide + "".join(f"{band:>26}" for band in sensor.bands)]
            for t, step in enumerate(self.dataset.steps):
                lines.append(f"{step:<{wide}}" + "".join(f"{_range(image):>26}" for image in images[t, bands]))
        if self.chip.label is not None:
            target = self.dataset.target
            lines += ["", f"{target.name}, {target.unit}: {_range(self.stack.label)}"]
        return "\n".join(lines)

    def _bytes(self) -> tuple[int, str]:
        if self.chip.packed is not None:
            head = chip_file.read_head(self.chip.packed)
            parts = bytes_stored(head)
            tiffs = sum(size for size, _ in head.sources.values())
            return head.end, (", ".join(f"{name} {n / 1e6:.2f}" for name, n in parts.items())
                              + f"; floats {'exact' if head.values == chip_file.EXACT else 'in steps'}; "
                              f"{head.end / tiffs:.3f} of its TIFFs")
        sizes = dict.fromkeys([sensor.name for sensor in self.dataset.sensors], 0)
        for path in self.chip.files:
            number = next((n for n, name in enumerate(self.dataset.names[:-1]) if name.fullmatch(path.name)), None)
            name = "label" if number is None else self.dataset.sensors[number].name
            sizes[name] = sizes.get(name, 0) + path.stat().st_size
        return sum(sizes.values()), ", ".join(f"{name} {n / 1e6:.2f}" for name, n in sizes.items()) + "; TIFFs"


def _range(values: np.ndarray) -> str:
    seen = values[np.isfinite(values)]
    if not seen.size:
        return "–"
    return f"{seen.min():.4g} … {seen.mean():.4g} … {seen.max():.4g}"


def open_chip(root: Path | str, chip: str, dataset: Dataset | None = None) -> ChipView:
    """All of a chip of a TIFF tree or a packed store, as NumPy arrays; `.to_xarray()` with names and units.

    dataset: as for `engine.open_index`.  Raises DataError where there is no such chip, or it is damaged.
    """
    chips = open_index(root, dataset).by_id()
    if chip not in chips:
        near = difflib.get_close_matches(chip, chips, n=3) or list(chips)[:3]
        raise DataError(f"{root}: no chip {chip!r} among {len(chips)}; it has {', '.join(near)}")
    found = chips[chip]
    return ChipView(found, open_source([found], nodata_months="mask").stack(found))
