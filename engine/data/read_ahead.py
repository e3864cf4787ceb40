"""Chips read ahead of the consumer, on threads, into buffers that are used again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from engine.data.batch import Request, read_for
from engine.data.source import Source, Turn


class Job(NamedTuple):
    """What to read."""

    request: Request
    turn: Turn | None  # None: to be warped


class Fed(NamedTuple):
    """What was read."""

    arrays: tuple[np.ndarray, ...]
    months: np.ndarray


class ReadAhead:
    """Iterates over batches of `Job`s, `depth` batches ahead of the consumer, on `threads` threads.

    Buffers are reused: what an iteration yields stays untouched for `hold` further iterations, which has to cover
    the consumer's own queue.  Raises BadChip.
    """

    def __init__(self, source: Source, jobs: Iterable[list[Job]], threads: int, depth: int, hold: int):
        self._source = source
        self._jobs = iter(jobs)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._pending: deque[list[tuple[Future[Fed], Any]]] = deque()
        self._held: deque[list[Any]] = deque()
        self._free: list[Any] = []
        self._depth, self._hold = depth, hold

    def __iter__(self) -> Iterator[list[Fed]]:
        try:
            self._submit()
            while self._pending:
                batch = self._pending.popleft()
                fed = [future.result() for future, _ in batch]
                self._held.append([buffer for _, buffer in batch])
                if len(self._held) > self._hold:
                    self._free += self._held.popleft()
                self._submit()
                yield fed
        finally:
            self.close()

    def _submit(self) -> None:
        while len(self._pending) < self._depth:
            jobs = next(self._jobs, None)
            if jobs is None:
                return
            batch = []
            for job in jobs:
                buffer = self._free.pop() if self._free else self._source.buffer()
                batch.append((self._pool.submit(read_for, job.request, self._read, job, buffer), buffer))
            self._pending.append(batch)

    def _read(self, job: Job, buffer: Any) -> Fed:
        stored = self._source.read(job.request.chip, job.request.draw.keep, buffer, job.turn)
        return Fed(stored.arrays(), stored.months)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
