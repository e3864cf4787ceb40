"""Losses: values against plain numpy, gradients finite in every corner."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.base.errors import ConfigError
from engine.data.biomassters import BIOMASSTERS
from engine.training.losses import LOSSES, make_loss, per_chip_rmse, rmse

NAMES = list(LOSSES)
TARGET = BIOMASSTERS.target


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    target = random.gamma(1.5, 120.0, (3, 13, 7))  # some pixels above 400
    pred = target[:, None] + random.normal(0, 30, (3, 1, 13, 7))
    return torch.tensor(pred, dtype=dtype), torch.tensor(target, dtype=dtype)


def expected(name: str, pred: np.ndarray, target: np.ndarray, ignore_above: float | None) -> float:
    """The definitions once more, with loops and boolean indexing."""
    kept = [(p[0][t < (ignore_above or math.inf)], t[t < (ignore_above or math.inf)]) for p, t in zip(pred, target)]
    errors = [p - t for p, t in kept]
    everything = np.concatenate(errors)
    per_chip = np.mean([np.sqrt(np.mean(e ** 2)) for e in errors])
    size = np.abs(everything)
    focus = everything ** 2 * (2 / (1 + np.exp(-0.2 * size)) - 1)
    return float({
        "per_chip_rmse": per_chip,
        "rmse": np.sqrt(np.mean(everything ** 2)),
        "mae": np.mean(size),
        "huber": np.mean(np.where(size <= 25, size ** 2 / 2, 25 * (size - 12.5))),
        "rmse_focal": per_chip + 0.05 * np.mean(focus),
    }[name])


@pytest.mark.parametrize("ignore_above", [400.0, 150.0, None])
@pytest.mark.parametrize("name", NAMES)
def test_values(name: str, ignore_above: float | None) -> None:
    pred, target = batch()
    assert (target >= 400).any()
    loss = make_loss(name, TARGET, ignore_above=ignore_above)(pred, target)
    assert loss.item() == pytest.approx(expected(name, pred.numpy(), target.numpy(), ignore_above), rel=1e-12)


def test_the_threshold_itself_is_ignored() -> None:
    target = torch.tensor([[[400.0, 10.0]]])
    assert per_chip_rmse(torch.zeros(1, 1, 1, 2), target, 400.0).item() == pytest.approx(10.0)


@pytest.mark.parametrize("name", NAMES)
def test_by_default_the_description_says_what_is_ignored(name: str) -> None:
    pred, target = batch()
    assert make_loss(name, TARGET)(pred, target) == LOSSES[name](pred, target, ignore_above=400.0)
    other = TARGET.model_copy(update={"ignore_above": None})
    assert make_loss(name, other)(pred, target) == LOSSES[name](pred, target)
    assert make_loss(name, TARGET, ignore_above=None)(pred, target) == LOSSES[name](pred, target)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("corner", ["no valid pixel", "one chip without", "exact", "one chip exact", "tiny error"])
def test_value_and_gradient_are_finite(name: str, dtype: torch.dtype, corner: str) -> None:
    pred, target = batch(1, torch.float32)
    if corner in ("no valid pixel", "one chip without"):
        target[slice(None) if corner == "no valid pixel" else slice(1, 2)] = 12_900.0
    pred = pred.clamp(-1000, 1000).to(dtype)
    if corner in ("exact", "one chip exact"):
        chips = slice(None) if corner == "exact" else slice(1, 2)
        target = target.to(dtype).float()
        pred[chips, 0] = target[chips].to(dtype)
    if corner == "tiny error":
        pred, target = torch.full_like(pred, 1e-30), torch.zeros_like(target)  # its square is no float32
    pred.requires_grad_()
    loss = make_loss(name, TARGET, ignore_above=400.0)(pred, target)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(pred.grad).all()
    assert not pred.grad[:, 0][target >= 400].any()
    if corner in ("no valid pixel", "exact"):
        assert loss == 0
        assert not pred.grad.any()
    elif corner != "tiny error":
        assert loss > 0
        assert pred.grad.any()


def test_a_chip_without_valid_pixels_does_not_change_the_others_gradients() -> None:
    pred, target = batch(2)
    full = torch.autograd.grad(per_chip_rmse(pred.requires_grad_(), target, 400.0), pred)[0]
    target = target.clone()
    target[1] = 500
    less = torch.autograd.grad(per_chip_rmse(pred, target, 400.0), pred)[0]
    torch.testing.assert_close(full[[0, 2]], less[[0, 2]], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    pred, target = batch(3)
    loss = make_loss(name, TARGET)
    assert torch.autograd.gradcheck(lambda p: loss(p, target), pred.requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_float32_inside_autocast(name: str) -> None:
    pred, target = batch(4, torch.float32)
    loss = make_loss(name, TARGET)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(pred, target)
    assert inside == loss(pred, target)
    assert inside.dtype == torch.float32


@pytest.mark.parametrize("ignore_above", [400.0, None])
@pytest.mark.parametrize("name", NAMES)
def test_where_there_is_no_target_no_pixel_counts(name: str, ignore_above: float | None) -> None:
    """Values and gradients are those of the pixels that have one."""
    pred, target = batch(5)
    hole = torch.tensor(np.random.default_rng(5).random(target.shape) < 0.4)
    full, target = target, target.masked_fill(hole, math.nan)
    target[0, hole[0]] = math.inf  # as infinity a warp may leave it
    loss = make_loss(name, TARGET, ignore_above=ignore_above)
    value = loss(pred.requires_grad_(), target)
    [found] = torch.autograd.grad(value, pred)

    kept = [~h & (t < (ignore_above or math.inf)) for h, t in zip(hole, full)]
    errors = [(p[0] - t)[k] for p, t, k in zip(pred, full, kept)]
    everything = torch.cat(errors)
    per_chip = torch.stack([e.square().mean().sqrt() for e in errors]).mean()
    plain = {
        "per_chip_rmse": per_chip,
        "rmse": everything.square().mean().sqrt(),
        "mae": everything.abs().mean(),
        "huber": torch.nn.functional.huber_loss(everything, torch.zeros_like(everything), delta=25.0),
        "rmse_focal": per_chip + 0.05 * (everything.square() * (2 * torch.sigmoid(0.2 * everything.abs()) - 1)).mean(),
    }[name]
    torch.testing.assert_close(value, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, torch.autograd.grad(plain, pred)[0], rtol=1e-10, atol=1e-15)
    assert not found[:, 0][hole].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_target_has_no_gradient(name: str) -> None:
    pred, target = batch(7)
    loss = make_loss(name, TARGET)(pred.requires_grad_(), torch.full_like(target, math.nan))
    loss.backward()
    assert loss == 0 and not pred.grad.any()


def test_mean_over_equal_shards_is_the_batch() -> None:
    pred, target = batch(6)
    target[1] = 900.0
    shards = torch.stack([per_chip_rmse(pred[i:i + 1], target[i:i + 1]) for i in range(3)])
    assert shards.mean().item() == pytest.approx(per_chip_rmse(pred, target).item(), rel=1e-14)


def test_shapes_do_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\[2, 4, 4\] and \[2, 4, 4\]"):
        rmse(torch.zeros(2, 4, 4), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="pred must be"):
        rmse(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))


def test_names_and_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="'per_chip_rsme' is unknown; nearest: 'per_chip_rmse'"):
        make_loss("per_chip_rsme", TARGET)
    with pytest.raises(ConfigError, match=r"loss.options of huber: 'detla' is unknown; nearest: 'delta'"):
        make_loss("huber", TARGET, detla=3)
    with pytest.raises(ConfigError, match="delta is 0"):
        make_loss("huber", TARGET, delta=0)
    with pytest.raises(ConfigError, match="not of the right type"):
        make_loss("mae", TARGET, ignore_above="400")
    with pytest.raises(ConfigError, match="'pred' is unknown"):
        make_loss("mae", TARGET, pred=1)
