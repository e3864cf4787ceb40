"""Makes the golden files of this folder: `python -m tests.golden.make` in the repository's root, with ../shared there.

They hold us to the 1st-place solution where its own outputs are not at hand.  The chain: `HELD` are tests that compare
this code with what the winner's code gave (1e-9 in float64: outputs, losses, gradients) and with the real files (byte
for byte); where one fails or skips, nothing is written.  Then this code writes what it computes, and
tests/model/test_golden.py compares every later version with that.

Last made with Python 3.11, torch 2.15.0, timm 1.0.31 and numpy 2.4.6 on a CPU, after all of `HELD` passed there.  Made
again it must give the same files to 1e-9: a change of these numbers is a change of the model or of the data's meaning.

Nothing here depends on a library's random numbers: weights, images and labels are SHAKE-128 (FIPS 202) of their names.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.data import reference
from engine.data.biomassters import AGBM_DTYPE, BIOMASSTERS, S1, S1_SHAPE, S2, S2_SHAPE, SENSORS, T
from engine.data.index import open_index
from engine.data.source import Stack
from engine.data.tiff import tiff
from engine.data.tiff.source import TiffSource
from engine.model.unet import BiomassUNet
from engine.training.losses import LOSSES, make_loss

GOLDEN = Path(__file__).parent
HELD = (
    "tests/model/test_unet.py::test_predictions_of_the_winners_weights",
    "tests/model/test_unet.py::test_named_weights_output_and_losses",
    "tests/model/test_unet.py::test_named_weights_training_step",
    "tests/data/test_tiff.py::test_real_files_come_back_byte_for_byte",
    "tests/data/test_pipeline.py::test_real_values_are_normalised_as_the_winner_s",
)

BACKBONES = ("tf_efficientnetv2_b0", "tf_mobilenetv3_small_minimal_100")
WIDTHS = (48, 40, 32, 24, 16)
DROPPED = torch.tensor([[False, True, False, False], [False, False, True, True]])
SPARSE = 5  # of a map's pixels every fifth row and column is kept, so that every place in a 32 × 32 block occurs

# A piece of a real chip, not square, over a label beyond 400 t/ha.  In month 10 one orbit of Sentinel-1 is blank.
CHIP, MONTHS, ROWS, COLUMNS = "288afc34", (10, 11), slice(0, 40), slice(30, 86)
REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "biomassters_288afc34"
TREE = GOLDEN / "biomassters"
STRIP_ROWS = {"S1": 2, "S2": 1, "agbm": 8}  # as in the files of 256 × 256


# --- the model --------------------------------------------------------------------------------------------------------

def by_name(name: str, shape: Iterable[int]) -> Tensor:
    """float64 of this shape, uniform in [−1, 1), from SHAKE-128 of the name."""
    shape = tuple(shape)
    words = np.frombuffer(hashlib.shake_128(name.encode()).digest(4 * int(np.prod(shape))), "<u4")
    return torch.from_numpy(words / 2.0**31 - 1).reshape(shape)


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of these names and shapes in float64: variance 1 / fan-in, BatchNorm that has seen something, no
    squeeze whose one or two units are dead, and a head that answers in hundreds of t/ha."""
    filled = {}
    for name, tensor in state.items():
        value = by_name(name, tensor.shape)
        if name.endswith("num_batches_tracked"):
            value = torch.zeros_like(tensor)
        elif tensor.dim() > 1:
            value = value * (3 / tensor[0].numel()) ** 0.5
        elif name.endswith(("weight", "running_var", "cSE.1.bias")):
            value = 1 + value / 4
        else:
            value = value / 4
        filled[name] = value * 400 if name.startswith("segmentation_head") else value
    return filled


def model_numbers(backbone: str) -> dict[str, Any]:
    """What the model computes of two chips of four months of 64 × 64 pixels, in float64.

    Keys: `eval`, `eval masked` [2,13,13]: some pixels of the output, all months kept and `DROPPED` left out;
    `losses` [5] of the latter; and for a training step with `DROPPED`, our way (`kept: …`, BatchNorm sees kept months)
    and the winner's (`zeroed: …`): `out` [2,13,13], `loss`, `norm` of the whole gradient, `gradients` [parameters,2]
    and `statistics` [buffers,2] by `fingerprints`.
    """
    model = BiomassUNet(backbone, WIDTHS).double()
    names = model.state_dict()
    images = (by_name("images", (2, 4, 15, 64, 64)) + 1) / 2
    label = (by_name("label", (2, 64, 64)) + 1) * 225  # to 450 t/ha
    zeroed = images.masked_fill(DROPPED[..., None, None, None], 0)  # as the loader gives them
    numbers: dict[str, Any] = {}

    model.load_state_dict(weights(names))
    with torch.no_grad():
        numbers["eval"] = _sparse(model.eval()(images))
        out = model(images, DROPPED)
        numbers["eval masked"] = _sparse(out)
        numbers["losses"] = np.array([make_loss(name, BIOMASSTERS.target)(out, label).item() for name in LOSSES])
    for way in ("kept", "zeroed"):
        model.load_state_dict(weights(names))
        model.train().zero_grad(set_to_none=True)
        model.skip_dropped_months = way == "kept"
        out = model(zeroed, DROPPED)
        loss = make_loss("per_chip_rmse", BIOMASSTERS.target)(out, label)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        statistics = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        numbers |= {
            f"{way}: out": _sparse(out), f"{way}: loss": np.array(loss.item()),
            f"{way}: norm": torch.cat([g.flatten() for g in gradients.values()]).norm().numpy(),
            f"{way}: gradients": fingerprints(gradients), f"{way}: statistics": fingerprints(statistics),
        }
    return numbers | {"parameters": np.array(list(gradients)), "buffers": np.array(list(statistics))}


