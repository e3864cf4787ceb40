"""The stored forms of a data set, told apart: a TIFF tree or a packed store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.data.dataset import AGBM_DTYPE, TILE
from engine.data.index import Chip
from engine.data.source import Source
from engine.data.store.source import PackedSource, label_into
from engine.data.tiff import tiff
from engine.data.tiff.source import TiffSource


def open_source(chips: Sequence[Chip], *, nodata_months: str = "fail", cache_gb: float = 0.0,
                backend: str = "cpu") -> Source:
    """The source that `chips`, all of one index, are read from.  `backend`: where DALI works."""
    if chips and chips[0].packed is not None:
        return PackedSource(chips[0].packed, nodata_months, cache_gb, backend)
    return TiffSource(nodata_months, cache_gb)


def read_label(chip: Chip) -> np.ndarray:
    """[TILE, TILE] float32, t/ha, of a chip that has one, of either form."""
    label = np.empty((TILE, TILE), AGBM_DTYPE)
    if chip.packed is not None:
        label_into(chip, label)
    else:
        assert chip.label is not None
        tiff.read_into(chip.label, label)
    return label
