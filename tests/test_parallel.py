"""What ranks agree on, with two real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from engine.metrics import ChipTable
from engine.parallel import StopFlag, average_, rank, synchronise_batchnorm, world


def _two(process: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=process, world_size=2)
    try:
        assert (rank(), world()) == (process, 2)
        assert average_(torch.tensor([float(process)])).item() == 0.5

        norm = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
        torch.manual_seed(process)
        norm(torch.randn(4, 3, 5, 5) + process)
        mine = [b.clone() for b in norm.buffers()]
        synchronise_batchnorm(norm)
        for before, after in zip(mine, norm.buffers()):
            both = [torch.empty_like(before) for _ in range(2)]
            dist.all_gather(both, before)
            expected = (both[0] + both[1]) / 2 if before.is_floating_point() else before
            torch.testing.assert_close(after, expected)

        stop = StopFlag()
        assert not stop.agreed()
        stop.asked = process == 1  # SIGTERM reaches one rank first
        assert stop.agreed()

        # each rank scores two of three chips' places, one of them padding
        table = ChipTable(3)
        maps = torch.full((2, 1, 4, 4), 10.0 + process)
        table.update(torch.tensor([process, 2]), maps, torch.full((2, 4, 4), 10.0), torch.tensor([True, process == 0]))
        table.reduce()
        assert table.metrics()["rmse_per_chip"] == pytest.approx(1 / 3)
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(_two, args=(str(tmp_path),), nprocs=2)


def test_alone_nothing_needs_a_group() -> None:
    assert average_(torch.tensor([3.0])).item() == 3.0
    synchronise_batchnorm(nn.BatchNorm2d(2))
    assert not StopFlag().agreed()
