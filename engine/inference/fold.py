"""The model made ready to predict: what training needs is taken out, once, before the first chip.

`optimize_for_inference` works on a copy; `engine.inference.predictor` predicts with it, validation in training with the
model itself.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Literal

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.model.backbones import has_fixed_size
from engine.model.compilation import compile_regions
from engine.model.decoder import UpsampleConv2d
from engine.model.unet import BiomassUNet

Precision = Literal["fp32", "bf16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Their output is linear in their weight as it is stored; others (weight standardisation) are left alone
FOLDABLE = (nn.Conv2d, Conv2dSame, UpsampleConv2d)


def optimize_for_inference(model: BiomassUNet, precision: Precision = "fp32", compile: bool = False) -> BiomassUNet:
    """A copy of the model in eval mode that gives the same maps with less work.

    BatchNorm is folded into the convolution before it (in float64), weights lie channels_last and in `precision`;
    in bf16 the head and the month attention keep float32.  `compile`: its blocks are compiled at the first call, see
    `engine.model.compilation.compile_regions`.
    In fp32 within 1e-4 of the model's own maps, relative to the largest value.  The copy takes images of any
    floating dtype, and is not for training, saving or loading: its tensors have other names.
    """
    model = copy.deepcopy(model).eval()
    fold_batchnorm(model)
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.SiLU):
            module.inplace = True
    dtype = DTYPES[precision]
    for part in (model.encoder, model.decoder):
        part.to(dtype).to(memory_format=torch.channels_last)
    model.segmentation_head.to(memory_format=torch.channels_last)
    if dtype != torch.float32:
        model.encoder.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
    if compile:
        compile_regions(model)
    return model


def fold_batchnorm(model: BiomassUNet) -> int:
    """Fold every BatchNorm that alone reads a convolution's output into that convolution; return how many.

    Which ones these are is read off the autograd graph of one forward pass, so that any backbone will do.
    """
    pairs = _find_pairs(model)
    names = {module: name for name, module in model.named_modules()}
    for convolution, norm in pairs:
        _fold(convolution, norm)
        parent, _, child = names[norm].rpartition(".")
        # timm's BatchNormAct2d carries its activation
        setattr(model.get_submodule(parent), child, getattr(norm, "act", nn.Identity()))
    return len(pairs)


def _find_pairs(model: BiomassUNet) -> list[tuple[nn.Conv2d, _BatchNorm]]:
    convolutions: dict[object, nn.Conv2d] = {}
    norms: dict[object, _BatchNorm] = {}

    def after_convolution(module: nn.Module, _: object, out: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        convolutions[out.grad_fn] = module

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _BatchNorm)
        norms[inputs[0].grad_fn] = module

    hooks = [module.register_forward_hook(after_convolution) for module in model.modules() if type(module) in FOLDABLE]
    hooks += [module.register_forward_pre_hook(before_norm) for module in model.modules()
              if isinstance(module, _BatchNorm) and module.running_mean is not None]
    parameter = next(model.parameters())
    try:
        with torch.enable_grad():
            # Transformers of fixed image size know only theirs; they have no BatchNorm, but the decoder has
            size = model.tile if has_fixed_size(model.backbone) else 2 * model.encoder.strides[-1]
            images = torch.zeros(1, 1, model.in_channels, size, size, dtype=parameter.dtype, device=parameter.device)
            out = model(images.requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    readers = _readers(out)
    calls = Counter(convolutions.values()), Counter(norms.values())
    return [(module, norms[node]) for node, module in convolutions.items()
            if node in norms and readers[node] == calls[0][module] == calls[1][norms[node]] == 1]


def _readers(out: Tensor) -> Counter[object]:
    """How often the result of each node of the autograd graph is used."""
    readers: Counter[object] = Counter()
    waiting = [out.grad_fn]
    while waiting:
        node = waiting.pop()
        assert node is not None
        for before, _ in node.next_functions:
            if before is not None:
                readers[before] += 1
                if readers[before] == 1:
                    waiting.append(before)
    return readers


def _fold(convolution: nn.Conv2d, norm: _BatchNorm) -> None:
    """BatchNorm(w x + b) = (s w) x + s (b − mean) + beta, with s = gamma / √(var + eps)."""
    assert norm.running_mean is not None and norm.running_var is not None
    weight = convolution.weight
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = -norm.running_mean.double()
    if convolution.bias is not None:
        bias = bias + convolution.bias.double()
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    convolution.weight = nn.Parameter((weight.double() * scale[:, None, None, None]).to(weight.dtype))
    convolution.bias = nn.Parameter(bias.to(weight.dtype))
