"""Gradients averaged over ranks while the backward still runs, at ZeRO stage 0.

DeepSpeed reduces there when the backward has ended: all gradients are flattened, sent and copied back one by one.  Here
parameters lie in buckets, those whose gradients come first in front; a bucket is sent as soon as its last gradient is
there, and afterwards the gradients are views of it.  Buckets go in their order, the same on all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.base.sections import HERE

BUCKET_BYTES = 25 << 20  # as PyTorch's DDP: large enough for full bandwidth, small enough to begin early


class Reducer:
    """Call `begin` before the backward of a step's last micro-batch, `finish` after it.

    dtype: in which gradients travel; they are float32 again afterwards.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32, bucket_bytes: int = BUCKET_BYTES):
        self._buckets = [_Bucket(parameters, dtype) for parameters in _cut(model, bucket_bytes)]
        self._active = False
        self._next = 0  # the first bucket that was not sent
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._hook(number))

    def begin(self) -> None:
        self._active, self._next = True, 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def finish(self) -> None:
        """Afterwards every parameter's gradient is the mean over ranks; zero where no rank had one."""
        for bucket in self._buckets[self._next:]:
            bucket.send()
        HERE.passed()
        for bucket in self._buckets:
            bucket.receive()
        self._active = False

    def _hook(self, number: int) -> Any:
        bucket = self._buckets[number]

        def ready(_: Tensor) -> None:
            if not self._active:
                return  # gradients are still accumulating
            bucket.missing -= 1
            while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
                self._buckets[self._next].send()
                self._next += 1

        return ready


def _cut(model: nn.Module, most_bytes: int) -> list[list[nn.Parameter]]:
    """The trained parameters, last ones first, in runs of about `most_bytes` of float32."""
    runs: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in reversed([p for p in model.parameters() if p.requires_grad]):
        if size and size + 4 * parameter.numel() > most_bytes:
            runs.append([])
            size = 0
        runs[-1].append(parameter)
        size += 4 * parameter.numel()
    return runs


class _Bucket:
    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype):
        self.parameters, self.missing = parameters, 0
        self._dtype = dtype
        self._work: Any = None
        self._sent: Tensor | None = None

    def send(self) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self._sent = torch.cat([grad.flatten() for grad in grads]).to(self._dtype)
        if dist.get_backend() == "nccl":
            self._work = dist.all_reduce(self._sent, dist.ReduceOp.AVG, async_op=True)
        else:
            self._sent /= dist.get_world_size()
            self._work = dist.all_reduce(self._sent, async_op=True)

    def receive(self) -> None:
        assert self._sent is not None
        self._work.wait()  # on a GPU the stream waits, not the host
        flat = self._sent.float()
        for parameter, grad in zip(self.parameters, flat.split([p.numel() for p in self.parameters])):
            view = grad.view_as(parameter)
            # Fused AdamW goes through memory: a gradient that lies otherwise than its parameter updates the wrong ones
            parameter.grad = view if parameter.is_contiguous() else torch.empty_like(parameter.detach()).copy_(view)
        self._work = self._sent = None
