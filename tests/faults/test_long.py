"""A long run takes no more memory, descriptors and threads at its end than in its middle."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from engine.data.made.fields import make_fields
from engine.data.store.pack import pack
from tests.faults.harness import description, when
from tests.hosts import history, started

STEPS = 3000
# KiB a step: over the second half one copy of a checkpoint, which malloc holds back or gives back as it likes; a step
# that leaves its images behind would leave 48
MOST = 8.0
RECIPE = """
data: {{path: {data}, split: {{folds: 11}}, readers: 1, prefetch: 1}}
run: {{name: run, folder: {folder}}}
model: {{backbone: tf_mobilenetv3_small_minimal_100, decoder_channels: [8, 8, 8, 8, 8], attention: reference}}
train: {{global_batch: 1, precision: fp32, device: cpu, ema: 0.9}}
phases: [{{name: first, epochs: 50, lr: 0.003}}, {{name: second, epochs: 50, lr: 0.001}},
         {{name: third, epochs: 50, lr: 0.001, start_from: last}}]
validate: {{every: 5}}
checkpoint: {{every_steps: 50}}
log: {{every: 10, chips: 1}}
"""


class Slope(NamedTuple):
    """What a step adds, by least squares over the second half, and its standard error."""

    step: float
    error: float

    def __str__(self) -> str:
        return f"{self.step:+.4f} ± {self.error:.4f}"


def note_usage(path: Path, every: int) -> None:
    page = os.sysconf("SC_PAGE_SIZE") / 1024

    def note(_: str, n: int) -> None:
        if n % every == 0:
            memory = int(Path("/proc/self/statm").read_text().split()[1]) * page
            usage = {"step": n, "KiB": memory, "descriptors": len(list(Path("/proc/self/fd").iterdir())),
                     "threads": len(list(Path("/proc/self/task").iterdir()))}
            with path.open("a") as handle:
                handle.write(json.dumps(usage) + "\n")

    when(["step"], note)


def slope(steps: np.ndarray, values: np.ndarray) -> Slope:
    half = len(steps) // 2
    x, y = steps[half:] - steps[half:].mean(), values[half:] - values[half:].mean()
    step = float(x @ y / (x @ x))
    return Slope(step, float(np.sqrt(((y - step * x) ** 2).sum() / (len(x) - 2) / (x @ x))))


def test_the_slope_of_a_line() -> None:
    x = np.arange(100.0)
    assert slope(x, np.where(x < 50, 7, 3 * x)).step == pytest.approx(3)
    noisy = slope(x, np.random.default_rng(0).normal(size=100))
    assert abs(noisy.step) < 3 * noisy.error and noisy.error == pytest.approx(1 / 50 ** 1.5 * 12 ** 0.5, rel=0.3)


@pytest.mark.faults
def test_three_thousand_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_fields(tmp_path / "tiff", description(), 22, seed=1)
    pack(tmp_path / "tiff", tmp_path / "data", workers=1)
    path, notes = tmp_path / "recipe.yaml", tmp_path / "usage.jsonl"
    path.write_text(RECIPE.format(data=tmp_path / "data", folder=tmp_path))
    with started(tmp_path / "log", "train", "--config", path, variables=[{}],
                 before={0: functools.partial(note_usage, notes, 5)}) as [rank]:
        assert rank.wait(1800) == 0, rank.text()
    assert [row["step"] for row in history(tmp_path / "run")] == list(range(1, STEPS + 1))
    rows = [json.loads(line) for line in notes.read_text().splitlines()]
    table = {key: np.array([row[key] for row in rows], float) for key in rows[0]}
    slopes = {key: slope(table["step"], values) for key, values in table.items() if key != "step"}
    with capsys.disabled():
        for key, each in slopes.items():
            middle, last = table[key][len(rows) // 2], table[key][-1]
            print(f"\n{key}: {middle:.0f} at step {STEPS // 2}, {last:.0f} at the end, {each} a step", end="")
        print()
    assert slopes["KiB"].step < MOST
    for key in ("descriptors", "threads"):
        values = table[key][len(rows) // 2:]
        assert values[-100:].max() <= values[:100].max(), key
