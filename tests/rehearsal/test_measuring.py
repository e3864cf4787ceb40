"""What measures on a GPU, rehearsed (see `tests.rehearsal.device`): memory, profiles, and the benchmarks' harness."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from engine.run.profile import Profile
from engine.training.state import _on_host
from engine.training.window import _peak_memory
from tests.conftest import ROOT
from tests.rehearsal.device import Device
from tests.rehearsal.run import profiler
from tests.rehearsal.state import CUDA, PEAK

sys.path.insert(0, str(ROOT / "benchmarks"))  # benchmarks are scripts

import harness


def test_memory_is_the_devices() -> None:
    with Device():
        assert _peak_memory() == PEAK


def test_a_profile_asks_for_cudas_activities(tmp_path: Path) -> None:
    asked: list[list[str]] = []
    with Device() as device, profiler(asked):
        ours = Profile(range(1, 3), tmp_path)
        for step in range(4):
            with ours.step(step):
                torch.ones(3, device="cuda") * 2
        assert asked == [["CPU", "CUDA"]]
        assert [wait.partition(" (")[0] for wait in device.waits] == ["synchronize"]
    assert "aten::mul" in (tmp_path / "profile" / "steps-1-3.txt").read_text()
    assert (tmp_path / "profile" / "steps-1-3.json.gz").stat().st_size > 0


def test_a_checkpoint_is_of_what_was_before_the_next_update() -> None:
    """And the host waits once for all its tensors."""
    with Device(late=True) as device:
        weights = {str(n): torch.full((2, 3, 4, 4), float(n)).to(memory_format=torch.channels_last).to("cuda")
                   for n in range(3)}
        device.waits.clear()
        copies = _on_host(weights.items())
        for weight in weights.values():
            weight.add_(1)
        assert [wait.partition(" (")[0] for wait in device.waits] == ["a stream's synchronize"]
        device.finish()
        assert all(copy.is_pinned() and (copy == int(n)).all() for n, copy in copies.items()) and len(copies) == 3


# The harness --------------------------------------------------------------------------------------------------------


def measured(tmp_path: Path, **options: bool) -> tuple[Device, harness.Timing, list[str]]:
    """One variant of two calls, a warm-up and a repeat, on a device that runs late.  Its timing, and what was asked."""
    with Device(late=True) as device:
        one, done = torch.ones(1, device="cuda"), []

        def run(i: int) -> dict[str, float]:
            device.calls.append(f"run {i}")
            done.append(one + i)
            return {"repeat": i}

        with mock.patch.object(harness.time, "perf_counter", lambda: float(len(device.calls))):
            [timing] = harness.measure([harness.Variant("a", run, calls=2, resident=7)], device=CUDA, n=1, **options)
        calls = list(device.calls)
        assert torch.cat(done).tolist() == [1, 2, 2], timing
    return device, timing, calls


def test_a_devices_time_is_taken_by_events_around_the_calls(tmp_path: Path) -> None:
    """An event's time is asked for when it has passed, or the stand-in complains; a call is half of it."""
    device, timing, calls = measured(tmp_path)
    assert calls == ["run 0", "time", "run 1", "run 1", "time"] and timing.seconds == [0.0005]
    assert timing.error is None and timing.extra == {"repeat": [1.0]} and timing.peak == PEAK - PEAK // 2 + 7
    kinds = [wait.partition(" (")[0] for wait in device.waits]
    assert kinds[:4] == ["synchronize"] * 3 + ["an event's synchronize"]  # before and after what was not timed


def test_a_device_is_kept_busy_while_the_host_enqueues(tmp_path: Path) -> None:
    """For half as long again as the warm-up's host took for as many calls, and never longer than 0.2 s."""
    _, timing, calls = measured(tmp_path, device_only=True)
    assert calls == ["run 0", "sleep 400000000", "time", "run 1", "run 1", "time"] and timing.error is None


def test_the_hosts_clock_stops_when_the_device_is_done(tmp_path: Path) -> None:
    device, timing, calls = measured(tmp_path, wall=True)
    assert calls == ["run 0", "run 1", "run 1"] and timing.seconds == [1.0]  # two calls in two ticks
    assert [wait.partition(" (")[0] for wait in device.waits][:4] == ["synchronize"] * 4


@pytest.mark.parametrize("left_out", ["record", "synchronize"])
def test_a_time_that_is_not_there_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: str) -> None:
    with Device():
        monkeypatch.setattr(torch.cuda.Event, left_out, lambda self, stream=None: None)
        with pytest.raises(AssertionError):
            test_a_devices_time_is_taken_by_events_around_the_calls(tmp_path)
