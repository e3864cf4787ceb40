"""The model: equal to the 1st-place solution's on its own numbers; months that are dropped have no part in it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.base.errors import ConfigError, DataError, WeightsError
from engine.data.biomassters import BIOMASSTERS
from engine.model import backbones
from engine.model.tensors import read_tensors
from engine.model.unet import BiomassUNet, MonthAttention, parameter_counts
from engine.training.losses import make_loss
from tests.winner import FIXTURE, images, label, masked, needs_fixture

SMALL = "tf_mobilenetv3_small_minimal_100"
WIDTHS = (48, 40, 32, 24, 16)


pytestmark = pytest.mark.usefixtures("one_thread")


def small(seed: int = 0, **options: object) -> BiomassUNet:
    torch.manual_seed(seed)
    return BiomassUNet(**{"backbone": SMALL, "decoder_channels": WIDTHS, **options})  # type: ignore[arg-type]


def noise(months: int = 3, size: int = 64, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.rand(batch, months, 15, size, size, generator=torch.Generator().manual_seed(seed))


# --- parity with the winner -------------------------------------------------------------------------------------------

@needs_fixture
@torch.no_grad()
def test_predictions_of_the_winners_weights() -> None:
    model = small().eval()
    model.load_state_dict(read_tensors(FIXTURE / "model_last.pth")[0])  # strict: the names are the winner's
    expected = np.load(FIXTURE / "predictions.npz")
    chip = images()
    plain = model(chip)
    np.testing.assert_allclose(plain[0, 0], expected["tta_1"], rtol=0, atol=1e-3)
    for name, flip in (("tta_2", (-1,)), ("tta_3", (-2,)), ("tta_4", (-2, -1))):
        mean = (plain + model(chip.flip(flip)).flip(flip)) / 2
        np.testing.assert_allclose(mean[0, 0], expected[name], rtol=0, atol=1e-3)
    np.testing.assert_allclose(model(*masked(chip, 2, 7))[0, 0], expected["masked_2_7"], rtol=0, atol=1e-3)
    assert np.abs(expected["masked_2_7"] - expected["tta_1"]).max() > 0.1  # the mask's part is far above the tolerance


@pytest.fixture(scope="module")
def named() -> BiomassUNet:
    """The fixture's second model: its weights depend on their names and shapes alone."""
    sys.path.insert(0, str(FIXTURE))
    try:
        from weights_by_name import fill
    finally:
        sys.path.remove(str(FIXTURE))
    model = BiomassUNet("tf_efficientnetv2_b0", WIDTHS)
    model.load_state_dict(fill(model.state_dict()))
    return model.double()


def assert_close(got: Tensor | None, expected: np.ndarray) -> None:
    """Within 1e-9 of the largest value: BatchNorm sums 10^6 numbers, in an order that hangs on the threads."""
    assert got is not None
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


@needs_fixture
@torch.no_grad()
def test_named_weights_output_and_losses(named: BiomassUNet) -> None:
    expected = np.load(FIXTURE / "named_weights_b0.npz")
    pred, target = named.eval()(images().double()), label().double()
    assert_close(pred[0, 0], expected["eval"])

    def loss(name: str, ignore_above: float | None) -> float:
        return make_loss(name, BIOMASSTERS.target, ignore_above=ignore_above)(pred, target).item()

    assert loss("per_chip_rmse", 400.0) == pytest.approx(float(expected["eval_loss_nrmse"]), rel=1e-9)
    assert loss("per_chip_rmse", None) == pytest.approx(float(expected["eval_loss_rmse"]), rel=1e-9)
    assert loss("rmse_focal", None) == pytest.approx(float(expected["eval_rmsefocal"]), rel=1e-9)
    # the winner's "nmae" divides the sum of a chip's errors by the root of their number, taken in float32
    kept = (target < 400).sum()
    nmae = loss("mae", 400.0) * kept.item() / kept.float().sqrt().item()
    assert nmae == pytest.approx(float(expected["eval_nmae"]), rel=1e-9)


@needs_fixture
def test_named_weights_training_step(named: BiomassUNet) -> None:
    expected = np.load(FIXTURE / "named_weights_b0.npz")
    named.skip_dropped_months = False  # the winner's BatchNorm sees the dropped months too
    pred = named.train()(*masked(images().double(), 1, 4, 9))
    named.skip_dropped_months = True
    assert_close(pred[0, 0].detach(), expected["train_out"])
    loss = make_loss("per_chip_rmse", BIOMASSTERS.target)(pred, label().double())
    assert loss.item() == pytest.approx(float(expected["train_loss"]), rel=1e-9)
    loss.backward()
    parameters = dict(named.named_parameters())
    for key in (key for key in expected.files if key.startswith("grad:")):
        assert_close(parameters[key.removeprefix("grad:")].grad, expected[key])
    norm = torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None]).norm().item()
    assert norm == pytest.approx(float(expected["train_grad_norm"]), rel=1e-9)
    unused = {name for name, p in parameters.items() if p.grad is None}
    assert unused == {name for name in parameters if name.startswith("decoder.blocks.4.attention1.")}


