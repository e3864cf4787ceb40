"""What one number of ranks and ZeRO stage has saved, any other goes on with: all pairs, with DeepSpeed as the engine
makes it, around a small model."""

from __future__ import annotations

import itertools
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine.base.distributed import join, leave, rank, world
from engine.config import parse_config
from engine.data.plan import Sharding
from engine.training import checkpoint
from engine.training.checkpoint import EMA, MODEL, OPTIMIZER
from engine.training.engine import make_engine
from engine.training.state import full_state, optimizer_state
from engine.training.update.batchnorm import average_statistics
from engine.training.update.ema import Ema
from tests.conftest import free_port, once
from tests.hosts import forks

WAYS = [(ranks, stage) for ranks in (1, 2) for stage in (0, 1, 2, 3)]
PAIRS = list(itertools.product(WAYS, WAYS))


class Model(nn.Module):
    """Sizes that do not divide by two, a number alone, buffers, a parameter that is never used and one that is frozen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Conv2d(5, 1, 1)
        self.unused = nn.Parameter(torch.ones(3, 3))
        self.frozen = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))))


OFFLOADED = {2: ["offload_optimizer"], 3: ["offload_optimizer", "offload_param"]}  # to the CPU, by stage


def made(stage: int, offloaded: bool = False) -> tuple[Any, Any, Ema]:
    recipe = {"data": {"path": "/none"}, "optimizer": {"lr": 0.01},
              "train": {"zero_stage": stage, "precision": "fp32", "global_batch": 4, "micro_batch": 2},
              "deepspeed": {"zero_optimization": {
                  **({"stage3_param_persistence_threshold": 10} if stage == 3 else {}),
                  **{key: {"device": "cpu"} for key in (OFFLOADED[stage] if offloaded else [])}}}}
    torch.manual_seed(0)
    sharding = Sharding(2, 2 // world(), world(), rank())
    model: Any = Model()
    engine, reducer = make_engine(model, parse_config(recipe, "a test"), sharding, torch.device("cpu"),
                                  lambda text: None)
    return engine, reducer, Ema(engine, 0.15)


def train(engine: Any, reducer: Any, ema: Ema, *steps: int) -> list[float]:
    """As `Step.take` does, two chips a micro-batch; losses of all micro-batches of these steps."""
    losses = []
    for step in steps:
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        own = images.split(2)[rank()::world()]
        for turn, x in enumerate(own):
            loss = (engine(x) - x.mean()).square().mean()
            if reducer is not None and turn + 1 == len(own):
                reducer.begin()
            engine.backward(loss)
            if reducer is not None and turn + 1 == len(own):
                reducer.finish()
            if engine.zero_optimization_stage() == 0 and turn + 1 == len(own):
                torch.nn.utils.clip_grad_norm_(engine.module.parameters(), 5.0)
            engine.step()
            losses.append(float(loss.detach()))
        ema.update(step + 1)
    return losses


def keep(engine: Any, ema: Ema, path: Path, step: int) -> None:
    average_statistics(engine.module)
    tensors = {MODEL: full_state(engine), OPTIMIZER: optimizer_state(engine)}
    with ema.in_place():
        tensors[EMA] = full_state(engine)
    if rank() == 0:
        checkpoint.write(path, step, tensors, {"state": {}}, 9)


def fail_alone(process: int, ema: Ema, path: Path) -> None:
    """A rank that fails with the average in place leaves without the others, who may wait for what it has to say."""
    with suppress(ZeroDivisionError), ema.in_place():
        if process == 1:
            raise ZeroDivisionError
        end = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
    path.touch()


def name(way: tuple[int, int]) -> str:
    return f"{way[0]}-{way[1]}"


def work(process: int, ranks: int, port: str, folder: Path, first: bool) -> None:
    os.environ.update(RANK=str(process), WORLD_SIZE=str(ranks), LOCAL_RANK=str(process), LOCAL_WORLD_SIZE=str(ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    join("cpu", timeout=60)
    losses = {}
    for way in (way for way in WAYS if way[0] == ranks):
        if first:
            engine, reducer, ema = made(way[1])
            train(engine, reducer, ema, 0, 1)
            keep(engine, ema, folder / name(way), 2)
            losses[name(way)] = train(engine, reducer, ema, 2, 3)
            keep(engine, ema, folder / name(way), 4)
            if ranks == 2:
                fail_alone(process, ema, folder / f"left-{way[1]}")
            engine.destroy()
            if way[1] in OFFLOADED:
                engine, reducer, ema = made(way[1], offloaded=True)
                train(engine, reducer, ema, 0, 1)
                keep(engine, ema, folder / f"{name(way)}-offloaded", 2)
                engine.destroy()
                engine, reducer, ema = made(way[1], offloaded=True)
                checkpoint.load(engine, folder / f"{name(way)}-offloaded" / "step-00000002", ema)
                losses[f"{name(way)}-offloaded"] = train(engine, reducer, ema, 2, 3)
                keep(engine, ema, folder / f"{name(way)}-offloaded", 4)
                engine.destroy()
            continue
        for before in WAYS:
            engine, reducer, ema = made(way[1])
            checkpoint.load(engine, folder / name(before) / "step-00000002", ema)
            pair = folder / f"{name(before)}-then-{name(way)}"
            keep(engine, ema, pair, 2)
            losses[pair.name] = train(engine, reducer, ema, 2, 3)
            keep(engine, ema, pair, 4)
            engine.destroy()
    (folder / f"losses-{ranks}-{process}-{first}.json").write_text(json.dumps(losses))
    leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each way `R-S`: checkpoints after two steps and after four.  Of each pair `R-S-then-R-S` one of what was
    loaded from the former, and one after two steps more."""
    return once(tmp_path_factory, "elastic", train_all)


