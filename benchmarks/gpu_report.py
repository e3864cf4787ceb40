"""What benchmarks/gpu_check.sh found, to be read at a glance, and two of its checks.  Needs no torch.

    python benchmarks/gpu_report.py report FOLDER          tables: stages, speed, parts of a step, levers
    python benchmarks/gpu_report.py agree RUN RUN … …      do runs of one recipe see the same losses?
    python benchmarks/gpu_report.py same OUT OUT           are the maps of two predictions the same?
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.base.cli import main
from engine.base.errors import DataError
from engine.data.biomassters import AGBM_DTYPE, TILE

SETTLED = 20  # steps, in which shapes are compiled and tuned for the first time

Rows = list[dict[str, Any]]


class Part(NamedTuple):
    """A part of a step: the parts of benchmarks/step_estimate.py that it is held against, and the kernels it has."""

    name: str
    estimated: tuple[str, ...]
    kernels: str


# In this order: the first whose pattern is found in a kernel's name has it.  From the names that cuDNN 9, cuBLAS,
# Inductor, DALI and our own kernels use; what none knows is listed, so that a wrong guess shows
PARTS = (
    Part("attention", ("attention",), r"^_(forward|backward)_kernel"),
    Part("data (DALI, nvCOMP, copies)", ("data",), r"dali|nvcomp|lz4|inflate|memcpy"),
    Part("depthwise", ("depthwise",), r"depthwise|dwconv|grouped_direct|conv2d_grouped|_dw_"),
    Part("optimizer and clipping", ("optimizer",), r"multi_tensor|fusedadam|fused_adam|lpnorm"),
    Part("elementwise and BatchNorm", ("encoder elementwise", "decoder elementwise", "head in float32"),
         r"^triton_|at::native|batch_?norm|elementwise|reduce_kernel|memset|bn_fw|bn_bw"),
    Part("convolutions", ("convolutions",), r"gemm|xmma|cutlass|cudnn|convol|nvjet|fprop|dgrad|wgrad|nhwc|nchw"),
)
OTHER, GAPS = "other kernels", "nothing runs (launches, waiting)"


# The report ------------------------------------------------------------------------------------------------------


def report(folder: Path) -> str:
    stages = [json.loads(path.read_text()) for path in sorted((folder / "stages").glob("*.json"))]
    if not stages:
        raise DataError(f"{folder}: no stages/*.json; run `bash benchmarks/gpu_check.sh 1 {folder}` first")
    stages.sort(key=lambda s: (s["call"], s["when"]))
    blocks = [_machine(folder), _stages(stages), _speed(folder), *_profiles(folder), *_levers(folder)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _machine(folder: Path) -> str:
    path = folder / "environment.json"
    if not path.exists():
        return "No environment.json: the stage `environment` did not finish."
    e = json.loads(path.read_text())
    gpu = e.get("gpu")
    card = f"{gpu['name']}, {gpu['memory'] / 1e9:.0f} GB, driver {gpu['driver']}" if gpu else f"no GPU ({e['cpu']})"
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items() if version)
    commit = f"{(e['commit'] or 'unknown')[:12]}{' with changes' if e['dirty'] else ''}"
    return f"Card: {card}; {e['cores']} cores\nCommit: {commit}, {e['when']}\nVersions: {versions}"


def _stages(stages: Rows) -> str:
    rows = [[str(s["call"]), s["stage"], "ok" if s["status"] == 0 else f"FAILED ({s['status']})", str(s["seconds"]),
             s["card"], (s["commit"] or "?")[:10]] for s in stages]
    return _table(["call", "stage", "", "s", "card", "commit"], rows)


def _speed(folder: Path) -> str:
    rows = []
    for path in sorted((folder / "history").glob("*.jsonl")):
        history = [json.loads(line) for line in path.read_text().splitlines()]
        speeds = settled([row for row in history if row["kind"] == "speed"], _profiled(folder, path.stem))
        if speeds:
            rate = [row["chips_per_second"] for row in speeds]
            tuning = sum(row["seconds"] for row in history if row["kind"] == "tuning")
            rows.append([f"training, {path.stem}", _spread(rate),
                         f"{100 * statistics.median(row['data_wait_share'] for row in speeds):.1f} %",
                         f"{max(row['memory_gib'] for row in speeds):.1f}",
                         f"{len(rate)} windows to step {speeds[-1]['step']}; tuning and compiling {tuning:.0f} s"])
    for path in sorted(folder.glob("recipe-ladder*.jsonl")):
        rows += [[f"training step alone, {row['variant']}", _rate(row), "", _peak(row), row.get("error", "")]
                 for row in _variants(path)]
    for log in sorted((folder / "stages").glob("*predict*.log")):
        found = re.findall(r"predicting: (\d+)/\1 chips, ([\d.e+]+)/s", log.read_text())
        if found:
            rows.append([f"prediction, {log.stem}", found[-1][1], "", "", f"{found[-1][0]} chips, start included"])
    return _table(["speed", "chips/s", "wait share", "memory GiB", ""], rows) if rows else ""


def settled(speeds: Rows, profiled: int | None) -> Rows:
    """The log's windows that begin after SETTLED steps and end before the first profiled step; where there is none,
    the last that ends before that."""
    before = [row for row in speeds if profiled is None or row["step"] <= profiled]
    starts = [0, *(row["step"] for row in speeds)]
    return [row for start, row in zip(starts, before) if start >= SETTLED] or before[-1:]


def _profiled(folder: Path, run: str) -> int | None:
    """The first step that was profiled."""
    found = [re.match(r"steps-(\d+)-", path.name) for path in (folder / "profile" / run).glob("steps-*.json.gz")]
    return min((int(match[1]) for match in found if match), default=None)


def _profiles(folder: Path) -> Iterable[str]:
    for path in sorted((folder / "profile").glob("*/steps-*.json.gz")):
        first, last = map(int, re.findall(r"\d+", path.name)[:2])
        config = folder / "history" / f"{path.parent.name}.yaml"
        batch = re.search(r"micro_batch: (\d+)", config.read_text()) if config.exists() else None
        if batch is None:
            continue
        chips = (last - first) * int(batch[1])
        title = f"parts of a step, {path.parent.name} ({last - first} profiled steps of {batch[1]} chips)"
        with gzip.open(path, "rt") as file:
            parts, unknown = breakdown(json.load(file)["traceEvents"])
        if not parts:
            yield f"{title}: no kernel in the trace, so the run was not on a GPU"
            continue
        expected = _estimate(folder)
        rows = []
        for name, estimated in [*((part.name, part.estimated) for part in PARTS), (OTHER, ()), (GAPS, ("gaps",))]:
            ms, guess = parts[name] / 1e3 / chips, sum(expected.get(key, 0.0) for key in estimated)
            rows.append([name, f"{ms:.3f}", f"{guess:.3f}" if guess else "", f"{ms / guess:.2f}" if guess else ""])
        yield _table([title, "ms a chip", "estimated", "of it"], rows)
        if unknown:
            yield "other kernels: " + "; ".join(f"{name[:70]} {us / 1e3 / chips:.3f} ms" for name, us in unknown)


def breakdown(events: Iterable[dict[str, Any]]) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Microseconds of each part of PARTS, of OTHER and of GAPS in a trace of torch's profiler, and the largest of the
    kernels that no part knows; ({}, []) where nothing ran on a GPU.

    Streams overlap, so parts may be more together than the time that passed; GAPS is the time in which no stream had
    anything to do.
    """
    spans, parts, other = [], dict.fromkeys([*(part.name for part in PARTS), OTHER, GAPS], 0.0), dict[str, float]()
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        name, duration = event["name"], float(event["dur"])
        spans.append((float(event["ts"]), float(event["ts"]) + duration))
        part = part_of(name)
        parts[part] += duration
        if part == OTHER:
            other[name] = other.get(name, 0.0) + duration
    if not spans:
        return {}, []
    reached = min(spans)[0]
    for start, end in sorted(spans):
        parts[GAPS] += max(0.0, start - reached)
        reached = max(reached, end)
    return parts, sorted(other.items(), key=lambda item: -item[1])[:5]


