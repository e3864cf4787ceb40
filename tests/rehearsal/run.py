"""A command of launch/ on a machine with a GPU, as far as it can tell:  python -m tests.rehearsal.run REPORT train …

Leaves in REPORT (JSON) where the host waited for the device in each training step, and what was asked of the process
group, of DeepSpeed's engine and of the profiler.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

from tests.rehearsal.dali import dali
from tests.rehearsal.device import Device


@contextmanager
def profiler(asked: list[list[str]]) -> Iterator[None]:
    """torch's own, without CUDA's activities, for which CUPTI would look for a driver; `asked` is told of them."""
    from torch.profiler import profile as real

    def profile(activities: list[ProfilerActivity], **options: Any) -> Any:
        asked.append([activity.name for activity in activities])
        return real(activities=[ProfilerActivity.CPU], **options)

    with mock.patch("engine.run.profile.profile", profile):
        yield


def main() -> None:
    path, name = Path(sys.argv[1]), sys.argv[2]
    sys.argv = [f"launch/{name}.py", *sys.argv[3:]]
    command = importlib.import_module(f"launch.{name}")
    report: dict[str, Any] = {"steps": [], "profiled": []}
    real = dist.init_process_group

    def group(backend: str, **options: Any) -> None:
        report["backend"], report["device_id"] = backend, str(options.pop("device_id"))
        real("gloo", **options)  # NCCL wants a driver

    with Device() as device, dali(), mock.patch.object(dist, "init_process_group", group):
        from deepspeed.accelerator import get_accelerator

        from engine.model.unet import MonthAttention
        from engine.training.update.step import Step

        take = Step.take

        def watched(self: Step, *args: Any) -> Any:
            before = len(device.waits)
            result = take(self, *args)
            report["steps"].append(device.waits[before:])
            report["allreduce"] = self.engine.enable_backward_allreduce
            report["devices"] = sorted({str(value.device) for value in self.engine.module.state_dict().values()})
            report["benchmark"] = torch.backends.cudnn.benchmark
            return result

        try:
            with mock.patch.object(Step, "take", watched), profiler(report["profiled"]), \
                    mock.patch.object(MonthAttention, "implementation", "reference"):  # Triton wants a driver, too
                command.run(command.arguments().parse_args())
        finally:
            report["accelerator"] = type(get_accelerator()).__name__
            report["calls"] = device.calls
            path.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
