"""What the parity tests share: the winner's fixture, and its chip read with tifffile and numpy alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from engine.data.biomassters import BIOMASSTERS, S1_NODATA, T

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FIXTURE = SHARED / "winner_fixture"
needs_fixture = pytest.mark.skipif(not FIXTURE.is_dir(), reason=f"the winner's fixture is not at {FIXTURE}")
CHIP = "0060c0a5"


def images() -> torch.Tensor:
    """The fixture's chip, normalised: float32 [1,12,15,256,256]."""
    months = []
    for month in range(T):
        stack = []
        for number, sensor in enumerate(BIOMASSTERS.sensors):
            path = SHARED / "biomassters" / "train_features" / BIOMASSTERS.feature_name(CHIP, number, month)
            shape = BIOMASSTERS.shape(sensor)
            raw = tifffile.imread(path).astype(np.float32) if path.is_file() else np.zeros(shape, np.float32)
            scaled = (raw - sensor.zero) / sensor.span
            stack.append(np.where(raw == S1_NODATA, np.float32(0), scaled) if sensor.name == "S1" else scaled)
        months.append(np.concatenate(stack, axis=2).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(months))[None]


def label() -> torch.Tensor:
    """Its biomass in t/ha: float32 [1,256,256]."""
    return torch.from_numpy(tifffile.imread(SHARED / "biomassters" / "train_agbm" / BIOMASSTERS.label_name(CHIP)))[None]


def masked(images: torch.Tensor, *months: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The images with these months zeroed, and the mask that says so."""
    images, dropped = images.clone(), torch.zeros(1, T, dtype=torch.bool)
    images[:, list(months)], dropped[:, list(months)] = 0, True
    return images, dropped
