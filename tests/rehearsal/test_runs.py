"""A training run on a GPU, rehearsed as a whole (see `tests.rehearsal.run`), beside the same run on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, TINY, command_line, environment
from tests.rehearsal.device import PEAK
from tests.runs.test_training import history

pytestmark = pytest.mark.slow

RECIPE = """
data: {{path: {data}, split: {{folds: 4}}, readers: 2}}
run: {{folder: {folder}}}
model: {{attention: reference}}
train: {{global_batch: 2, micro_batch: 1, precision: bf16, compile: false}}
phases: [{{epochs: 1, lr: 0.003}}]
log: {{every: 2, chips: 1}}
"""


@pytest.fixture(scope="module")
def both(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, Path]:
    """What the rehearsal reports, its folder, and the CPU's."""
    folder = tmp_path_factory.mktemp("rehearsed")
    (folder / "recipe.yaml").write_text(RECIPE.format(data=sample, folder=folder))
    _, *words = command_line("train", "--config", folder / "recipe.yaml", *TINY)
    gpu = {name: value for name, value in environment().items() if name != "DS_ACCELERATOR"}  # found, as on a GPU
    runs = []
    for name, module, env in (("gpu", ["-m", "tests.rehearsal.run", str(folder / "report.json"), "train"], gpu),
                              ("cpu", words[:1], environment())):
        line = [sys.executable, *module, *words[1:], "--set", f"train.device={name}", "--set", f"run.name={name}"]
        runs.append(subprocess.Popen(line, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                                     stderr=subprocess.STDOUT))
    for run in runs:
        try:
            out, _ = run.communicate(timeout=500)
        finally:
            run.kill()
        assert run.returncode == 0, out[-6000:]
    return json.loads((folder / "report.json").read_text()), folder / "gpu", folder / "cpu"


def test_a_run_on_a_gpu_trains_as_on_the_cpu(both: Any) -> None:
    _, ours, theirs = both
    for kind, names in (("step", ("step", "loss", "grad_norm", "lr")), ("validation", ("rmse_per_chip", "mae"))):
        one, other = ([[row[name] for name in names] for row in history(run, kind)] for run in (ours, theirs))
        assert len(one) == (3 if kind == "step" else 1)
        np.testing.assert_allclose(one, other, rtol=0.02)  # images in bfloat16 come by way of DALI's float16


def test_a_step_never_waits_for_the_device(both: Any) -> None:
    report, *_ = both
    assert report["steps"] == [[], [], []]


def test_everything_is_asked_of_the_gpu(both: Any) -> None:
    report, *_ = both
    assert report["devices"] == ["cuda:0"]
    assert (report["backend"], report["device_id"]) == ("nccl", "cuda:0")
    assert report["accelerator"] == "CUDA_Accelerator"
    assert report["allreduce"] is False  # one rank at stage 0 has nothing to add up
    assert report["benchmark"] is True


def test_what_is_measured_goes_into_the_history(both: Any) -> None:
    _, ours, _ = both
    rows = history(ours, "speed")
    assert [row["step"] for row in rows] == [2, 3]
    assert all(row["chips_per_second"] > 0 and 0 <= row["data_wait_share"] <= 1 for row in rows)
    assert all(row["memory_gib"] == PEAK / 2**30 for row in rows)
