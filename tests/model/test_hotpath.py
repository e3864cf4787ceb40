"""The fast ways to run the model give what the plain ways give: upsampling convolution, compiled and recomputed
blocks, the copy for inference, flips in one batch; and a run on two ranks with compiled blocks."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from engine.data.batch import Batch
from engine.inference.chips import predict_batch
from engine.inference.fold import fold_batchnorm, optimize_for_inference
from engine.model.compilation import checkpoint_regions, compile_regions, regions
from engine.model.decoder import DecoderBlock, UpsampleConv2d, upsample_conv3x3, upsample_conv3x3_reference
from engine.model.tensors import read_tensors
from engine.model.unet import BiomassUNet
from tests.conftest import stop_tracing, untraced
from tests.hosts import forked, history, started, torchrun
from tests.runs.test_training import recipe, succeed
from tests.winner import FIXTURE, images, needs_fixture

SMALL = "tf_mobilenetv3_small_minimal_100"
WIDTHS = (48, 40, 32, 24, 16)


pytestmark = pytest.mark.usefixtures("one_thread")


def lived_in(backbone: str = SMALL, **options: Any) -> BiomassUNet:
    """A model whose BatchNorms have seen images: nothing about them is 0 or 1."""
    torch.manual_seed(0)
    model = BiomassUNet(backbone, WIDTHS, **options)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    model.train()
    with torch.no_grad():
        for seed in range(20):  # the running statistics move a tenth of the way each time
            model(noise(seed=seed))
    return model


def noise(months: int = 3, size: int = 64, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.rand(batch, months, 15, size, size, generator=torch.Generator().manual_seed(seed))


def largest_difference(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


# --- upsampling convolution -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(2, 5, 7, 3, 4), (1, 1, 1, 1, 1), (1, 3, 1, 6, 2), (3, 16, 8, 8, 24)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_upsampling_convolution_and_its_gradients(shape: tuple[int, ...], with_bias: bool) -> None:
    b, i, h, w, o = shape
    torch.manual_seed(0)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((b, i, h, w), (o, i, 3, 3), (o,))]
    inputs = inputs if with_bias else inputs[:2]
    got, expected = upsample_conv3x3(*inputs), upsample_conv3x3_reference(*inputs)
    assert got.shape == (b, o, 2 * h, 2 * w)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    for ours, theirs in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_upsampling_convolution_in_half_precision() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 32, 9, 7), torch.randn(16, 32, 3, 3) / 17
    truth = upsample_conv3x3_reference(x.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        errors = [(f(x, weight).double() - truth).square().mean().sqrt() / truth.std()
                  for f in (upsample_conv3x3, upsample_conv3x3_reference)]
    assert errors[0] < 0.005 and errors[0] < 1.5 * errors[1]


def test_the_switch_of_the_upsampling_convolution() -> None:
    model, calls = lived_in().eval(), []
    assert model.upsample_conv
    [layer] = [m for m in model.modules() if isinstance(m, UpsampleConv2d)]
    layer.register_forward_hook(lambda module, *_: calls.append(module.fused))
    with torch.no_grad():
        fused = model(noise())
        model.upsample_conv = False
        plain = model(noise())
    assert calls == [True, False] and not model.upsample_conv
    assert 0 < largest_difference(fused, plain) < 1e-4  # not bit for bit: the same numbers in another order


def test_the_upsampling_convolution_keeps_channels_last() -> None:
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    assert upsample_conv3x3(x, torch.randn(4, 8, 3, 3)).is_contiguous(memory_format=torch.channels_last)


# --- regions ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("backbone", "blocks"), [
    (SMALL, 12), ("tf_efficientnetv2_b0", 22), ("resnet18", 8), ("convnext_atto", 12)])
def test_regions_are_the_blocks(backbone: str, blocks: int) -> None:
    with torch.device("meta"):
        model = BiomassUNet(backbone, WIDTHS)
    found = list(regions(model))
    assert len(found) == len(set(found)) == blocks + 5
    assert all(isinstance(block, DecoderBlock) for block in found[-5:])
    inside = [inner for outer in found for inner in outer.modules() if inner is not outer]
    assert not set(inside) & set(found)


def steps(model: BiomassUNet, months: tuple[int, ...] = (3, 2)) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after a few training passes, each with its number of kept months."""
    result = {}
    for step, kept in enumerate(months):
        dropped = torch.zeros(2, 3, dtype=torch.bool)
        dropped[0, kept:] = True
        out = model.train()(noise(seed=step).double(), dropped)
        out.square().mean().backward()
        result[f"out {step}"] = out.detach()
    result |= {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return result | {f"buffer {name}": b for name, b in model.named_buffers()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_recomputed_blocks_change_nothing_but_the_memory() -> None:
    plain = lived_in().double()
    plain.keep_less = False  # its hooks would hide what is kept from this test's
    lean = copy.deepcopy(plain)
    assert "17 blocks" in checkpoint_regions(lean)
    assert lean.state_dict().keys() == plain.state_dict().keys()

    def kept_bytes(model: BiomassUNet) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        held = copy.deepcopy(model) if model is plain else model
        before = {name: buffer.clone() for name, buffer in held.named_buffers()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held.train()(noise().double()).sum()
        for name, buffer in held.named_buffers():
            buffer.data.copy_(before[name])
        return sum(seen.values())

    assert kept_bytes(lean) < 0.5 * kept_bytes(plain)
    assert_same(steps(lean), steps(plain))  # the buffers too: a batch counts once
    with torch.no_grad():
        torch.testing.assert_close(lean.eval()(noise().double()), plain.eval()(noise().double()))


def test_compiled_blocks_take_any_number_of_months_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    plain = lived_in().double()
    compiled = copy.deepcopy(plain)
    assert "17 blocks" in compile_regions(compiled, backend=count)
    checkpoint_regions(compiled)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    with untraced():
        first = steps(compiled, (3,))
    after_first = len(graphs)
    assert 5 < after_first <= 17
    assert_same(first, steps(plain, (3,)))
    for model in (compiled, plain):
        model.zero_grad()
    with untraced():
        more = steps(compiled, (2, 1))
    assert_same(more, steps(plain, (2, 1)))
    assert len(graphs) == after_first
    copied = copy.deepcopy(compiled)  # the plain model again
    with torch.no_grad():
        torch.testing.assert_close(copied.eval()(noise().double()), plain.eval()(noise().double()))
    assert len(graphs) == after_first


@pytest.mark.slow
def test_inductor_pads_while_it_normalises() -> None:
    """SAME padding of a strided depthwise convolution takes no pass of its own in a compiled block."""
    from torch._inductor.utils import run_and_get_code

    block = BiomassUNet("tf_efficientnetv2_b0", WIDTHS).encoder.model.get_submodule("blocks.3.0").train()
    assert isinstance(block.conv_dw, Conv2dSame)
    block.compile()
    images = torch.rand(2, block.conv_pw.in_channels, 8, 8).contiguous(memory_format=torch.channels_last)
    with untraced(), torch._inductor.config.patch(fx_graph_cache=False):
        _, codes = run_and_get_code(block, images.requires_grad_())
    kernels = {name for code in codes for name in re.findall(r"cpp_fused_\w+", code) if "constant_pad" in name}
    assert kernels and all("batch_norm" in name and "silu" in name for name in kernels)


def test_at_zero_3_nothing_is_compiled_and_it_says_so() -> None:
    with torch.device("meta"):
        model = BiomassUNet(SMALL, WIDTHS)
    assert "nothing is compiled at ZeRO-3" in compile_regions(model, zero_stage=3)
    assert all(module._compiled_call_impl is None for module in model.modules())


# --- inference --------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("backbone", [SMALL, "tf_efficientnetv2_b0", "resnet18", "convnext_atto"])
def test_the_copy_for_inference_gives_the_models_maps(backbone: str) -> None:
    model = lived_in(backbone)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = optimize_for_inference(model)
    assert model.training and not fast.training  # the model itself is as it was
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fast.modules())
    dropped = torch.tensor([[False, True, False], [False, False, False]])
    assert largest_difference(fast(noise(), dropped), model.eval()(noise(), dropped)) < 1e-4


@torch.no_grad()
def test_the_copy_for_inference_in_bf16() -> None:
    model = lived_in().eval()
    fast = optimize_for_inference(model, "bf16")
    dtypes = {part: {p.dtype for p in getattr(fast, part).parameters()} for part in ("encoder", "decoder", "attn")}
    assert dtypes == {"encoder": {torch.bfloat16}, "decoder": {torch.bfloat16}, "attn": {torch.float32}}
    expected = model(noise())
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(noise())
        under_autocast = fast(noise())
    for got in (fast(noise()), under_autocast):
        error = (got.float() - expected).square().mean().sqrt()
        assert error < 2 * (plain.float() - expected).square().mean().sqrt()


@pytest.mark.slow
@torch.no_grad()
def test_the_copy_for_inference_compiled() -> None:
    model = lived_in("test_efficientnet").eval()
    fast = optimize_for_inference(model, compile=True)
    dropped = torch.tensor([[False, True, False], [False, False, False]])
    assert all(region._compiled_call_impl is not None for region in regions(fast))
    with untraced():
        assert largest_difference(fast(noise(), dropped), model(noise(), dropped)) < 1e-4


@needs_fixture
@torch.no_grad()
def test_the_copy_for_inference_of_the_winners_weights() -> None:
    model = BiomassUNet(SMALL, WIDTHS)
    model.load_state_dict(read_tensors(FIXTURE / "model_last.pth")[0])
    expected = torch.from_numpy(np.load(FIXTURE / "predictions.npz")["tta_1"])
    assert largest_difference(optimize_for_inference(model)(images())[0, 0], expected) < 1e-4


def test_a_batchnorm_that_shares_its_input_is_not_folded() -> None:
    model = lived_in("resnet18")
    before = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())

    class Shared(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = self[0](x)
            return self[1](y) + 0.1 * y

    block = model.decoder.blocks[1]
    assert isinstance(block, DecoderBlock)
    block.conv2 = Shared(*block.conv2)
    with torch.no_grad():
        expected = model.eval()(noise())
    assert fold_batchnorm(model) == before - 1
    with torch.no_grad():
        assert largest_difference(model(noise()), expected) < 1e-4


def test_flips_in_one_batch() -> None:
    model, calls = lived_in().eval(), []
    dropped = torch.tensor([[False, True, False], [False, False, False]])
    batch = Batch(images=noise(), dropped=dropped, label=None, valid=None, rows=None, chips=[])  # type: ignore[arg-type]

    def forward(images: Tensor, dropped: Tensor) -> Tensor:
        calls.append(len(images))
        return model(images, dropped)

    one, three, four = (predict_batch(forward, batch, ("id", "h", "v", "hv"), "fp32", n) for n in (1, 3, 4))
    assert calls == [2, 2, 2, 2, 6, 2, 8]
    assert one.shape == (2, 1, 64, 64)
    torch.testing.assert_close(three, one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(four, one, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(predict_batch(forward, batch, ("id",), "fp32"), one, atol=1e-3)


# --- whole runs -------------------------------------------------------------------------------------------------------

RUN = ["--set", "phases=[{epochs: 1, lr: 0.003}]", "--set", "checkpoint.every_steps=null",
       "--set", "model.backbone=test_efficientnet"]  # few kinds of block: each takes Inductor seconds


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Path:
    """Of one rank, neither compiled nor computed again."""
    folder = tmp_path_factory.mktemp("plain")
    succeed(forked("train", "--config", recipe(folder, sample, "plain"), *RUN))
    return folder / "plain"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_with_compiled_blocks(plain_run: Path, tmp_path: Path, sample: Path, stage: int) -> None:
    """Compiled or not, the losses are the same; at ZeRO-3 it runs and says that it does not compile."""
    with started(tmp_path / "log", "train", "--config", recipe(tmp_path, sample, "compiled"), *RUN, "--set",
                 f"train.zero_stage={stage}", "--set", "train.compile=true", "--set",
                 "train.checkpoint_activations=true", variables=torchrun(2),
                 before=dict.fromkeys(range(2), stop_tracing) if stage < 3 else None) as ranks:
        assert [rank.wait(1200) for rank in ranks] == [0, 0], ranks[0].text() + ranks[1].text()
        out = ranks[0].text()
    assert ("blocks of" in out) == (stage < 3) and ("nothing is compiled at ZeRO-3" in out) == (stage == 3)
    assert "recomputed in the backward" in out
    ours, theirs = history(tmp_path / "compiled"), history(plain_run)
    assert len(ours) == len(theirs) == 3
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], rtol=1e-3)
