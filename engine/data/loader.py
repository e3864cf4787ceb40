"""From requests to batches on the device: read ahead (threads) → DALI pipeline → torch, zero-copy.

The trainer and the evaluator ask for batches the same way; only the requests differ.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from engine.data import pipeline
from engine.data.bands import T
from engine.data.index import Chip
from engine.data.plan import IDENTITY, Draw
from engine.data.source import UPRIGHT, Fed, Job, ReadAhead, Source, Turn, turn_of
from engine.errors import DeviceError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Request(NamedTuple):
    """One chip of a batch, and what to do to it.  `row` travels along: the chip's place in a table of results."""

    chip: Chip
    draw: Draw = IDENTITY
    row: int = 0
    valid: bool = True


class Batch(NamedTuple):
    """Slot k of chip b holds its k-th kept month; the slots after the last are zero and `dropped`.

    Attention over months does not depend on their order, so kept months are simply moved to the front.
    """

    images: torch.Tensor  # [B, T, C, H, W], training precision, channels_last in memory
    dropped: torch.Tensor  # [B, T] bool, on the host: the model counts kept months without waiting for the device
    label: torch.Tensor  # [B, H, W] float32, t/ha
    rows: torch.Tensor  # [B] int64
    valid: torch.Tensor  # [B] bool; False marks padding of the last evaluation batch
    chips: list[Chip]


class Loader:
    """A DALI pipeline for batches of one size, kept over epochs.

    `device`: where the batches are wanted; `backend` "cpu" or "gpu": where DALI works.  `wait` counts the seconds
    that the consumer stood waiting.  Raises DeviceError where `backend` "gpu" has no GPU.
    """

    def __init__(self, source: Source, *, batch_size: int, device: torch.device, backend: str, precision: str,
                 warp: bool, readers: int = 4, threads: int = 2, prefetch: int = 2):
        if backend == "gpu" and not torch.cuda.is_available():
            raise DeviceError("data.backend gpu: this machine has no CUDA device; set data.backend: cpu "
                              "(and train.device: cpu)")
        self.wait = 0.0
        self._source, self._batch_size, self._device = source, batch_size, device
        self._readers, self._prefetch = readers, prefetch
        self._dtype = DTYPES[precision]
        self._warp, self._gpu = warp, backend == "gpu"
        self._ready: Iterator[list[Fed]] = iter(())
        self._fed: deque[tuple[list[Request], list[int]]] = deque()
        self._asked: deque[list[Request]] = deque()
        self._pipe = pipeline.build(
            self._feed, form=source.form, batch_size=batch_size, threads=threads, prefetch=prefetch, warp=warp,
            device_id=(device.index or 0) if self._gpu else None,
            half=self._gpu and precision != "fp32")  # DALI's CPU operators take 30 ms a chip to write float16

    def batches(self, requests: Iterable[list[Request]]) -> Iterator[Batch]:
        """Yield one batch for each list of `batch_size` requests, in order.

        Raises DataError from the reading of a chip.  Read to the end or drop the loader: batches prepared ahead
        of an abandoned iteration would come first in the next.
        """
        ahead = ReadAhead(self._source, self._tell(requests), self._readers, depth=self._prefetch + 1,
                          hold=self._prefetch + 2)
        self._ready = iter(ahead)
        try:
            while True:
                start = time.perf_counter()
                try:
                    images, labels = self._run()
                except StopIteration:
                    self._pipe.reset()
                    return
                batch = self._batch(images, labels)
                self.wait += time.perf_counter() - start
                yield batch
        finally:
            ahead.close()

    def _tell(self, requests: Iterable[list[Request]]) -> Iterator[list[Job]]:
        for batch in requests:
            self._asked.append(batch)
            yield [Job(request.chip, request.draw.keep, self._turn(request)) for request in batch]

    def _turn(self, request: Request) -> Turn | None:
        if not self._warp:
            return UPRIGHT
        return None if self._gpu else turn_of(request.draw.matrix)

    def _feed(self) -> tuple[list[np.ndarray], ...]:
        ready = next(self._ready)
        requests = self._asked.popleft()
        self._fed.append((requests, [len(fed.months) for fed in ready]))
        arrays = tuple(map(list, zip(*(fed.arrays for fed in ready))))
        if not self._warp:
            return arrays
        matrices = [request.draw.matrix for request in requests]
        if self._gpu:
            return *arrays, matrices
        return *arrays, matrices, [np.array(self._turn(request) is None) for request in requests]

    def _run(self) -> tuple[torch.Tensor, torch.Tensor]:
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        outputs = self._pipe.run(cuda_stream=stream) if stream else self._pipe.run()
        images, labels = (torch.from_dlpack(output.as_tensor()) for output in outputs)
        return images, labels

    def _batch(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        requests, kept = self._fed.popleft()
        dropped = np.arange(T) >= np.array(kept)[:, None]
        return Batch(
            images=images.to(self._device, self._dtype, non_blocking=True).permute(0, 1, 4, 2, 3),
            dropped=torch.from_numpy(dropped),
            label=labels.to(self._device, non_blocking=True),
            rows=self._put(torch.tensor([request.row for request in requests])),
            valid=self._put(torch.tensor([request.valid for request in requests])),
            chips=[request.chip for request in requests],
        )

    def _put(self, small: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            small = small.pin_memory()  # or the copy would wait for the device
        return small.to(self._device, non_blocking=True)
