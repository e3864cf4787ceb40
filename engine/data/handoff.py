"""From where a batch was made to where it is used: the step does not wait, and no memory is used again too soon.

On a GPU a batch is moved and converted on a stream of its own, beside the step that still computes; the consumer's
stream waits for it by an event.  The memory it was made in (DALI's outputs, page-locked host memory) belongs to its
maker again when the last reference to it dies, in the host's order and not in the device's: so it is held here until
an event behind the last read of it has passed, and nothing that leaves here lies in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

MOST = 2  # batches whose memory the device may still have to read when the next one is asked for


class Handoff:
    """Hands batches to `device`.  On a CPU it does nothing: there a reference is all that memory needs to be kept."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._held: deque[tuple[torch.cuda.Event, Any]] = deque()

    def stream(self) -> AbstractContextManager[Any]:
        """The context to make a batch in: what is asked of the device there runs beside the consumer's work."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def take(self, made: Any, read: Callable[[Any], list[Tensor]]) -> list[Tensor]:
        """`read(made)`, tensors that `own` and `small` made, fit for use on the consumer's stream."""
        if self._stream is None:
            return read(made)
        with torch.cuda.stream(self._stream):
            tensors = read(made)
            event = torch.cuda.Event()
            event.record(self._stream)
        self._held.append((event, made))
        del made
        self._let_go(MOST)
        consumer = torch.cuda.current_stream(self._device)
        consumer.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(consumer)  # the allocator knows only the stream a tensor was made on
        return tensors

    def own(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """On the device in `dtype` (None: its own), in memory of torch's.

        Moved, then converted: the other way round a host array is converted here, and copied while we wait.
        """
        moved = tensor.to(self._device, non_blocking=True)
        return moved.to(dtype or tensor.dtype, copy=self._stream is not None and moved is tensor)

    def small(self, values: list[int] | list[bool]) -> Tensor:
        """[n], by way of pinned memory: or the copy would wait for all that its stream was asked for before."""
        return torch.tensor(values, pin_memory=self._stream is not None).to(self._device, non_blocking=True)

    def drain(self) -> None:
        """Wait until the device has read what it was given."""
        self._let_go(0)

    def _let_go(self, most: int) -> None:
        while self._held and (len(self._held) > most or self._held[0][0].query()):
            event, _ = self._held[0]
            event.synchronize()
            self._held.popleft()
