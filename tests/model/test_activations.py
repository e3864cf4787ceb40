"""BatchNorm with its activation keeps one array, activations are computed again: the same numbers, less memory."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from engine.model import activations
from engine.model.activations import BatchNormReLU, BatchNormSiLU, activations_again, keep_one_array
from tests.model.test_hotpath import assert_same, lived_in, steps


class NormThenReLU(nn.BatchNorm2d):
    """What `BatchNormReLU` equals."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.mark.parametrize(("dtype", "tolerance"),
                         [(torch.float64, 1e-11), (torch.float32, 2e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("shape", [(3, 5, 4, 7), (1, 64, 8, 8)])
@pytest.mark.parametrize("relu", [False, True])
def test_batchnorm_with_activation(dtype: torch.dtype, tolerance: float, shape: tuple[int, ...], relu: bool) -> None:
    """Outputs, gradients, statistics, in training, after it, and with parameters of float32 for half precision."""
    torch.manual_seed(0)
    plain = NormThenReLU(shape[1]) if relu else BatchNormAct2d(shape[1], act_layer=nn.SiLU, inplace=False)
    plain.to(torch.promote_types(dtype, torch.float32))
    nn.init.uniform_(plain.weight, 0.5, 1.5)
    nn.init.normal_(plain.bias)
    if relu:
        lean: nn.Module = BatchNormReLU(shape[1]).to(plain.weight.dtype)
        lean.load_state_dict(plain.state_dict())
    else:
        lean = copy.deepcopy(plain)
        keep_one_array(lean)
        assert type(lean) is BatchNormSiLU
    x = (3 * torch.randn(shape, dtype=dtype) + 2).contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(x)
    results = []
    for module in (lean, plain):
        leaf = x.clone().requires_grad_()
        for _ in range(2):
            out = module.train()(leaf)
            out.backward(grad)
        assert module.weight.grad is not None and module.bias.grad is not None and leaf.grad is not None
        results.append([out, leaf.grad, module.weight.grad, module.bias.grad, *module.buffers(), module.eval()(x)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)


def test_activations_computed_again_change_nothing_but_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanged: dict[int, int] = {}

    def look(tensor: Tensor) -> Any:
        recipe = recipe_of(tensor)
        if recipe is not None:
            exchanged[tensor.data_ptr()] = tensor.nbytes
            torch.testing.assert_close(recipe(), tensor, rtol=1e-12, atol=1e-12)
        return recipe

    recipe_of = activations._recipe_of
    plain = lived_in("tf_efficientnetv2_b0").double()
    lean = copy.deepcopy(plain)
    plain.keep_less = False
    monkeypatch.setattr(activations, "_recipe_of", look)
    got = steps(lean)
    gates = sum(isinstance(module, activations.GatedAgain) for module in lean.modules())
    norms = sum(isinstance(module, BatchNormSiLU | BatchNormReLU) for module in lean.modules())
    assert gates == 16 and len(exchanged) >= norms + gates, (len(exchanged), norms)
    exchanged.clear()
    assert_same(got, steps(plain))
    assert not exchanged


def test_an_activation_that_was_written_to_is_kept() -> None:
    plain = BatchNormAct2d(6, act_layer=nn.SiLU, inplace=False).double()
    lean = copy.deepcopy(plain)
    keep_one_array(lean)
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    weight = torch.randn(3, 6, 1, 1, dtype=torch.float64)
    grads = []
    for module, context in ((plain, nullcontext()), (lean, activations_again())):
        leaf = x.clone().requires_grad_()
        with context:
            y = module(leaf)
            y.mul_(3)
            out = nn.functional.conv2d(y, weight).square().sum()
        out.backward(retain_graph=True)
        out.backward()  # the graph serves twice
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_what_has_no_recipe_must_not_be_written_to() -> None:
    """Autograd's own check, which its hooks turn off."""
    leaf = torch.randn(3, requires_grad=True)
    with activations_again():
        y = leaf.exp()
        out = y.square().sum()
        y.mul_(2)
    with pytest.raises(RuntimeError, match="written to after"):
        out.backward()
