"""The TIFF tree as a source for the loader.

The TIFFs of BioMassters are uncompressed and pixel-interleaved, so reading is all the decoding there is: bytes go from
the page cache to the place DALI takes them from.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.base.errors import DataError
from engine.data.dataset import Dataset, Sensor
from engine.data.index import Chip
from engine.data.source import ALL_NODATA, UPRIGHT, Cache, Stack, Turn, empty_stack, fill, present_months
from engine.data.store.chip_file import EXACT
from engine.data.tiff import tiff


class TiffSource:
    """The TIFF tree as downloaded.

    `nodata_months`: what to do with a step whose files hold no value at all: "fail", or "mask" it like a step without
    files.  `need_target`: a label that is nodata throughout is an error.
    """

    form, values = "stack", EXACT

    def __init__(self, dataset: Dataset, nodata_months: str = "fail", cache_gb: float = 0.0,
                 need_target: bool = False):
        self.dataset, self.nodata_months = dataset, nodata_months
        self._need_target = need_target
        self._cache = Cache(cache_gb)
        self._moving = [number for number, sensor in enumerate(dataset.sensors) if not sensor.static]
        self._static = [number for number, sensor in enumerate(dataset.sensors) if sensor.static]

    def buffer(self) -> Stack:
        return empty_stack(self.dataset)

    def stack(self, chip: Chip) -> Stack:
        return self.read(chip, None, self.buffer())

    def read(self, chip: Chip, keep: np.ndarray | None, into: Stack, turn: Turn | None = UPRIGHT) -> Stack:
        """Raises DataError naming the file that is missing, damaged, of another shape or dtype, NaN or all nodata."""
        turn = turn or UPRIGHT
        months: list[int] = []
        for t in present_months(chip, keep):
            if self._read_month(chip, t, into, len(months), turn):
                months.append(t)
        if not months:
            raise DataError(f"chip {chip.id} in {chip.folder}: no month holds any data; remove the chip")
        k = len(months)
        for number in self._static:
            image = into.images[number]
            self._read_image(chip, number, 0, image[0], turn)
            image[1:k] = image[0]
        label = into.label[..., 0]
        if chip.label is None:
            label.fill(0)
        else:
            self._load(chip.label, label, turn, np.dtype(self.dataset.target.dtype))
            if not np.isfinite(label).all():
                raise DataError(f"{chip.label}: the label holds NaN or infinity; download it again or remove the chip")
            self.dataset.target.hide_nodata(label)
            if self._need_target and np.isnan(label).all():
                raise DataError(f"{chip.label}: {ALL_NODATA}")
        return Stack(self.dataset, tuple(images[:k] for images in into.images), into.label, np.array(months))

    def _read_month(self, chip: Chip, month: int, into: Stack, slot: int, turn: Turn) -> bool:
        """False where the month holds no value and such months are to be masked."""
        blank, seen = None, False
        for number in self._moving:
            image = into.images[number][slot]
            if self._read_image(chip, number, month, image, turn):
                if not seen and _blank(image, self.dataset.sensors[number]):
                    blank = number
                else:
                    seen = True
        if not seen and blank is not None:
            if self.nodata_months == "mask":
                return False
            raise DataError(f"{chip.path(blank, month)}: every value is nodata and the month has no other image; "
                            f"delete the file (the month then counts as missing) or set data.nodata_months: mask")
        return True

    def _read_image(self, chip: Chip, number: int, month: int, out: np.ndarray, turn: Turn) -> bool:
        """Into `out` [tile, tile, bands]; False where there is no file."""
        sensor = self.dataset.sensors[number]
        if not chip.months[number][month]:
            fill(out, sensor.absent)
            return False
        path = chip.path(number, month)
        self._load(path, out, turn, out.dtype)
        # A sum sees every NaN and infinity, and is cheaper than a mask
        if out.dtype.kind == "f" and not np.isfinite(out.sum()) and not np.isfinite(out).all():
            wanted = "" if sensor.nodata is None else f", or write nodata as {sensor.nodata:g}"
            raise DataError(f"{path}: holds NaN or infinity; download it again{wanted}")
        return True

    def _load(self, path: Any, out: np.ndarray, turn: Turn, dtype: np.dtype[Any]) -> None:
        values = self._cache.get(path)
        if values is None:
            size = out.size * dtype.itemsize
            keep = self._cache.wants(size)
            direct = turn == UPRIGHT and not keep and dtype == out.dtype and out.flags.c_contiguous
            values = out if direct else np.empty(out.shape, dtype)
            tiff.read_into(path, values)
            if keep:
                self._cache.put(path, values, size)
        if values is not out:
            np.copyto(out, turn.view(values))


def _blank(image: np.ndarray, sensor: Sensor) -> bool:
    """Whether all of an image is nodata."""
    if sensor.nodata is None:
        return False
    nodata = image.dtype.type(sensor.nodata)
    return bool((image[0, 0] == nodata).all() and (image == nodata).all())
