"""The thread that looks after other ranks: who failed, died, froze or was cut off is named on all others.  Three ranks
as threads of one process, with a store as launchers make it; whole runs are in test_ranks_loud.py."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from engine.base import watch
from engine.base.sections import Sections
from engine.base.watch import Watch
from tests.conftest import free_port
from tests.hosts import forks

NAMES = [f"rank {rank} on host {name}" for rank, name in enumerate("abc")]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"PERIOD": 0.1, "GRACE": 0.5, "PATIENCE": 0.5}.items():
        monkeypatch.setattr(watch, name, seconds)


def store(port: int, serve: bool = False) -> Any:
    return dist.TCPStore("127.0.0.1", port, None, serve, timedelta(seconds=20), wait_for_workers=False)


def serve(port: int) -> None:
    kept = store(port, serve=True)
    time.sleep(60)
    del kept


@contextmanager
def three(port: int, timeout: float = 60) -> Iterator[tuple[list[Watch], list[int]]]:
    left: list[int] = []
    watches = [Watch(store(port), rank, NAMES, timeout, leave=left.append) for rank in range(3)]
    for each in watches:
        each.start()
    try:
        yield watches, left
    finally:
        for each in watches:
            each.stop()


def soon(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_who_failed_first_is_told_to_all(capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    server = store(port, serve=True)
    with three(port) as (watches, left):
        watches[2].tell("chip 7 is truncated")
        watches[1].tell("the connection to rank 2 is lost")  # which is what follows from it
        soon(lambda: watches[0].reason is not None)
        assert watches[0].reason == "rank 2 on host c: chip 7 is truncated"
        # Ranks that said why have left; one that is told and stays is ended
        soon(lambda: left == [2])
        assert "stopped by rank 2 on host c: chip 7 is truncated" in capfd.readouterr().err
    del server


def test_rank_0_keeps_the_store_until_the_others_have_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PERIOD", 2.0)
    port = free_port()
    server = store(port, serve=True)
    watches = [Watch(store(port), rank, NAMES, 60, leave=lambda _: None) for rank in range(3)]
    watches[0].start()
    watches[2].tell("no room left")
    assert watches[0].told(30) == "rank 2 on host c: no room left"
    threading.Timer(0.2, watches[1].start).start()
    watches[0].linger()
    assert watches[1].reason == "rank 2 on host c: no room left"
    watches[1].stop()
    del server


def test_those_who_know_by_a_message_do_not_keep_rank_0_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PERIOD", "GRACE", "PATIENCE"):
        monkeypatch.setattr(watch, name, 60.0)
    port = free_port()
    server = store(port, serve=True)
    watches = [Watch(store(port), rank, NAMES, 60, leave=lambda _: None) for rank in range(3)]
    watches[1].heard()
    watches[2].heard()
    begin = time.monotonic()
    watches[0].tell("a key of the recipe")
    assert time.monotonic() - begin < 20
    del server


def test_a_silent_rank_is_named_and_one_that_works_for_long_is_not() -> None:
    port = free_port()
    server = store(port, serve=True)
    with three(port, timeout=3) as (watches, _):
        time.sleep(4)
        assert [each.reason for each in watches] == [None] * 3
        watches[1].stop()
        soon(lambda: None not in (watches[0].reason, watches[2].reason))
        assert watches[0].reason == watches[2].reason
        assert watches[0].reason.startswith("rank 1 on host b, which has not been heard of for ")
    del server


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_rank_0s_host_dies_or_freezes_and_nobody_waits_for_it(number: int) -> None:
    port = free_port()
    server = forks().Process(target=serve, args=(port,))
    server.start()
    try:
        with three(port, timeout=1) as (watches, left):
            time.sleep(0.3)
            os.kill(server.pid, number)
            soon(lambda: watches[1].reason is not None and watches[2].reason is not None, 30)
            assert watches[1].reason.startswith("rank 0 on host a, which ")
            begin = time.monotonic()
            watches[1].tell("timed out")  # cannot be told, and does not hang
            assert time.monotonic() - begin < 20
            soon(lambda: 2 in left)
    finally:
        if server.is_alive():
            os.kill(server.pid, signal.SIGKILL)
        server.join()


def test_a_slow_answer_is_not_a_lost_rank() -> None:
    class Slow:
        def __init__(self) -> None:
            self.calls = 0

        def set_timeout(self, _: timedelta) -> None: ...

        def set(self, key: str, value: str) -> None:
            self.calls += 1
            if self.calls < 4:
                raise dist.DistStoreError("wait timeout after 5000ms")

        def check(self, _: list[str]) -> bool:
            return False

    slow = Slow()
    each = Watch(slow, 1, NAMES, 60, leave=lambda _: None)
    each.start()
    soon(lambda: slow.calls > 5)
    assert each.reason is None
    each.stop()


def test_ranks_that_are_done_wait_for_one_that_works_on_alone() -> None:
    port = free_port()
    server = store(port, serve=True)
    with three(port, timeout=2) as (watches, _):
        threads = [threading.Thread(target=each.all_here) for each in watches[1:]]
        for thread in threads:
            thread.start()
        time.sleep(4)  # longer than ranks wait for one that is silent
        assert all(thread.is_alive() for thread in threads)
        watches[0].all_here()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        assert [each.reason for each in watches] == [None] * 3
    del server


def test_at_the_end_one_that_died_is_not_waited_for_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "END", 2.0)
    port = free_port()
    server = store(port, serve=True)
    with three(port, timeout=600) as (watches, _):
        soon(lambda: all(found for found, _ in watches[0]._heard.values()))
        watches[2].stop()  # and so beats no more
        watches[0].all_here()
        assert str(watches[0].reason).startswith(f"{NAMES[2]}, which has not been heard of for ")
    del server


# Who hangs, and in what -------------------------------------------------------------------------------------------

LIMITS = {"reading": 1.0, "step": 1.0, "starting": 60.0}


@contextmanager
def in_sections(names: list[str] = NAMES,
                timeout: float = 60) -> Iterator[tuple[list[Sections], list[Watch], list[int]]]:
    """Ranks that meet in a store of this process; what the main thread of each says."""
    kept, left = dist.HashStore(), list[int]()
    sections = [Sections() for _ in names]
    watches = [Watch(kept, rank, names, timeout, LIMITS, own, left.append) for rank, own in enumerate(sections)]
    for own, each in zip(sections, watches):
        own.enter("starting")
        each.start()
    try:
        yield sections, watches, left
    finally:
        for each in watches:
            each.stop()


def wait_in_a_step(own: Sections) -> None:
    own.enter("reading")
    own.enter("step")
    own.passed()


def named(watches: list[Watch]) -> str:
    """What all say, the same."""
    soon(lambda: all(each.reason is not None for each in watches))
    [reason] = {each.reason for each in watches}
    assert reason is not None
    return reason


@pytest.mark.parametrize("who", [0, 1])
def test_who_hangs_is_behind_those_who_wait_for_it(who: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Though they have stood longer than they may, and before it."""
    with in_sections() as (sections, watches, left):
        for rank, own in enumerate(sections):
            if rank != who:
                wait_in_a_step(own)
        time.sleep(1.5)
        assert [each.reason for each in watches] == [None] * 3  # it sets up, and has time for that
        sections[who].enter("reading")
        reason = named(watches)
        assert reason.startswith(f"{NAMES[who]}, which hangs in reading for ") and reason.endswith(" s")
        soon(lambda: len(left) == 3)
    assert left == [2] * 3
    said = capfd.readouterr().err
    assert said.count(f"stopped by {reason}") == 3
    assert said.count("hangs; where its threads stand") == 1
    assert f"{NAMES[who]} hangs; where" in said and "most recent call first" in said and " in soon" in said


