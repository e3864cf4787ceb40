"""The model: a UNet whose one encoder sees every month, with attention over the months at every level.

    images [B,T,C,H,W] -> encode -> L maps [B·T,D,h,w] -> pool over months -> L maps [B,D,h,w] -> decode -> [B,1,H,W]

It is the 1st-place solution's network (https://github.com/drivendataorg/the-biomassters, 1st-place), with the
state-dict names of its weights: `encoder.model.*` is timm's `features_only` backbone, `attn.N.*` the month attention
of level N, `decoder.*` the UNet decoder of segmentation-models-pytorch as of early 2023 with scSE
(Roy et al. 2018, arXiv:1803.02579), `segmentation_head.*` a bare 3×3 convolution.

Legend: B chips, T months, C bands, H, W pixels, L levels of the encoder, D channels of a level, h, w its pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.backbones import build_backbone, is_channels_last
from engine.errors import ConfigError, DataError

SCSE_REDUCTION = 16


class BiomassUNet(nn.Module):
    """Biomass of a chip (t/ha) from its monthly images.

    backbone: any timm model that offers `features_only`, with or without a pretrained tag.
    decoder_channels: one number per halving of the encoder, deepest first (five for a stride of 32).
    pretrained: False: random; True: the tag's weights from timm's hub; a path: a local file of timm weights for this
        backbone (3 input channels; timm spreads the stem's weights over `in_channels`).
    Raises ConfigError (unknown backbone, wrong number of decoder_channels), WeightsError (pretrained).
    """

    def __init__(self, backbone: str = "tf_efficientnetv2_l.in21k",
                 decoder_channels: Sequence[int] = (384, 368, 352, 336, 320),
                 in_channels: int = 15, pretrained: bool | str | Path = False):
        super().__init__()
        self.backbone, self.decoder_channels, self.in_channels = backbone, tuple(decoder_channels), in_channels
        self.encoder = Encoder(backbone, in_channels, pretrained)
        self.attn = nn.ModuleList(MonthAttention(channels) for channels in self.encoder.channels)
        self.decoder = Decoder(self.encoder.channels, self.encoder.strides, self.decoder_channels, backbone)
        self.segmentation_head = nn.Conv2d(self.decoder_channels[-1], 1, 3, padding=1)
        nn.init.xavier_uniform_(self.segmentation_head.weight)
        nn.init.zeros_(self.segmentation_head.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Biomass [B,1,H,W] in t/ha of normalised images [B,T,C,H,W].

        dropped [B,T] bool: months that do not take part (None: all do).  A chip whose months are all dropped gets
        the decoder's answer to nothing: finite, and independent of its images.
        """
        self._check(images, dropped)
        if dropped is None:
            dropped = torch.zeros(images.shape[:2], dtype=torch.bool, device=images.device)
        return self.decode(self.pool(self.encode(images.flatten(0, 1)), dropped))

    def encode(self, images: Tensor) -> list[Tensor]:
        """Features of single months: [N,C,H,W] -> L maps [N,D,h,w], finest first."""
        return self.encoder(images.contiguous(memory_format=torch.channels_last))

    def pool(self, features: list[Tensor], dropped: Tensor) -> list[Tensor]:
        """Months to one map per chip: L × [B·T,D,h,w], dropped [B,T] -> L × [B,D,h,w]."""
        return [attention(level, dropped) for attention, level in zip(self.attn, features)]

    def decode(self, pooled: list[Tensor]) -> Tensor:
        """L maps [B,D,h,w], finest first -> [B,1,H,W]."""
        return self.segmentation_head(self.decoder(pooled))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments that shape the model, for saving beside its weights."""
        return {"backbone": self.backbone, "decoder_channels": list(self.decoder_channels),
                "in_channels": self.in_channels}

    def _check(self, images: Tensor, dropped: Tensor | None) -> None:
        if images.ndim != 5 or images.shape[2] != self.in_channels:
            raise DataError(f"the model takes images [B,T,{self.in_channels},H,W], not {list(images.shape)}; "
                            "set model.in_channels to the number of bands")
        stride = self.encoder.strides[-1]
        if images.shape[3] % stride or images.shape[4] % stride:
            raise DataError(f"images of {images.shape[3]}×{images.shape[4]} pixels: {self.backbone} needs multiples of "
                            f"{stride}; pad or crop the images, or choose a backbone with a smaller stride")
        if dropped is not None and (dropped.shape != images.shape[:2] or dropped.dtype != torch.bool):
            raise DataError(f"dropped must be bool {list(images.shape[:2])}, "
                            f"not {dropped.dtype} {list(dropped.shape)}")


def parameter_counts(model: BiomassUNet) -> dict[str, int]:
    """Numbers of parameters: `encoder`, `attention`, `decoder` (with the head), `total`."""
    def count(*modules: nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    return {"encoder": count(model.encoder), "attention": count(model.attn),
            "decoder": count(model.decoder, model.segmentation_head), "total": count(model)}


class Encoder(nn.Module):
    """A timm backbone; of levels with one stride (as in a ViT) only the last is used.  NCHW in and out."""

    def __init__(self, backbone: str, in_channels: int, pretrained: bool | str | Path):
        super().__init__()
        self.model = build_backbone(backbone, in_channels, pretrained)
        info: Any = self.model.feature_info
        strides, channels = info.reduction(), info.channels()
        self.levels = [i for i, stride in enumerate(strides) if strides[i + 1:i + 2] != [stride]]
        self.strides = [strides[i] for i in self.levels]
        self.channels = [channels[i] for i in self.levels]
        self.channels_last = is_channels_last(self.model)
        if self.strides != sorted(set(self.strides)) or any(s & (s - 1) for s in self.strides):
            raise ConfigError(f"model.backbone {backbone!r} has levels at strides {strides}; a UNet needs rising "
                              "powers of two: choose another backbone")

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.model(images)
        chosen = [features[i] for i in self.levels]
        return [level.permute(0, 3, 1, 2) for level in chosen] if self.channels_last else chosen


class MonthAttention(nn.Module):
    """Per pixel a softmax over the months that are not dropped, and the weighted sum of their features."""

    def __init__(self, channels: int):
        super().__init__()
        self.attn = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels), nn.GELU(),
                                  nn.Linear(channels, 1))

    def forward(self, features: Tensor, dropped: Tensor) -> Tensor:
        """[B·T,D,h,w] and dropped [B,T] -> [B,D,h,w]; zero where all months of a chip are dropped."""
        months = features.permute(0, 2, 3, 1).unflatten(0, dropped.shape)  # [B,T,h,w,D]
        logits = self.attn(months)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        gone = dropped[:, :, None, None, None]
        # The lowest finite number, not -inf: where all months are dropped, -inf makes NaN, there and back.
        weights = logits.masked_fill(gone, torch.finfo(logits.dtype).min).softmax(1).masked_fill(gone, 0)
        return (weights * months).sum(1).to(features.dtype).permute(0, 3, 1, 2)


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
        self.conv1 = _convolution(in_channels + skip_channels, out_channels)
        self.attention1 = _scse(in_channels + skip_channels)
        self.conv2 = _convolution(out_channels, out_channels)
        self.attention2 = _scse(out_channels)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if skip is not None:
            x = self.attention1(torch.cat([x, skip], 1))
        return self.attention2(self.conv2(self.conv1(x)))


class ScSE(nn.Module):
    """Squeeze-and-excitation over channels (cSE) and over pixels (sSE), added."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(1, channels // SCSE_REDUCTION)
        self.cSE = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True),
                                 nn.Conv2d(hidden, channels, 1), nn.Sigmoid())
        self.sSE = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.cSE(x) + self.sSE(x))


def _scse(channels: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(attention=ScSE(channels)))


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
                         nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def _initialise(module: nn.Module) -> None:
    """The decoder's initial weights in segmentation-models-pytorch: He's, uniform; biases zero."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
