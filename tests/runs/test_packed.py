"""Whole runs on packed stores: the losses of the TIFFs, a kill, two ranks, chips that are bad and that turn bad."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.config import load_config
from engine.data.biomassters import T
from engine.data.index import Chip, open_index
from engine.data.plan import Sharding, training_batches
from engine.data.selection.chips import select_chips
from engine.data.selection.quarantine import Quarantine
from engine.data.store.pack import pack
from tests.conftest import Command
from tests.hosts import forked
from tests.runs.test_training import by, history, kill, recipe, same_run, succeed

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
    chip, _ = turning_bad(recipe(folder.parent, folder, "any"))
    shutil.copy(chip.packed, folder.parent)  # type: ignore[arg-type]
    return folder


QUARANTINE = ["--set", "data.bad_chips=quarantine"]


def turning_bad(path: Path) -> tuple[Chip, Chip]:
    """The chip that the second of two ranks reads for the second step of the recipe, and the one after it in the
    order."""
    config = load_config(path)
    bad = open_index(config.data.path).split("train")[2]
    chips = [chip for chip in select_chips(config)[0] if chip != bad]
    places = sorted((item.position, rank, chips[item.chip]) for rank in range(2) for items in training_batches(
        len(chips), config.run.seed, 0, Sharding(1, 1, 2, rank), 1, config.augment, T) for item in items)
    chip = next(number for number, (position, rank, _) in enumerate(places) if rank == 1)
    return places[chip][2], places[(chip + 1) % len(places)][2]


def cut_short() -> None:
    """In this process the chip turns bad when all chips were looked at, before the first step."""
    begin = Quarantine.begin

    def then_cut(self: Quarantine, step: int) -> None:
        begin(self, step)
        chip, _ = turning_bad(self._path.parent.with_suffix(".yaml"))
        assert step == 0 and chip.packed is not None
        chip.packed.write_bytes((self._path.parent.parent / chip.packed.name).read_bytes()[:-1000])

    Quarantine.begin = then_cut  # type: ignore[method-assign]


def begin_again(store: Path, name: str) -> Path:
    """A recipe for data as they were."""
    path = recipe(store.parent, store, name)
    chip, _ = turning_bad(path)
    assert chip.packed is not None
    shutil.copy(store.parent / chip.packed.name, chip.packed)
    return path


@pytest.fixture(scope="module")
def whole(store: Path) -> Path:
    path = begin_again(store, "whole")
    chip, other = turning_bad(path)
    said = by(1, path, *QUARANTINE, before=cut_short)
    assert f"WARNING: training step 2: chip {chip.id}: {chip.packed}: is truncated" in said
    assert said.count(f"chip {other.id} takes its place") == 1 == said.count("WARNING: training step")
    return store.parent / "whole"


def test_a_killed_run_goes_on_bit_exact(store: Path, whole: Path) -> None:
    """One chip is left out, another turns bad and is replaced; what goes on knows both."""
    path = begin_again(store, "killed")
    kill(path, 4, *QUARANTINE, before=cut_short)
    assert "resumed from" in (said := succeed(forked("train", "--config", path, *QUARANTINE)))
    assert "WARNING" not in said and "to be replaced" not in said
    same_run(whole, path.with_suffix(""))
    assert (whole / "quarantine.json").read_text() == (path.with_suffix("") / "quarantine.json").read_text()


def test_two_ranks_find_bad_chips_together(store: Path, whole: Path) -> None:
    """Each rank checks half of the chips; both leave out the same one; the second meets the one that turns bad, and the
    first tells; and the losses are those of one rank."""
    path = begin_again(store, "two")
    chip, other = turning_bad(path)
    said = by(2, path, *QUARANTINE, before=cut_short)
    assert f"WARNING: training step 2: chip {chip.id}: " in said and f"chip {other.id} takes its place" in said
    one, two = (json.loads((run / "quarantine.json").read_text()) for run in (whole, store.parent / "two"))
    bad = open_index(store).split("train")[2]
    assert one == two and list(one) == [bad.id, chip.id] and "checksum of its month" in one[bad.id]
    assert one[chip.id]["since_step"] == 2 and "is truncated" in one[chip.id]["why"]
    ours, theirs = (history(run) for run in (store.parent / "two", whole))
    assert len(ours) > 3
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], rtol=1e-4)


def test_a_run_does_not_change_its_data_in_silence(store: Path, whole: Path, sample: Path, command: Command) -> None:
    result = command("train", "--config", recipe(store.parent, sample, "whole"), "--set", "data.bad_chips=quarantine")
    assert result.returncode == 2
    assert "begun on data with floats in steps" in result.stderr and f"{sample} has them as they are" in result.stderr
