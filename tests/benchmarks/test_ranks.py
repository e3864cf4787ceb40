"""benchmarks/ranks.py: the arithmetic of its model, that its ways do the same work, and that it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from engine.training.update.reduction import Reducer
from tests.conftest import ROOT, environment

sys.path.insert(0, str(ROOT / "benchmarks"))  # benchmarks are scripts

import harness
import ranks
from ranks import Network, exposed


def test_an_all_reduce_takes_the_less_of_ring_and_tree() -> None:
    """Two hosts of two ranks: a ring of 6 steps, 4 of them between hosts; a tree of one step each, up and down."""
    network = Network(rate=1e9, base=1e-4, inside=1e-3, between=2e-3, per_host=2)
    assert network.all_reduce(1e9, 4) == pytest.approx(1e-4 + 1.5 + 2 * 1e-3 + 4 * 2e-3)
    assert network.all_reduce(1e6, 4) == pytest.approx(1e-4 + 1.5e-3 / 0.92 + 2 * (1e-3 + 2e-3))
    assert network.all_reduce(1e9, 2) == pytest.approx(1e-4 + 1.0 + 2 * 1e-3)  # nothing between hosts
    assert network.all_reduce(1e9, 1) == 0


def test_the_network_of_a_host_is_shared_by_its_gpus() -> None:
    assert ranks.nvidia(1, 0).rate == 370e9
    assert ranks.nvidia(2, 100).rate == pytest.approx(0.85 * 12.5e9)
    assert ranks.nvidia(2, 100_000).rate == 370e9  # NVLink is then the slowest


@pytest.mark.parametrize(("rate", "late"), [
    (1e12, 1e-3),  # each of 10 buckets is sent before the next is ready: the last one is waited for
    (5e9, 0.1 + 10 * 0.2 - 1.0),  # none is: all wait behind the first
])
def test_what_is_sent_beside_the_backward_is_waited_for_at_its_end(rate: float, late: float) -> None:
    """A backward of 1 s, 10 GB of gradients over 2 ranks, in 10 buckets."""
    network = Network(rate, 0.0, 0.0, 0.0, 2)
    assert exposed(1.5, 10e9, 2, network, 1e9) == pytest.approx(late)
    assert exposed(1.5, 10e9, 2, network, 10e9) == pytest.approx(network.all_reduce(10e9, 2)), "one bucket: all of it"


def test_the_slowest_rank_is_the_plan_s() -> None:
    assert ranks.waiting(1, 16) == 1
    assert 1 < ranks.waiting(8, 16) < 1.02 < ranks.waiting(8, 2) < 1.15


def test_the_documentation_shows_what_the_model_says() -> None:
    assert ranks.table(rate=95) in (ROOT / "docs" / "many-gpus.md").read_text()


def _both_ways(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1), nn.Linear(6, 4))
    unused = nn.Parameter(torch.ones(3))
    model.register_parameter("unused", unused)
    reducer = Reducer(model, bucket_bytes=64)
    found = []
    for way in (ranks.AFTER, ranks.BESIDE):
        model.zero_grad(set_to_none=True)
        loss = model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(rank))).square().mean()
        if way == ranks.BESIDE:
            reducer.begin()
        loss.backward()
        if way == ranks.BESIDE:
            reducer.finish()
        else:
            ranks.reduce_after(list(model.parameters()))
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(found[0], found[1])
    assert not unused.grad.any() and model[0].weight.grad.any()
    dist.destroy_process_group()


def test_all_ways_of_reducing_give_the_same_gradients() -> None:
    mp.spawn(_both_ways, args=(ranks._free_port(),), nprocs=2)


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "ranks.py"), "--smoke", "--out", str(tmp_path / "r.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(traced=False), timeout=600)
    assert done.returncode == 0, done.stderr
    records = harness.read(tmp_path / "r.jsonl")
    timed = [record for record in records if "variant" in record]
    assert {record["group"] for record in timed} == {"all-reduce over 2 ranks", "weak scaling", "strong scaling"}
    assert all("time" in record for record in timed)
    assert sum("measured, ms" in record.get("values", {}) for record in records) == 1 + 2 * 2  # gloo; two ways, twice
    assert "| 512 | 100 Gb/s | 16 |" in done.stdout
