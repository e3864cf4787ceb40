"""The second recipe, on data of other bands, steps, tiles and target, through the same commands: nothing is
BioMassters' but its own description."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
import yaml

from engine.data.dataset import FILE, described, load_dataset
from engine.data.index import open_index
from engine.model.weights import read_notes
from launch import prepare
from tests.conftest import ROOT
from tests.hosts import history, started, torchrun

pytestmark = pytest.mark.slow

RECIPE = ROOT / "configs" / "grassland.yaml"
DESCRIPTION = load_dataset(ROOT / "configs" / "datasets" / "grassland.yaml")
SHORT = ["model.decoder_channels=[8,8,8,8,8]", "model.attention=reference", "train.global_batch=2",
         "phases=[{epochs: 1, lr: 0.003}]", "log.every=1", "log.chips=1", "data.readers=1", "train.device=cpu"]


class Told(NamedTuple):
    code: int
    text: str


class Place(NamedTuple):
    """The data's forms, and the runs on them, in one folder."""

    root: Path

    def run(self, script: str, *words: object, ranks: int = 1) -> Told:
        with started(self.root / "logs", script, *words, variables=torchrun(ranks) if ranks > 1 else [{}]) as running:
            codes = [rank.wait(240) for rank in running]
            return Told(max(codes), "".join(rank.text() for rank in running))

    def train(self, data: Path | str, name: str, *more: str, ranks: int = 1) -> Told:
        keys = [*SHORT, f"data.path={self.root / data}", f"run.name={name}", f"run.folder={self.root}", *more]
        return self.run("train", "--config", RECIPE, *[word for key in keys for word in ("--set", key)], ranks=ranks)

    def predict(self, run: str, data: str, out: str, *more: object) -> Told:
        return self.run("predict", "--weights", self.root / run, "--data", self.root / data, "--out", self.root / out,
                        "--device", "cpu", *more)

    def losses(self, name: str) -> list[float]:
        return [row["loss"] for row in history(self.root / name)]

    def maps(self, out: str) -> dict[str, np.ndarray]:
        return {path.name: tifffile.imread(path) for path in (self.root / out).glob("*.tif")}


