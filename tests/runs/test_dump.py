"""A run whose steps are no longer finite: it stops, and leaves what the last of them can be taken again with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from engine.base.errors import EngineError
from engine.training.dump import replay
from tests.conftest import Command
from tests.hosts import history, started, torchrun

pytestmark = pytest.mark.slow

RECIPE = """
data: {{path: {data}, overfit: true, readers: 1, prefetch: 1}}
run: {{name: run, folder: {folder}}}
model: {{backbone: tf_mobilenetv3_small_minimal_100, decoder_channels: [8, 8, 8, 8, 8], attention: reference}}
train: {{global_batch: 4, micro_batch: 1, precision: bf16, device: cpu, not_finite: 3}}
optimizer: {{lr: {lr}}}
phases: [{{epochs: 100}}]
validate: {{every: 100}}
log: {{every: 2, chips: 0}}
"""




def recipe(folder: Path, sample: Path, lr: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(data=sample, folder=folder, lr=lr))
    return path


def test_a_run_that_diverges_leaves_its_last_step(tmp_path: Path, sample: Path, command: Command) -> None:
    result = command("train", "--config", recipe(tmp_path, sample, "1.0e+20"))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    steps, bad = history(tmp_path / "run"), history(tmp_path / "run", "not_finite")
    [left] = (tmp_path / "run" / "dump").iterdir()
    assert left.name == f"step-{len(steps):08d}" and steps[0]["grad_norm"] < 1e9
    assert bad[-1]["step"] == len(steps) and len(bad) >= 3
    assert f"`python launch/train.py --replay {left}`" in result.stderr and "last good checkpoint" in result.stderr
    about = json.loads((left / "dump.json").read_text())
    assert [chip for turn in about["chips"][0] for chip in turn] == bad[-1]["chips"]
    assert about["command"].endswith(f"--replay {left}") and "segmentation_head.weight" in about["state"]
    assert about["loss_scale"] == 1  # that of fp16 alone is another
    assert yaml.safe_load((left / "config.yaml").read_text())["optimizer"]["lr"] == 1e20

    lines = list(replay(left, torch.device("cpu")))
    assert lines[0] == f"step {len(steps)} of run, by 1 ranks" and len(lines) == 6
    assert lines[1].startswith(f"rank 0, micro-batch 0: chips {about['chips'][0][0][0]}: loss ")
    assert any(": loss nan; not finite: the output of " in line for line in lines)
    assert lines[5].startswith("gradient: norm nan; not finite: of ")
    (left / "rank-0.safetensors").write_bytes(b"")
    with pytest.raises(EngineError, match=re.escape("rank-0.safetensors")):
        list(replay(left, torch.device("cpu")))
    for text in ('{"step": 1}', "[", '{"step": 1, "seeds": [1], "chips": [1], "loss_scale": 1}'):
        (left / "dump.json").write_text(text)
        with pytest.raises(EngineError, match=re.escape(f"{left}: not a dump") + ".*RUN/dump/step-N"):
            list(replay(left, torch.device("cpu")))


def take_all_for_bad() -> None:
    from engine.training.window import Window

    flush = Window.flush

    def pretend(self: Window, step: int, skipped: int) -> int:
        flush(self, step, skipped)
        self.skipped_in_a_row = 3
        return 1

    Window.flush = pretend  # type: ignore[method-assign]


def test_what_is_taken_again_is_the_step(tmp_path: Path, sample: Path, command: Command) -> None:
    """By two ranks, and their weights do not move."""
    with started(tmp_path / "log", "train", "--config", recipe(tmp_path, sample, "1.0e-30"), variables=torchrun(2),
                 before=dict.fromkeys(range(2), take_all_for_bad)) as ranks:
        assert [rank.wait() for rank in ranks] == [2, 2], ranks[0].text()
    result = command("train", "--replay", tmp_path / "run" / "dump" / "step-00000002")
    assert result.returncode == 0, result.stderr
    lines, step = result.stdout.splitlines(), history(tmp_path / "run")[1]
    losses = [float(loss) for loss in re.findall("loss ([^;]*);", result.stdout)]
    assert lines[0] == "step 2 of run, by 2 ranks" and len(losses) == 4
    assert np.mean(losses) == pytest.approx(step["loss"], rel=1e-5)
    assert float(lines[5].removeprefix("gradient: norm ").split(";")[0]) == pytest.approx(step["grad_norm"], rel=1e-3)
    assert lines[5].endswith("not finite: nothing")
