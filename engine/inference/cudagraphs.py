"""Prediction by CUDA graphs: the host launches one graph a batch, not a thousand kernels.

A graph holds addresses, so there is one for each shape of input: batches are of one size, and those that keep the
same number of months in all share a graph.  Training has none: at ZeRO stages 1 to 3, and at stage 0 with several
ranks, gradients are sent by hooks, Python inside the backward that a graph would not replay.  With one rank at stage 0
nothing forbids them; `benchmarks/levers.py` measures what they would gain there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.base.errors import DeviceError
from engine.model.unet import BiomassUNet

MOST = 8  # graphs; each has static inputs of its own, their working memory is shared
WARM_UP = 3  # runs before the capture, in which compilers, autotuners and cuDNN do what cannot be captured

Run = Callable[[], Tensor]


class Graphed:
    """A model in eval mode on a GPU, called like it: (images [B,T,C,H,W], dropped [B,T]) -> [B,1,H,W].

    The first batch of a shape captures a graph; where more than MOST shapes come, later ones run without.  Call it
    always under the same autocast.  Raises DeviceError where the model is not on a GPU.
    """

    def __init__(self, model: BiomassUNet):
        if _device(model).type != "cuda":
            raise DeviceError("CUDA graphs: the model is on the CPU; predict with --device gpu, or leave out "
                              "--cuda-graphs")
        self._model = model
        self._graphs: dict[tuple[object, ...], _Graph] = {}
        self._pool: Any = None

    @torch.inference_mode()
    def __call__(self, images: Tensor, dropped: Tensor | None = None) -> Tensor:
        months, segments = self._model.kept(images, dropped)  # on the host; the rest is on the device alone
        key = months.shape, months.dtype, segments.shape
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) == MOST:
                return self._model.predict(months, segments)
            graph = self._capture(months, segments)
            self._graphs[key] = graph
        graph.months.copy_(months)
        graph.segments.copy_(segments)
        graph.replay()
        return graph.out.clone()  # the next replay, of whichever graph, writes there

    def _capture(self, months: Tensor, segments: Tensor) -> _Graph:
        # clone keeps the layout, and the values are good ones to warm up with
        months, segments = months.clone(), segments.clone()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        replay, out = record(lambda: self._model.predict(months, segments), self._pool)
        return _Graph(months, segments, replay, out)


def _device(model: BiomassUNet) -> torch.device:
    return next(model.parameters()).device


class _Graph(NamedTuple):
    months: Tensor
    segments: Tensor
    replay: Callable[[], None]
    out: Tensor


def record(run: Run, pool: Any) -> tuple[Callable[[], None], Tensor]:
    """A graph of `run`: what replays it, and where its output then lies."""
    now, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(now)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    now.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Weights that autocast has cast already would be read from memory that is freed when it ends
    torch.clear_autocast_cache()
    # thread_local: DALI's threads may allocate meanwhile
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = run()
    torch.clear_autocast_cache()
    return graph.replay, out
