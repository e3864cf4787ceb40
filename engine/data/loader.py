"""From requests to batches on the device: chips are read ahead on threads, and a DALI pipeline makes batches of them
(`Piped`); packed chips on a CPU become a batch directly (`engine.data.store.cpu_batches`).

Training and prediction ask for batches the same way; only the requests differ.
"""

from __future__ import annotations

import functools
import gc
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from engine.base.errors import DeviceError
from engine.data import pipeline
from engine.data.batch import Batch, Produced, Producer, Request
from engine.data.handoff import MOST, Handoff
from engine.data.read_ahead import Fed, Job, ReadAhead
from engine.data.source import UPRIGHT, Source, Turn, turn_of
from engine.data.store.cpu_batches import Direct
from engine.data.store.source import DIRECT, PackedSource

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Loader:
    """Makes batches of one size, kept over epochs.

    `device`: where the batches are wanted; `backend` "cpu" or "gpu": where they are made.  `wait` counts the seconds
    that the consumer stood waiting.  Raises DeviceError where `backend` "gpu" has no GPU.
    """

    def __init__(self, source: Source, *, batch_size: int, device: torch.device, backend: str, precision: str,
                 warp: bool, readers: int = 4, threads: int = 2, prefetch: int = 2):
        if backend == "gpu" and not torch.cuda.is_available():
            raise DeviceError("data.backend gpu: this machine has no CUDA device; set data.backend: cpu "
                              "(and train.device: cpu)")
        self.wait = 0.0
        self._dtype, self._handoff, self._months = DTYPES[precision], Handoff(device), source.dataset.months
        self._make: Callable[[], Producer]
        if source.form == DIRECT:
            assert isinstance(source, PackedSource)
            self._make = functools.partial(Direct, source, batch_size, threads=readers, ahead=prefetch, warp=warp,
                                           page_locked=device.type == "cuda")
        else:
            self._make = functools.partial(Piped, source, batch_size, device=device, gpu=backend == "gpu",
                                           half=precision != "fp32", warp=warp, readers=readers, threads=threads,
                                           prefetch=prefetch)
        self._idle: Producer | None = self._make()

    def batches(self, requests: Iterable[list[Request]]) -> Iterator[Batch]:
        """Yield one batch for each list of `batch_size` requests, in order.

        Raises BadChip.  After an iteration that was not read to its end, the next takes as long to begin as the first:
        batches prepared ahead must not come in it, and so all is made anew.
        """
        producer, self._idle = self._idle, None
        if producer is None:
            gc.collect()  # the one before: a DALI pipeline and what feeds it hold each other
            producer = self._make()
        produced = producer.batches(requests)
        try:
            while True:
                start = time.perf_counter()
                with self._handoff.stream():
                    made = next(produced, None)
                if made is None:
                    self._idle = producer
                    return
                batch = self._batch(made)
                del made  # its memory is used again when the consumer has dropped the batch
                self.wait += time.perf_counter() - start
                yield batch
                del batch
        finally:
            self._handoff.drain()

    def _batch(self, made: Produced) -> Batch:
        dropped = torch.from_numpy(np.arange(self._months) >= np.array(made.kept)[:, None])
        chips = [request.chip for request in made.requests]
        images, label, rows, valid = self._handoff.take(made, self._read)
        return Batch(images.permute(0, 1, 4, 2, 3), dropped, label, rows, valid, chips)

    def _read(self, made: Produced) -> list[torch.Tensor]:
        hand, requests = self._handoff, made.requests
        return [hand.own(made.images, self._dtype), hand.own(made.label),
                hand.small([request.row for request in requests]),
                hand.small([request.valid for request in requests])]


class Piped:
    """Produces batches by DALI.  `gpu`: on `device`, there as float16 if `half`; else on the CPU."""

    def __init__(self, source: Source, batch_size: int, *, device: torch.device, gpu: bool, half: bool, warp: bool,
                 readers: int, threads: int, prefetch: int):
        self._source, self._device, self._gpu, self._warp = source, device, gpu, warp
        self._readers, self._prefetch = readers, prefetch
        self._ready: Iterator[list[Fed]] = iter(())
        self._fed: deque[tuple[list[Request], list[int]]] = deque()
        self._asked: deque[list[Request]] = deque()
        self._pipe = pipeline.build(
            self._feed, form=pipeline.Form(source.form, source.dataset, source.values), batch_size=batch_size,
            threads=threads, prefetch=prefetch, warp=warp, device_id=(device.index or 0) if gpu else None,
            half=gpu and half)  # DALI's CPU operators take 30 ms a chip to write float16

    def batches(self, requests: Iterable[list[Request]]) -> Iterator[Produced]:
        ahead = ReadAhead(self._source, self._tell(requests), self._readers, depth=self._prefetch + 1,
                          hold=self._prefetch + MOST + 1)
        self._ready = iter(ahead)
        try:
            while True:
                try:
                    images, label = self._run()
                except StopIteration:
                    self._pipe.reset()
                    return
                yield Produced(*self._fed.popleft(), images, label)
        finally:
            ahead.close()

    def _tell(self, requests: Iterable[list[Request]]) -> Iterator[list[Job]]:
        for batch in requests:
            self._asked.append(batch)
            yield [Job(request, self._turn(request)) for request in batch]

    def _turn(self, request: Request) -> Turn | None:
        if not self._warp:
            return UPRIGHT
        return None if self._gpu else turn_of(request.draw.matrix, self._source.dataset.tile)

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
        stream = torch.cuda.current_stream(self._device) if self._gpu else None
        outputs = self._pipe.run(stream)  # by its place: DALI takes names for inputs of the pipeline
        images, label = (torch.from_dlpack(output.as_tensor()) for output in outputs)
        return images, label