def part_of(kernel: str) -> str:
    return next((part.name for part in PARTS if re.search(part.kernels, kernel, re.IGNORECASE)), OTHER)


def _estimate(folder: Path) -> dict[str, float]:
    path = folder / "estimate.jsonl"
    notes = _records(path) if path.exists() else []
    return next((row["values"] for row in notes if row.get("note", "").startswith("estimate")), {})


def _levers(folder: Path) -> Iterable[str]:
    rows, notes = [], []
    for path in sorted(folder.glob("lever*.jsonl")):
        rows += [[row["group"], row["variant"], _rate(row), f"{row['ratio']['median']:.3f}" if "ratio" in row else "",
                  _peak(row), row.get("error", "")] for row in _variants(path)]
        notes += [f"{row['note']}: " + ", ".join(f"{name} {value:.4g}" for name, value in row["values"].items())
                  for row in _records(path) if "note" in row]
    if rows:
        yield _table(["lever", "", "chips/s", "×", "peak GiB", ""], rows)
    if notes:
        yield "\n".join(notes)


def _records(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _variants(path: Path) -> Rows:
    return [row for row in _records(path) if "variant" in row]


def _rate(row: dict[str, Any]) -> str:
    if "time" not in row:
        return ""
    return " ".join((f"{row['work']['chips'] / row['time']['median']:.4g}",
                     f"({row['work']['chips'] / row['time']['high']:.4g}–"
                     f"{row['work']['chips'] / row['time']['low']:.4g})"))


def _peak(row: dict[str, Any]) -> str:
    return f"{row['peak'] / 2**30:.1f}" if row.get("peak") else ""


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g}–{max(values):.4g})"


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [header, *rows]]
    return "\n".join([lines[0], "-" * sum(widths, 2 * len(widths) - 2), *lines[1:]])


