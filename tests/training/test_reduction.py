"""Gradients and running statistics of two real processes."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from engine.base.distributed import join, leave
from engine.training.update.batchnorm import average_statistics, keep_horizon
from engine.training.update.reduction import Reducer
from tests.conftest import free_port
from tests.hosts import forks


def two_processes(work: Any, *args: object) -> None:
    port = str(free_port())
    processes = [forks().Process(target=_in_group, args=(rank, port, work, *args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


def _in_group(process: int, port: str, work: Any, *args: object) -> None:
    os.environ.update(RANK=str(process), WORLD_SIZE="2", LOCAL_RANK=str(process), LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    join("cpu", timeout=60)
    work(process, *args)
    leave()


class Branches(nn.Module):
    """Ten layers of which the fourth is skipped by all, and the fifth by the second rank; the last one's weight lies
    channels_last."""

    def __init__(self, size: int = 8):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(size, size, 3, padding=1) for _ in range(10))
        self.layers[9].to(memory_format=torch.channels_last)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: torch.Tensor, skip: tuple[int, ...]) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            if number not in skip:
                x = torch.tanh(layer(x))
        return x


def step(model: nn.Module, process: int, reducer: Reducer | None) -> None:
    """Three micro-batches."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(process)
    for turn in range(3):
        x = torch.randn(2, 8, 6, 6, generator=generator)
        loss = model(x, (4,) if process == 0 else (4, 5)).square().mean() / 3
        if reducer is not None and turn == 2:
            reducer.begin()
        loss.backward()
    if reducer is not None:
        reducer.finish()


def _gradients(process: int) -> None:
    torch.manual_seed(0)
    ours = Branches()
    plain = copy.deepcopy(ours)
    step(plain, process, None)
    for parameter in plain.parameters():
        if parameter.requires_grad:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(grad)
            parameter.grad = grad / 2
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        for bucket_bytes in (1, 6000, 25 << 20):
            model = copy.deepcopy(ours)
            reducer = Reducer(model, dtype, bucket_bytes)
            for _ in range(2):  # the second step begins with views of the buckets as gradients
                step(model, process, reducer)
                for (name, a), b in zip(model.named_parameters(), plain.parameters()):
                    if not a.requires_grad:
                        assert a.grad is None
                        continue
                    scale = float(b.grad.abs().max())
                    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=tolerance * max(scale, 1e-6), msg=name)
                    assert a.grad.dtype == torch.float32 and a.grad.stride() == a.stride()
            mine = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            both = [torch.empty_like(mine) for _ in range(2)]
            dist.all_gather(both, mine)
            assert torch.equal(*both)
            assert torch.equal(model.layers[4].weight.grad, torch.zeros_like(model.layers[4].weight))
            assert float(model.layers[5].weight.grad.abs().max()) > 0  # the first rank's


def test_gradients_are_those_of_a_plain_all_reduce() -> None:
    two_processes(_gradients)


def _overlap(process: int, folder: Path) -> None:
    torch.manual_seed(0)
    model = Branches(64)
    reducer = Reducer(model, bucket_bytes=1)
    order: list[str] = []
    for number, layer in enumerate(model.layers):
        layer.weight.register_post_accumulate_grad_hook(lambda _, n=number: order.append(f"gradient {n}"))
    send = dist.all_reduce

    def noted(*args: Any, **more: Any) -> Any:
        order.append("send")
        return send(*args, **more)

    x = torch.randn(4, 64, 64, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", noted)
        reducer.begin()
        model(x, ()).square().mean().backward()
        reducer.finish()
    # All but the last buckets went before the first layer's gradient was there, and each only once
    assert order.count("send") == 20 and order[:order.index("gradient 0")].count("send") >= 17, order

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        reducer.begin()
        loss = model(x, ()).square().mean()
        with torch.profiler.record_function("the backward"):
            loss.backward()
        reducer.finish()
    if process == 0:
        profile.export_chrome_trace(str(folder / "trace.json"))


def test_gradients_travel_while_the_backward_runs(tmp_path: Path) -> None:
    two_processes(_overlap, tmp_path)
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e.get("ph") == "X"]
    last = max((e for e in events if "convolution_backward" in e["name"]), key=lambda e: e["ts"])
    sent = [e for e in events if e["name"].startswith("gloo:all_reduce")]
    assert len(sent) == 20 and last["tid"] not in {e["tid"] for e in sent}
    assert sum(e["ts"] < last["ts"] + last["dur"] for e in sent) >= 3  # the cores may be busy with others


# BatchNorm --------------------------------------------------------------------------------------------------------


def _statistics(process: int) -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5, momentum=0.01)).double()

    often, once = model(), model()
    generator = torch.Generator().manual_seed(process)
    for _ in range(7):
        x = torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64) * (1 + process) + process
        for each in (often, once):
            each(x)
        average_statistics(often)
    average_statistics(once)
    for (name, a), b in zip(often.named_buffers(), once.buffers()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=name)
        both = [torch.empty_like(a) for _ in range(2)]
        dist.all_gather(both, b)
        assert torch.equal(*both)


def test_statistics_averaged_once_are_those_averaged_at_every_step() -> None:
    two_processes(_statistics)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_statistics_forget_per_chip_what_those_of_one_rank_do(ranks: int) -> None:
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=0.1), nn.BatchNorm2d(2, momentum=None)).double()
    keep_horizon(model, ranks)
    assert model[1].momentum is None  # it averages over all that it saw
    x = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        model[0].running_mean.fill_(1.0)
        for _ in range(8 // ranks):  # 8 micro-batches of a step
            model[0](x)
    torch.testing.assert_close(model[0].running_mean, torch.full((2,), 0.9**8, dtype=torch.float64), rtol=0, atol=1e-12)
