"""The average of the weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine.base.errors import ConfigError
from engine.config import parse_config
from engine.data.dataset import load_dataset
from engine.training.cut import memory_need
from engine.training.update.ema import Ema


def test_it_is_the_recurrence_it_says_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    engine = SimpleNamespace(module=model, zero_optimization_stage=lambda: 0, optimizer=None)
    ema = Ema(engine, 0.4)
    wanted = {name: value.clone().double() for name, value in model.state_dict().items()}
    for n in range(1, 9):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += torch.randn_like(p)
        model(torch.randn(5, 3))
        ema.update(n)
        decay = min(0.4, (1 + n) / (10 + n))
        for name, value in model.state_dict().items():
            wanted[name] = decay * wanted[name] + (1 - decay) * value if "tracked" not in name else value.clone()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), ema.in_place():
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value.double(), wanted[name].double(), msg=name)
        assert not torch.equal(model[0].weight, weights["0.weight"])
        raise ZeroDivisionError  # whatever happens meanwhile, the weights come back
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_recipes() -> None:
    def recipe(ema: float | None, start: str) -> dict[str, object]:
        return {"data": {"path": "x"}, "train": {"ema": ema, "global_batch": 1},
                "model": {"backbone": "tf_mobilenetv3_small_minimal_100"},
                "phases": [{"epochs": 1}, {"epochs": 1, "name": "second", "start_from": start}]}

    with pytest.raises(ConfigError, match="start_from an average needs train.ema"):
        parse_config(recipe(None, "best-ema"), "r")
    for wrong in (0.0, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="train.ema"):
            parse_config(recipe(wrong, "best"), "r")
    need = [memory_need(parse_config(recipe(ema, "best"), "r"), load_dataset("biomassters")).fixed
            for ema in (None, 0.9)]
    assert need[1] / need[0] == 20 / 16
