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
                backend: str = "cpu") -> Source:
    """The source that `chips` (at least one), all of one index, are read from.  `backend`: where DALI works.

    Raises DataError where a packed chip is damaged, or described otherwise than its store.
    """
    if chips[0].packed is not None:
        source = PackedSource(chips[0].packed, nodata_months, cache_gb, backend)
        if not source.dataset.alike(chips[0].dataset):
            raise DataError(f"{chips[0].packed}: describes its data otherwise than {MANIFEST} does; run "
                            f"`launch/prepare.py pack` again, it writes {MANIFEST} anew")
        return source
    return TiffSource(chips[0].dataset, nodata_months, cache_gb)


def read_label(chip: Chip) -> np.ndarray:
    """[tile, tile] float32, in the target's unit, of a chip that has a label, of either form."""
    tile, dtype = chip.dataset.tile, np.dtype(chip.dataset.target.dtype)
    if chip.packed is not None:
        label = np.empty((tile, tile), LABEL_DTYPE)
        label_into(chip, label)
        return label
    assert chip.label is not None
    label = np.empty((tile, tile), dtype)
    tiff.read_into(chip.label, label)
    return label.astype(LABEL_DTYPE, copy=False)
