"""The model: a UNet whose one encoder sees every month, with attention over the months at every level.

    images [B,T,C,H,W] -> encode -> L maps [B·T,D,h,w] -> pool over months -> L maps [B,D,h,w] -> decode -> [B,1,H,W]

It is the 1st-place solution's network (https://github.com/drivendataorg/the-biomassters, 1st-place), with the
state-dict names of its weights: `encoder.model.*` is timm's `features_only` backbone, `attn.N.*` the month attention
of level N, `decoder.*` the UNet decoder of segmentation-models-pytorch as of early 2023 with scSE
(Roy et al. 2018, arXiv:1803.02579), `segmentation_head.*` a bare 3×3 convolution.

Legend: B chips, T months, C bands, H, W pixels, L levels of the encoder, D channels of a level, h, w its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.base.errors import ConfigError, DataError
from engine.model.activations import activations_again, keep_one_array
from engine.model.backbones import TILE, build_backbone, is_channels_last
from engine.model.decoder import Decoder
from kernels.month_attention import month_attention


class BiomassUNet(nn.Module):
    """A map of a chip (biomass in t/ha, say) from its monthly images.

    backbone: any timm model that offers `features_only`, with or without a pretrained tag.
    decoder_channels: one number per halving of the encoder, deepest first (five for a stride of 32).
    pretrained: False: random; True: the tag's weights from timm's hub; a path: a local file of timm weights for this
        backbone (3 input channels; timm spreads the stem's weights over `in_channels`).
    tile: pixels a side of the images, which backbones of one image size (many transformers) are built for; the others
        take any multiple of their stride.
    skip_dropped_months: the encoder sees kept months only.  In eval mode nothing changes but the work; in training,
        BatchNorm then sees real images only.  False: the winner's way, whose encoder sees dropped months as zeros.
    keep_less: in eager training, activations that are cheap to compute again are not kept: see
        `engine.model.activations`.
    Raises ConfigError (unknown backbone, wrong number of decoder_channels), WeightsError (pretrained).
    """

    skip_dropped_months = True
    keep_less = True

    def __init__(self, backbone: str = "tf_efficientnetv2_l.in21k",
                 decoder_channels: Sequence[int] = (384, 368, 352, 336, 320),
                 in_channels: int = 15, pretrained: bool | str | Path = False, tile: int = TILE):
        super().__init__()
        self.backbone, self.decoder_channels = backbone, tuple(decoder_channels)
        self.in_channels, self.tile = in_channels, tile
        self.encoder = Encoder(backbone, in_channels, pretrained, tile)
        self.attn = nn.ModuleList(MonthAttention(channels) for channels in self.encoder.channels)
        self.decoder = Decoder(self.encoder.channels, self.encoder.strides, self.decoder_channels, backbone)
        self.segmentation_head = nn.Conv2d(self.decoder_channels[-1], 1, 3, padding=1)
        for block in self.decoder.blocks:
            if not block.has_skip:  # held for the sake of the weights' names, used by nothing
                block.attention1.requires_grad_(False)
        nn.init.xavier_uniform_(self.segmentation_head.weight)
        nn.init.zeros_(self.segmentation_head.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Maps [B,1,H,W] in the target's unit of normalised images [B,T,C,H,W].

        dropped [B,T] bool: months that do not take part (None: all do), best on the host: there it tells how many
        months are kept without waiting for the device.  A chip whose months are all dropped gets the decoder's
        answer to nothing: finite, and independent of its images.
        """
        if self.skip_dropped_months:
            return self.predict(*self.kept(images, dropped))
        self._check(images, dropped)
        index, segments = kept_months(dropped, images)
        features = self.encode(images.flatten(0, 1))
        if index is not None:
            features = [take(level, index) for level in features]
        return self.decode(self.pool(features, segments))

    def kept(self, images: Tensor, dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `predict` takes: the months [N,C,H,W] that take part, and segments int32 [B+1]."""
        self._check(images, dropped)
        index, segments = kept_months(dropped, images)
        months = images.flatten(0, 1)
        return months if index is None else take(months, index), segments

    def predict(self, months: Tensor, segments: Tensor) -> Tensor:
        """Months [N,C,H,W] -> [B,1,H,W]; chip b has months segments[b]:segments[b+1].  Never waits for the device."""
        return self.decode(self.pool(self.encode(months), segments))

    def encode(self, images: Tensor) -> list[Tensor]:
        """Features of single months: [N,C,H,W] -> L maps [N,D,h,w], finest first."""
        with self._kept():
            return self.encoder(images.contiguous(memory_format=torch.channels_last))

    def pool(self, features: list[Tensor], segments: Tensor) -> list[Tensor]:
        """Months to one map per chip: L × [N,D,h,w] -> L × [B,D,h,w]; chip b has months segments[b]:segments[b+1]."""
        return [attention(level, segments) for attention, level in zip(self.attn, features)]

    def decode(self, pooled: list[Tensor]) -> Tensor:
        """L maps [B,D,h,w], finest first -> [B,1,H,W]."""
        with self._kept():
            x = self.decoder(pooled)
            # bfloat16 has 8 bits: above 128 t/ha its steps are 1 to 2 t/ha
            with _without_autocast(x.device.type):
                return self.segmentation_head(x.to(self.segmentation_head.weight.dtype))

    def _kept(self) -> AbstractContextManager[None]:
        # Not while it is traced as a whole: autograd's hooks would be traced with it
        again = self.keep_less and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return activations_again() if again else nullcontext()

    @property
    def upsample_conv(self) -> bool:
        """Whether the decoder convolves before it upsamples, where it can: the same map with less work."""
        return self.decoder.upsample_conv

    @upsample_conv.setter
    def upsample_conv(self, fused: bool) -> None:
        self.decoder.upsample_conv = fused

    def config(self) -> dict[str, Any]:
        """The constructor's arguments that shape the model, for saving beside its weights."""
        return {"backbone": self.backbone, "decoder_channels": list(self.decoder_channels),
                "in_channels": self.in_channels, "tile": self.tile}

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


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    known = torch.amp.is_autocast_available(device)  # not on the meta device, where operations are counted
    return torch.autocast(device, enabled=False) if known else nullcontext()


def parameter_counts(model: BiomassUNet) -> dict[str, int]:
    """Numbers of parameters: `encoder`, `attention`, `decoder` (with the head), `total`."""
    def count(*modules: nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    return {"encoder": count(model.encoder), "attention": count(model.attn),
            "decoder": count(model.decoder, model.segmentation_head), "total": count(model)}


class Encoder(nn.Module):
    """A timm backbone; of levels with one stride (as in a ViT) only the last is used.  NCHW in and out."""

    def __init__(self, backbone: str, in_channels: int, pretrained: bool | str | Path, tile: int):
        super().__init__()
        self.model = build_backbone(backbone, in_channels, pretrained, tile)
        for module in self.model.modules():
            if isinstance(module, nn.SiLU):  # in place, autograd first copies its input: slower, and no memory saved
                module.inplace = False
        keep_one_array(self.model)
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
    """Per pixel a softmax over a chip's months, and the weighted sum of their features: `kernels.month_attention`.

    `implementation`: "auto", or one of `kernels.month_attention.IMPLEMENTATIONS` by name.
    """

    implementation = "auto"

    def __init__(self, channels: int):
        super().__init__()
        self.attn = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels), nn.GELU(),
                                  nn.Linear(channels, 1))

    def forward(self, features: Tensor, segments: Tensor) -> Tensor:
        """[N,D,h,w] and segments int32 [B+1] -> [B,D,h,w]; zero where a chip has no months."""
        linear, norm, _, score = cast(Any, self.attn)
        return month_attention(features, segments, linear.weight, linear.bias, norm.weight, norm.bias, score.weight,
                               score.bias, eps=norm.eps, implementation=self.implementation)


def kept_months(dropped: Tensor | None, images: Tensor) -> tuple[Tensor | None, Tensor]:
    """Where the months that take part lie among the B·T: index int64 [N] (None: all of them), and how they belong to
    chips: segments int32 [B+1], both on the device of images [B,T,…].

    With `dropped` on the host nothing waits for the device; on the device, counting the months does.
    """
    chips, months = images.shape[:2]
    if dropped is None:
        return None, torch.arange(0, (chips + 1) * months, months, dtype=torch.int32, device=images.device)
    kept = ~dropped
    segments = F.pad(kept.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    index = kept.flatten().nonzero()[:, 0]
    if len(index) == 0:  # an encoder wants at least one image; no segment holds it
        index = index.new_zeros(1)
    if len(index) == chips * months:
        return None, _put(segments, images.device)
    return _put(index, images.device), _put(segments, images.device)


def _put(small: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and small.device.type == "cpu":
        small = small.pin_memory()  # or the copy would wait for the device
    return small.to(device, non_blocking=True)


def take(maps: Tensor, index: Tensor) -> Tensor:
    """Rows `index` of [N,D,h,w], channels_last in memory."""
    return maps.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
