"""Which device a rank takes, and that ranks which do not fit together all say so at once."""

from __future__ import annotations

import os
import socket
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from engine.base import distributed
from engine.base.errors import ConfigError, DeviceError
from engine.base.launchers import Place
from tests.conftest import free_port
from tests.hosts import forks

HOST = socket.gethostname()


@pytest.mark.parametrize(("gpus", "local_rank", "expected"), [(1, 0, 0), (1, 3, 0), (4, 3, 3), (8, 0, 0)])
def test_a_rank_takes_its_own_gpu_or_the_one_that_it_sees(gpus: int, local_rank: int, expected: int,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for wanted in ("auto", "gpu"):
        assert distributed.own_device(wanted, local_rank, 4) == torch.device("cuda", expected)
    assert distributed.own_device("cpu", local_rank, 4) == torch.device("cpu")


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="local rank 3 of 4 has no GPU: this machine has 2; launch with --num_gpus 2"):
        distributed.own_device("auto", 3, 4)


def _meets(rank: int, port: str, cards: list[str | None], expected: str) -> None:
    """Join with a GPU whose UUID is `cards[rank]`; None: without one; "": it is wanted, and there is none."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="3",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=port)

    def own(*_: object) -> torch.device:
        if cards[rank] == "":
            raise DeviceError("this machine has no CUDA device")
        return torch.device("cpu" if cards[rank] is None else "cuda")

    distributed.own_device = own
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(uuid=cards[rank])
    if rank == 2:
        time.sleep(1)
    begin = time.monotonic()
    try:
        distributed.join("auto", timeout=60)
    except Exception as error:
        assert (rank, str(error)) == (rank, error_of(rank, expected)) and time.monotonic() - begin < 45
        return
    raise AssertionError("they have met")


def error_of(rank: int, expected: str) -> str:
    return expected if rank == 1 or "no CUDA" not in expected else f"stopped by rank 1 on host {HOST}: {expected}"


@pytest.mark.parametrize(("cards", "expected"), [
    (["a", None, "c"], f"rank 0 on host {HOST} works on cuda, rank 1 on host {HOST} on cpu: ranks of one run need "
                       f"devices of one kind; set train.device (--device), or leave it out"),
    (["a", "b", "a"], f"rank 0 on host {HOST} and rank 2 share one GPU; start as many ranks on a host as it has GPUs "
                      f"(--num_gpus, --gpus-per-task=1)"),
    (["a", "", "c"], "this machine has no CUDA device"),
])
def test_ranks_that_do_not_fit_together(cards: list[str | None], expected: str) -> None:
    port = str(free_port())
    ranks = [forks().Process(target=_meets, args=(rank, port, cards, expected)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]


def test_ranks_that_do_not_meet_are_told_of() -> None:
    """Rank 0 was not started."""
    port = free_port()
    with mock.patch.dict(os.environ), pytest.raises(ConfigError, match=(
            rf"rank 1 on {HOST}: not all of 2 ranks met at 127.0.0.1:{port} within 1 s .*were all started, and can "
            r"they reach that host\?")):
        distributed._meet(Place(1, 2, 0, 1, "127.0.0.1", port), torch.device("cpu"), timeout=1)


def _shares(rank: int, port: str, cores: list[set[int]], own: int) -> None:
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.pop(name, None)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.sched_getaffinity = lambda process: cores[rank]
    distributed.join("cpu", timeout=60)
    assert torch.get_num_threads() == own and os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == str(own)
    assert distributed.share_of_host("auto") == own
    distributed.leave()


@pytest.mark.parametrize(("cores", "own"), [
    pytest.param([set(range(6)), set(range(6))], 3, id="unbound"),
    pytest.param([{0, 1, 2, 3}, {4, 5, 6, 7}], 4, id="bound by the launcher"),
    pytest.param([{0, 1, 2, 3}, {2, 3, 4, 5}], 3, id="bound in part")])
def test_ranks_of_a_host_share_its_cores(cores: list[set[int]], own: int) -> None:
    port = str(free_port())
    ranks = [forks().Process(target=_shares, args=(rank, port, cores, own)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
