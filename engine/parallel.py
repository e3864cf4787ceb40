"""Processes and devices: joining the others, agreeing with them, and the DeepSpeed config of a recipe."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from engine.config import Config
from engine.errors import ConfigError, DeviceError

# Keys of a `deepspeed:` block that the engine derives, and where to set them instead
_DERIVED = {
    "train_batch_size": "train.micro_batch and train.accumulate",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_clipping": "optimizer.clip",
    "torch_autocast": "train.precision",
    "bf16": "train.precision (the bf16 block would cast BatchNorm too)",
    "fp16": "train.precision",
    "optimizer": "optimizer.*",
    "scheduler": "phases",
    "zero_allow_untested_optimizer": "nothing: it is always true here",
    "zero_optimization.stage": "train.zero_stage",
}


def resolve_device(wanted: str) -> torch.device:
    """The device of this rank for "auto", "cpu" or "gpu".  Raises DeviceError where "gpu" is not to be had."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "gpu" and not gpus:
        raise DeviceError("train.device gpu: this machine has no CUDA device that torch can use; "
                          "set train.device: cpu (or auto), or install the driver")
    if wanted == "cpu" or not gpus:
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if rank >= gpus:
        raise DeviceError(f"local rank {rank} has no GPU: this machine has {gpus}; launch with --num_gpus {gpus}")
    return torch.device("cuda", rank)


def join(device: torch.device) -> None:
    """Join the process group that the launcher describes; alone where there is no launcher."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce first, 40 s and a compiler that may not be there
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(device)
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(_free_port())}.items():
        os.environ.setdefault(key, value)
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def barrier() -> None:
    if dist.is_initialized() and world() > 1:
        dist.barrier()


def average_(tensor: torch.Tensor) -> torch.Tensor:
    """Mean over ranks, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
        tensor /= world()
    return tensor


class StopFlag:
    """Whether any rank was asked to stop.  Agreed on the host, so that no step waits for the device."""

    def __init__(self) -> None:
        self.asked = False
        self._group: Any = dist.new_group(backend="gloo") if world() > 1 else None

    def agreed(self) -> bool:
        if self._group is None:
            return self.asked
        flag = torch.tensor([int(self.asked)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())


@torch.no_grad()
def synchronise_batchnorm(model: nn.Module) -> None:
    """Set BatchNorm's running statistics to their mean over ranks.

    The statistics are a moving average, linear in those of each batch, so the mean over ranks is the average that
    one process would have kept over all ranks' batches of each step.
    """
    if world() == 1:
        return
    buffers = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    flat = average_(torch.cat([b.flatten() for b in buffers]))
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers])):
        buffer.copy_(mean.view_as(buffer))


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config that a recipe means.

    Raises ConfigError where the recipe's `deepspeed:` block sets what the engine derives.
    """
    own = copy.deepcopy(config.deepspeed)
    zero = own.get("zero_optimization") or {}
    for key, instead in _DERIVED.items():
        if key in own or (key == "zero_optimization.stage" and "stage" in zero):
            raise ConfigError(f"deepspeed.{key}: the engine sets this; use {instead}")
    train = config.train
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.accumulate,
        "train_batch_size": train.micro_batch * train.accumulate * world_size,
        # Stage 0 throws its norm away, so there the trainer clips itself
        "gradient_clipping": config.optimizer.clip if train.zero_stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {**zero, "stage": train.zero_stage},
    }
    own.setdefault("steps_per_print", 10**9)
    own.setdefault("timers", {"throughput": {"enabled": False}})  # it waits for the device twice a step
    if train.precision != "fp32":
        derived["torch_autocast"] = {
            "enabled": True,
            "dtype": {"bf16": "bfloat16", "fp16": "float16"}[train.precision],
            # Gradients travel in float32, as at stage 0
            "lower_precision_safe_modules": [],
        }
    return {**own, **derived}
