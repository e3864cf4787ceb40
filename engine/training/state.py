"""Model and optimizer by parameter name, whole: out of DeepSpeed's hands and back, at every ZeRO stage.

Stages 1 to 3 spread the optimizer's state over ranks in flat partitions, stage 3 the parameters too.  They are put
together parameter by parameter with DeepSpeed's own calls (`safe_get_full_optimizer_state`, which knows of offloading
and padding): numbers are moved, never computed with, so what is saved at one stage is exact at another.  It takes two
messages a parameter, and no device holds more than one of them whole.  Back, each rank reads the whole file and takes
its part: no message at all.  (`safe_set_full_optimizer_state` fails at stage 3 for a parameter that does
not divide by the ranks, so there the part is cut here.)  Under `torch_autocast` parameters are float32 at all stages,
and the same as the optimizer's own copies of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from engine.base.distributed import rank

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, float32, each of its parameter's shape; beside them `step`, a number

Read = Callable[[str], Tensor]  # a tensor by its name


def full_state(engine: Any) -> dict[str, Tensor]:
    """The model's state dict on rank 0's host, float32, whole at every ZeRO stage; empty on other ranks."""
    module = engine.module
    with deepspeed.zero.GatheredParameters(list(module.parameters()),
                                           enabled=engine.zero_optimization_stage() == 3):
        return _on_host(module.state_dict().items())


def optimizer_state(engine: Any) -> dict[str, Tensor]:
    """`NAME.exp_avg`, `NAME.exp_avg_sq` and `NAME.step` of each parameter that was updated, on rank 0's host."""
    return _on_host(_optimizer_tensors(engine))


def shapes(engine: Any) -> dict[str, torch.Size]:
    """What `full_state` would hold."""
    return {name: getattr(value, "ds_shape", value.shape)
            for name, value in engine.module.state_dict(keep_vars=True).items()}


def load_model(engine: Any, read: Read) -> None:
    """The opposite of `full_state`, on all ranks."""
    parted = engine.zero_optimization_stage() == 3
    for name, value in engine.module.state_dict(keep_vars=True).items():
        whole = parted and isinstance(value, nn.Parameter)
        with deepspeed.zero.GatheredParameters([value], modifier_rank=0, enabled=whole):
            if not whole or rank() == 0:
                value.data.copy_(read(name))
    if engine.zero_optimization_stage():
        engine.optimizer.refresh_fp32_params()


def load_optimizer(engine: Any, names: Collection[str], read: Read) -> None:
    """The opposite of `optimizer_state`, on all ranks.  names: what can be read; a parameter that was never updated
    has no state."""
    updated = [(name, p) for name, p in engine.module.named_parameters() if f"{name}.step" in names]
    if not updated:
        return
    stage = engine.zero_optimization_stage()
    if stage == 0:
        for name, p in updated:
            engine.optimizer.state[p] = {"step": read(f"{name}.step").to(p.device),
                                         **{key: torch.empty_like(p.detach()).copy_(read(f"{name}.{key}"))
                                            for key in MOMENTS}}
        return
    zero = engine.optimizer
    step = max((read(f"{name}.step") for name, _ in updated), key=float)
    for flat in zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups:
        zero.optimizer.state[flat] = {"step": step.to(flat.device, copy=True),
                                      **{key: torch.zeros_like(flat.detach()) for key in MOMENTS}}
    _link(engine)
    for name, p in updated:
        for key in MOMENTS:
            value = read(f"{name}.{key}")
            if stage == 3:
                safe_set_local_optimizer_state(p, _own_part(p, value), key)
            else:
                safe_set_full_optimizer_state(p, value, key)


def _optimizer_tensors(engine: Any) -> Iterator[tuple[str, Tensor]]:
    if engine.zero_optimization_stage() == 0:
        for name, p in engine.module.named_parameters():
            for key, value in engine.optimizer.state.get(p, {}).items():
                yield f"{name}.{key}", value
        return
    _link(engine)
    for step in [state["step"] for state in engine.optimizer.optimizer.state.values()][:1]:  # one for all
        for name, p in engine.module.named_parameters():
            if p.requires_grad:
                for key in MOMENTS:
                    yield f"{name}.{key}", safe_get_full_optimizer_state(p, key)
                yield f"{name}.step", step


def _link(engine: Any) -> None:
    """Stages 1 and 2 link parameters to their state after the first group's first update, when the others' state is not
    there yet, and never again."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() < 3 and zero.optimizer.state:
        for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups):
            lazy_init_hp_params_optimizer_state(parameters, flat, zero.optimizer.state)


def _own_part(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of a `value` of a parameter's shape, as stage 3 cuts it: into equal ones, with zeros at the end.
    """
    size = parameter.ds_tensor.numel()
    part = torch.zeros(size, dtype=value.dtype)
    own = value.flatten()[rank() * size:(rank() + 1) * size]
    part[:own.numel()] = own
    return part


def _on_host(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies on rank 0, made when this returns: the next update may change what they are of.

    Of a GPU's tensors into page-locked memory, which torch keeps for the next time, and all before the one wait.
    """
    copies = {}
    for name, value in tensors:  # on all ranks: they are put together as they come
        if rank() == 0:
            # Strides too: another layout would take a copy of its own, and a wait for each
            copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, pin_memory=value.is_cuda)
            copies[name] = copy.copy_(value.detach(), non_blocking=True)
    if any(copy.is_pinned() for copy in copies.values()):
        torch.cuda.current_stream().synchronize()
    return copies
