"""The model that a phase starts from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from engine.base.errors import ConfigError
from engine.config import Config
from engine.data.dataset import Dataset, described, differences
from engine.model.unet import BiomassUNet
from engine.model.weights import load_model, read_notes
from kernels.month_attention import resolve


def starting_model(config: Config, data: Dataset, phase: int, device: torch.device,
                   say: Callable[[str], None]) -> BiomassUNet:
    """The model of phase number `phase`, on the CPU: with the weights of the phase before, the recipe's, or fresh ones.

    device: where it will train, which decides by what its months are pooled; `say` is told.
    data: what it will be trained on.  Raises ConfigError (weights of another architecture or for other images, no such
    attention here), WeightsError.
    """
    torch.manual_seed(config.run.seed)
    start: str | Path | None = config.model.weights
    if phase > 0:
        start = (config.run_folder / "weights"
                 / f"{config.phases[phase - 1].name}-{config.phases[phase].start_from}.safetensors")
    if start is not None:
        model = load_model(start)
        _same_architecture(model, config, start)
        other = differences(described(read_notes(start), str(start)), data)
        if other:
            raise ConfigError(f"{start} was trained on other images than {config.data.path} holds: "
                              f"{'; '.join(other[:3])}; train from other weights")
    else:
        model = BiomassUNet(config.model.backbone, config.model.decoder_channels, data.channels,
                            pretrained=config.model.pretrained, tile=data.tile)
        assert model.segmentation_head.bias is not None
        torch.nn.init.constant_(model.segmentation_head.bias, config.model.initial_prediction)
    say(f"month attention: {for_training(model, config, device)}")
    return model


def for_training(model: BiomassUNet, config: Config, device: torch.device) -> str:
    """Have a model train as a recipe says.  Returns the month attention that it takes."""
    model.skip_dropped_months = config.model.skip_dropped_months
    try:
        implementation = resolve(config.model.attention, device)
    except RuntimeError as error:
        raise ConfigError(f"model.attention: {error}") from None
    for level in model.attn:
        level.implementation = implementation
    return implementation


def _same_architecture(model: BiomassUNet, config: Config, path: Path | str) -> None:
    found, wanted = model.config(), config.model
    for key in ("backbone", "decoder_channels"):
        want = getattr(wanted, key)
        if list(np.atleast_1d(found[key])) != list(np.atleast_1d(want)):
            raise ConfigError(f"{path} holds a model with {key} {found[key]}, the recipe says {want}; "
                              f"set model.{key} to the weights', or train from others")
