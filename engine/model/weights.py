"""Weights on disk: safetensors written and read, and the 1st-place solution's own files read without executing them.

A safetensors file made here says in its metadata, under `architecture`, which model it fits (JSON of
`BiomassUNet.config()`).  The winner's two kinds, `model_last.pth` (a dict with `state_dict` and `args`) and
`modelo_best.pth` (a whole pickled module), say it in their arguments, or it is told from the tensors.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.base.errors import ConfigError, WeightsError
from engine.base.texts import parse_json
from engine.model.backbones import TILE, guess_backbone, input_channels
from engine.model.tensors import read_metadata, read_tensors, write_tensors
from engine.model.unet import BiomassUNet

log = logging.getLogger(__name__)

ENCODER = "encoder.model."
LARGEST_TILE = 512  # pixels a side, of any data set
RUN_FILES = ("weights/best.safetensors", "weights/last.safetensors")  # of a run folder, in order of preference


def save_weights(path: str | Path, weights: nn.Module | Mapping[str, Tensor], architecture: Mapping[str, Any],
                 extra: Mapping[str, str] | None = None) -> None:
    """Write a model's (or state dict's) tensors, in their dtypes, as one safetensors file; atomic.

    The same weights and texts give the same bytes.
    architecture: `BiomassUNet.config()`; extra: further metadata, text to text.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    write_tensors(path, {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()},
                  {**(extra or {}), "architecture": json.dumps(dict(architecture))}, sealed=True)


def load_model(path: str | Path, device: torch.device | str = "cpu", backbone: str | None = None) -> BiomassUNet:
    """The model that the weights at `path` fit, filled with them; in training mode, as torch makes them.

    path, backbone and errors as in `read_weights`.
    """
    state, architecture = read_weights(path, backbone)
    try:
        model = BiomassUNet(**architecture)
    except ConfigError as error:
        raise WeightsError(f"{path}: its architecture cannot be built here: {error}") from error
    fill(model, state, path)
    return model.to(device)


def read_weights(path: str | Path, backbone: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state dict of `BiomassUNet` on the CPU, and the arguments that build its model.

    path: a run folder (its `weights/best.safetensors`, else `last`), a safetensors file, or either of the winner's
    kinds, told by content.  backbone: overrides what the file says, and is needed where no timm model fits.
    Raises WeightsError: a file that is missing, damaged or of another model.
    """
    file = weights_file(Path(path))
    state, about = read_tensors(file)
    if "segmentation_head.weight" not in state or not any(name.startswith(ENCODER) for name in state):
        raise WeightsError(f"{file}: not the weights of a BiomassUNet (first tensors: {', '.join(list(state)[:3])}); "
                           "for an encoder alone set model.pretrained to its path")
    return state, _architecture(file, state, about, backbone)


def read_notes(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file (or a run folder's); empty for the winner's kinds.  Raises WeightsError."""
    file = weights_file(Path(path))
    return read_metadata(file)


def identify(path: str | Path) -> dict[str, str]:
    """Which weights these are: `path`, and the `sha256` of their file.  Raises WeightsError where there is none."""
    file = weights_file(Path(path))
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({error.strerror}); give a run folder or a weights file") from None
    return {"path": str(path), "sha256": digest}


def fill(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load `state` into `model`; WeightsError lists the first tensors that do not fit and names `source`."""
    own = model.state_dict()
    wanted = {name: list(tensor.shape) for name, tensor in own.items()}
    problems = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": [f"{name} ({list(state[name].shape)} in the file, {shape} in the model)"
                             for name, shape in wanted.items() if name in state and list(state[name].shape) != shape],
        "of another kind": [f"{name} ({state[name].dtype} in the file, {tensor.dtype} in the model)"
                            for name, tensor in own.items() if name in state and (
                                state[name].is_floating_point() != tensor.is_floating_point()
                                or state[name].is_complex())],
    }
    said = [f"{len(names)} {what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for what, names in problems.items() if names]
    if said:
        raise WeightsError(f"{source} does not fit the model ({'; '.join(said)}); set model.backbone and "
                           "model.decoder_channels to those of the weights")
    model.load_state_dict(state)


def weights_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in RUN_FILES:
        if (path / name).is_file():
            return path / name
    raise WeightsError(f"{path}: a folder without {' or '.join(RUN_FILES)}; give a run folder that has saved weights, "
                       "or a weights file")


def _architecture(file: Path, state: Mapping[str, Tensor], about: Mapping[str, Any],
                  backbone: str | None) -> dict[str, Any]:
    if "architecture" in about:
        try:
            said = parse_json(about["architecture"])
            architecture = {key: said[key] for key in ("backbone", "decoder_channels", "in_channels")}
            architecture["tile"] = said.get("tile", TILE)  # older files do not say it
            _believable(file, state, architecture)
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{file}: its metadata 'architecture' is damaged ({error!r}); write it again with "
                               "engine.model.weights.save_weights") from error
        return {**architecture, "backbone": backbone or architecture["backbone"]}
    encoder = {name.removeprefix(ENCODER): tuple(tensor.shape) for name, tensor in state.items()
               if name.startswith(ENCODER)}
    backbone = backbone or _said_backbone(about)
    if backbone:
        try:
            in_channels = input_channels(backbone, encoder)
        except ConfigError as error:
            raise WeightsError(f"{file}: {error}; name it as this timm does: "
                               "predict.py --backbone NAME, or backbone= in code") from error
    else:
        log.info("%s does not name its backbone: comparing its tensors with timm's models", file)
        found = guess_backbone(encoder)
        if found is None:
            raise WeightsError(f"{file}: no model of this timm has the encoder's tensors; name it: "
                               "predict.py --backbone NAME, or backbone= in code")
        backbone, in_channels = found
        log.warning("%s does not name its backbone: taken to be %s, the first in timm with these tensors; models that "
                    "differ in padding or activation alone look the same: if it is another, give --backbone",
                    file, backbone)
    return {"backbone": backbone, "decoder_channels": _decoder_channels(file, state), "in_channels": in_channels,
            "tile": TILE}


def _believable(file: Path, state: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    """Raises ValueError where a file's words ask for another model than its tensors are of, however large."""
    stems = {tensor.shape[1] for name, tensor in state.items() if name.startswith(ENCODER) and tensor.ndim == 4}
    tile = said["tile"]
    if not isinstance(said["backbone"], str) or said["decoder_channels"] != _decoder_channels(file, state) \
            or said["in_channels"] not in stems or type(tile) is not int or not 0 < tile <= LARGEST_TILE:
        raise ValueError("it is not what the tensors are of")


def _said_backbone(about: Mapping[str, Any]) -> str | None:
    """From the winner's `args.backbone`, or the name "u-BACKBONE" of his module."""
    said = about.get("args", {}).get("backbone")
    if isinstance(said, str):
        return said
    name = about.get("name", "")
    return name.removeprefix("u-") if name.startswith("u-") else None


def _decoder_channels(file: Path, state: Mapping[str, Tensor]) -> list[int]:
    channels: list[int] = []
    while (name := f"decoder.blocks.{len(channels)}.conv2.0.weight") in state:
        channels.append(state[name].shape[0])
    if not channels:
        raise WeightsError(f"{file}: has no tensor {name}: not the weights of a BiomassUNet")
    return channels
