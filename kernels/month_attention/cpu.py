"""Calls cpu.cpp (built by kernels/native.py): the month attention's `compile` implementation.

It uses OpenMP with as many threads as PyTorch. Features in half precision are computed in float32.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from kernels import native

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = {
    "forward": [_POINTER] * 2 + [_LONG] * 4 + [_POINTER] * 5 + [ctypes.c_double] + [_POINTER] * 3 + [ctypes.c_int],
    "backward": [_POINTER] * 6 + [_LONG] * 4 + [_POINTER] * 5 + [ctypes.c_double] + [_POINTER] * 2 + [ctypes.c_int],
}


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library.  Raises RuntimeError as `kernels.native.load` does."""
    loaded = native.load(Path(__file__).with_name("cpu.cpp"))
    for name, arguments in _ARGUMENTS.items():
        for scalar in ("float", "double"):
            function = getattr(loaded, f"{name}_{scalar}")
            function.argtypes, function.restype = arguments, None
    return loaded


def _call(name: str, dtype: torch.dtype, *arguments: torch.Tensor | int | float | None) -> None:
    function = getattr(library(), f"{name}_{'double' if dtype == torch.float64 else 'float'}")
    function(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments), torch.get_num_threads())


def forward(
    x: torch.Tensor, segments: torch.Tensor, layer: tuple[torch.Tensor, ...], eps: float,
    pooled: torch.Tensor, lse: torch.Tensor, hidden: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fills pooled [B, D, H, W], lse [B, H, W] and, if given, hidden [N, D, H, W]: the first layer's output.

    lse and hidden have the dtype of the computation: float32, or float64 for float64 features. ValueError for segments
    outside of x, which here (unlike on a GPU) can be looked at for free.
    """
    images, d, height, width = x.shape
    bounds = segments.tolist()
    if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > images:
        raise ValueError(f"month attention: segments must rise from 0 to at most {images} images, not {bounds}")
    dtype = lse.dtype
    result = pooled if pooled.dtype == dtype else torch.empty_like(pooled, dtype=dtype)
    layer = tuple(p.to(dtype) for p in layer)
    _call("forward", dtype, x.to(dtype), segments.to(torch.int32), images, lse.shape[0], height * width, d, *layer,
          eps, result, lse, hidden)  # fmt: skip
    if result is not pooled:
        pooled.copy_(result)


def backward(
    grad: torch.Tensor, x: torch.Tensor, segments: torch.Tensor, pooled: torch.Tensor, lse: torch.Tensor,
    hidden: torch.Tensor | None, layer: tuple[torch.Tensor, ...], eps: float, grad_x: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Fills grad_x [N, D, H, W]; returns the layer's gradients [D·D + 4·D] (w1, b1, ln_weight, ln_bias, w2)."""
    images, d, height, width = x.shape
    dtype = lse.dtype
    result = grad_x if grad_x.dtype == dtype else torch.empty_like(grad_x, dtype=dtype)
    layer = tuple(p.to(dtype) for p in layer)
    grads = torch.empty(d * d + 4 * d, dtype=dtype)
    _call("backward", dtype, grad.to(dtype), x.to(dtype), segments.to(torch.int32), pooled.to(dtype), lse, hidden,
          images, lse.shape[0], height * width, d, *layer, eps, result, grads)  # fmt: skip
    if result is not grad_x:
        grad_x.copy_(result)
    return grads
