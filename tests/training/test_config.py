from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from engine.base.errors import ConfigError
from engine.config import Config, load_config, parse_config
from engine.data.biomassters import BIOMASSTERS
from engine.data.plan import Sharding
from engine.training.cut import cut
from engine.training.deepspeed import deepspeed_config
from engine.training.optim import learning_rate, phase_rates
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_their_dump_means_the_same(path: Path) -> None:
    config = load_config(path)
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.dump())), "dump") == config


def test_the_winner_s_recipe() -> None:
    config = load_config(ROOT / "configs" / "biomassters.yaml")
    assert [phase.epochs for phase in config.phases] == [800, 100, 100, 100]
    assert [phase.train_on for phase in config.phases] == ["fold", "fold", "all", "all"]
    assert [phase_rates(phase, config.optimizer) for phase in config.phases] == [(1e-3, 1e-4)] + [(1e-4, 5e-5)] * 3
    first = config.phases[0]
    assert learning_rate(first, config.optimizer, 0) == 1e-3
    assert learning_rate(first, config.optimizer, 400) == pytest.approx(5.5e-4)
    assert learning_rate(first, config.optimizer, 799) < 1.0001e-4
    assert (config.optimizer.weight_decay, config.optimizer.clip) == (1e-2, 5.0)
    a = config.augment
    assert (a.hflip, a.rot90, a.rotate, a.degrees, a.centre_jitter) == (0.5, True, 0.7, 45, 0.1)
    assert (a.month_dropout, a.drop_month) == (0.5, 0.3)


def test_extends_and_overrides(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "data: {path: x}\ntrain: {micro_batch: 3, zero_stage: 1}")
    b = write(tmp_path / "b.yaml", "extends: a.yaml\ntrain: {zero_stage: 2}")
    config = load_config(b, ["optimizer.lr=1e-4", "data.path=/y", "train.global_batch=12", "augment.rot90=false"])
    assert (config.train.micro_batch, config.train.zero_stage, config.train.global_batch) == (3, 2, 12)
    assert config.optimizer.lr == 1e-4 and config.data.path == "/y" and not config.augment.rot90


@pytest.mark.parametrize(("text", "message"), [
    ("data: {path: x}\ntrain: {micro_bach: 3}", r"unknown key 'train.micro_bach'; did you mean 'micro_batch'\?"),
    ("data: {path: x}\nmodle: {}", r"unknown key 'modle'; did you mean 'model'\?"),
    ("data: {path: x}\nphases: [{epochs: 3, epoch: 3}]", r"unknown key 'phases.0.epoch'; did you mean 'epochs'\?"),
    ("train: {}", "'data' must be given"),
    ("data: {path: x}\ntrain: {precision: fp8}", r"train.precision: .*'fp32', 'bf16' or 'fp16' \(found 'fp8'\)"),
    ("data: {path: x}\ntrain: {micro_batch: 0}", "train.micro_batch: .*greater than 0"),
    ("data: {path: x, split: {fold: 10}}", "fold 10 does not exist in 10 folds: give 0..9"),
    ("data: {path: x, split: {path: y}}", "path belongs to scheme 'file'"),
    ("data: {path: x}\nphases: [{epochs: 1}, {epochs: 2}]", "names must differ"),
    ("data: {path: x}\ntrain: {micro_batch: true}", "train: micro_batch is True, where a number belongs"),
    ("data: {path: x}\noptimizer: {betas: [0.9, true]}", "optimizer: betas is True, where a number belongs"),
    ("data: {path: x}\naugment: {rot90: 1}", "augment: rot90 is 1, where true or false belongs"),
    ("data: {path: x}\ntrain: {}\ntrain: {}", "not a YAML file: line 3: 'train' is given twice; leave one out"),
    ("data: {path: x}\nloss: {options: {ignore_above: .nan}}", "loss: options.ignore_above is nan: give a finite"),
    ("data: {path: x}\ndeepspeed: {a: [{b: 2001-01-01}]}", "deepspeed.a.b is 2001-01-01: give a finite number or a"),
    ("data: {path: x}\noptimizer: {lr: .inf}", r"optimizer.lr: .*finite number \(found inf\)"),
    ("data: {path: x}\noptimizer: {lr: 1e400}", "optimizer.lr: .*finite number"),
    (f"data: {{path: x}}\ntrain: {{global_batch: {10**30}}}", "train.global_batch: .*less than or equal to 1048576"),
    ("[1, 2]", "a recipe is a mapping"), ("a: [", "not a YAML file"),
])
def test_bad_recipes_name_the_file_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "r.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_missing_and_circular_recipes(tmp_path: Path) -> None:
    write(tmp_path / "near.yaml", "data: {path: x}")
    with pytest.raises(ConfigError, match=r"none.yaml: no such recipe; .* has near.yaml"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="named by extends"):
        load_config(write(tmp_path / "a.yaml", "extends: none.yaml"))
    write(tmp_path / "c.yaml", "extends: d.yaml")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(write(tmp_path / "d.yaml", "extends: c.yaml"))


