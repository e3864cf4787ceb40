"""A step that is left to be taken again, without a run: `tests/runs/test_dump.py` has whole ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from engine.base.errors import DataError, EngineError
from engine.config import parse_config
from engine.data.batch import Batch
from engine.data.biomassters import BIOMASSTERS
from engine.model.tensors import read_tensors, write_tensors
from engine.model.unet import BiomassUNet
from engine.training import dump
from engine.training.dump import leave, replay

DATA = BIOMASSTERS.model_copy(update={"tile": 32})
BACKBONE, WIDTHS, SEED = "tf_mobilenetv3_small_minimal_100", [8] * 5, 20_261_126


def left(folder: Path) -> Path:
    """A step of one chip, of whose label half is no target."""
    torch.manual_seed(0)
    engine = SimpleNamespace(module=BiomassUNet(BACKBONE, WIDTHS, DATA.channels, tile=DATA.tile), device="cpu",
                             zero_optimization_stage=lambda: 0)
    label = torch.ones(1, 32, 32)
    label[:, :16] = torch.nan
    chips: list[Any] = [SimpleNamespace(id="a chip")]
    batch = Batch(torch.rand(1, DATA.months, DATA.channels, 32, 32), torch.arange(DATA.months)[None] > 2, label,
                  torch.zeros(1), torch.ones(1), chips)
    config = parse_config({"data": {"path": "x"}, "run": {"seed": SEED}, "model": {"attention": "reference"},
                           "train": {"precision": "fp32"}}, "a test")
    return leave(folder, 4, engine, [batch], config, {"dataset": json.dumps(DATA.dump())}, 1.0)


def again(folder: Path) -> list[str]:
    return list(replay(folder, torch.device("cpu")))


def test_what_is_no_target_is_no_fault_and_what_does_not_fit_is_named(tmp_path: Path) -> None:
    """And a seed of eight digits, such as a day, is one that torch takes."""
    path = left(tmp_path)
    lines = again(path)
    assert "chips a chip: loss " in lines[1] and lines[1].endswith("; not finite: nothing up to here")
    recipe = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(recipe.replace("checkpoint_activations: false", "checkpoint_activations: true"))
    with mock.patch.object(dump, "checkpoint_regions", wraps=dump.checkpoint_regions) as less:
        assert [line.split(",")[0] for line in again(path)] == [line.split(",")[0] for line in lines] and less.called
    batches = path / "rank-0.safetensors"
    whole, _ = read_tensors(batches)
    for name, wrong in {"0.images": whole["0.images"][..., 1:], "0.dropped": whole["0.dropped"].float(),
                        "0.label": torch.ones(()), "0.other": torch.ones(1)}.items():
        write_tensors(batches, {**whole, name: wrong}, {})
        if name == "0.other":
            assert again(path)
            continue
        with pytest.raises(DataError, match=f"rank-0.safetensors: has no {name} of 1 chips"):
            again(path)
    about = json.loads((path / "dump.json").read_text())
    (path / "dump.json").write_text(json.dumps({**about, "chips": [[[]]]}))
    with pytest.raises(DataError, match="not a dump"):
        again(path)


def test_a_full_disk_is_one_message_that_says_why_there_was_something_to_leave(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=r"training has diverged.*file/step-00000005 cannot be written"):
        left(tmp_path / "file")