# Checks ----------------------------------------------------------------------------------------------------------


def agree(runs: Sequence[Path], first: float, rest: float, steps: int) -> bool:
    """Whether the runs' losses of the first `steps` steps are the first run's, the very first within the share
    `first`, later ones, which follow different roundings of the updates, within `rest`.  Prints them."""
    losses = {run: _losses(run)[:steps] for run in runs}
    fine = True
    for run, values in losses.items():
        off = [abs(value / base - 1) for value, base in zip(values, losses[runs[0]])]
        good = len(values) == steps and all(map(math.isfinite, values)) and all(
            o <= (rest if k else first) for k, o in enumerate(off))
        fine &= good
        print(f"{'ok   ' if good else 'WRONG'} {run.name}: {' '.join(f'{value:.4f}' for value in values)}")
    return fine


def _losses(run: Path) -> list[float]:
    path = run / "history.jsonl"
    if not path.exists():
        raise DataError(f"{path}: is missing, so this run did not begin; look at the log of its stage")
    return [row["loss"] for row in _records(path) if row["kind"] == "step"]


def same(one: Path, other: Path, most: float) -> bool:
    """Whether the maps *_agbm.tif of two folders differ by at most `most` t/ha.  Prints the largest difference."""
    import numpy as np

    from engine.data.tiff import tiff

    names = sorted(path.name for path in one.glob("*_agbm.tif"))
    if not names or names != sorted(path.name for path in other.glob("*_agbm.tif")):
        raise DataError(f"{one} and {other}: not maps of the same chips, or none at all; predict into both")
    maps = np.empty((2, TILE, TILE), AGBM_DTYPE)
    worst = 0.0
    for name in names:
        for place, folder in zip(maps, (one, other)):
            tiff.read_into(folder / name, place)
        worst = max(worst, float(np.abs(maps[0] - maps[1]).max()))
    print(f"{len(names)} maps, the largest difference is {worst:.3g} t/ha, allowed {most:g}")
    return worst <= most


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("report")
    show.add_argument("folder", type=Path)
    losses = commands.add_parser("agree")
    losses.add_argument("runs", type=Path, nargs="+", help="run folders; the first is the truth")
    losses.add_argument("--first", type=float, default=0.005, help="allowed of the first loss (default: 0.005)")
    losses.add_argument("--rest", type=float, default=0.05, help="allowed of the others (default: 0.05)")
    losses.add_argument("--steps", type=int, default=4)
    maps = commands.add_parser("same")
    maps.add_argument("outs", type=Path, nargs=2)
    maps.add_argument("--most", type=float, default=0.5, help="t/ha (default: 0.5)")
    return parser


def run(args: argparse.Namespace) -> int:
    if args.command == "report":
        print(report(args.folder), end="")
        return 0
    if args.command == "agree":
        return 0 if agree(args.runs, args.first, args.rest, args.steps) else 1
    return 0 if same(args.outs[0], args.outs[1], args.most) else 1


if __name__ == "__main__":
    main(arguments(), run)