def test_the_real_model_has_the_winners_size() -> None:
    with torch.device("meta"):
        counts = parameter_counts(BiomassUNet())
    assert {part: round(count / 1e6, 1) for part, count in counts.items()} == {
        "encoder": 116.4, "attention": 0.5, "decoder": 13.9, "total": 130.8}
    assert counts["total"] == counts["encoder"] + counts["attention"] + counts["decoder"]


@pytest.mark.filterwarnings("ignore:Mapping deprecated model name")
def test_the_name_that_the_winners_timm_had() -> None:
    with torch.device("meta"):
        old, new = BiomassUNet("tf_efficientnetv2_l_in21k"), BiomassUNet()
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (old, new)]
    assert shapes[0] == shapes[1]


# --- months -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_a_dropped_month_has_no_part() -> None:
    model, chips = small().eval(), noise()
    dropped = torch.tensor([[False, True, False], [True, False, True]])
    pred = model(chips, dropped)
    chips[0, 1], chips[1, 0] = 7.0, -3.0
    torch.testing.assert_close(model(chips, dropped), pred, rtol=0, atol=0)
    alone = model(chips[:1, [0, 2]])
    torch.testing.assert_close(alone, pred[:1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(chips), pred, atol=1e-3)


@torch.no_grad()
def test_no_mask_is_an_empty_mask_and_order_does_not_matter() -> None:
    model, chips = small().eval(), noise()
    pred = model(chips)
    torch.testing.assert_close(model(chips, torch.zeros(2, 3, dtype=torch.bool)), pred, rtol=0, atol=0)
    torch.testing.assert_close(model(chips[:, [2, 0, 1]]), pred, rtol=1e-3, atol=1e-4)


def test_all_months_dropped_is_finite_and_ignores_the_images() -> None:
    model, chips = small(), noise()
    dropped = torch.tensor([[True, True, True], [False, True, False]])
    chips.requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way back either
        pred = model(chips, dropped)
        pred.square().mean().backward()
    assert torch.isfinite(pred).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    attention = MonthAttention(8)
    assert not attention(torch.randn(3, 8, 2, 2), torch.tensor([0, 0, 3], dtype=torch.int32))[0].any()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(chips, dropped)[0], model(torch.randn_like(chips), dropped)[0])


@torch.no_grad()
def test_skipping_dropped_months_changes_nothing_in_eval_mode() -> None:
    model, chips = small().eval(), noise(months=5)
    dropped = torch.tensor([[False, True, False, True, True], [True, False, False, False, False]])
    skipping = model(chips, dropped)
    model.skip_dropped_months = False
    torch.testing.assert_close(skipping, model(chips, dropped), rtol=1e-4, atol=1e-5)


def test_in_training_batchnorm_sees_kept_months_only() -> None:
    """The same as if the dropped months had never been loaded; and not what the winner's way gives."""
    dropped = torch.tensor([[False, True, False], [False, True, False]])
    chips = noise()
    whole, alone, winner = small(), small(), small()
    winner.skip_dropped_months = False
    torch.testing.assert_close(whole(chips, dropped), alone(chips[:, [0, 2]]), rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(whole.named_buffers(), alone.buffers()):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    winner(chips, dropped)
    assert not torch.allclose(winner.encoder.model.bn1.running_mean, whole.encoder.model.bn1.running_mean)


def test_attention_gradients() -> None:
    torch.manual_seed(0)
    attention = MonthAttention(5).double()
    features = torch.randn(5, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x, *_: attention(x, segments), (features, *attention.parameters()))


def test_attention_is_a_softmax_over_kept_months() -> None:
    torch.manual_seed(0)
    attention, features = MonthAttention(4), torch.randn(3, 4, 1, 1)
    kept = features[:2, :, 0, 0]
    weights = torch.softmax(attention.attn(kept)[:, 0], 0)
    pooled = attention(features, torch.tensor([0, 2, 3], dtype=torch.int32))
    torch.testing.assert_close(pooled[0, :, 0, 0], weights @ kept)


# --- how it runs ------------------------------------------------------------------------------------------------------

def test_one_graph_under_compile() -> None:
    model, chips = small(), noise(months=2)
    compiled = torch.compile(small(), backend="aot_eager", fullgraph=True)  # a graph break or a sync raises
    eager, traced = model(chips), compiled(chips)
    torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)
    eager.mean().backward()
    traced.mean().backward()
    for (name, a), b in zip(model.named_parameters(), compiled.parameters()):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@torch.no_grad()