@pytest.mark.parametrize("item", ["train", "=3", "train.micro_batch.x=1", "a=["])
def test_bad_overrides(tmp_path: Path, item: str) -> None:
    path = write(tmp_path / "a.yaml", "data: {path: x}\ntrain: {micro_batch: 2}")
    with pytest.raises(ConfigError, match="--set"):
        load_config(path, [item])


def make(**sections: object) -> Config:
    return parse_config({"data": {"path": "x"}, **sections}, "test")


@pytest.mark.parametrize("stage", range(4))
def test_the_deepspeed_config(stage: int) -> None:
    config = make(train={"global_batch": 24, "micro_batch": 3, "zero_stage": stage, "precision": "bf16"},
                  deepspeed={"zero_optimization": {"reduce_bucket_size": 5}, "wall_clock_breakdown": True})
    derived = deepspeed_config(config, cut(config, BIOMASSTERS, 4))
    assert derived["train_batch_size"] == 24 and derived["train_micro_batch_size_per_gpu"] == 3
    assert derived["gradient_accumulation_steps"] == 2
    overlap = {"overlap_comm": True} if stage in (1, 2) else {}
    assert derived["zero_optimization"] == {"stage": stage, "reduce_bucket_size": 5, **overlap}
    assert derived["timers"]["throughput"]["enabled"] is False  # it would wait for the device twice a step
    assert derived["torch_autocast"]["dtype"] == "bfloat16" and derived["wall_clock_breakdown"] is True
    assert derived["gradient_clipping"] == (5.0 if stage else 0.0)
    assert "torch_autocast" not in deepspeed_config(make(train={"precision": "fp32"}), Sharding(16))
    assert "communication_data_type" not in derived
    halved = make(train={"zero_stage": stage, "reduce_dtype": "bf16"})
    assert deepspeed_config(halved, Sharding(16))["communication_data_type"] == "bf16"


@pytest.mark.parametrize("block", [{"train_batch_size": 3}, {"bf16": {"enabled": True}}, {"optimizer": {}},
                                   {"zero_optimization": {"stage": 2}},
                                   {"zero_optimization": {"compute_grad_norm": False}}])
def test_what_the_engine_derives_is_refused(block: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"deepspeed\.[\w.]+: the engine sets this; use "):
        deepspeed_config(make(deepspeed=block), Sharding(16))


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_what_checkpoints_would_not_hold_is_refused(key: str) -> None:
    block = {"zero_optimization": {key: {"device": "nvme", "nvme_path": "/tmp"}}}
    with pytest.raises(ConfigError, match=rf"^deepspeed.zero_optimization.{key}.device: checkpoints .*; use cpu$"):
        deepspeed_config(make(train={"zero_stage": 3}, deepspeed=block), Sharding(16))
