"""How a built model is run in training: regions compiled, or recomputed in the backward.  `engine.trainer` calls it.

A region is a repeated block: of the encoder, whatever timm backbone it is, or of the decoder.  Blocks of one kind and
shape share one compiled graph, so compile time grows with the kinds, not with the depth.  Both functions change how
the modules are *called* and nothing else: parameters, buffers and state-dict names stay, and a copy or a pickle of
the model is the plain one again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.model.unet import BiomassUNet
from kernels.native import own_folder

# Graphs per block class: kinds of blocks of the largest backbones, times training and evaluation
RECOMPILE_LIMIT = 128


def regions(model: BiomassUNet) -> Iterator[nn.Module]:
    """The encoder's blocks, in their order, then the decoder's.

    A block is a composite module that a Sequential holds, or one that holds no container itself, like the stem's
    normalisation with its activation.
    """
    yield from _blocks(model.encoder.model)
    yield from model.decoder.blocks


def _blocks(parent: nn.Module) -> Iterator[nn.Module]:
    for child in parent.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            yield from _blocks(child)
        elif next(child.children(), None) is not None:
            holds_container = any(isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) for m in child.modules())
            if isinstance(parent, nn.Sequential) or not holds_container:
                yield child
            else:
                yield from _blocks(child)


def compile_regions(model: BiomassUNet, zero_stage: int = 0, backend: str | Callable[..., Any] = "inductor", *,
                    any_number: bool = True, options: dict[str, Any] | None = None) -> str:
    """Have torch.compile compile every region at its first call.  Returns what is compiled and what is not.

    The encoder's regions take any number of images, as kept months vary from batch to batch; the decoder's are made
    for the batch they see.  Month attention is left alone: it is one operator already, and so is the head.  At
    ZeRO-3 nothing is compiled: its hooks gather and release weights inside the blocks.

    any_number: False makes a graph of its own for every number of images instead, each of which takes as long to
        compile as the one.
    options: of torch.compile, for Inductor.

    In a compiled block a strided convolution's SAME padding is part of the kernel that normalises before it.

    Compiled code is kept in TORCHINDUCTOR_CACHE_DIR, by default under ~/.cache, so that a second start only loads it.
    """
    found = list(regions(model))
    if zero_stage == 3:
        return (f"nothing is compiled at ZeRO-3: its hooks gather weights inside the model's {len(found)} blocks; "
                "set train.zero_stage to 2 or less to compile them")
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # torch's own is in /tmp, and code and pickles lie there
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own_folder(Path.home() / ".cache" / "biomassters" / "inductor"))
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    decoder = set(model.decoder.blocks)
    model.keep_less = False  # Inductor decides what a compiled block keeps
    for region in found:
        region.compile(backend=backend, dynamic=None if any_number else False, options=options)
        if any_number and region not in decoder:
            _wrap(region, _any_number_of_images)
    kinds = len({type(region) for region in found})
    return f"{len(found)} blocks of {kinds} kinds are compiled; month attention and the head are single operators"


def checkpoint_regions(model: BiomassUNet) -> str:
    """Have every region forget its activations in training and recompute them in the backward.  Returns a note.

    Call it after `compile_regions`, if both are wanted.
    """
    found = list(regions(model))
    model.keep_less = False  # nothing of a region is kept; recipes would hold what it is to forget
    for region in found:
        _wrap(region, _recomputed)
    return f"activations of {len(found)} blocks are recomputed in the backward"


Call = Callable[..., Any]


def _wrap(module: nn.Module, around: Callable[[nn.Module, Call], Call]) -> None:
    """Put `around` the module's call.  nn.Module keeps a replaced call here and leaves it out of copies."""
    inner = module._compiled_call_impl or module._call_impl
    module._compiled_call_impl = around(module, inner)


def _any_number_of_images(module: nn.Module, inner: Call) -> Call:
    def call(images: Tensor, *rest: Any) -> Any:
        # From the start: otherwise the second number of images compiles everything again
        torch._dynamo.maybe_mark_dynamic(images, 0)
        return inner(images, *rest)

    return call


def _recomputed(module: nn.Module, inner: Call) -> Call:
    buffers = [b for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for b in m.buffers()]

    def call(*args: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return inner(*args)
        return checkpoint(inner, *args, use_reentrant=False,
                          context_fn=lambda: (nullcontext(), _unchanged(buffers)))

    return call


@contextmanager
def _unchanged(buffers: list[Tensor]) -> Iterator[None]:
    """BatchNorm's running statistics count a batch once, not again when it is recomputed."""
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before):
            buffer.data.copy_(value)  # .data: autograd does not need to know
