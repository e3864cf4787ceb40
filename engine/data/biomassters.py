"""The built-in description by the names that its challenge gave: for what is about BioMassters alone (made forests, the
challenge's download, benchmarks, tests).  What trains and predicts takes a `Dataset`."""

from __future__ import annotations

from engine.data.dataset import LABEL_DTYPE, load_dataset

BIOMASSTERS = load_dataset("biomassters")
S1, S2 = SENSORS = BIOMASSTERS.sensors
TILE, MONTHS, BANDS = BIOMASSTERS.tile, BIOMASSTERS.steps, BIOMASSTERS.bands
T, C = len(MONTHS), len(BANDS)
S1_NODATA = -9999.0
S1_SHAPE, S2_SHAPE = BIOMASSTERS.shape(S1), BIOMASSTERS.shape(S2)
AGBM_DTYPE = LABEL_DTYPE  # t/ha
AGBM_IGNORE_ABOVE = 400.0  # t/ha; the winner leaves such pixels out of the loss
FEATURE_NAMES, LABEL_NAME = BIOMASSTERS.names[:-1], BIOMASSTERS.names[-1]
