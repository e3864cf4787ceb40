"""What benchmarks/model.py times: batches as the loader gives them, a training step, single stages, bare convolutions,
and how much arithmetic they mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from plain_model import PlainUNet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from engine.config import Augment
from engine.data import plan
from engine.data.biomassters import BIOMASSTERS, C, T
from engine.inference.chips import autocast
from engine.model.unet import BiomassUNet
from engine.training.losses import make_loss

CLIP = 5.0  # the recipe's gradient norm
RECIPE = Augment()
POOL = 64  # batches that stand for the recipe's


@dataclass(frozen=True)
class Setup:
    """What all parts of a call share."""

    backbone: str
    decoder: tuple[int, ...]
    batch: int
    size: int  # pixels a side
    precision: str
    device: torch.device


class Batch(NamedTuple):
    images: Tensor  # [B, T, C, H, W], months first that are kept, the rest zero; channels_last
    plain_images: Tensor  # the same, contiguous, float32
    dropped: Tensor  # [B, T] bool, on the host
    label: Tensor  # [B, H, W] t/ha


def recipe_batches(setup: Setup, n: int, augment: Augment = RECIPE, pool: int = POOL) -> list[int]:
    """`n` batches of the recipe's first epoch for `make_batch`, at the quantiles of their kept months: few repeats
    then see the recipe's mean, too."""
    by_months = sorted(range(pool), key=lambda number: int(kept_months(setup, number, augment).sum()))
    return [by_months[int((k + 0.5) / n * pool)] for k in range(n)]


def kept_months(setup: Setup, number: int, augment: Augment = RECIPE) -> Tensor:
    """[B] int: how many months each chip of batch `number` keeps."""
    positions = range(number * setup.batch, (number + 1) * setup.batch)
    return torch.tensor([plan.kept_months(augment, T, 0, 0, position) for position in positions])


def make_batch(setup: Setup, number: int | None, months: int = T) -> Batch:
    """Batch `number` of the recipe's first epoch; None: all months kept."""
    generator = torch.Generator().manual_seed(number or 0)
    kept = torch.full((setup.batch,), months) if number is None else kept_months(setup, number)
    dropped = torch.arange(months) >= kept[:, None]
    images = torch.rand(setup.batch, months, setup.size, setup.size, C, generator=generator)
    images[dropped] = 0
    label = 120 * torch.rand(setup.batch, setup.size, setup.size, generator=generator)
    dtype = torch.float32 if setup.precision == "fp32" else torch.bfloat16
    return Batch(images.to(setup.device, dtype).permute(0, 1, 4, 2, 3),
                 images.permute(0, 1, 4, 2, 3).contiguous().to(setup.device), dropped, label.to(setup.device))


def train_step(model: BiomassUNet, optimizer: torch.optim.Optimizer, setup: Setup) -> Callable[[Batch], None]:
    """One optimizer step, with nothing that waits for the device."""
    loss_of = make_loss("per_chip_rmse", BIOMASSTERS.target)
    plain = isinstance(model, PlainUNet)

    def step(batch: Batch) -> None:
        with autocast(setup.device, setup.precision):
            prediction = model(batch.plain_images if plain else batch.images, batch.dropped)
        loss_of(prediction, batch.label).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # at the end: gradients then count in the repeat's own peak memory

    return step


class Flop(NamedTuple):
    """Floating-point operations forward: of a month in the encoder, of a month in the attention, of a chip in the
    decoder (two for a multiplication and an addition)."""

    encoder: float
    attention: float
    decoder: float

    @classmethod
    def of(cls, setup: Setup) -> Flop:
        with torch.device("meta"):
            model = BiomassUNet(setup.backbone, setup.decoder).eval()
        model.decoder.upsample_conv = False
        with FlopCounterMode(display=False) as encoder:
            levels = model.encoder(torch.empty(1, C, setup.size, setup.size, device="meta"))
        with FlopCounterMode(display=False) as decoder:
            model.segmentation_head(model.decoder(levels))
        layers = sum(2 * level.shape[1] * level.numel() for level in levels)  # the D × D layer, per pixel
        return cls(encoder.get_total_flops(), layers, decoder.get_total_flops())

    def chips(self, count: int, months: float) -> float:
        """Forward of `count` chips that keep `months` together."""
        return (self.encoder + self.attention) * months + self.decoder * count


