"""What the parity tests share: the winner's fixture, and its chip read with tifffile and numpy alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from engine.data import dataset

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FIXTURE = SHARED / "winner_fixture"
needs_fixture = pytest.mark.skipif(not FIXTURE.is_dir(), reason=f"the winner's fixture is not at {FIXTURE}")
CHIP = "0060c0a5"


def images() -> torch.Tensor:
    """The fixture's chip, normalised: float32 [1,12,15,256,256]."""
    months = []
    for month in range(dataset.T):
        stack = []
        for sensor in dataset.SENSORS:
            path = SHARED / "biomassters" / "train_features" / dataset.feature_name(CHIP, sensor, month)
            raw = tifffile.imread(path).astype(np.float32) if path.is_file() else np.zeros(sensor.shape, np.float32)
            scaled = (raw - sensor.low) / (sensor.high - sensor.low)
            stack.append(np.where(raw == dataset.S1_NODATA, np.float32(0), scaled) if sensor is dataset.S1 else scaled)
        months.append(np.concatenate(stack, axis=2).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(months))[None]


def label() -> torch.Tensor:
    """Its biomass in t/ha: float32 [1,256,256]."""
    return torch.from_numpy(tifffile.imread(SHARED / "biomassters" / "train_agbm" / dataset.label_name(CHIP)))[None]


def masked(images: torch.Tensor, *months: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The images with these months zeroed, and the mask that says so."""
    images, dropped = images.clone(), torch.zeros(1, dataset.T, dtype=torch.bool)
    images[:, list(months)], dropped[:, list(months)] = 0, True
    return images, dropped
