from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from engine.config import Optimizer, Phase
from engine.training.optim import learning_rate, make_optimizer, parameter_groups, phase_rates
from engine.training.update.loss_scale import GROWTH_INTERVAL, LossScale


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    optimizer.step()


def test_only_matrices_and_filters_decay() -> None:
    decay, rest = parameter_groups(model(), 0.01)
    assert [p.ndim for p in decay["params"]] == [4, 2] and decay["weight_decay"] == 0.01
    assert all(p.ndim == 1 for p in rest["params"]) and len(rest["params"]) == 4 and rest["weight_decay"] == 0


def test_an_update_that_is_not_finite_is_skipped_on_the_device() -> None:
    net = model()
    optimizer = make_optimizer(net, Optimizer())
    before = [p.clone() for p in net.parameters()]
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    step(net, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    assert all(float(state["step"]) == 0 for state in optimizer.state.values()), "bias correction must not advance"
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    step(net, optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_a_scaled_gradient_gives_the_same_update() -> None:
    plain, scaled = model(), model()
    for net, factor in ((plain, 1.0), (scaled, 1024.0)):
        optimizer = make_optimizer(net, Optimizer())
        net(torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(1))).square().sum().mul(factor).backward()
        optimizer.grad_scale = torch.tensor(factor)  # type: ignore[attr-defined]
        optimizer.step()
    for a, b in zip(plain.parameters(), scaled.parameters()):
        torch.testing.assert_close(a, b)


def test_loss_scale_halves_on_overflow_and_grows_after_a_long_time() -> None:
    scale = LossScale(8.0)
    scale.update(math.inf)
    scale.update(math.nan)
    assert scale.value == 2.0
    for _ in range(GROWTH_INTERVAL):
        scale.update(1.0)
    assert scale == LossScale(4.0, 0)


@pytest.mark.parametrize(("phase", "first", "low"), [
    (Phase(epochs=10), 1e-3, 1e-4), (Phase(epochs=10, lr=1e-4), 1e-4, 5e-5), (Phase(epochs=10, lr=1e-5), 1e-5, 1e-5),
    (Phase(epochs=10, lr=1e-2, min_lr=0), 1e-2, 0)])
def test_rates_of_a_phase(phase: Phase, first: float, low: float) -> None:
    assert phase_rates(phase, Optimizer()) == pytest.approx((first, low))
    rates = [learning_rate(phase, Optimizer(), epoch) for epoch in range(10)]
    assert rates[0] == pytest.approx(first) and rates == sorted(rates, reverse=True)
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=first)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=10, eta_min=low)
    for rate in rates:
        assert rate == pytest.approx(reference.param_groups[0]["lr"])
        reference.step()
        cosine.step()
