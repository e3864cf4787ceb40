"""Progress for people: a bar on a terminal, plain lines in a log, rank 0 only, with an estimate of the time left."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from tqdm import tqdm

from engine.base.sections import HERE


class Progress:
    """`with Progress("packing", total=1000, unit="chip") as progress: progress.advance(1, "note")`.

    In a log, a line is written at most every `interval` seconds, and at the end.
    """

    def __init__(self, title: str, total: int, unit: str, *, done: int = 0, quiet: bool = False,
                 interval: float = 20.0):
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._first, self._start, self._interval, self._quiet = done, time.monotonic(), interval, quiet
        self._last_line = self._start
        self._bar = None
        if sys.stderr.isatty() and not quiet:
            self._bar = tqdm(total=total, initial=done, desc=title, unit=unit, dynamic_ncols=True, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif not self._quiet and not failed:
            self._line("")

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        HERE.moved()
        if self._bar is not None:
            self._bar.update(count)
            if note:
                self._bar.set_postfix_str(note)
        elif not self._quiet and time.monotonic() - self._last_line >= self._interval:
            self._line(note)

    def skip(self, count: int) -> None:
        """Done before: counts as done, and not to the rate."""
        self.done, self._first = self.done + count, self._first + count
        if self._bar is not None:
            self._bar.initial += count
            self._bar.update(count)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _line(self, note: str) -> None:
        self._last_line = now = time.monotonic()
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        left = (self.total - self.done) / rate if rate else float("inf")
        eta = f", {timedelta(seconds=round(left))} left" if 0 < left < 1e9 else ""
        print(f"{self.title}: {self.done}/{self.total} {self.unit}s, {rate:.3g}/s{eta}{'  ' + note if note else ''}",
              file=sys.stderr, flush=True)
