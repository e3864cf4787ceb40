"""The stored forms of a data set, told apart: a TIFF tree or a packed store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.base.errors import DataError
from engine.data.dataset import LABEL_DTYPE
from engine.data.index import Chip
from engine.data.source import Source
from engine.data.store.chip_file import MANIFEST
from engine.data.store.source import PackedSource, label_into
from engine.data.tiff import tiff
from engine.data.tiff.source import TiffSource


def open_source(chips: Sequence[Chip], *, nodata_months: str = "fail", cache_gb: float = 0.0,
                backend: str = "cpu", need_target: bool = False) -> Source:
    """The source that `chips` (at least one), all of one index, are read from.  `backend`: where DALI works.
    `need_target`: a label that is nodata throughout is an error, and not just one that has nothing to be scored.

    Raises DataError where a packed chip is damaged, or described otherwise than its store.
    """
    if chips[0].packed is not None:
        source = PackedSource(chips[0].packed, nodata_months, cache_gb, backend, need_target)
        if not source.dataset.alike(chips[0].dataset):
            raise DataError(f"{chips[0].packed}: describes its data otherwise than {MANIFEST} does; run "
                            f"`launch/prepare.py pack` again, it writes {MANIFEST} anew")
        return source
    return TiffSource(chips[0].dataset, nodata_months, cache_gb, need_target)


def read_label(chip: Chip) -> np.ndarray:
    """[tile, tile] float32, in the target's unit, NaN for nodata, of a chip that has a label, of either form."""
    tile, target = chip.dataset.tile, chip.dataset.target
    if chip.packed is not None:
        label = np.empty((tile, tile), LABEL_DTYPE)
        label_into(chip, label)
        return label
    assert chip.label is not None
    stored = np.empty((tile, tile), target.dtype)
    tiff.read_into(chip.label, stored)
    label = stored.astype(LABEL_DTYPE, copy=False)
    target.hide_nodata(label)
    return label