def train_all(path: Path) -> None:
    for first in (True, False):
        for ranks in (1, 2):
            port = str(free_port())
            processes = [forks().Process(target=work, args=(i, ranks, port, path, first)) for i in range(ranks)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(200)
            assert [process.exitcode for process in processes] == [0] * ranks


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    path = folder / f"step-{step:08d}"
    average = {f"ema.{key}": value for key, value in load_file(path / EMA).items()}
    return {**load_file(path / MODEL), **load_file(path / OPTIMIZER), **average}


def losses(folder: Path, key: str, ranks: int, first: bool) -> list[float]:
    """Of all micro-batches, in the order of the chips."""
    by_rank = [json.loads((folder / f"losses-{ranks}-{i}-{first}.json").read_text())[key] for i in range(ranks)]
    return [loss for together in zip(*by_rank) for loss in together]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=lambda way: name(way))
def test_any_goes_on_with_what_any_saved(folder: Path, before: tuple[int, int], after: tuple[int, int]) -> None:
    pair = f"{name(before)}-then-{name(after)}"
    saved, loaded = tensors(folder / name(before), 2), tensors(folder / pair, 2)
    assert {key: value for key, value in loaded.items() if not key.startswith("unused.")}.keys() == {
        key: value for key, value in saved.items() if not key.startswith("unused.")}.keys()
    assert all(torch.equal(loaded[key], value) for key, value in saved.items())  # moved, not computed with
    assert float(saved["conv.weight.exp_avg_sq"].max()) > 0 and float(saved["conv.weight.step"]) == 2
    assert float((saved["norm.running_mean"]).abs().max()) > 0 and "num_batches_tracked" in "".join(saved)
    assert (saved["ema.conv.weight"] != saved["conv.weight"]).all()
    whole, ours = tensors(folder / name(before), 4), tensors(folder / pair, 4)
    assert (before != after) or all(torch.equal(ours[key], value) for key, value in whole.items())
    for key, value in whole.items():
        if value.is_floating_point() and "running" not in key and not key.startswith(("unused", "ema.unused")):
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    torch.testing.assert_close(torch.tensor(losses(folder, pair, after[0], False)),
                               torch.tensor(losses(folder, name(before), before[0], True)), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in WAYS if way[1] in OFFLOADED], ids=name)
def test_what_is_offloaded_to_the_cpu_is_saved_and_loaded(folder: Path, way: tuple[int, int]) -> None:
    """As what is not: saved after two steps, loaded, and two steps more.  On a CPU, by DeepSpeed's code for it."""
    for step in (2, 4):
        plain, ours = tensors(folder / name(way), step), tensors(folder / f"{name(way)}-offloaded", step)
        assert plain.keys() == ours.keys() and all(torch.equal(ours[key], value) for key, value in plain.items())
    assert losses(folder, f"{name(way)}-offloaded", way[0], True) == losses(folder, name(way), way[0], True)
