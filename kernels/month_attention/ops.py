"""The month attention as PyTorch operators: shapes for the compiler, gradients for autograd, a backend to run them.

`kernels::month_attention` and `kernels::month_attention_backward` are opaque to torch.compile, which keeps one graph
around them, with any number of images. What the forward leaves for the backward is x itself, the pooled map, one
number a pixel (log Σ exp of the logits) and, for wide features only, the output of the first layer; the rest is
computed again. No function here reads a tensor's values on the host.

Legend: N images, B chips, D channels, H × W pixels. All feature maps are channels_last in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LAST = torch.channels_last


def is_wide(x: Tensor, implementation: str) -> bool:
    """Whether the first layer's output is kept for the backward.

    Narrow features repeat the layer, wide ones keep it: the product costs D times the arithmetic of everything else,
    the wide levels hold little of the features. On CUDA the limit is also what fits on chip beside the layer (float32
    has no matrix unit to use there).
    """
    if implementation == "compile":
        return x.shape[1] > 64
    return x.shape[1] > (128 if x.element_size() == 2 else 32)


def _forward_outputs(x: Tensor, segments: Tensor, implementation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unfilled pooled [B, D, H, W], lse [B, H, W] and hidden: like x, or empty where it is not kept."""
    images, d, height, width = x.shape
    chips = segments.shape[0] - 1
    computing = torch.float64 if x.dtype == torch.float64 else torch.float32
    pooled = torch.empty((chips, d, height, width), dtype=x.dtype, device=x.device, memory_format=_LAST)
    lse = torch.empty((chips, height, width), dtype=computing, device=x.device)
    hidden_dtype = x.dtype if implementation == "triton" else computing
    hidden_shape = (images, d, height, width) if is_wide(x, implementation) else (0, d, 1, 1)
    hidden = torch.empty(hidden_shape, dtype=hidden_dtype, device=x.device, memory_format=_LAST)
    return pooled, lse, hidden


def _grad_features(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_LAST)


@torch.library.custom_op("kernels::month_attention", mutates_args=())
def month_attention(
    x: Tensor, segments: Tensor, w1: Tensor, b1: Tensor, ln_weight: Tensor, ln_bias: Tensor, w2: Tensor, b2: Tensor,
    eps: float, implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Pools x [N, D, H, W]; returns pooled [B, D, H, W], lse [B, H, W], hidden. b2 cancels in the softmax."""
    pooled, lse, hidden = _forward_outputs(x, segments, implementation)
    x = x.contiguous(memory_format=_LAST)
    layer = tuple(p.contiguous() for p in (w1, b1, ln_weight, ln_bias, w2))
    if implementation == "compile":
        from kernels.month_attention import cpu

        cpu.forward(x, segments, layer, eps, pooled, lse, hidden if is_wide(x, implementation) else None)
        return pooled, lse, hidden
    from kernels.month_attention import triton_fused, triton_rows

    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        if is_wide(x, implementation):
            triton_rows.forward(x, segments, layer, eps, pooled, lse, hidden)
        else:
            triton_fused.forward(x, segments, layer, eps, pooled, lse)
    return pooled, lse, hidden


@month_attention.register_fake
def _(
    x: Tensor, segments: Tensor, w1: Tensor, b1: Tensor, ln_weight: Tensor, ln_bias: Tensor, w2: Tensor, b2: Tensor,
    eps: float, implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward_outputs(x, segments, implementation)


@torch.library.custom_op("kernels::month_attention_backward", mutates_args=())
def month_attention_backward(
    grad: Tensor, x: Tensor, segments: Tensor, pooled: Tensor, lse: Tensor, hidden: Tensor,
    w1: Tensor, b1: Tensor, ln_weight: Tensor, ln_bias: Tensor, w2: Tensor, eps: float, implementation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x [N, D, H, W] and of w1, b1, ln_weight, ln_bias and w2 in one row [D·D + 4·D]."""
    grad, x, pooled = (t.contiguous(memory_format=_LAST) for t in (grad.to(x.dtype), x, pooled))
    layer = tuple(p.contiguous() for p in (w1, b1, ln_weight, ln_bias, w2))
    grad_x = _grad_features(x)
    if implementation == "compile":
        from kernels.month_attention import cpu

        kept = hidden if is_wide(x, implementation) else None
        return grad_x, cpu.backward(grad, x, segments, pooled, lse, kept, layer, eps, grad_x)
    from kernels.month_attention import triton_fused, triton_rows

    # the interpreter has no multiprocessors: three programs make each of them loop
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        if is_wide(x, implementation):
            return grad_x, triton_rows.backward(
                grad, x, segments, pooled, lse, hidden, layer, eps, grad_x, programs
            )
        return grad_x, triton_fused.backward(grad, x, segments, pooled, lse, layer, eps, grad_x, programs)


@month_attention_backward.register_fake
def _(
    grad: Tensor, x: Tensor, segments: Tensor, pooled: Tensor, lse: Tensor, hidden: Tensor,
    w1: Tensor, b1: Tensor, ln_weight: Tensor, ln_bias: Tensor, w2: Tensor, eps: float, implementation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    d = x.shape[1]
    return _grad_features(x), torch.empty(d * d + 4 * d, dtype=lse.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, segments, w1, b1, ln_weight, ln_bias, w2, b2, ctx.eps, ctx.implementation = inputs
    ctx.save_for_backward(x, segments, *output, w1, b1, ln_weight, ln_bias, w2, b2)
    ctx.set_materialize_grads(False)  # lse and hidden never carry a gradient


def _gradients(ctx: Any, grad: Tensor | None, _lse: None, _hidden: None) -> tuple[Tensor | None, ...]:
    if grad is None:  # nobody asked for pooled's gradient
        return (None,) * 10
    x, segments, pooled, lse, hidden, w1, b1, ln_weight, ln_bias, w2, b2 = ctx.saved_tensors
    grad_x, row = torch.ops.kernels.month_attention_backward(
        grad, x, segments, pooled, lse, hidden, w1, b1, ln_weight, ln_bias, w2, ctx.eps, ctx.implementation
    )
    layer = (w1, b1, ln_weight, ln_bias, w2)
    parts = row.split([p.numel() for p in layer])
    grads = (part.view(p.shape).to(p.dtype) for part, p in zip(parts, layer))
    return grad_x, None, *grads, torch.zeros_like(b2), None, None


month_attention.register_autograd(_gradients, setup_context=_save)
