"""The BioMassters data as it is: names, bands, months, ranges.  Constants only; everything else reads them here.

Sources: the challenge's data page (https://www.drivendata.org/competitions/99/biomass-estimation/page/536/) for
bands, units and nodata; the 1st-place solution for the normalisation ranges, which its weights expect.

Shape legend used throughout `engine`: B chips, T months, C bands, H rows, W columns.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

TILE = 256  # pixels a side
PIXEL_METRES = 10.0
MONTHS = ("September", "October", "November", "December", "January", "February", "March", "April", "May",
          "June", "July", "August")  # month 00 is September
T = len(MONTHS)


class Sensor(NamedTuple):
    """One satellite's files: `{chip}_{name}_{month:02d}.tif`, [TILE, TILE, len(bands)] of `dtype`."""

    name: str
    bands: tuple[str, ...]
    dtype: np.dtype
    low: np.ndarray  # [bands] float32: the value that becomes 0
    high: np.ndarray  # [bands] float32: the value that becomes 1

    @property
    def shape(self) -> tuple[int, int, int]:
        return TILE, TILE, len(self.bands)


S1_NODATA = -9999.0  # becomes 0 after scaling: that is `S1.low` in dB
S1 = Sensor(
    "S1", ("VV asc", "VH asc", "VV desc", "VH desc"), np.dtype("<f4"),  # dB
    low=np.array([-25, -62, -25, -60], np.float32),
    high=np.array([29, 28, 30, 22], np.float32),
)
S2 = Sensor(
    "S2", ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12", "CLP"), np.dtype("<u2"),
    low=np.zeros(11, np.float32),
    high=np.array([19616, 18400, 17536, 17097, 16928, 16768, 16593, 16492, 15401, 15226, 255], np.float32),
)
SENSORS = (S1, S2)
BANDS = S1.bands + S2.bands  # the order of the model's input channels
C = len(BANDS)

AGBM_DTYPE = np.dtype("<f4")  # t/ha
AGBM_IGNORE_ABOVE = 400.0  # t/ha; the winner leaves such pixels out of the loss

FEATURE_NAME = re.compile(r"^(?P<chip>[0-9A-Za-z-]+)_(?P<sensor>S[12])_(?P<month>\d{2})\.tif$")
LABEL_NAME = re.compile(r"^(?P<chip>[0-9A-Za-z-]+)_agbm\.tif$")


def feature_name(chip: str, sensor: Sensor, month: int) -> str:
    return f"{chip}_{sensor.name}_{month:02d}.tif"


def label_name(chip: str) -> str:
    return f"{chip}_agbm.tif"
