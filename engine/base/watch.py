"""A rank that fails, dies or hangs is known to all within seconds, by name, even where they wait for it inside a
collective: a thread of each rank looks into the store that they met in.

Keys of the store: `beat/{rank}` rises while the rank lives; `failed` says who left first and why; `told` counts those
who have read it, for the rank that holds the store must not end before.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PERIOD = 1.0  # seconds between looks
GRACE = 5.0  # seconds in which a rank that was told is to leave by itself
PATIENCE = 5.0  # seconds that a message to the store may take; a frozen or unplugged host takes it without an answer
ABRUPT = 2  # exit status of a rank that did not


class Watch(threading.Thread):
    """Beats for rank `rank`, whose name people know as `names[rank]`; rank 0 listens to the others, they to rank 0.

    store: this thread's own connection.  timeout: seconds without a beat after which a rank counts as lost.
    """

    def __init__(self, store: Any, rank: int, names: list[str], timeout: float,
                 leave: Callable[[int], Any] = os._exit):
        super().__init__(name="watch", daemon=True)
        self._store, self._rank, self._names, self._timeout, self._leave = store, rank, names, timeout, leave
        store.set_timeout(timedelta(seconds=PATIENCE))
        self._over = threading.Event()
        self._heard = {other: ("", time.monotonic()) for other in (range(1, len(names)) if rank == 0 else (0,))}
        self._answered = time.monotonic()  # the store, last
        self._lock = threading.Lock()
        self.reason: str | None = None

    def run(self) -> None:
        # A thread of its own: what a frozen host does not answer is waited for without end
        threading.Thread(target=self._look_often, name="watch-store", daemon=True).start()
        while not self._over.wait(PERIOD):
            silent = time.monotonic() - self._answered
            if silent > self._timeout + PERIOD:
                self._set(f"{self._names[0]}, which has not answered for {silent:.0f} s")
            if self.reason is not None:
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
                self._set(f"{self._names[0]}, which no longer answers")
            self._answered = time.monotonic()

    def _look(self, beat: int) -> None:
        with self._lock:
            self._store.set(f"beat/{self._rank}", str(beat))
            if self._store.check(["failed"]):
                self._read()
                return
            now = time.monotonic()
            for other, (last, since) in self._heard.items():
                found = self._store.get(f"beat/{other}").decode() if self._store.check([f"beat/{other}"]) else ""
                if found != last:
                    self._heard[other] = found, now
                elif now - since > self._timeout:
                    self._store.compare_set("failed", "", f"{self._names[other]}, which has not been heard of for "
                                                          f"{now - since:.0f} s")

    def _read(self) -> None:
        if self.reason is None:
            self._set(self._store.get("failed").decode())
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
        with self._lock:
            self._store.add("here", 1)
        while self.reason is None:
            with self._lock:
                if self._store.add("here", 0) >= len(self._names):
                    return
            time.sleep(0.05)

    def stop(self) -> None:
        self._over.set()
