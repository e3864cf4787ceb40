"""Beside `tests.rehearsal.device`, DALI's GPU pipelines: the same operators on DALI's CPU backend, handed over as a GPU
does.

`with dali(): …` makes `engine.data.pipeline.build` give a `Rehearsed` pipeline.  Blocks are inflated as they are fed,
in nvCOMP's place; all that follows is the engine's own graph, run by DALI itself with the arguments that it was given.
What a GPU pipeline gives lies in DALI's memory, is ready for the stream that `run` was given and for no other, and is
gone when its last holder lets go; and what it was fed is still read when that stream gets to it.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import lz4.block
import numpy as np
import nvidia.dali.fn as fn
import torch
from nvidia.dali import Pipeline
from nvidia.dali.types import DALIDataType

from engine.data import pipeline
from engine.data.biomassters import TILE
from tests.rehearsal.cuda import Stream
from tests.rehearsal.state import Mistake, State, poison


def inflated(data: np.ndarray, tables: list[np.ndarray]) -> list[np.ndarray]:
    """In nvCOMP's place: [blocks, TILE²] uint8 of each pair of offsets and sizes."""
    raw = data.tobytes()
    return [np.stack([np.frombuffer(lz4.block.decompress(raw[a:a + n], uncompressed_size=TILE * TILE), np.uint8)
                      for a, n in zip(offsets.tolist(), sizes.tolist())])
            for offsets, sizes in zip(tables[::2], tables[1::2])]


_build = pipeline.build


def build(feed: pipeline.Feed, *, form: pipeline.Form, batch_size: int, device_id: int | None, threads: int,
          prefetch: int, half: bool, warp: bool) -> Rehearsed:
    fed: deque[list[tuple[np.ndarray, int]]] = deque()

    def watched() -> tuple[list[np.ndarray], ...]:
        arrays = feed()
        fed.append([(array, _sum(array)) for some in arrays for array in some])
        if device_id is None:
            return arrays
        count = len(form.layouts)
        stored, rest = list(arrays[:count]), list(arrays[count:])
        if form.gpu_only:
            stored = list(map(list, zip(*(inflated(chip[0], list(chip[1:])) for chip in zip(*stored)))))
        elif warp:
            rest.append([np.array(True)] * batch_size)  # which the CPU's graph asks
        return *stored, *rest

    options = {"batch_size": batch_size, "num_threads": threads, "prefetch_queue_depth": prefetch}
    if device_id is None or not form.gpu_only:
        pipe = _build(watched, form=form, batch_size=batch_size, device_id=None, threads=threads, prefetch=prefetch,
                      half=half, warp=warp)
    else:
        pipeline.define(feed, form=form, batch_size=batch_size, device_id=device_id, threads=threads,
                        prefetch=prefetch, half=half, warp=warp)  # what it refuses
        with Pipeline(**options, device_id=None) as pipe:
            count = len(form.layouts) // 2
            inputs = list(fn.external_source(source=watched, num_outputs=count + warp, batch=True))
            stored = pipeline.assemble(form, inputs[:count])
            dtype = DALIDataType.FLOAT16 if half else DALIDataType.FLOAT
            pipe.set_outputs(*pipeline.finish(form, stored, inputs[count] if warp else None, warp, dtype))
        pipe.build()
    return Rehearsed(pipe, device_id is not None, fed)


class Rehearsed:
    """A built pipeline."""

    def __init__(self, pipe: Pipeline, gpu: bool, fed: deque[list[tuple[np.ndarray, int]]]):
        self._pipe, self._gpu, self._fed = pipe, gpu, fed

    def run(self, *args: Any, **kwargs: Any) -> list[_Output]:
        streams = [value for value in (*args, *kwargs.values()) if isinstance(value, Stream)]
        if bool(streams) != self._gpu:
            raise Mistake("a pipeline on a GPU is given torch's stream, one on the CPU is not: it would call CUDA")
        args = tuple(None if isinstance(value, Stream) else value for value in args)
        kwargs = {name: None if isinstance(value, Stream) else value for name, value in kwargs.items()}
        outputs = self._pipe.run(*args, **kwargs)
        fed = self._fed.popleft()
        if self._gpu:
            streams[0].ask(lambda: _unchanged(fed))
        return [_Output(output, streams[0] if self._gpu else None) for output in outputs]

    def reset(self) -> None:
        self._pipe.reset()


def _sum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _unchanged(fed: list[tuple[np.ndarray, int]]) -> None:
    if any(_sum(array) != was for array, was in fed):
        raise Mistake("a buffer was filled again while DALI still read it")


class _Output:
    """A TensorList, and the Tensor that it gives."""

    def __init__(self, made: Any, stream: Stream | None):
        self.made, self.stream = made, stream

    def as_tensor(self) -> _Output:
        return _Output(self.made.as_tensor(), self.stream)


def _from_dlpack(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def from_dlpack(ext_tensor, *, device=None, copy=None):  # type: ignore[no-untyped-def]
        tensor = real(ext_tensor.made, device=device, copy=copy)
        stand_in, stream = State.active, ext_tensor.stream
        stand_in.mark(tensor, "borrowed")
        if stream is None:
            return tensor
        stand_in.mark(tensor)
        with stand_in.unwatched():
            values = tensor.clone()
            poison(tensor)
        give = stand_in.holder(tensor)

        def ready() -> None:
            try:
                late = give()
            except Mistake:  # nobody wants it any more
                return
            late.copy_(values)

        stream.ask(ready)
        return tensor

    return from_dlpack


@contextmanager
def dali() -> Iterator[None]:
    with mock.patch.object(pipeline, "build", build), \
            mock.patch.object(torch, "from_dlpack", _from_dlpack(torch.from_dlpack)):
        yield
