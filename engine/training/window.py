"""Measures the training loop without slowing it: losses, gradient norms, speed, waiting and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from engine.base.distributed import average_, of_all
from engine.base.progress import Progress
from engine.data.loader import Loader
from engine.run.log import RunLog
from engine.training.update.step import Taken

SHOWN = 8  # chips of a step in a message


class Window:
    """The steps since the last log line.  Losses stay on the device until `flush` reads them all at once."""

    def __init__(self, log: RunLog, loader: Loader, progress: Progress, chips_per_step: int):
        self._log, self._loader, self._progress, self._chips_per_step = log, loader, progress, chips_per_step
        self.note = ""
        self.skipped_in_a_row = 0  # updates, up to the end of the last window
        self._shapes: set[int] = set()
        self._first: list[float] = []  # the host's seconds in first passes of a shape that were not reported yet
        self._usual = 0.0  # the same of the latest other pass
        self._clear()

    @contextmanager
    def shape(self, months: int) -> Iterator[None]:
        """Around forward and backward of a micro-batch that keeps `months` in all.

        The first pass of a shape makes the host wait for compilers and for cuDNN, which tries out its algorithms;
        `flush` says how long.
        """
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        if months in self._shapes:
            self._usual = seconds
        else:
            self._shapes.add(months)
            self._first.append(seconds)

    def _clear(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor | float] = []
        self._rates: list[float] = []
        self._chips: list[list[str]] = []
        self._start, self._waited = time.perf_counter(), self._loader.wait

    def add(self, taken: Taken, lr: float) -> None:
        self._losses.append(taken.loss)
        self._norms.append(taken.norm)
        self._chips.append(taken.chips)
        self._rates.append(lr)

    def flush(self, step: int, skipped_before: int) -> int:
        """Log the window that ends with `step`, on all ranks.  Returns how many updates of it were skipped."""
        if not self._losses:
            return 0
        losses = average_(torch.stack(self._losses)).tolist()  # the one wait for the device
        norms = [float(norm) for norm in self._norms]
        seconds = max(time.perf_counter() - self._start, 1e-9)
        good = np.isfinite(losses) & np.isfinite(norms)
        bad = len(good) - int(good.sum())
        self._log.steps(step - len(losses) + 1, {"loss": losses, "grad_norm": norms, "lr": self._rates})
        self._log.scalars("speed", step, {
            "chips_per_second": len(losses) * self._chips_per_step / seconds,
            "data_wait_share": (self._loader.wait - self._waited) / seconds,
            "memory_gib": _peak_memory() / 2**30,
        })
        self._log.scalars("train", step, {"skipped_updates": float(skipped_before + bad)}, history=False)
        self.skipped_in_a_row = int(good[::-1].argmax()) if good.any() else self.skipped_in_a_row + bad
        if bad:
            self._tell(step - len(good) + 1, good, skipped_before + bad)
        cost = sum(self._first) - len(self._first) * self._usual
        if self._first and self._usual and cost > 1:
            self._log.scalars("tuning", step, {"new_shapes": len(self._first), "seconds": cost})
            self._progress.say(f"step {step}: first passes of {len(self._first)} new shapes of batch took {cost:.1f} s "
                               "more than later ones (compilers, cuDNN's choice of algorithms)")
            self._first = []
        self.note = f"loss {losses[-1]:.2f}"
        self._clear()
        return bad

    def _tell(self, first: int, good: np.ndarray, so_far: int) -> None:
        """Of which chips the steps were, from `first` on, that are not `good` [n] bool."""
        steps = [[chip for part in parts for chip in part] for parts in zip(*of_all(self._chips))]
        bad = np.flatnonzero(~good).tolist()
        for place in bad:
            self._log.note("not_finite", first + place, {"chips": steps[place]})
        last = steps[bad[-1]]
        more = f" and {len(last) - SHOWN} more" if len(last) > SHOWN else ""
        self._progress.say(f"step {first + len(good) - 1}: {len(bad)} of the last {len(good)} updates were skipped, "
                           f"their loss or gradient was not finite ({so_far} so far); the last was step "
                           f"{first + bad[-1]}, of chips {', '.join(last[:SHOWN])}{more} (all are in history.jsonl)")


def _peak_memory() -> float:
    """Bytes: allocated at most on the GPU, or the process's resident peak."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
