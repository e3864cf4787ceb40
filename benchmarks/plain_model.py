"""The model as its definition is first written down in PyTorch: the baseline of attention.py and model.py.

Every month passes through the encoder, dropped ones as well; the attention holds logits and weights of all months and
masks them; convolutions see NCHW; timm's backbone is timm's; gates are added before they multiply; nothing is
compiled.  This is how the 1st-place solution computes.  Parameters and their names are
`engine.model.unet.BiomassUNet`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engine.model.activations import BatchNormReLU
from engine.model.backbones import build_backbone
from engine.model.decoder import ScSE
from engine.model.unet import BiomassUNet


class PlainMonthAttention(nn.Module):
    """As `engine.model.unet.MonthAttention`, over all months with a mask."""

    def __init__(self, channels: int):
        super().__init__()
        self.attn = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels), nn.GELU(),
                                  nn.Linear(channels, 1))

    def forward(self, features: Tensor, dropped: Tensor) -> Tensor:
        """[B·T,D,h,w] and dropped [B,T] bool on their device -> [B,D,h,w]."""
        months = features.permute(0, 2, 3, 1).unflatten(0, dropped.shape)  # [B,T,h,w,D]
        logits = self.attn(months).masked_fill(dropped[:, :, None, None, None], float("-inf"))
        return (logits.softmax(1) * months).sum(1).to(features.dtype).permute(0, 3, 1, 2)


class PlainScSE(ScSE):
    """As `engine.model.decoder.ScSE`: the same parameters and, but for rounding, the same values."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.cSE(x) + self.sSE(x))


class PlainBatchNormReLU(BatchNormReLU):
    """As `engine.model.activations.BatchNormReLU`, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(nn.BatchNorm2d.forward(self, x))


class PlainUNet(BiomassUNet):
    """As `engine.model.unet.BiomassUNet`, in the plain way."""

    def __init__(self, *args: Any, memory_format: torch.memory_format = torch.contiguous_format, **options: Any):
        super().__init__(*args, **options)
        self.memory_format = memory_format
        self.attn = nn.ModuleList(PlainMonthAttention(channels) for channels in self.encoder.channels)
        plain_norms(self)
        plain_decoder(self)
        self.keep_less = False

    def forward(self, images: Tensor, dropped: Tensor | None = None) -> Tensor:
        if dropped is None:
            dropped = torch.zeros(images.shape[:2], dtype=torch.bool)
        dropped = dropped.to(images.device)
        return self.decode(self.pool(self.encode(images.flatten(0, 1)), dropped))

    def encode(self, images: Tensor) -> list[Tensor]:
        return self.encoder(images.contiguous(memory_format=self.memory_format))


def plain_norms(model: BiomassUNet) -> None:
    """Give `model` timm's backbone as timm makes it, with the weights that it has, and a decoder whose BatchNorm and
    ReLU are two operators."""
    backbone = build_backbone(model.backbone, model.in_channels)
    backbone.load_state_dict(model.encoder.model.state_dict())
    model.encoder.model = backbone
    for module in model.decoder.modules():
        if type(module) is BatchNormReLU:
            module.__class__ = PlainBatchNormReLU


def plain_decoder(model: BiomassUNet) -> None:
    """Have the decoder of `model` upsample before it convolves, and add gates before it multiplies."""
    model.decoder.upsample_conv = False
    for module in model.decoder.modules():
        if type(module) is ScSE:
            module.__class__ = PlainScSE  # parameters and their names stay
