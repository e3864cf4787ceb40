"""The TIFF tree as a source for the loader.

The TIFFs of BioMassters are uncompressed and pixel-interleaved, so reading is all the decoding there is: bytes go from
the page cache to the place DALI takes them from.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.base.errors import DataError
from engine.data.dataset import S1_NODATA, SENSORS, T
from engine.data.index import Chip
from engine.data.source import UPRIGHT, Cache, Stack, Turn, empty_stack, present_months
from engine.data.store.chip_file import EXACT
from engine.data.tiff import tiff


class TiffSource:
    """The TIFF tree as downloaded.

    `nodata_months`: what to do with a month whose file holds no value at all: "fail", or "mask" it like a month
    without files.
    """

    form, s1 = "stack", EXACT

    def __init__(self, nodata_months: str = "fail", cache_gb: float = 0.0):
        self.nodata_months = nodata_months
        self._cache = Cache(cache_gb)

    def buffer(self) -> Stack:
        return empty_stack()

    def stack(self, chip: Chip) -> Stack:
        return self.read(chip, np.ones(T, bool), empty_stack())

    def read(self, chip: Chip, keep: np.ndarray, into: Stack, turn: Turn | None = UPRIGHT) -> Stack:
        """Raises DataError naming the file that is missing, damaged, of another shape or dtype, NaN or all nodata."""
        turn = turn or UPRIGHT
        months: list[int] = []
        for t in present_months(chip, keep):
            if self._read_month(chip, t, into, len(months), turn):
                months.append(t)
        if not months:
            raise DataError(f"chip {chip.id} in {chip.folder}: no month holds any data; remove the chip")
        if chip.label is None:
            into.label.fill(0)
        else:
            self._load(chip.label, into.label[..., 0], turn)
            if not np.isfinite(into.label).all():
                raise DataError(f"{chip.label}: the label holds NaN or infinity; download it again or remove the chip")
        k = len(months)
        return Stack(into.s1[:k], into.s2[:k], into.label, np.array(months))

    def _read_month(self, chip: Chip, month: int, into: Stack, slot: int, turn: Turn) -> bool:
        """False where the month holds no value and such months are to be masked."""
        s1, s2 = into.s1[slot], into.s2[slot]
        has_s1, has_s2 = (chip.months[s][month] for s in range(len(SENSORS)))
        if has_s1:
            self._load(chip.path(0, month), s1, turn)
            if np.isnan(s1.sum()):  # a sum sees every NaN, and is cheaper than a mask
                raise DataError(f"{chip.path(0, month)}: holds NaN; download it again, or write nodata as {S1_NODATA}")
        else:
            s1.fill(S1_NODATA)
        if has_s2:
            self._load(chip.path(1, month), s2, turn)
        else:
            s2.fill(0)
            if s1[0, 0].max() == S1_NODATA and s1.max() == S1_NODATA:
                if self.nodata_months == "mask":
                    return False
                raise DataError(f"{chip.path(0, month)}: every value is nodata and the month has no Sentinel-2 image; "
                                f"delete the file (the month then counts as missing) or set data.nodata_months: mask")
        return True

    def _load(self, path: Any, out: np.ndarray, turn: Turn) -> None:
        values = self._cache.get(path)
        if values is None:
            keep = self._cache.wants(out.nbytes)
            values = out if turn == UPRIGHT and not keep else np.empty(out.shape, out.dtype)
            tiff.read_into(path, values)
            if keep:
                self._cache.put(path, values, values.nbytes)
        if values is not out:
            np.copyto(out, turn.view(values))
