"""The decoder: from the pooled levels of the encoder to one map at full resolution.

    L maps [B,D,h,w], finest first -> ×2 at a time, joined with the level of the same stride -> [B,D,H,W]

It is the UNet decoder of segmentation-models-pytorch as of early 2023 with scSE (Roy et al. 2018, arXiv:1803.02579),
with the state-dict names of the 1st-place solution's weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.base.errors import ConfigError
from engine.model.activations import BatchNormReLU

SCSE_REDUCTION = 16


class Decoder(nn.Module):
    """From the deepest level to full resolution, ×2 at a time, joining the encoder's level of the same stride."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], widths: Sequence[int], backbone: str):
        super().__init__()
        halvings = strides[-1].bit_length() - 1
        if len(widths) != halvings:
            raise ConfigError(f"model.decoder_channels has {len(widths)} numbers, but {backbone!r} halves the image "
                              f"{halvings} times: give {halvings}")
        skips = dict(zip(strides[:-1], channels[:-1]))
        inputs = [channels[-1], *widths[:-1]]
        self.blocks = nn.ModuleList(
            DecoderBlock(inputs[i], skips.get(strides[-1] >> (i + 1), 0), widths[i]) for i in range(halvings))
        self.apply(_initialise)

    @property
    def upsample_conv(self) -> bool:
        """Whether blocks without a skip convolve before they upsample; see `upsample_conv3x3`."""
        return all(module.fused for module in self.modules() if isinstance(module, UpsampleConv2d))

    @upsample_conv.setter
    def upsample_conv(self, fused: bool) -> None:
        for module in self.modules():
            if isinstance(module, UpsampleConv2d):
                module.fused = fused

    def forward(self, pooled: list[Tensor]) -> Tensor:
        x, skips = pooled[-1], pooled[:-1]
        for block in self.blocks:
            x = block(x, skips.pop() if block.has_skip else None)
        return x


class DecoderBlock(nn.Module):
    """Upsample ×2, join the skip, scSE, two convolutions, scSE.

    Without a skip `attention1` is not used; it stays, because the winner's weights hold it.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.has_skip = skip_channels > 0
        self.conv1 = _convolution(in_channels + skip_channels, out_channels, upsample=not self.has_skip)
        self.attention1 = _scse(in_channels + skip_channels)
        self.conv2 = _convolution(out_channels, out_channels)
        self.attention2 = _scse(out_channels)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        if skip is not None:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = self.attention1(torch.cat([x, skip], 1))
        return self.attention2(self.conv2(self.conv1(x)))


class UpsampleConv2d(nn.Conv2d):
    """Nearest ×2 upsampling and a 3×3 convolution: [B,I,h,w] -> [B,O,2h,2w].  Its parameter is the convolution's.

    `fused` False: in two steps, as the definition says.

    A block with a skip cannot have this: its scSE multiplies the upsampled map with a gate per pixel of the *fine*
    map (sSE sees the skip), so neighbours that the upsampling made equal are not equal when they are convolved.
    Taking the weights inside the gate (nine 1×1 convolutions at low resolution, then nine gated sums of shifted maps)
    would halve the arithmetic, but moves 4.5 times the output's bytes there and back: a loss on a GPU.
    """

    fused = True

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (upsample_conv3x3 if self.fused else upsample_conv3x3_reference)(x, self.weight, self.bias)


def upsample_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Nearest ×2 upsampling of x [B,I,h,w], then a convolution with weight [O,I,3,3] and padding 1: [B,O,2h,2w].

    The same map in 16 instead of 36 multiplications per pixel of x, borders too: a fine pixel's nine taps fall on
    2×2 coarse pixels, so taps that fall on the same one are added first.  Both steps are convolutions, the upsampling
    a transposed one with 2×2 ones at stride 2; their composition is a transposed one with weight ∗ ones, 4×4.
    """
    padded = F.pad(weight.flip(2, 3), (1, 1, 1, 1))  # flipped: a transposed convolution runs its kernel backwards
    rows = padded[:, :, :-1] + padded[:, :, 1:]
    kernel = rows[..., :-1] + rows[..., 1:]
    return F.conv_transpose2d(x, kernel.transpose(0, 1), bias, stride=2, padding=1)


def upsample_conv3x3_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `upsample_conv3x3` equals."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


class ScSE(nn.Module):
    """Squeeze-and-excitation over channels (cSE) and over pixels (sSE), added."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(1, channels // SCSE_REDUCTION)
        self.cSE = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True),
                                 nn.Conv2d(hidden, channels, 1), nn.Sigmoid())
        self.sSE = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        # x·c + x·s, not x·(c + s): the sum of the gates is as large as x and autograd would keep it
        return (x * self.cSE(x)).addcmul_(x, self.sSE(x))


def _scse(channels: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(attention=ScSE(channels)))


def _convolution(in_channels: int, out_channels: int, upsample: bool = False) -> nn.Sequential:
    convolution = UpsampleConv2d(in_channels, out_channels) if upsample else \
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(convolution, BatchNormReLU(out_channels))


def _initialise(module: nn.Module) -> None:
    """The decoder's initial weights in segmentation-models-pytorch: He's, uniform; biases zero."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