def prepared(*words: object) -> None:
    args = prepare.arguments().parse_args(list(map(str, words)))
    run: Callable[..., int] = args.run
    assert run(args) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Made, packed both ways, trained and predicted from each."""
    root = tmp_path_factory.mktemp("other")
    found = Place(root)
    prepared("sample", "--dataset", ROOT / "configs" / "datasets" / "grassland.yaml", "--out", root / "tiff", "--chips",
             8, "--test-chips", 2, "--seed", 4)
    prepared("pack", "--data", root / "tiff", "--out", root / "exact", "--lossless", "--workers", 1, "--verify")
    prepared("pack", "--data", root / "tiff", "--out", root / "steps", "--workers", 1, "--verify")
    for form in ("tiff", "exact", "steps"):
        done = found.train(form, f"run-{form}")
        assert done.code == 0, done.text
        assert "RMSE" in done.text and " m (mean over 2 chips)" in done.text
        done = found.predict(f"run-{form}", form, f"maps-{form}")
        assert done.code == 0, done.text
    return found


def test_the_description_is_another() -> None:
    ours = load_dataset("biomassters")
    assert DESCRIPTION.tile != ours.tile and DESCRIPTION.months != ours.months
    assert set(DESCRIPTION.bands) != set(ours.bands) and DESCRIPTION.target != ours.target
    assert any(sensor.static for sensor in DESCRIPTION.sensors)


def test_forms_give_the_same_losses(place: Place) -> None:
    assert len(place.losses("run-tiff")) == 3 and np.isfinite(place.losses("run-tiff")).all()
    assert place.losses("run-exact") == place.losses("run-tiff")
    # Heights in 0.1 m: seen 6e-5 and 3e-5 off, and 0.006 when the weights had been stepped twice
    np.testing.assert_allclose(place.losses("run-steps")[:2], place.losses("run-tiff")[:2], rtol=0.001)
    np.testing.assert_allclose(place.losses("run-steps"), place.losses("run-tiff"), rtol=0.02)
    assert place.losses("run-steps") != place.losses("run-tiff")


def test_maps_are_named_and_sized_by_the_description(place: Place) -> None:
    maps = place.maps("maps-tiff")
    assert set(maps) == {f"{chip.id}_height.tif" for chip in open_index(place.root / "tiff").split("test")}
    assert {(image.shape, image.dtype.str) for image in maps.values()} == {((128, 128), "<f4")}
    metrics = json.loads((place.root / "maps-tiff" / "metrics.json").read_text())
    for name, image in maps.items():
        label = tifffile.imread(place.root / "tiff" / "test_target" / name)
        assert 0.05 < (label == -1).mean() < 0.1, "no target there"
        rmse = np.sqrt(((image.astype(float) - label)[label != -1] ** 2).mean())
        assert metrics["chips"][name.removesuffix("_height.tif")]["rmse"] == pytest.approx(rmse, rel=1e-5)
    assert len(list((place.root / "maps-tiff" / "pictures").glob("*.png"))) == 2
    assert (place.root / "maps-tiff" / "scatter.png").exists()


def test_labels_of_nodata_alone_are_refused_by_training_and_not_scored(place: Place) -> None:
    data = place.root / "blank"
    shutil.copytree(place.root / "tiff", data)
    train, test = (sorted((data / f"{split}_target").iterdir()) for split in ("train", "test"))
    blank = np.full((128, 128), -1, np.float32)
    for path in (train[0], test[0]):
        tifffile.imwrite(path, blank)
    done = place.train("blank", "on-blank")
    assert done.code == 2 and "Traceback" not in done.text
    assert f"{train[0]}: every pixel of the label is nodata" in done.text
    done = place.train("blank", "without-blank", "data.bad_chips=quarantine")
    assert done.code == 0 and "1 chips in quarantine" in done.text, done.text

    done = place.predict("run-tiff", "blank", "maps-blank")
    assert done.code == 0, done.text
    metrics = json.loads((place.root / "maps-blank" / "metrics.json").read_text())
    assert metrics["metrics"]["n_chips"] == 1 and [f"{chip}_height.tif" for chip in metrics["chips"]] == [test[1].name]
    assert len(place.maps("maps-blank")) == 2
    tifffile.imwrite(test[1], blank)
    done = place.predict("run-tiff", "blank", "maps-none")
    assert done.code == 0 and not (place.root / "maps-none" / "metrics.json").exists(), done.text
    assert len(list((place.root / "maps-none" / "pictures").glob("*.png"))) == len(place.maps("maps-none")) == 2


def test_forms_give_the_same_maps(place: Place) -> None:
    """By the same weights: from the lossless store those of the TIFFs, from steps nearly."""
    for form in ("exact", "steps"):
        done = place.predict("run-tiff", form, f"cross-{form}")
        assert done.code == 0, done.text
    whole, exact, steps = (place.maps(out) for out in ("maps-tiff", "cross-exact", "cross-steps"))
    for name, image in whole.items():
        np.testing.assert_array_equal(exact[name], image)
        np.testing.assert_allclose(steps[name], image, atol=0.02)


def test_weights_remember_the_description(place: Place) -> None:
    for form in ("tiff", "exact", "steps"):
        notes = read_notes(place.root / f"run-{form}")
        assert described(notes, "weights") == DESCRIPTION


def test_a_folder_without_a_description_is_read_by_the_weights(place: Place) -> None:
    bare = place.root / "bare"
    bare.mkdir()
    (bare / "test_features").symlink_to(place.root / "tiff" / "test_features")
    done = place.predict("run-tiff", "bare", "maps-bare")
    assert done.code == 0, done.text
    for name, image in place.maps("maps-bare").items():
        np.testing.assert_array_equal(image, place.maps("maps-tiff")[name])


def test_two_ranks_are_one_run(place: Place) -> None:
    done = place.train("steps", "two", "train.micro_batch=1", ranks=2)
    assert done.code == 0, done.text
    done = place.train("steps", "one", "train.micro_batch=1")
    assert done.code == 0, done.text
    np.testing.assert_allclose(place.losses("two"), place.losses("one"), rtol=1e-4)


def test_other_data_are_refused(place: Place, sample: Path) -> None:
    done = place.predict("run-tiff", str(sample), "refused")
    assert done.code == 2 and "Traceback" not in done.text
    assert "not a name of this data ({chip}_S2_00.tif, {chip}_height.tif)" in done.text

    described_itself = place.root / "biomassters"  # as a tree that carries its description would be
    described_itself.mkdir()
    for folder in ("train_features", "train_agbm"):
        (described_itself / folder).symlink_to(sample / folder)
    (described_itself / FILE).write_text(yaml.safe_dump(load_dataset("biomassters").dump(), allow_unicode=True))
    done = place.predict("run-tiff", "biomassters", "refused", "--split", "all")
    assert done.code == 2 and "Traceback" not in done.text
    assert "does not hold what" in done.text and "sensors S1, S2 instead of S2, radar, terrain" in done.text
    assert not (place.root / "refused").exists()


def test_one_other_band_is_named(place: Place) -> None:
    """By predicting, and by training on from these weights."""
    raw = DESCRIPTION.dump()
    raw["sensors"][0]["bands"][2] = "B5"
    raw["pictures"] = []
    other = place.root / "band"
    other.mkdir()
    for folder in ("train_features", "test_features", "train_target"):
        (other / folder).symlink_to(place.root / "tiff" / folder)
    (other / FILE).write_text(yaml.safe_dump(raw, allow_unicode=True))
    done = place.predict("run-tiff", "band", "refused")
    assert done.code == 2 and "S2: band 3 is B5 instead of B4" in done.text
    weights = place.root / "run-tiff" / "weights" / "best.safetensors"
    done = place.train("band", "on-band", f"model.weights={weights}")
    assert done.code == 2 and "Traceback" not in done.text
    assert "was trained on other images than" in done.text and "S2: band 3 is B5 instead of B4" in done.text
    done = place.train("tiff", "further", f"model.weights={weights}")
    assert done.code == 0, done.text
