"""A stand-in for CUDA, so that what runs on a GPU runs first on a machine that has none.

`with Device() as device:` torch's tensors on "cuda" are CPU tensors whose memory is marked; streams, events, graphs and
the runtime are the classes of `tests.rehearsal.cuda`, with the parameters of the real ones (`STANDINS`; a test compares
them).  Branches for CUDA are taken, with real values.  As on a GPU, tensors of two devices do not mix, and
`device.waits` tells where the host had to wait for the device.

`Device(late=True)` runs late: what a stream was asked for waits in its queue until somebody synchronises, and results
are NaN until then.  Of memory that is torch's own on the device (or page-locked by torch, which remembers events) the
queue holds references, as torch's allocators do in effect.  Of other memory, DALI's outputs and what was page-locked by
hand, it holds none: where its owner has let go of it too early, the late read fails.  `early`: the first stream, the
consumer's, is not late itself, but waits for others.

What it cannot show: kernels, their speed, allocation, and errors inside CUDA, cuDNN, NCCL or nvCOMP.
"""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import torch

from tests.rehearsal.cuda import STANDINS, Stream, named
from tests.rehearsal.functions import Autocast, Functions, Operators, grouped, record_stream
from tests.rehearsal.state import State


class Device(State):
    """CUDA's part, played by the CPU, inside `with`."""

    def __enter__(self) -> Device:
        State.active = self
        self.current = [Stream()]
        self._stack = ExitStack()
        for path, fake in STANDINS.items():
            owner, _, name = path.rpartition(".")
            self._stack.enter_context(mock.patch.object(named(owner), name, fake))
        self._stack.enter_context(mock.patch.object(torch.cuda, "_lazy_init", lambda: None))
        # which looks at its argument before it asks modes
        self._stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", record_stream))
        for owner in (torch, torch.amp):  # CPU tensors have the CPU's autocast
            self._stack.enter_context(mock.patch.object(owner, "autocast", Autocast))
        self._stack.enter_context(mock.patch.object(
            torch._C, "_group_tensors_by_device_and_dtype", grouped(torch._C._group_tensors_by_device_and_dtype)))
        self._stack.enter_context(Operators(self))
        self._stack.enter_context(Functions(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
