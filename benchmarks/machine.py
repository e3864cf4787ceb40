"""The machine under a benchmark: what it is, and the two rates it reaches when measured."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.base.errors import DeviceError

PACKAGES = ("torch", "triton", "deepspeed", "timm", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "numpy",
            "opencv-python-headless", "tifffile", "lz4")


def use_device(name: str) -> torch.device:
    """ "cpu", "gpu" or "auto" (the GPU where there is one).  Raises DeviceError where "gpu" has none."""
    if name == "gpu" and not torch.cuda.is_available():
        raise DeviceError("--device gpu: this machine has no CUDA device that torch can use; choose --device cpu")
    return torch.device("cuda", 0) if name != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit and load: what a number means nothing without."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    for name in ("nvidia.dali", "deepspeed"):  # on PYTHONPATH they have no metadata
        if not any(name.replace("nvidia.", "") in found for found in versions):
            with contextlib.suppress(ImportError):
                versions[name] = importlib.import_module(name).__version__
    facts: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "system": platform.platform(), "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)), "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load": os.getloadavg()[0], "torch_threads": torch.get_num_threads(), "device": str(device),
        "versions": versions, **_commit(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts["gpu"] = {"name": gpu.name, "memory": gpu.total_memory, "multiprocessors": gpu.multi_processor_count,
                        "capability": f"{gpu.major}.{gpu.minor}", "driver": _driver()}
    return facts


def ceilings(device: torch.device, dtype: torch.dtype, small: bool = False) -> dict[str, float]:
    """What this machine reaches, measured: bytes/s (read + written) of a large copy, flop/s of a large matrix product
    in `dtype`; random data, because zeros run faster than real ones.  `small`: quick
    and meaningless, for smoke runs."""
    cuda = device.type == "cuda"
    source = torch.rand(1 << (20 if small else 30 if cuda else 26), device=device)
    target = torch.empty_like(source)
    size = 256 if small else 8192 if cuda else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)

    def copy() -> None:
        target.copy_(source)

    def multiply() -> None:
        torch.mm(a, b, out=product)

    copied, multiplied = _median_seconds(copy, device), _median_seconds(multiply, device)
    return {"copy_bytes_per_s": 2 * source.nbytes / copied, "matmul_flop_per_s": 2 * size**3 / multiplied}


def _median_seconds(call: Callable[[], None], device: torch.device, n: int = 7, calls: int = 4) -> float:
    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    call()
    times = []
    for _ in range(n):
        start = wait()
        for _ in range(calls):
            call()
        times.append((wait() - start) / calls)
    return statistics.median(times)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
                platform.processor() or platform.machine())


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def _commit() -> dict[str, Any]:
    """The commit, and whether files differ from it; where this is no git checkout, what BENCHMARK_COMMIT says."""
    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/", ":!/benchmarks/results")  # which this run itself writes
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {"commit": os.environ.get("BENCHMARK_COMMIT") or None, "dirty": None}
