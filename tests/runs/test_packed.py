"""Whole runs on packed stores: the losses of the TIFFs, a kill, two ranks, a bad chip."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine.data.index import open_index
from engine.data.store.pack import pack
from tests.conftest import Command
from tests.hosts import forked
from tests.runs.test_training import by_two, history, kill, recipe, same_run, succeed

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


QUARANTINE = ["--set", "data.bad_chips=quarantine"]


@pytest.fixture(scope="module")
def whole(store: Path) -> Path:
    succeed(forked("train", "--config", recipe(store.parent, store, "whole"), *QUARANTINE))
    return store.parent / "whole"


def test_a_killed_run_goes_on_bit_exact(store: Path, whole: Path) -> None:
    path = recipe(store.parent, store, "killed")
    kill(path, 4, *QUARANTINE)
    assert "resumed from" in succeed(forked("train", "--config", path, *QUARANTINE))
    same_run(whole, path.with_suffix(""))


def test_two_ranks_find_the_bad_chip_together(store: Path, whole: Path) -> None:
    """Each rank checks half of the chips; both leave out the same one, and the losses are those of one rank."""
    by_two(recipe(store.parent, store, "two"), *QUARANTINE)
    one, two = (json.loads((run / "quarantine.json").read_text()) for run in (whole, store.parent / "two"))
    bad = open_index(store).split("train")[2]
    assert one == two and list(one) == [bad.id] and "checksum of its month" in one[bad.id]
    ours, theirs = (history(run) for run in (store.parent / "two", whole))
    assert len(ours) > 3
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], rtol=1e-4)


def test_a_run_does_not_change_its_data_in_silence(store: Path, whole: Path, sample: Path, command: Command) -> None:
    result = command("train", "--config", recipe(store.parent, sample, "whole"), "--set", "data.bad_chips=quarantine")
    assert result.returncode == 2
    assert "begun on data with floats in steps" in result.stderr and f"{sample} has them as they are" in result.stderr
