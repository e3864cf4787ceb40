"""Work that nobody has to wait for: weights written and pictures drawn beside training, maps beside prediction."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Background:
    """One thread that does one thing after the other.  What failed is raised by the next call, and what was asked after
    it is not done."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._waiting: list[Future[Any]] = []

    def do(self, work: Callable[..., Any], *args: Any) -> None:
        """Do `work(*args)` later.  What was asked before the last call has been done when this returns, so that no more
        than two results are held in memory."""
        self.make_room()
        before = self._waiting[-1] if self._waiting else None
        self._waiting.append(self._pool.submit(_unless_failed, before, work, *args))

    def make_room(self) -> None:
        """Wait, as `do` would, before what is handed to it is made."""
        self._keep(1)

    def finish(self) -> None:
        """Wait until everything is done."""
        self._keep(0)

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _keep(self, most: int) -> None:
        while len(self._waiting) > most:
            self._waiting.pop(0).result()


def _unless_failed(before: Future[Any] | None, work: Callable[..., Any], *args: Any) -> None:
    if before is None or before.exception() is None:
        work(*args)
