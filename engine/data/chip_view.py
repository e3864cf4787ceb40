"""A chip for people who want to look: NumPy arrays, xarray, a table.  Training does not come through here."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.base.errors import DataError, EngineError
from engine.data.dataset import BANDS, MONTHS, PIXEL_METRES, S1, S1_NODATA, S2, SENSORS, TILE, C, T
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

    def images(self) -> np.ndarray:
        """[T, C, H, W] float32 in the files' units, NaN where there is no value."""
        images = np.full((T, C, TILE, TILE), np.nan, np.float32)
        for slot, t in enumerate(self.stack.months):
            s1 = self.stack.s1[slot]
            images[t, :len(S1.bands)] = np.where(s1 == S1_NODATA, np.nan, s1).transpose(2, 0, 1)
            if self.chip.months[1][t]:
                images[t, len(S1.bands):] = self.stack.s2[slot].transpose(2, 0, 1)
        return images

    def to_xarray(self) -> xarray.Dataset:
        """`images` (month, band, y, x) and, where there is a label, `agbm` (y, x).  x and y in metres from the upper
        left corner: the challenge publishes no place."""
        try:
            import xarray
        except ImportError:
            raise EngineError("to_xarray needs xarray: pip install -e '.[xarray]'") from None
        metres = (np.arange(TILE) + 0.5) * PIXEL_METRES
        variables = {"images": (("month", "band", "y", "x"), self.images())}
        if self.chip.label is not None:
            variables["agbm"] = (("y", "x"), self.stack.label[..., 0], {"units": "t/ha"})  # type: ignore[assignment]
        return xarray.Dataset(variables, {"month": list(MONTHS), "band": list(BANDS), "y": metres, "x": metres},
                              {"chip": self.chip.id, "split": self.chip.split})

    def table(self) -> str:
        """Months and bands with their ranges, and the bytes that they take, as text."""
        size, taken = self._bytes()
        lines = [f"chip {self.chip.id} ({self.chip.split}), {size / 1e6:.2f} MB: {taken}"]
        images = self.images()
        for sensor, bands in ((S1, slice(0, len(S1.bands))), (S2, slice(len(S1.bands), C))):
            unit = "dB" if sensor is S1 else "counts"
            lines += ["", f"{sensor.name}, {unit}: smallest … mean … largest of each band, nodata left out",
                      " " * 10 + "".join(f"{band:>26}" for band in sensor.bands)]
            for t, month in enumerate(MONTHS):
                lines.append(f"{month:<10}" + "".join(f"{_range(image):>26}" for image in images[t, bands]))
        if self.chip.label is not None:
            lines += ["", f"AGBM, t/ha: {_range(self.stack.label)}"]
        return "\n".join(lines)

    def _bytes(self) -> tuple[int, str]:
        if self.chip.packed is not None:
            head = chip_file.read_head(self.chip.packed)
            parts = bytes_stored(head)
            tiffs = sum(size for size, _ in head.sources.values())
            return head.end, (", ".join(f"{name} {n / 1e6:.2f}" for name, n in parts.items())
                              + f"; Sentinel-1 as {head.s1}; {head.end / tiffs:.3f} of its TIFFs")
        sizes = {sensor.name: sum(self.chip.path(s, t).stat().st_size for t in range(T) if self.chip.months[s][t])
                 for s, sensor in enumerate(SENSORS)}
        if self.chip.label is not None:
            sizes["label"] = self.chip.label.stat().st_size
        return sum(sizes.values()), ", ".join(f"{name} {n / 1e6:.2f}" for name, n in sizes.items()) + "; TIFFs"


def _range(values: np.ndarray) -> str:
    seen = values[np.isfinite(values)]
    if not seen.size:
        return "–"
    return f"{seen.min():.4g} … {seen.mean():.4g} … {seen.max():.4g}"


def open_chip(root: Path | str, chip: str) -> ChipView:
    """All of a chip of a TIFF tree or a packed store, as NumPy arrays; `.to_xarray()` with names and units.

    Raises DataError where there is no such chip, or it is damaged.
    """
    chips = open_index(root).by_id()
    if chip not in chips:
        near = difflib.get_close_matches(chip, chips, n=3) or list(chips)[:3]
        raise DataError(f"{root}: no chip {chip!r} among {len(chips)}; it has {', '.join(near)}")
    found = chips[chip]
    return ChipView(found, open_source([found], nodata_months="mask").stack(found))
