"""BatchNorm and SiLU of the encoder as one step that keeps one array for the backward instead of two.

Plain autograd keeps the input of BatchNorm and the input of SiLU, each as large as the feature map; the second is
one cheap pass over the first, so it is computed again in the backward.  `engine.model.Encoder` makes the exchange;
under torch.compile the plain modules are traced, whose activations Inductor recomputes by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class BatchNormSiLU(BatchNormAct2d):
    """timm's BatchNormAct2d with SiLU: same parameters, buffers and numbers; see the module's docstring."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return super().forward(x)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return _NormSiLU.apply(x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps)


def keep_one_array(model: nn.Module) -> None:
    """Make every BatchNormAct2d with SiLU a BatchNormSiLU, in place."""
    for module in model.modules():
        if (type(module) is BatchNormAct2d and isinstance(module.act, nn.SiLU) and isinstance(module.drop, nn.Identity)
                and module.affine and module.track_running_stats and module.momentum is not None):
            module.__class__ = BatchNormSiLU


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
                momentum: float, eps: float) -> Tensor:
        y, mean, inverse_std = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse_std)
        ctx.eps = eps
        return F.silu(y, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse_std = ctx.saved_tensors
        variance = inverse_std.square().reciprocal() - ctx.eps
        y = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, ctx.eps)[0]
        grad = torch.ops.aten.silu_backward(grad, y)
        del y
        grads = torch.ops.aten.native_batch_norm_backward(grad, x, weight, None, None, mean, inverse_std, True,
                                                          ctx.eps, list(ctx.needs_input_grad[:3]))
        return (*grads, None, None, None, None)
