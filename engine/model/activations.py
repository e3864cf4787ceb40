"""BatchNorm and its activation keep one array for the backward; plain autograd keeps two, or three where
squeeze-and-excitation follows.

What the backward needs besides the convolution's output is cheap to compute from it: the normalised map (one pass),
its activation, and that times the channel gates.  Three things happen:
- `BatchNormSiLU` and `BatchNormReLU` keep their input alone and normalise again in the backward;
- what other operators would keep of their output (the next convolution, gates) is exchanged by `activations_again`
  for a recipe, by autograd's saved-tensor hooks;
- `GatedAgain` gives squeeze-and-excitation's output such a recipe too.
`engine.model.unet` makes the exchange.  Under torch.compile the plain modules are traced, whose activations Inductor
recomputes by itself.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Recipe = Callable[[], Tensor]


class BatchNormSiLU(BatchNormAct2d):
    """timm's BatchNormAct2d with SiLU: same parameters, buffers and numbers; see the module's docstring."""

    def forward(self, x: Tensor) -> Tensor:
        return _norm_act(self, x) if _lean(self) else super().forward(x)


class BatchNormReLU(nn.BatchNorm2d):
    """BatchNorm2d followed by ReLU; parameters and buffers are BatchNorm2d's."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return _norm_act(self, x) if _lean(self) else self.act(super().forward(x))


def _lean(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _norm_act(norm: BatchNormSiLU | BatchNormReLU, x: Tensor) -> Tensor:
    if x.numel() == x.shape[1]:
        raise ValueError(f"BatchNorm in training wants more than one value a channel, not {list(x.shape)}")
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    activation = _SILU if isinstance(norm, BatchNormSiLU) else _RELU
    shared = _Shared()
    out, mean, inverse_std = _NormAct.apply(x, norm.weight, norm.bias, norm.running_mean, norm.running_var,
                                            norm.momentum, norm.eps, activation, shared)
    kept = _Norm(x.detach(), norm.weight.detach(), norm.bias.detach(), mean, inverse_std, norm.eps, shared)
    _offer(out, lambda: activation.forward(kept.again()))
    return out


class GatedAgain(SqueezeExcite):
    """timm's squeeze-and-excitation; what it gives is not kept where its input is not."""

    def forward(self, x: Tensor) -> Tensor:
        recipe = None if torch.compiler.is_compiling() else _recipe_of(x)
        if recipe is None:
            return super().forward(x)
        gate = self.gate(self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))))
        out = x * gate
        held = gate.detach()
        _offer(out, lambda: recipe() * held)
        return out


def keep_one_array(model: nn.Module) -> None:
    """Exchange the classes of the modules that can do with less, in place."""
    for module in model.modules():
        if (type(module) is BatchNormAct2d and isinstance(module.act, nn.SiLU) and isinstance(module.drop, nn.Identity)
                and module.affine and module.track_running_stats and module.momentum is not None):
            module.__class__ = BatchNormSiLU
        elif type(module) is SqueezeExcite:
            module.__class__ = GatedAgain


@contextmanager
def activations_again() -> Iterator[None]:
    """Inside, autograd keeps recipes in place of the tensors that have one."""
    outer = _offers()
    _LOCAL.offers = {}
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _LOCAL.offers = outer


def _pack(tensor: Tensor) -> Recipe | tuple[Tensor, int]:
    return _recipe_of(tensor) or (tensor, tensor._version)


def _unpack(kept: Recipe | tuple[Tensor, int]) -> Tensor:
    if callable(kept):
        return kept()
    tensor, version = kept
    if tensor._version != version:  # autograd's own check, which hooks turn off
        raise RuntimeError("a tensor that the backward needs was written to after the forward had kept it")
    return tensor


class _Shared:
    """The normalised map between the first of the backward's steps that needs it and the last, BatchNorm's own."""

    normalised: Tensor | None = None


class _Norm(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    inverse_std: Tensor
    eps: float
    shared: _Shared

    def again(self) -> Tensor:
        if self.shared.normalised is None:
            with torch.no_grad():
                self.shared.normalised = _normalise(*self[:6])
        return self.shared.normalised


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, eps: float) -> Tensor:
    variance = inverse_std.square().reciprocal() - eps
    return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]


class _Activation(NamedTuple):
    forward: Callable[..., Tensor]  # (x, inplace=False)
    backward: Callable[[Tensor, Tensor], Tensor]  # (gradient, x)


_SILU = _Activation(F.silu, torch.ops.aten.silu_backward)
_RELU = _Activation(F.relu, lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0))


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
                momentum: float, eps: float, activation: _Activation, shared: _Shared) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, inverse_std = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse_std)
        ctx.mark_non_differentiable(mean, inverse_std)
        ctx.eps, ctx.activation, ctx.shared = eps, activation, shared
        return activation.forward(y, inplace=True), mean, inverse_std

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse_std = ctx.saved_tensors
        y, ctx.shared.normalised = ctx.shared.normalised, None
        if y is None:
            y = _normalise(x, weight, bias, mean, inverse_std, ctx.eps)
        grad = ctx.activation.backward(grad, y)
        del y
        grads = torch.ops.aten.native_batch_norm_backward(grad, x, weight, None, None, mean, inverse_std, True,
                                                          ctx.eps, list(ctx.needs_input_grad[:3]))
        return (*grads, None, None, None, None, None, None)


# Tensors that can be computed again ------------------------------------------------------------------------------


class _Offer(NamedTuple):
    tensor: weakref.ref[Tensor]
    version: int
    recipe: Recipe


_LOCAL = threading.local()


def _offers() -> dict[int, _Offer] | None:
    return getattr(_LOCAL, "offers", None)


def _offer(tensor: Tensor, recipe: Recipe) -> None:
    offers = _offers()
    if offers is not None:
        offers[tensor.data_ptr()] = _Offer(weakref.ref(tensor), tensor._version, recipe)


def _recipe_of(tensor: Tensor) -> Recipe | None:
    """Only of a tensor that still is what was offered: alive, of the same shape, and not written to since."""
    found = (_offers() or {}).get(tensor.data_ptr())
    if found is None:
        return None
    offered = found.tensor()
    if (offered is None or offered._version != found.version or offered.dtype != tensor.dtype
            or offered.shape != tensor.shape or offered.stride() != tensor.stride()):
        return None
    return found.recipe