# Single stages -------------------------------------------------------------------------------------------------


def stages(model: BiomassUNet, setup: Setup, backward: bool) -> dict[str, Callable[[int], None]]:
    """Encoder, attention and decoder of `model` by themselves, on all months of a batch."""
    plain = isinstance(model, PlainUNet)
    batch = make_batch(setup, None)
    images = (batch.plain_images if plain else batch.images).flatten(0, 1)
    months: Tensor = torch.zeros(setup.batch, T, dtype=torch.bool, device=setup.device) if plain else \
        torch.arange(0, (setup.batch + 1) * T, T, dtype=torch.int32, device=setup.device)
    with torch.no_grad(), autocast(setup.device, setup.precision):
        model.eval()
        features = [level.clone() for level in model.encode(images)]
        pooled = [level.clone() for level in model.pool(features, months)]
        model.train(backward)

    def encoder() -> list[Tensor]:
        return model.encode(images)

    def attention() -> list[Tensor]:
        return model.pool([level.detach().requires_grad_(backward) for level in features], months)

    def decoder() -> list[Tensor]:
        return [model.decode([level.detach().requires_grad_(backward) for level in pooled])]

    return {call.__name__: _stage(call, model, setup, backward) for call in (encoder, attention, decoder)}


def _stage(call: Callable[[], list[Tensor]], model: BiomassUNet, setup: Setup,
           backward: bool) -> Callable[[int], None]:
    grads: list[Tensor] = []

    def run(_: int) -> None:
        with torch.inference_mode(not backward), autocast(setup.device, setup.precision):
            outputs = call()
        if backward:
            if not grads:
                grads.extend(torch.randn_like(output) for output in outputs)
            torch.autograd.backward(outputs, grads)
            model.zero_grad(set_to_none=True)

    return run


# Convolutions alone --------------------------------------------------------------------------------------------


class _Convolution(NamedTuple):
    image: tuple[int, ...]  # [C, H, W] of its input
    weight: Tensor
    options: dict[str, Any]


def convolutions(model: BiomassUNet, setup: Setup, backward: bool) -> Callable[[int], None]:
    """run(N): every convolution of the encoder on N images, in training precision and channels_last, and nothing else.

    Inputs are views of one buffer: values do not matter to a convolution's time, as long as they are no zeros.
    """
    found: list[_Convolution] = []
    dtype = torch.float32 if setup.precision == "fp32" else torch.bfloat16

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        padding = [(k - 1) // 2 * d for k, d in zip(module.kernel_size, module.dilation)]  # as SAME's, in size
        weight = module.weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        options = {"stride": module.stride, "padding": padding, "dilation": module.dilation, "groups": module.groups}
        found.append(_Convolution(tuple(inputs[0].shape[1:]), weight.requires_grad_(backward), options))

    hooks = [m.register_forward_hook(note) for m in model.encoder.modules() if isinstance(m, nn.Conv2d)]
    model.eval()
    with torch.no_grad():
        model.encode(torch.rand(1, C, setup.size, setup.size, device=setup.device))
    for hook in hooks:
        hook.remove()
    largest = max(max(c.image[0], len(c.weight)) * c.image[1] * c.image[2] for c in found)
    buffer = torch.rand(setup.batch * T * largest, device=setup.device, dtype=dtype)

    def view(images: int, channels: int, height: int, width: int) -> Tensor:
        flat = buffer[:images * channels * height * width]
        return flat.view(images, height, width, channels).permute(0, 3, 1, 2)

    def run(images: int) -> None:
        for conv in found:
            with torch.set_grad_enabled(backward):
                x = view(images, *conv.image).detach().requires_grad_(backward)
                y = F.conv2d(x, conv.weight, **conv.options)
            if backward:
                torch.autograd.grad(y, (x, conv.weight), view(*y.shape))

    return run
