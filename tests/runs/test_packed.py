"""Whole runs on packed stores: the losses of the TIFFs, a kill, two ranks, a bad chip."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from engine.data.index import open_index
from engine.data.store.pack import pack
from tests.conftest import ROOT, Command, command_line, environment
from tests.runs.test_training import history, recipe, same_run, succeed

pytestmark = pytest.mark.slow


def test_training_does_not_know_the_form(sample: Path, tmp_path: Path, command: Command) -> None:
    """One recipe and one key: the same losses from the TIFFs and from a lossless store."""
    pack(sample, tmp_path / "store", lossless=True, workers=2)
    losses = []
    for name, data in (("tiff", sample), ("packed", tmp_path / "store")):
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(f"""
data: {{path: {data}, split: {{folds: 4}}, readers: 2, bad_chips: quarantine}}
run: {{name: {name}, folder: {tmp_path}}}
model: {{backbone: tf_mobilenetv3_small_minimal_100, decoder_channels: [8, 8, 8, 8, 8]}}
train: {{global_batch: 2, micro_batch: 1, precision: fp32, device: cpu}}
phases: [{{epochs: 1}}]
log: {{every: 1, chips: 1}}
""")
        done = command("train", "--config", recipe)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads((tmp_path / name / "quarantine.json").read_text()) == {}
        rows = [json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if row["kind"] == "step"])
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.fixture(scope="module")
def store(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample in steps, with one chip that is damaged."""
    folder = tmp_path_factory.mktemp("steps") / "store"
    pack(sample, folder, workers=2)
    path = open_index(folder).split("train")[2].packed
    assert path is not None
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def whole(store: Path) -> Path:
    succeed(subprocess.run(line(store, "whole"), cwd=ROOT, env=environment(), text=True, capture_output=True,
                           timeout=300))
    return store.parent / "whole"


def line(store: Path, name: str, *options: str, ranks: int = 0) -> list[str]:
    return command_line("train", "--config", recipe(store.parent, store, name), "--set", "data.bad_chips=quarantine",
                        *options, ranks=ranks)


def test_a_killed_run_goes_on_bit_exact(store: Path, whole: Path) -> None:
    process = subprocess.Popen(line(store, "killed"), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    path, deadline = store.parent / "killed" / "history.jsonl", time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_text().count('"step", ') >= 4:
            break
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it could be killed"
    process.kill()
    process.wait()
    out = succeed(subprocess.run(line(store, "killed"), cwd=ROOT, env=environment(), text=True, capture_output=True,
                                 timeout=300))
    assert "resumed from" in out
    same_run(whole, store.parent / "killed")


def test_two_ranks_find_the_bad_chip_together(store: Path, whole: Path) -> None:
    """Each rank checks half of the chips; both leave out the same one, and the losses are those of one rank."""
    succeed(subprocess.run(line(store, "two", ranks=2), cwd=ROOT, env=environment(),
                           text=True, capture_output=True, timeout=300))
    one, two = (json.loads((run / "quarantine.json").read_text()) for run in (whole, store.parent / "two"))
    bad = open_index(store).split("train")[2]
    assert one == two and list(one) == [bad.id] and "checksum of its month" in one[bad.id]
    ours, theirs = (history(run) for run in (store.parent / "two", whole))
    assert len(ours) > 3
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], rtol=1e-4)


def test_a_run_does_not_change_its_data_in_silence(store: Path, whole: Path, sample: Path, command: Command) -> None:
    result = command("train", "--config", recipe(store.parent, sample, "whole"), "--set", "data.bad_chips=quarantine")
    assert result.returncode == 2
    assert "begun on Sentinel-1 as 0.01 dB" in result.stderr and f"{sample} has it as float32" in result.stderr
