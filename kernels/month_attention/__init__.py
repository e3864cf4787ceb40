"""Month attention: pools a chip's monthly feature maps into one, pixel by pixel, in one pass over the features.

The model's levels hold N = Σ months feature maps of all chips of a batch, each chip with its own number of months:

    logit_n  = w2 · GELU(LayerNorm(w1 x_n + b1)) + b2        pooled_b = Σ_n softmax_n(logit) x_n

Plain PyTorch writes some twenty arrays of the features' size for this; these kernels read the features once and write
the pooled map, and in the backward read them once more and write their gradient. kernels/README.md has the bytes,
operations and expected times.

Implementations, chosen by name and never exchanged in silence (`resolve` says which one runs):
- `triton`: CUDA, any D; float32, bfloat16 and float16 features; on a CPU only in Triton's interpreter.
- `compile`: CPU, a C++ kernel compiled for the machine at first use; float32, float64, half precision by conversion.
- `reference`: plain PyTorch on any device; the truth of the tests.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from kernels.month_attention import ops
from kernels.month_attention.reference import month_attention_reference
from kernels.native import find_compiler, instructions

IMPLEMENTATIONS = ("auto", "triton", "compile", "reference")

__all__ = ["IMPLEMENTATIONS", "month_attention", "month_attention_reference", "resolve"]


@torch.compiler.assume_constant_result
def resolve(implementation: str, device: torch.device | str) -> str:
    """The implementation that runs on a device: `auto` becomes the fastest there, a name stays or raises.

    ValueError for an unknown name, RuntimeError for one that cannot run on this device or machine, with the remedy.
    """
    kind = torch.device(device).type
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"month attention has no implementation {implementation!r}: choose of {IMPLEMENTATIONS}")
    has_triton = importlib.util.find_spec("triton") is not None
    if implementation == "auto":
        if kind == "cuda" and has_triton:
            return "triton"
        if kind != "cpu" or find_compiler() is None:
            return "reference"
        implementation = "compile"
    elif implementation == "triton":
        if not has_triton:
            raise RuntimeError("month attention 'triton' needs the package triton: install it, or choose 'auto'")
        if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                f"month attention 'triton' runs on CUDA, not on {kind!r}: choose 'auto', or set TRITON_INTERPRET=1 "
                "before Python starts to run it in Triton's (slow) interpreter"
            )
    elif implementation == "compile":
        if kind != "cpu":
            raise RuntimeError(f"month attention 'compile' runs on the CPU, not on {kind!r}: choose 'auto' or 'triton'")
        if find_compiler() is None:
            raise RuntimeError("month attention 'compile' needs a C++ compiler (c++, g++, clang++ or $CXX): none found")
    if implementation == "compile":
        instructions()  # what $KERNELS_CPU asks in vain is better said here than in the first step
    return implementation


def month_attention(
    x: Tensor, segments: Tensor, w1: Tensor, b1: Tensor, ln_weight: Tensor, ln_bias: Tensor, w2: Tensor, b2: Tensor,
    *, eps: float = 1e-5, implementation: str = "auto",
) -> Tensor:  # fmt: skip
    """Pools x [N, D, H, W] over each chip's months to [B, D, H, W] in x's dtype, channels_last.

    segments: int32 [B + 1] on x's device, from 0, not decreasing: chip b owns images segments[b] to segments[b + 1].
    A chip without images gives zeros; images after the last segment are ignored and get a zero gradient.
    w1 [D, D], b1, ln_weight, ln_bias [D], w2 [1, D], b2 [1]: of any floating dtype, usually float32. b2 cancels in the
    softmax and gets a zero gradient.
    x is best channels_last; any other layout is copied once. Autocast changes nothing here: features come in the dtype
    the encoder gave them, and everything but the two matrix products is computed in float32 (float64 for float64).
    ValueError for shapes, dtypes or devices that do not fit; see `resolve` for what `implementation` can raise.
    """
    _check(x, segments, w1, b1, ln_weight, ln_bias, w2, b2)
    chosen = resolve(implementation, x.device.type)
    if chosen == "reference":
        return month_attention_reference(x, segments, w1, b1, ln_weight, ln_bias, w2, b2, eps)
    if chosen == "triton" and x.dtype == torch.float64:
        raise ValueError("month attention 'triton' has no float64: convert the features or choose 'reference'")
    return ops.month_attention(x, segments, w1, b1, ln_weight, ln_bias, w2, b2, eps, chosen)[0]


def _check(x: Tensor, segments: Tensor, *layer: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"month attention: x must be floating [N, D, H, W], not {x.dtype} {tuple(x.shape)}")
    if segments.dim() != 1 or segments.shape[0] < 2 or segments.dtype not in (torch.int32, torch.int64):
        found = f"{segments.dtype} {tuple(segments.shape)}"
        raise ValueError(f"month attention: segments must be int32 [B + 1], not {found}")
    d = x.shape[1]
    names = ("w1", "b1", "ln_weight", "ln_bias", "w2", "b2")
    for name, p, shape in zip(names, layer, ((d, d), (d,), (d,), (d,), (1, d), (1,))):
        if tuple(p.shape) != shape:
            raise ValueError(f"month attention: {name} must be {shape} for D = {d} channels, not {tuple(p.shape)}")
    for name, p in zip(("segments", *names), (segments, *layer)):
        if p.device != x.device:
            raise ValueError(f"month attention: {name} is on {p.device}, x on {x.device}; move them to one device")
