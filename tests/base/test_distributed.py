"""What ranks agree on, with two real processes."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from engine.base.distributed import (
    Elsewhere,
    StopFlag,
    _Joined,
    average_,
    from_rank_0,
    join,
    leave,
    local_world,
    of_all,
    rank,
    together,
    world,
)
from engine.base.errors import DataError
from engine.base.stopping import Asked
from engine.inference.metrics import ChipTable
from engine.training.update.batchnorm import average_statistics
from tests.hosts import listening


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _two(process: int, port: str) -> None:
    os.environ.update(RANK=str(process), WORLD_SIZE="2", LOCAL_RANK=str(process), LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="192.0.2.1", MASTER_PORT=port)  # no host's: ranks of one host do not ask for it
    join("cpu", timeout=60)
    try:
        assert listening(os.getpid()) == {"127.0.0.1"}
        assert os.environ["NCCL_SOCKET_IFNAME"] == "lo"
        assert (rank(), world(), local_world()) == (process, 2, 2)
        assert from_rank_0(process) == 0 and of_all(process) == [0, 1]
        said = {"best": float("inf"), "loss": 0.1 + 0.2, "way": ["é", None, True]} if process else ["short"]
        assert of_all(said)[1] == {"best": float("inf"), "loss": 0.1 + 0.2, "way": ["é", None, True]}
        with pytest.raises(TypeError):
            from_rank_0(lambda: None)  # what a pickle could hold
        assert average_(torch.tensor([float(process)])).item() == 0.5

        norm = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
        torch.manual_seed(process)
        norm(torch.randn(4, 3, 5, 5) + process)
        mine = [b.clone() for b in norm.buffers()]
        average_statistics(norm)
        for before, after in zip(mine, norm.buffers()):
            both = [torch.empty_like(before) for _ in range(2)]
            dist.all_gather(both, before)
            expected = (both[0] + both[1]) / 2 if before.is_floating_point() else before
            torch.testing.assert_close(after, expected)

        stop = StopFlag(Asked())
        assert not stop.agreed()
        assert stop.told == [] and not stop.agreed("chip 5" if process else None) and stop.told == ["chip 5"]
        stop.asked.now = process == 1  # SIGTERM reaches one rank first
        assert stop.agreed(None if process else "chip 6") and stop.told == ["chip 6"]
        assert stop.agreed() and stop.told == []

        for group in (dist.group.WORLD, _Joined.host_group):
            assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=60)

        # What one fails in, all leave; and the next message meets its own kind
        failure, heard = (DataError, "^chip 7$") if process else (Elsewhere, "^stopped by rank 1 on host .*: chip 7$")
        with pytest.raises(failure, match=heard), together():
            if process == 1:
                raise DataError("chip 7")
        with pytest.raises(failure, match=heard):
            StopFlag().failed(DataError("chip 7")) if process else StopFlag().agreed()
        assert of_all(process) == [0, 1]

        # each rank scores two of three chips' places, one of them padding
        table = ChipTable(3)
        maps = torch.full((2, 1, 4, 4), 10.0 + process)
        table.update(torch.tensor([process, 2]), maps, torch.full((2, 4, 4), 10.0), torch.tensor([True, process == 0]))
        table.reduce()
        assert table.metrics()["rmse_per_chip"] == pytest.approx(1 / 3)
    finally:
        leave()


def test_two_processes() -> None:
    mp.spawn(_two, args=(str(free_port()),), nprocs=2)


def _one(process: int) -> None:
    join("cpu", timeout=60)
    assert dist.is_initialized() and listening(os.getpid()) <= {"127.0.0.1"}
    leave()


def test_a_process_alone_listens_to_nobody_else() -> None:
    mp.spawn(_one, nprocs=1)


def test_alone_nothing_needs_a_group() -> None:
    assert average_(torch.tensor([3.0])).item() == 3.0
    average_statistics(nn.BatchNorm2d(2))
    stop = StopFlag()
    assert not stop.agreed("chip 5") and stop.told == ["chip 5"] and not stop.agreed() and stop.told == []
