"""A rank that fails, dies or hangs is known to all, by name, even where they wait for it inside a collective: a thread
of each rank looks into the store that they met in.

Keys of the store: `beat/{rank}` rises while the rank lives, and says where its main thread stands
(`engine.base.sections`); `failed` says who left first and why, and behind a NUL which ranks hang; `told` counts those
who have read it, for the rank that holds the store must not end before.

Who hangs: those that are behind all others wait for nobody, so they are the ones, once each has stood for longer than
its section may take.  Others are stuck too, but ahead, in a message in which they wait.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from engine.base.sections import HERE, Sections

PERIOD = 1.0  # seconds between looks
GRACE = 5.0  # seconds in which a rank that was told is to leave by itself
PATIENCE = 5.0  # seconds that a message to the store may take; a frozen or unplugged host takes it without an answer
END = 30.0  # seconds without a beat that a rank has at the end, where the others have nothing left to do but to wait
ABRUPT = 2  # exit status of a rank that did not


class Beat(NamedTuple):
    """What a rank says of itself."""

    number: int
    passed: int  # `Sections.now`
    section: str
    seconds: float  # since its main thread moved


class Watch(threading.Thread):
    """Beats for rank `rank`, whose name people know as `names[rank]`; rank 0 listens to the others, they to rank 0.

    store: this thread's own connection.  timeout: seconds without a beat after which a rank counts as lost.
    limits: seconds that the main thread may stand in a section, by its name; for ever where it is not there.
    """

    def __init__(self, store: Any, rank: int, names: list[str], timeout: float,
                 limits: Mapping[str, float] | None = None, sections: Sections = HERE,
                 leave: Callable[[int], Any] = os._exit):
        super().__init__(name="watch", daemon=True)
        self._store, self._rank, self._names, self._timeout, self._leave = store, rank, names, timeout, leave
        self._limits, self._sections = limits or {}, sections
        store.set_timeout(timedelta(seconds=PATIENCE))
        self._over = threading.Event()
        self._awake = 0.0  # seconds; all that follows is in them
        self._moved = 0.0  # the main thread, last
        self._answered = 0.0  # the store, last
        self._heard = dict.fromkeys(range(1, len(names)) if rank == 0 else (0,), ("", 0.0))
        self._lock = threading.Lock()
        self._hanging = False
        self.reason: str | None = None

    def run(self) -> None:
        # A thread of its own: what a frozen host does not answer is waited for without end
        threading.Thread(target=self._look_often, name="watch-store", daemon=True).start()
        before, stood = time.monotonic(), None
        while not self._over.wait(PERIOD):
            now, stands = time.monotonic(), (self._sections.now, self._sections.alive)
            self._awake += min(now - before, 3 * PERIOD)  # who was stopped and goes on (SIGCONT) did not hang meanwhile
            if stands != stood:
                self._moved = self._awake
            before, stood = now, stands
            silent = self._awake - self._answered
            if silent > self._timeout + PERIOD:
                self._set(f"{self._names[0]}, which has not answered for {silent:.0f} s{self._last_in(0)}")
            if self.reason is not None:
                if self._hanging:
                    print(f"{self._names[self._rank]} hangs; where its threads stand, the main one last:",
                          file=sys.stderr, flush=True)
                    faulthandler.dump_traceback(2)
                if not self._over.wait(GRACE):
                    print(f"stopped by {self.reason}", file=sys.stderr, flush=True)
                    self._leave(ABRUPT)
                return

    def _look_often(self) -> None:
        beat = 0
        while self.reason is None and not self._over.wait(PERIOD):
            beat += 1
            try:
                self._look(beat)
            except dist.DistStoreError:  # it took too long; `run` says when that is too often
                continue
            except Exception:  # the store is gone, and rank 0 with it
                self._set(f"{self._names[0]}, which no longer answers{self._last_in(0)}")
            self._answered = self._awake

    def _look(self, beat: int) -> None:
        with self._lock:
            now, (passed, section) = self._awake, self._sections.now
            own = Beat(beat, passed, section, now - self._moved)
            self._store.set(f"beat/{self._rank}", json.dumps(own))
            if self._store.check(["failed"]):
                self._read()
                return
            for other, (last, since) in self._heard.items():
                found = self._store.get(f"beat/{other}").decode() if self._store.check([f"beat/{other}"]) else ""
                if found != last:
                    self._heard[other] = found, now
                elif now - since > self._timeout:
                    self._store.compare_set("failed", "", f"{self._names[other]}, which has not been heard of for "
                                                          f"{now - since:.0f} s{self._last_in(other)}")
            if self._rank == 0:
                self._judge(own, now)

    def _judge(self, own: Beat, now: float) -> None:
        """On rank 0: whether ranks hang, and which."""
        if not all(found and now - since < 5 * PERIOD for found, since in self._heard.values()):
            return  # the silent one may be it, and `timeout` is for that
        beats = [own, *(Beat(*json.loads(found)) for found, _ in self._heard.values())]
        least = min(beat.passed for beat in beats)
        behind = {rank: beat for rank, beat in enumerate(beats) if beat.passed == least}
        if any(beat.seconds <= self._limits.get(beat.section, math.inf) for beat in behind.values()):
            return
        who, several = ", ".join(self._names[rank] for rank in behind), len(behind) > 1
        if several and len(behind) == len(beats):
            who = f"all {len(beats)} ranks, none of them behind another (a GPU, NCCL or the network)"
        stuck = next(iter(behind.values()))
        text = f"{who}, which hang{'' if several else 's'} in {stuck.section} for {stuck.seconds:.0f} s"
        self._store.compare_set("failed", "", f"{text}\0{json.dumps(list(behind))}")

    def _last_in(self, other: int) -> str:
        found = self._heard[other][0] if other in self._heard else ""
        section = Beat(*json.loads(found)).section if found else ""
        return f", last known in {section}" if section else ""

    def _read(self) -> None:
        if self.reason is None:
            reason, _, hanging = self._store.get("failed").decode().partition("\0")
            self._hanging = self._rank in json.loads(hanging or "[]")
            self._set(reason)
            self._store.add("told", 1)

    def _set(self, reason: str) -> None:
        self.reason = self.reason or reason

    def told(self, wait: float) -> str | None:
        """Why others left, as far as it becomes known within `wait` seconds; who is silent for a moment now counts as
        lost.  For a rank whose collective failed."""
        self._timeout = min(self._timeout, 3 * PERIOD)
        end = time.monotonic() + wait
        while self.reason is None and time.monotonic() < end:
            time.sleep(0.05)
        return self.reason

    def tell(self, text: str) -> None:
        """That this rank leaves, and why."""
        if self._lock.acquire(timeout=PATIENCE):
            with suppress(dist.DistError):
                self._store.compare_set("failed", "", f"{self._names[self._rank]}: {text}")
            self._lock.release()
        self.linger()

    def heard(self) -> None:
        """This rank leaves, and knows why without having looked."""
        if self._lock.acquire(timeout=PATIENCE):
            with suppress(dist.DistError):
                self._store.add("told", 1)
            self._lock.release()
        self.stop()

    def linger(self) -> None:
        """Look no more.  Rank 0, with whom the store ends, waits for the others to have read it, for some seconds."""
        self.stop()
        end = time.monotonic() + (3 * PERIOD if self._rank == 0 else 0)
        with suppress(dist.DistError):
            while time.monotonic() < end and self._store.add("told", 0) < len(self._names) - 1:
                time.sleep(0.05)

    def all_here(self) -> None:
        """Wait for all ranks, however long one still works alone: that it lives is enough."""
        self._timeout = min(self._timeout, END)
        with self._lock:
            self._store.add("here", 1)
        while self.reason is None:
            with self._lock:
                if self._store.add("here", 0) >= len(self._names):
                    return
            time.sleep(0.05)

    def stop(self) -> None:
        self._over.set()