def fingerprints(tensors: dict[str, Tensor]) -> np.ndarray:
    """[tensors,2]: each one's norm, and its projection on a direction of its own, which sees the order of values."""
    return np.array([[t.norm().item(), (t * by_name(f"direction of {name}", t.shape)).sum().item()]
                     for name, t in tensors.items()])


def _sparse(maps: Tensor) -> np.ndarray:
    return maps.detach()[:, 0, ::SPARSE, ::SPARSE].numpy()


# --- the data ---------------------------------------------------------------------------------------------------------

def read_crop() -> Stack:
    """The chip of `TREE` by the engine's own index and reader."""
    height, width = ROWS.stop - ROWS.start, COLUMNS.stop - COLUMNS.start
    images = tuple(np.empty((T, height, width, len(sensor.bands)), sensor.values) for sensor in SENSORS)
    into = Stack(BIOMASSTERS, images,
                 np.empty((height, width, 1), AGBM_DTYPE), np.arange(T))
    chip, = open_index(TREE).chips
    return TiffSource(BIOMASSTERS).read(chip, np.ones(T, bool), into)


def digest(array: np.ndarray) -> str:
    """SHA-256 of the values, little-endian, row by row."""
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<"), order="C").tobytes()).hexdigest()


def data_numbers() -> dict[str, Any]:
    """What our reader and `engine.data.reference` make of `TREE`.

    `s1`, `s2`, `label`: digests of what was read; `months` [K]; and normalised float32, of every third row and column:
    `images` [K,14,19,15] and `target` [14,19], and both as `warped …` by `turned`, and as `steps …` with Sentinel-1
    in steps of 0.01 dB.
    """
    stack = read_crop()
    s1, s2 = stack.images
    numbers: dict[str, Any] = {"s1": digest(s1), "s2": digest(s2), "label": digest(stack.label),
                               "months": stack.months}
    for name, matrix, steps in (("", None, False), ("warped ", turned(), False), ("steps ", None, True)):
        images, target = reference.transform(stack, matrix, steps)
        assert not images[len(stack.months):].any()
        numbers[f"{name}images"] = images[:len(stack.months), ::3, ::3]
        numbers[f"{name}target"] = target[::3, ::3]
    return numbers


def turned() -> np.ndarray:
    """Output → input places as `engine.data.plan.Draw` has them, [3,3] float32: flipped, and 30° about the centre."""
    cos, sin, x, y = 3**0.5 / 2, 0.5, (COLUMNS.stop - COLUMNS.start) / 2, (ROWS.stop - ROWS.start) / 2
    return np.array([[-cos, -sin, x + cos * x + sin * y], [-sin, cos, y + sin * x - cos * y], [0, 0, 1]], np.float32)


def cut() -> None:
    """Writes `TREE` from the real chip, with as many rows a strip as the real files have."""
    files = [(f"train_features/{BIOMASSTERS.feature_name(CHIP, number, month)}", sensor.name)
             for number, sensor in enumerate((S1, S2)) for month in MONTHS]
    files.append((f"train_agbm/{BIOMASSTERS.label_name(CHIP)}", "agbm"))
    for file, kind in files:
        whole = np.empty(*{"S1": (S1_SHAPE, S1.values), "S2": (S2_SHAPE, S2.values),
                           "agbm": (S1_SHAPE[:2], AGBM_DTYPE)}[kind])
        tiff.read_into(REAL / file, whole)
        (TREE / file).parent.mkdir(parents=True, exist_ok=True)
        tiff.write(TREE / file, whole[ROWS, COLUMNS], STRIP_ROWS[kind])


# ----------------------------------------------------------------------------------------------------------------------

class Outcomes:
    """A plugin of pytest that counts what passed: a skipped parity test must not count as one that holds."""

    def __init__(self) -> None:
        self.passed = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.when == "call" and report.passed


def main() -> int:
    import pytest

    seen = Outcomes()
    if pytest.main(["-q", *HELD], plugins=[seen]) or seen.passed < len(HELD):
        print(f"{seen.passed} of {len(HELD)} comparisons with the winner and the real files passed: nothing written")
        return 1
    cut()
    np.savez_compressed(GOLDEN / "data.npz", **data_numbers())
    for backbone in BACKBONES:
        np.savez_compressed(GOLDEN / f"{backbone}.npz", **model_numbers(backbone))
    return 0


if __name__ == "__main__":
    sys.exit(main())
