"""The model in DeepSpeed's hands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch

from engine.base.distributed import world
from engine.config import Config
from engine.data.plan import Sharding
from engine.model.compilation import checkpoint_regions, compile_regions
from engine.model.unet import BiomassUNet
from engine.training.deepspeed import deepspeed_config
from engine.training.deterministic import set_deterministic
from engine.training.optim import make_optimizer
from engine.training.update.batchnorm import keep_horizon
from engine.training.update.loss_scale import take_over
from engine.training.update.reduction import Reducer


def make_engine(model: BiomassUNet, config: Config, sharding: Sharding, device: torch.device,
                say: Callable[[str], None]) -> tuple[Any, Reducer | None]:
    """DeepSpeed's engine around `model`, on `device`, and what adds up gradients at ZeRO stage 0 on several ranks."""
    model.to(device)
    train = config.train
    set_deterministic(train.deterministic)
    if train.compile is True or (train.compile == "auto" and device.type == "cuda"):
        say(f"train.compile: {compile_regions(model, train.zero_stage)}")
    if train.checkpoint_activations:
        say(f"train.checkpoint_activations: {checkpoint_regions(model)}")
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model, config.optimizer),
                                      config=deepspeed_config(config, sharding), dist_init_required=False)
    if train.precision == "fp16":
        take_over(engine)
    keep_horizon(model, world())
    reducer = None
    if train.zero_stage == 0:
        # DeepSpeed would flatten, reduce and copy back every gradient, after the backward and even for one rank
        engine.enable_backward_allreduce = False
        if world() > 1:
            reducer = Reducer(model, torch.bfloat16 if train.reduce_dtype == "bf16" else torch.float32)
    return engine, reducer