def test_several_that_hang_are_all_named() -> None:
    with in_sections() as (sections, watches, _):
        wait_in_a_step(sections[0])
        sections[1].enter("reading")
        sections[2].enter("reading")
        assert named(watches).startswith(f"{NAMES[1]}, {NAMES[2]}, which hang in reading for ")


def test_where_none_is_behind_all_are_said_to_hang() -> None:
    with in_sections() as (sections, watches, _):
        for own in sections:
            wait_in_a_step(own)
        reason = named(watches)
    assert reason.startswith("all 3 ranks, none of them behind another (a GPU, NCCL or the network), "
                             "which hang in step for ")


@pytest.mark.parametrize("sign", [lambda own: own.enter("reading"), Sections.passed, Sections.moved])
def test_a_rank_that_gets_on_does_not_hang(sign: Callable[[Sections], None]) -> None:
    with in_sections(NAMES[:1]) as ([own], [alone], _):
        own.enter("reading")
        for _turn in range(20):
            sign(own)
            time.sleep(0.1)
        assert alone.reason is None


def test_a_frozen_rank_is_named_as_silent_with_the_section_it_was_in() -> None:
    """And not another as one that hangs, which is behind what the frozen one last said."""
    with in_sections(timeout=3) as (sections, watches, _):
        for own in sections:
            wait_in_a_step(own)
        sections[1].passed()
        time.sleep(0.5)
        watches[1].stop()
        reason = named([watches[0], watches[2]])
        assert reason.startswith(f"{NAMES[1]}, which has not been heard of for ")
        assert reason.endswith(", last known in step")


def test_a_rank_alone_is_watched(capfd: pytest.CaptureFixture[str]) -> None:
    with in_sections(NAMES[:1]) as ([own], [alone], left):
        own.enter("reading")
        soon(lambda: bool(left))
        assert left == [2] and str(alone.reason).startswith(f"{NAMES[0]}, which hangs in reading for ")
    said = capfd.readouterr().err
    assert f"{NAMES[0]} hangs; where its threads stand" in said and "most recent call first" in said


def watch_alone(started: Any) -> None:
    watch.PERIOD = watch.GRACE = 0.1
    own = Sections()
    own.enter("reading")
    Watch(dist.HashStore(), 0, NAMES[:1], 60, {"reading": 3.0}, own).start()
    started.send(True)
    for _ in range(8):  # a sleep counts on while the process is stopped
        time.sleep(0.2)
    own.enter("")
    time.sleep(60)


def test_who_is_stopped_and_goes_on_did_not_hang_meanwhile() -> None:
    here, there = forks().Pipe()
    process = forks().Process(target=watch_alone, args=(there,))
    process.start()
    try:
        assert here.recv()
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(4)
        os.kill(process.pid, signal.SIGCONT)
        process.join(2)
        assert process.exitcode is None
    finally:
        process.kill()
        process.join()
