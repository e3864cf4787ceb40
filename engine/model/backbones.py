"""timm's backbones as feature encoders: built by name, filled from its hub or a file, told by their tensors.

Under `engine.model.unet`, which builds one, and `engine.model.weights`, which must guess one where a file does not name
it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from engine.base.errors import ConfigError, WeightsError
from engine.model.tensors import read_tensors

Shape = tuple[int, ...]

TIMM_IN_CHANNELS = 3  # of the weights that timm publishes
TILE = 256  # pixels a side that backbones of one image size are built for, where nothing else is said


def build_backbone(backbone: str, in_channels: int, pretrained: bool | str | Path = False,
                   tile: int = TILE) -> nn.Module:
    """timm's `features_only` model of that name; see `engine.model.unet.BiomassUNet` for `pretrained`.

    Models that fix their image size (as many transformers do) are built for `tile` pixels a side.
    Raises ConfigError (unknown name or tag, no features_only), WeightsError (weights not reached or not fitting).
    """
    config = _timm_config(backbone)
    options: dict[str, Any] = {"img_size": tile} if config.fixed_input_size else {}
    try:
        plain = timm.create_model(backbone, features_only=True, in_chans=in_channels, **options)
    except Exception as error:  # timm raises what it likes; the cause is kept
        raise ConfigError(f"model.backbone {backbone!r} gives no features for a UNet in timm "
                          f"{timm.__version__} ({error}); choose another, for instance "
                          "tf_efficientnetv2_s.in21k") from error
    if pretrained is False:
        return plain
    if pretrained is True:
        source, overlay = f"timm's weights of {backbone!r}", None
    else:
        source, overlay = str(pretrained), {"state_dict": _fitting_weights(Path(pretrained), plain, backbone)}
    try:
        with _of_tensors_alone():
            return timm.create_model(backbone, features_only=True, in_chans=in_channels, pretrained=True,
                                     pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # the hub's client, the network and timm each have errors of their own
        raise WeightsError(f"{source} could not be loaded ({type(error).__name__}: {error}); check the network, "
                           "or download the file elsewhere and give model.pretrained its path") from error


@contextmanager
def _of_tensors_alone() -> Iterator[None]:
    """The hub may have a pickle where it has no safetensors, which not every timm asks torch not to execute."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        del os.environ[key]
        if before is not None:
            os.environ[key] = before


def has_fixed_size(backbone: str) -> bool:
    """Whether it takes images of the one size alone that it was built for (many transformers)."""
    return bool(_timm_config(backbone).fixed_input_size)


def is_channels_last(backbone: nn.Module) -> bool:
    """Whether the features come as [N,h,w,D] (swin and its like)."""
    return str(getattr(getattr(backbone, "output_fmt", None), "value", "NCHW")) == "NHWC"


def _timm_config(backbone: str) -> Any:
    name = backbone.partition(".")[0]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise ConfigError(f"model.backbone {backbone!r} is not a model of timm {timm.__version__}"
                          + (f"; nearest: {', '.join(near)}" if near else ""))
    try:
        return timm.get_pretrained_cfg(backbone) or timm.models.PretrainedCfg()
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{name}.*")
        raise ConfigError(f"model.backbone {backbone!r}: timm {timm.__version__} has no such weights; "
                          f"it has: {', '.join(tags) or 'none'}") from error


def _fitting_weights(path: Path, plain: nn.Module, backbone: str) -> dict[str, Tensor]:
    """A local timm checkpoint, checked to hold the whole encoder: timm itself would skip tensors in silence."""
    tensors, _ = read_tensors(path)
    # features_only flattens names ("stages.0" -> "stages_0") and may put "model." before them
    shapes = {_flat(name): list(tensor.shape) for name, tensor in tensors.items()}
    wrong = []
    for name, tensor in plain.state_dict().items():
        found, wanted = shapes.get(_flat(name)), list(tensor.shape)
        stem = found and found[1:2] == [TIMM_IN_CHANNELS] and _but_input(found) == _but_input(wanted)
        if found != wanted and not stem:
            wrong.append(f"{name} is {found or 'missing'}, not {wanted}")
    if wrong:
        raise WeightsError(f"{path} does not hold the weights of {backbone!r}: {len(wrong)} tensors differ, first: "
                           f"{'; '.join(wrong[:3])}; give a file with timm.create_model(NAME, pretrained=True)"
                           ".state_dict()")
    return tensors


def _flat(name: str) -> str:
    return name.removeprefix("model.").replace(".", "_")


def guess_backbone(shapes: Mapping[str, Shape]) -> tuple[str, int] | None:
    """The first timm backbone whose encoder has exactly these tensors, and its number of input channels.

    shapes: of the encoder's state dict, by name.  Variants can share all shapes (`efficientnet_b0` and
    `tf_efficientnet_b0` differ in padding alone): TensorFlow's come first, as the winner used them.  Going
    through all of timm takes minutes.
    """
    for backbone in sorted(timm.list_models(), key=_likelihood):
        wanted = _encoder_shapes(backbone)
        if wanted.keys() == shapes.keys():
            channels = _stem_channels(shapes, wanted)
            differing = [name for name in wanted if wanted[name] != shapes[name]]
            if not differing or (len(differing) == 1 and channels != TIMM_IN_CHANNELS):
                return backbone, channels
    return None


def input_channels(backbone: str, shapes: Mapping[str, Shape]) -> int:
    """The number of input channels of an encoder with these tensors, read off its stem."""
    return _stem_channels(shapes, _encoder_shapes(backbone))


def _encoder_shapes(backbone: str) -> dict[str, Shape]:
    """Of the encoder with timm's own number of input channels; empty where it cannot be built without memory."""
    options: dict[str, Any] = {"img_size": TILE} if has_fixed_size(backbone) else {}
    try:
        with torch.device("meta"):
            model = timm.create_model(backbone, features_only=True, **options)
    except Exception:  # mostly: no features_only.  `build_backbone` says why if it is asked for
        return {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _stem_channels(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> int:
    """Where one convolution differs in its input channels alone, it is the stem."""
    for name, shape in wanted.items():
        found = shapes.get(name, ())
        if len(found) == len(shape) == 4 and found[1] != shape[1] and _but_input(found) == _but_input(shape):
            return found[1]
    return TIMM_IN_CHANNELS


def _but_input(shape: Sequence[int]) -> tuple[int, ...]:
    """A convolution's shape without its input channels."""
    return (*shape[:1], *shape[2:])


def _likelihood(backbone: str) -> tuple[int, str]:
    likely = ("tf_efficientnetv2", "tf_mobilenetv3", "tf_", "efficientnet", "mobilenet", "resnet", "convnext")
    return next((i for i, start in enumerate(likely) if backbone.startswith(start)), len(likely)), backbone