def test_autocast_and_memory_layout() -> None:
    model, chips = small().eval(), noise()
    pred = model(chips)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(chips)
    # The head computes in float32: maps come in finer steps than bfloat16's, which are 1 to 2 t/ha above 128
    assert half.dtype == torch.float32 and (half != half.bfloat16()).float().mean() > 0.9
    assert (half - pred).square().mean().sqrt() < 0.1 * pred.std()
    by_pixel = chips.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)  # channels last in memory
    torch.testing.assert_close(model(by_pixel), pred, rtol=0, atol=0)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(chips), pred, rtol=1e-4, atol=1e-5)
    maps = model.encode(chips.flatten(0, 1))
    pooled = model.pool(maps, torch.tensor([0, 3, 6], dtype=torch.int32))
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in [*maps, *pooled])


@torch.no_grad()
@pytest.mark.parametrize(("backbone", "size", "widths"), [
    ("resnet18", 64, (8, 8, 8, 8, 8)),  # fewer channels than scSE's reduction
    ("convnext_atto", 64, WIDTHS),  # its finest level is at stride 4: two blocks without a skip
    ("vgg11", 64, WIDTHS),  # its finest level is at stride 1: every block has a skip
    ("swin_tiny_patch4_window7_224", 256, WIDTHS),  # fixed size, channels last
    ("vit_tiny_patch16_224", 256, WIDTHS[:4]),  # three levels, all at stride 16
])
def test_other_backbones(backbone: str, size: int, widths: tuple[int, ...]) -> None:
    model = BiomassUNet(backbone, widths).eval()
    assert model(noise(2, size, 1), torch.tensor([[False, True]])).shape == (1, 1, size, size)
    rebuilt = BiomassUNet(**model.config())
    assert rebuilt.state_dict().keys() == model.state_dict().keys()


# --- weights of the encoder -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.parametrize("backbone", [SMALL, "convnext_atto"])  # the second one's names are flattened by timm
def test_pretrained_from_a_local_file(tmp_path: Path, kind: str, backbone: str) -> None:
    source = timm.create_model(backbone)  # as published: 3 channels, with its classifier
    path = tmp_path / f"encoder.{kind}"
    save_file(source.state_dict(), path) if kind == "safetensors" else torch.save(source.state_dict(), path)
    loaded = BiomassUNet(backbone, WIDTHS, pretrained=path).encoder.model.state_dict()
    expected = {backbones._flat(name): tensor for name, tensor in source.state_dict().items()}
    stems = 0
    for name, tensor in loaded.items():
        wanted = expected[backbones._flat(name)]
        if tensor.shape != wanted.shape:  # timm repeats the three channels and keeps the sum
            wanted, stems = wanted.repeat(1, 5, 1, 1) / 5, stems + 1
        torch.testing.assert_close(tensor, wanted)
    assert stems == 1


def test_pretrained_from_a_wrong_file(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file(timm.create_model("resnet18").state_dict(), path)
    with pytest.raises(WeightsError, match=r"other.safetensors does not hold the weights of 'tf_mob.*conv_stem"
                                           r"\.weight is missing"):
        small(pretrained=path)
    with pytest.raises(WeightsError, match="no such file"):
        small(pretrained=tmp_path / "absent.safetensors")


def test_pretrained_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"timm's weights of 'tf_.*could not be loaded.*give model.pretrained"):
        small(pretrained=True)


# --- what cannot be built or run --------------------------------------------------------------------------------------

def test_wrong_configuration_names_the_key_and_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"model.backbone 'tf_efficientnetv2_xxl' .*nearest: tf_efficientnetv2_xl"):
        BiomassUNet("tf_efficientnetv2_xxl")
    with pytest.raises(ConfigError, match=r"no such weights; it has: .*tf_efficientnetv2_l.in21k"):
        BiomassUNet("tf_efficientnetv2_l.in22k")
    with pytest.raises(ConfigError, match="decoder_channels has 4 numbers, but .* halves the image 5 times: give 5"):
        small(decoder_channels=WIDTHS[:4])
    with pytest.raises(ConfigError, match=r"levels at strides \[14, 14, 14\]; a UNet needs rising powers of two"):
        BiomassUNet("eva02_tiny_patch14_224")


def test_a_backbone_without_features(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("features_only not implemented")

    monkeypatch.setattr(timm, "create_model", refuse)  # older timm has such models, newer has none
    with pytest.raises(ConfigError, match="gives no features for a UNet .*features_only not implemented.*choose"):
        small()


def test_wrong_input_names_the_remedy() -> None:
    model = small()
    with pytest.raises(DataError, match="64×72 pixels: .* needs multiples of 32; pad or crop"):
        model(torch.zeros(1, 2, 15, 64, 72))
    with pytest.raises(DataError, match=r"\[B,T,15,H,W\], not \[1, 2, 4, 64, 64\]"):
        model(torch.zeros(1, 2, 4, 64, 64))
    with pytest.raises(DataError, match=r"bool \[1, 2\], not torch.float32 \[1, 2\]"):
        model(torch.zeros(1, 2, 15, 64, 64), torch.zeros(1, 2))
