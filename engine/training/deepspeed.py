"""The DeepSpeed config that a recipe means.  Without DeepSpeed itself, which looks for devices when it is imported."""

from __future__ import annotations

import copy
from typing import Any

from engine.base.errors import ConfigError
from engine.config import Config
from engine.data.plan import Sharding

# Keys of a `deepspeed:` block that the engine derives, and where to set them instead
_DERIVED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optimizer.clip",
    "torch_autocast": "train.precision",
    "bf16": "train.precision (the bf16 block would cast BatchNorm too)",
    "fp16": "train.precision",
    "communication_data_type": "train.reduce_dtype",
    "optimizer": "optimizer.*",
    "scheduler": "phases",
    "zero_allow_untested_optimizer": "nothing: it is always true here",
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.compute_grad_norm": "nothing: by the norm a step is known to be finite",
}

# Gradients travel beside the backward; DeepSpeed's own buckets are of 2 GB, more than all of them
_BUCKETS = {"overlap_comm": True, "reduce_bucket_size": 30_000_000}


def deepspeed_config(config: Config, sharding: Sharding) -> dict[str, Any]:
    """The DeepSpeed config that a recipe means, its global batch cut by `sharding`.

    Raises ConfigError where the recipe's `deepspeed:` block sets what the engine derives, or offloads to NVMe.
    """
    own = copy.deepcopy(config.deepspeed)
    zero = own.get("zero_optimization") or {}
    for key, instead in _DERIVED.items():
        section, _, name = key.rpartition(".")
        if name in (zero if section else own):
            raise ConfigError(f"deepspeed.{key}: the engine sets this; use {instead}")
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device") == "nvme":
            raise ConfigError(f"deepspeed.zero_optimization.{key}.device: checkpoints do not hold what lies on an NVMe "
                              f"(nvme); use cpu")
    own.setdefault("zero_force_ds_cpu_optimizer", False)  # offloaded, the update is torch's fused AdamW too
    train = config.train
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": sharding.micro_batch,
        "gradient_accumulation_steps": sharding.accumulate,
        "train_batch_size": sharding.global_batch,
        # Stage 0 throws its norm away, so there the trainer clips itself
        "gradient_clipping": config.optimizer.clip if train.zero_stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {**(_BUCKETS if train.zero_stage in (1, 2) else {}), **zero, "stage": train.zero_stage},
    }
    if train.reduce_dtype != "fp32":
        derived["communication_data_type"] = train.reduce_dtype
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
