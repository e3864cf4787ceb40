"""How a recipe's global batch is cut into micro-batches, over ranks and one after the other, so that it fits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from engine.base.errors import ConfigError
from engine.config import Config
from engine.data.dataset import Dataset
from engine.data.plan import Sharding
from engine.model.unet import BiomassUNet

FILL = 0.85  # of a device's memory: the rest is for batches made ahead, workspaces and fragments
PARAMETER_BYTES = 16  # weight, gradient and AdamW's two moments, float32
EMA_BYTES = 4


class Need(NamedTuple):
    """Bytes that training takes: whatever the batch, and a chip of a micro-batch, which keeps all months."""

    fixed: int
    chip: int

    def of(self, chips: int) -> int:
        return self.fixed + chips * self.chip


def memory_need(config: Config, data: Dataset) -> Need:
    """What autograd keeps of a forward pass, counted on the meta device, and the parameters with all that AdamW has.

    An estimate from above: compiled blocks and those that are computed again keep less.
    """
    with torch.device("meta"):
        model = BiomassUNet(config.model.backbone, config.model.decoder_channels, data.channels,
                            tile=data.tile).train()
    model.keep_less = False
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        levels = model.encode(torch.empty(data.months, data.channels, data.tile, data.tile, device="meta"))
        model.decode([level[:1] for level in levels])
    chip = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    each = PARAMETER_BYTES + (EMA_BYTES if config.train.ema is not None else 0)
    return Need(each * sum(p.numel() for p in model.parameters()),
                chip if config.train.precision == "fp32" else chip // 2)


def device_memory(device: torch.device, local_world: int) -> int:
    """Bytes for one rank: of its GPU, or its share of the host's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return int(psutil.virtual_memory().total) // local_world


def cut(config: Config, data: Dataset, world: int, rank: int = 0, memory: int | None = None) -> Sharding:
    """The recipe's global batch over `world` ranks of `memory` bytes each (None: as much as it takes).

    Raises ConfigError where it cannot be cut evenly, or one chip does not fit.
    """
    batch, micro = config.train.global_batch, config.train.micro_batch
    if batch % world:
        even = [n for n in range(1, batch + 1) if batch % n == 0]
        raise ConfigError(f"train.global_batch: {batch} chips cannot be cut evenly over {world} ranks; start "
                          f"{' or '.join(map(str, even))} ranks, or change it (which changes the training)")
    share = batch // world
    if micro == "auto":
        if memory is None:
            return Sharding(share, 1, world, rank)
        need = memory_need(config, data)
        fits = int((FILL * memory - need.fixed) // need.chip)
        if fits < 1:
            raise ConfigError(f"train.micro_batch: one chip needs {need.of(1) / 2**30:.1f} GiB (estimated) of a rank's "
                              f"{FILL * memory / 2**30:.1f}; choose a smaller model.backbone, or try "
                              f"train.micro_batch: 1 with train.checkpoint_activations: true")
        fitting = max(n for n in range(1, share + 1) if share % n == 0 and n <= fits)
        return Sharding(fitting, share // fitting, world, rank)
    if share % micro:
        raise ConfigError(f"train.micro_batch: each of {world} ranks has {share} of the {batch} chips of "
                          f"train.global_batch, which is no multiple of {micro}; give a divisor of {share}, or auto")
    return Sharding(micro, share // micro, world, rank)


def explain(sharding: Sharding, config: Config) -> str:
    """What the cut is, and what it means for BatchNorm."""
    s = sharding
    text = (f"a step: {s.global_batch} chips = micro-batches of {s.micro_batch} × {s.accumulate} accumulated × "
            f"{s.world} {'rank' if s.world == 1 else 'ranks'}")
    if config.train.micro_batch == "auto" and s.micro_batch != s.global_batch:
        text += (f"\nBatchNorm sees {s.micro_batch} chips at a time, where one rank with memory for all would see "
                 f"{s.global_batch}: losses will differ a little from such a run; train.micro_batch: {s.micro_batch} "
                 f"gives the same losses on any number of ranks")
    return text
