"""What a recipe would do, found out without training: works without a GPU and without the data."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
import yaml

from engine.base.distributed import rank, world
from engine.base.errors import DataError
from engine.config import Config
from engine.data.dataset import load_dataset
from engine.data.selection.chips import select_chips
from engine.model.unet import BiomassUNet, parameter_counts
from engine.training.cut import cut, explain, memory_need
from engine.training.deepspeed import deepspeed_config
from engine.training.losses import make_loss
from engine.training.optim import phase_rates


def describe(config: Config) -> str:
    """The resolved recipe, the DeepSpeed config, parameter and step counts.  Raises ConfigError as training would."""
    return "\n".join(_lines(config))


def _lines(config: Config) -> Iterator[str]:
    yield "# recipe"
    yield yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True).rstrip()
    data, problem = load_dataset(config.data.dataset), None
    try:
        train, validation = select_chips(config)
        data = train[0].dataset
    except DataError as error:
        problem = error
    yield "\n# data"
    yield (f"{data.name}: {', '.join(f'{s.name} ({len(s.bands)} bands)' for s in data.sensors)}, {data.months} steps, "
           f"{data.tile} × {data.tile} pixels; predicts {data.target.name}, {data.target.unit}")
    yield "\n# DeepSpeed"
    sharding = cut(config, data, world(), rank())
    yield json.dumps(deepspeed_config(config, sharding), indent=2)
    make_loss(config.loss.name, data.target, **config.loss.options)
    with torch.device("meta"):
        model = BiomassUNet(config.model.backbone, config.model.decoder_channels, data.channels, tile=data.tile)
    counts = parameter_counts(model)
    yield "\n# parameters"
    yield "\n".join(f"{name:10} {count / 1e6:8.2f} M" for name, count in counts.items())
    need = memory_need(config, data)
    yield (f"memory     {need.fixed / 2**30:.2f} GiB, and {need.chip / 2**30:.2f} GiB a chip of a micro-batch at most "
           f"(estimated)")
    yield "\n# steps"
    yield explain(sharding, config)
    if problem is not None:
        yield f"unknown, the data cannot be read: {problem}"
        return
    total = 0
    for phase in config.phases:
        chips = len(train) + (len(validation) if phase.train_on == "all" and not config.data.overfit else 0)
        steps = sharding.steps(chips)
        first, last = phase_rates(phase, config.optimizer)
        total += steps * phase.epochs
        yield (f"phase {phase.name}: {phase.epochs} epochs × {steps} steps on {chips} chips, lr {first:g} → {last:g}, "
               f"{phase.epochs * steps * sharding.global_batch:,} chips")
    yield f"in all {total:,} steps; {len(validation)} chips validate"
