"""One harness under all benchmarks: times variants side by side, writes every number, renders nothing by itself.

    python benchmarks/harness.py environment [--device gpu]     what this machine is; fails where it has no GPU
    python benchmarks/harness.py render FILE.jsonl …            FILE.md and FILE.png beside each (benchmarks/render.py)

A benchmark describes `Variant`s and asks a `Recorder` to measure groups of them.  Warm-up lies outside the timer; the
repeats are interleaved (A B C A B C …), so that what disturbs the machine disturbs all alike; a ratio is taken
between two repeats of the same round.  A result file holds one JSON object a line: first the environment, then one a
variant, with every single time.  It is written line by line: a run that is cut off leaves what it had.

CUDA is timed by events on the stream, the CPU by time.perf_counter.  Peak memory is taken in the last warm-up, so that
its bookkeeping disturbs no timed repeat: on CUDA from the allocator, on the CPU from the allocations that torch's
profiler sees.  It counts from the level before the repeat; `resident` adds what a variant keeps between repeats, as its
weights.  "process GiB", taken one repeat earlier, is the same from the kernel's high-water mark of this process (VmHWM,
reset through /proc/self/clear_refs), after what earlier repeats left was given back: with the holes in the heap, and
with what libraries allocate for themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import environment, use_device
from render import read, render_file, table

RESULTS = Path(__file__).resolve().parent / "results"
QUANTILES = (0.1, 0.9)  # the spread that is reported
_LONGEST_HOLD = 0.2  # s that the device is held back while the host enqueues


@dataclass
class Variant:
    """One way to do the same work.

    run(i): repeat i (0, 1, …, warm-up included), the same work for all variants of a group; what it returns, names to
        numbers, is recorded for each repeat.
    prepare(i): before it, untimed.
    calls: how many times `run` is called within one timing; times are per call.
    resident: bytes that stay between repeats and belong to the variant.
    work: what one repeat does, for rates: "chips", "bytes", "flop".
    """

    name: str
    run: Callable[[int], Mapping[str, float] | None]
    prepare: Callable[[int], None] | None = None
    calls: int = 1
    resident: int = 0
    work: dict[str, float] = field(default_factory=dict)


@dataclass
class Timing:
    """Of one variant: seconds of each repeat, in the order of rounds; peak bytes (None: not known); the first line of
    the error that stopped it, in which case the others are empty."""

    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    extra: dict[str, list[float]] = field(default_factory=dict)
    error: str | None = None


def measure(variants: Sequence[Variant], *, device: torch.device, n: int, warmup: int = 1, wall: bool = False,
            device_only: bool = False, memory: bool = True) -> list[Timing]:
    """`n` interleaved repeats of each variant after `warmup` (at least 1) untimed ones.

    wall: time by the host's clock on CUDA too, for work that does not only run there.
    device_only: keep the device busy while the host enqueues, so that launches do not show (kernels that take less
    time than their launch); without it an eager model is charged for them.
    memory: False where this process's peak says little, as with work in other processes.
    A variant that raises is left out of the further rounds, and its Timing holds the error.
    """
    if n < 1 or warmup < 1:
        raise ValueError(f"n {n}, warmup {warmup}: both must be at least 1")
    timings = [Timing() for _ in variants]
    holds = [0.0] * len(variants)
    for i in range(warmup + n):
        for k, (variant, timing) in enumerate(zip(variants, timings)):
            if timing.error is not None:
                continue
            try:
                if variant.prepare is not None:
                    variant.prepare(i)
                if i == warmup - 1:
                    peak, holds[k] = _peak(variant, i, device)
                    timing.peak = peak if memory else None
                elif i == warmup - 2 and memory and device.type == "cpu":
                    if (grown := _process_peak(variant, i)) is not None:
                        timing.extra["process GiB"] = [grown]
                elif i < warmup:
                    variant.run(i)
                else:
                    hold = holds[k] * variant.calls if device_only else 0.0
                    seconds, extra = _timed(variant, i, device, wall, hold)
                    timing.seconds.append(seconds)
                    for name, value in (extra or {}).items():
                        timing.extra.setdefault(name, []).append(float(value))
            except Exception as error:  # one variant must not cost the others; the caller's exit status says so
                timing.error = f"{type(error).__name__}: {error}".splitlines()[0]
                timing.seconds, timing.peak, timing.extra = [], None, {}
    return timings


def _timed(variant: Variant, i: int, device: torch.device, wall: bool,
           hold: float) -> tuple[float, Mapping[str, float] | None]:
    extra = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type != "cuda" or wall:
        start = time.perf_counter()
        for _ in range(variant.calls):
            extra = variant.run(i)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / variant.calls, extra
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if hold:
        torch.cuda._sleep(int(min(hold * 1.5, _LONGEST_HOLD) * 2e9))  # cycles; clocks stay below 2 GHz
    begin.record()
    for _ in range(variant.calls):
        extra = variant.run(i)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / variant.calls, extra


def _peak(variant: Variant, i: int, device: torch.device) -> tuple[int, float]:
    """One untimed repeat: (its peak bytes with what is resident, seconds the host took to enqueue it)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        variant.run(i)
        enqueued = time.perf_counter() - start
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before + variant.resident, enqueued
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        variant.run(i)
    return _highest(seen) + variant.resident, 0.0


