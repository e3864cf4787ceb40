"""A model run over the samples of a batch one by one, several at a time: the way to predict on a CPU.

A sample's result then does not depend on what else is in its batch, nor on how many threads there are: convolutions of
another batch size, or on more threads, add in another order.  And it is faster: threads that each have a whole sample
do not wait for one another in every layer, and glibc gives tensors of more than 32 MB, as batches have, back to the
system, which fills new ones with zeros (of tf_efficientnetv2_b0, 12 months, 4 chips at once took 8 to 30 % more CPU
time a chip).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from engine.base.distributed import own_cores

Model = Callable[[Tensor, Tensor], Tensor]


def samples_at_once(device: torch.device) -> int:
    """A batch that serves: on a CPU, enough for all cores."""
    return max(4, own_cores()) if device.type == "cpu" else 4


class OneByOne:
    """Called like the model: (images [B,T,C,H,W], dropped [B,T]) -> [B,1,H,W], on `threads` threads."""

    def __init__(self, model: Model, threads: int):
        self._model = model
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="predict",
                                        initializer=lambda: torch.set_num_threads(1))

    @torch.inference_mode()
    def __call__(self, images: Tensor, dropped: Tensor) -> Tensor:
        autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def one(index: int) -> Tensor:
            with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=autocast):
                return self._model(images[index:index + 1], dropped[index:index + 1])

        return torch.cat(list(self._pool.map(one, range(len(images)))))
