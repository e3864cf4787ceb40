"""Measures the training loop without slowing it: losses, gradient norms, speed, waiting and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from engine.base.distributed import average_
from engine.base.errors import EngineError
from engine.base.progress import Progress
from engine.data.loader import Loader
from engine.run.log import RunLog


class Window:
    """The steps since the last log line.  Losses stay on the device until `flush` reads them all at once."""

    def __init__(self, log: RunLog, loader: Loader, progress: Progress, chips_per_step: int):
        self._log, self._loader, self._progress, self._chips = log, loader, progress, chips_per_step
        self.note = ""
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
        self._start, self._waited = time.perf_counter(), self._loader.wait

    def add(self, loss: torch.Tensor, norm: torch.Tensor | float, lr: float) -> None:
        self._losses.append(loss)
        self._norms.append(norm)
        self._rates.append(lr)

    def flush(self, step: int, skipped_before: int) -> int:
        """Log the window that ends with `step`.  Returns how many updates of it were skipped.

        Raises EngineError where training has diverged: no update of a long window was finite.
        """
        if not self._losses:
            return 0
        losses = average_(torch.stack(self._losses)).tolist()  # the one wait for the device
        norms = [float(norm) for norm in self._norms]
        seconds = max(time.perf_counter() - self._start, 1e-9)
        bad = sum(not np.isfinite(norm) for norm in norms)
        self._log.steps(step - len(losses) + 1, {"loss": losses, "grad_norm": norms, "lr": self._rates})
        self._log.scalars("speed", step, {
            "chips_per_second": len(losses) * self._chips / seconds,
            "data_wait_share": (self._loader.wait - self._waited) / seconds,
            "memory_gib": _peak_memory() / 2**30,
        })
        self._log.scalars("train", step, {"skipped_updates": float(skipped_before + bad)}, history=False)
        if bad:
            self._progress.say(f"step {step}: {bad} of the last {len(norms)} updates were skipped, their "
                               f"gradient was not finite ({skipped_before + bad} so far)")
        if bad == len(norms) >= 10:
            raise EngineError(f"training has diverged: the last {bad} gradients were not finite; the last good "
                              f"checkpoint is in the run's folder; lower optimizer.lr, or set train.precision: fp32")
        cost = sum(self._first) - len(self._first) * self._usual
        if self._first and self._usual and cost > 1:
            self._log.scalars("tuning", step, {"new_shapes": len(self._first), "seconds": cost})
            self._progress.say(f"step {step}: first passes of {len(self._first)} new shapes of batch took {cost:.1f} s "
                               "more than later ones (compilers, cuDNN's choice of algorithms)")
            self._first = []
        self.note = f"loss {losses[-1]:.2f}"
        self._clear()
        return bad


def _peak_memory() -> float:
    """Bytes: allocated at most on the GPU, or the process's resident peak."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