def _highest(seen: Any) -> int:
    """The most bytes that were allocated at once, of those that were allocated meanwhile."""
    level = highest = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            highest = max(highest, level)
    return highest


def _process_peak(variant: Variant, i: int) -> float | None:
    """One untimed repeat: GiB that this process grows by at its highest, and what is resident."""
    gc.collect()
    resettable = _reset_high_water()
    before = _memory("VmRSS")
    variant.run(i)
    return (_memory("VmHWM") - before + variant.resident) / 2**30 if resettable else None


def _reset_high_water() -> bool:
    """False where the system cannot (no Linux, or a sandbox's /proc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _memory("VmHWM") - _memory("VmRSS") < 1 << 26


def _memory(key: str) -> int:
    """Bytes of a line of /proc/self/status; 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), 0)


# Results -------------------------------------------------------------------------------------------------------


class Recorder:
    """Measures groups of variants, prints a line each, and writes `path` as it goes.

    `settings`: what holds for the whole call (precision, layout, threads, …); recorded with the environment.
    """

    def __init__(self, path: Path, benchmark: str, device: torch.device, settings: Mapping[str, Any],
                 ceilings: Mapping[str, float] | None = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.device = path, device
        self.failed: list[str] = []
        self._file = path.open("w")
        self._write({"benchmark": benchmark, "environment": environment(device), "settings": dict(settings),
                     "ceilings": dict(ceilings or {})})

    def group(self, title: str, variants: Sequence[Variant], *, n: int, x: tuple[str, float] | None = None,
              floor: float | None = None, **options: Any) -> list[Timing]:
        """Measure variants that do the same work; the first is the baseline of the ratios.

        `x`: (name, value) where groups of one title form a curve.  `floor`: seconds below which the machine's measured
        ceilings let nothing go.  `options`: of `measure`.
        """
        timings = measure(variants, device=self.device, n=n, **options)
        for variant, timing in zip(variants, timings):
            record = result(title, variant, timing, timings[0], variants[0].name, x)
            if floor is not None and timing.error is None:
                record["floor"] = floor
            self._write(record)
            self.failed += [f"{title}, {variant.name}: {timing.error}"] if timing.error else []
            print(_line(record), flush=True)
        return timings

    def absent(self, title: str, variant: str, why: str, failed: bool = False) -> None:
        """Record a variant that was not measured, and why; `failed`: though it should have been."""
        self.take({"group": title, "variant": variant, "baseline": variant, "n": 0, "work": {}, "error": why}, failed)

    def take(self, record: Mapping[str, Any], failed: bool = False) -> None:
        """Record what another process measured."""
        self._write(record)
        self.failed += [f"{record['group']}, {record['variant']}: {record['error']}"] if failed else []

    def note(self, text: str, **values: float) -> None:
        """Record numbers that are no timing of a variant, as a fitted slope; names with their units."""
        self._write({"note": text, "values": values})
        print(f"{text}: {', '.join(f'{name} {value:.4g}' for name, value in values.items())}", flush=True)

    def close(self) -> int:
        """The exit status: 1 if a variant failed.  Prints the table."""
        self._file.close()
        print(f"\n{table(read(self.path))}\n{self.path}")
        for failure in self.failed:
            print(f"FAILED {failure}", file=sys.stderr)
        return 1 if self.failed else 0

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def result(title: str, variant: Variant, timing: Timing, base: Timing, baseline: str,
           x: tuple[str, float] | None = None) -> dict[str, Any]:
    """The record of one variant; ratios are the baseline's time over this one's, round by round."""
    record: dict[str, Any] = {"group": title, "variant": variant.name, "baseline": baseline, "n": len(timing.seconds),
                              "work": variant.work}
    if x is not None:
        record["x"] = {x[0]: x[1]}
    if timing.error is not None:
        return record | {"error": timing.error}
    record |= {"seconds": timing.seconds, "time": spread(timing.seconds), "peak": timing.peak,
               "resident": variant.resident, "extra": {name: spread(v) for name, v in timing.extra.items()}}
    if base.error is None:
        record["ratio"] = spread([b / s for b, s in zip(base.seconds, timing.seconds)])
        if timing.peak is not None and base.peak:
            record["peak_ratio"] = timing.peak / base.peak
    return record


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the two QUANTILES (linear between order statistics) of at least one value."""
    low, median, high = np.quantile(np.asarray(values, float), [QUANTILES[0], 0.5, QUANTILES[1]])
    return {"median": float(median), "low": float(low), "high": float(high)}


def line_through(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of the least-squares line."""
    slope, intercept = np.polyfit(np.asarray(x, float), np.asarray(y, float), 1)
    return float(slope), float(intercept)


def _line(record: Mapping[str, Any]) -> str:
    head = f"{record['group']}: {record['variant']}" + "".join(f", {k} {v:g}" for k, v in record.get("x", {}).items())
    if "error" in record:
        return f"{head}: {record['error']}"
    text = f"{head}: {record['time']['median'] * 1e3:.3f} ms"
    return text + (f", {record['ratio']['median']:.2f}×" if record["variant"] != record["baseline"] and
                   "ratio" in record else "")


# Commands ------------------------------------------------------------------------------------------------------


def common_options(parser: argparse.ArgumentParser, n: int) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu"))
    parser.add_argument("--n", type=int, default=n, help=f"timed repeats (default: {n})")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/NAME-{cpu,gpu}.jsonl)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, once: does it run at all")


def out_path(args: argparse.Namespace, name: str, device: torch.device) -> Path:
    """Where the results go.  A smoke run never overwrites committed ones."""
    if args.out is not None:
        return args.out
    return RESULTS / f"{name}-{'gpu' if device.type == 'cuda' else 'cpu'}{'-smoke' if args.smoke else ''}.jsonl"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("environment", help="what this machine is, as JSON")
    show.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu"))
    render = commands.add_parser("render", help="table and plot of result files")
    render.add_argument("files", nargs="+", type=Path)
    return parser


def run(args: argparse.Namespace) -> int:
    if args.command == "environment":
        print(json.dumps(environment(use_device(args.device)), indent=2))
    else:
        for path in args.files:
            print(render_file(path))
    return 0


if __name__ == "__main__":
    from engine.base.cli import main

    main(arguments(), run)
