"""A profiler window over training steps: a trace for Perfetto (TensorBoard no longer shows torch's traces), and a table
of the top operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from engine.base.distributed import rank
from engine.base.errors import ConfigError
from engine.base.files import write_text


def parse_window(text: str) -> range:
    """`steps=a:b` (b not included) as a range.  Raises ConfigError."""
    first, _, last = text.removeprefix("steps=").partition(":")
    try:
        window = range(int(first), int(last))
    except ValueError:
        window = range(0)
    if len(window) == 0 or window.start < 0:
        raise ConfigError(f"--profile {text}: write it as steps=a:b with 0 ≤ a < b, such as steps=10:15")
    return window


class Profile:
    """Profiles the steps of `window` on rank 0 and leaves `folder/profile/steps-a-b.{json.gz,txt}`."""

    def __init__(self, window: range | None, folder: Path):
        self._window = window if rank() == 0 else None
        self._folder = folder / "profile"
        self._profiler: profile | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around training step `step`."""
        if self._window is not None and step in self._window and self._profiler is None:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profiler.start()
        yield
        if self._profiler is not None and self._window is not None and step + 1 >= self._window.stop:
            self._finish(step)

    def _finish(self, last: int) -> None:
        assert self._profiler is not None and self._window is not None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self._window.start}-{last + 1}"
        self._profiler.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self._profiler.key_averages().table(sort_by=order, row_limit=30)
        write_text(self._folder / f"{name}.txt", table)
        print(f"profile of steps {self._window.start}:{last + 1} in {self._folder} (open the trace in "
              f"https://ui.perfetto.dev)", flush=True)
        self._window = self._profiler = None
