"""Made data: the layout of the challenge, repeatable, learnable, floors that hold."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.base.errors import ConfigError, DataError
from engine.data.biomassters import AGBM_DTYPE, BIOMASSTERS, MONTHS, S1, S1_NODATA, S1_SHAPE, S2, S2_SHAPE, TILE, T
from engine.data.index import open_index
from engine.data.made import forest, sample
from engine.data.metadata import FEATURE_CSVS_ELSEWHERE
from engine.data.tiff.checksum import cksum_file
from engine.data.tiff.tiff import read_into
from engine.inference.predictor import choose_chips, predict
from engine.model.unet import BiomassUNet
from engine.model.weights import save_weights
from tests.conftest import SHARED

needs_real = pytest.mark.skipif(not SHARED.exists(), reason="the real data (../shared/data) are not here")
SEED = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("data") / "sample"
    return out, sample.make_sample(out, 2, SEED, test_chips=1)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def label_of(out: Path, chip: str) -> np.ndarray:
    label = np.empty((TILE, TILE), AGBM_DTYPE)
    read_into(out / "train_agbm" / BIOMASSTERS.label_name(chip), label)
    return label


def test_files_are_what_the_tables_say(made: tuple[Path, dict[str, Any]]) -> None:
    out, _ = made
    features, labels = table(out / "features_metadata.csv"), table(out / "train_agbm_metadata.csv")
    rows = {f"{row['split']}_features/{row['filename']}": row for row in features}
    rows |= {f"train_agbm/{row['filename']}": row for row in labels}
    assert len(labels) == 2 and len({row["chip_id"] for row in features}) == 3
    unlisted = {f"test_agbm/{BIOMASSTERS.label_name(sample.chip_id(SEED, sample.FIRST_TEST))}"}
    assert {str(p.relative_to(out)) for p in out.glob("*/*")} == rows.keys() | unlisted
    for place, row in rows.items():
        assert cksum_file(out / place) == (int(row["cksum"]), int(row["size"]))
        size = {"S1": 1_049_524, "S2": 1_443_550}.get(row.get("satellite", ""), 262_482)
        assert int(row["size"]) == size
        assert row["s3path_eu"] == f"s3://drivendata-competition-biomassters-public-eu/{place}"
    for row in features:
        sensor = ["S1", "S2"].index(row["satellite"])
        assert row["filename"] == BIOMASSTERS.feature_name(row["chip_id"], sensor, MONTHS.index(row["month"]))


def test_labels_of_test_chips_score(made: tuple[Path, dict[str, Any]], tmp_path: Path, one_thread: None) -> None:
    """From the folder to the metrics of `predict --split test`; and without labels, where they are not wanted."""
    torch.manual_seed(0)
    model, path = BiomassUNet("tf_mobilenetv3_small_minimal_100", [8, 8, 8, 8, 8]), tmp_path / "w.safetensors"
    save_weights(path, model, model.config())
    [chip] = choose_chips(made[0], "test", path)
    assert chip.label == made[0] / "test_agbm" / BIOMASSTERS.label_name(chip.id)
    metrics = predict(path, [chip], tmp_path / "out", device=torch.device("cpu"), n_pictures=0)
    label, guess = (np.empty((TILE, TILE), AGBM_DTYPE) for _ in range(2))
    read_into(chip.label, label)
    read_into(tmp_path / "out" / BIOMASSTERS.label_name(chip.id), guess)
    assert np.isclose(metrics["rmse_per_chip"], np.sqrt(((guess - label).astype(float) ** 2).mean()), rtol=1e-5)

    sample.make_sample(tmp_path / "bare", 1, SEED, test_chips=1, test_labels=False)
    [bare] = choose_chips(tmp_path / "bare", "test", path)
    assert bare.id == chip.id and bare.label is None and not (tmp_path / "bare" / "test_agbm").exists()
    sample.make_sample(tmp_path / "bare", 1, SEED, test_chips=1)
    assert choose_chips(tmp_path / "bare", "test", path)[0].label is not None, "an older sample is completed"


@needs_real
def test_layout_of_the_real_files(made: tuple[Path, dict[str, Any]]) -> None:
    out, real = made[0], SHARED / "biomassters"
    for name in ("features_metadata.csv", "train_agbm_metadata.csv"):
        mine, theirs = table(out / name), table(real / name)
        assert list(mine[0]) == list(theirs[0])
        assert (out / name).read_bytes().splitlines(keepends=True)[0] == (
            real / name).read_bytes().splitlines(keepends=True)[0]
        assert [row["filename"] for row in mine] == sorted(row["filename"] for row in mine)
        assert [row["filename"] for row in theirs] == sorted(row["filename"] for row in theirs)
        ours = next(row for row in mine if row.get("split") != "test")
        for column in set(ours) - {"cksum"}:
            assert re.sub("[0-9a-f]{8}", "ID", ours[column]) == re.sub("[0-9a-f]{8}", "ID", theirs[0][column])
    for glob, header in (("train_features/*_S1_*", 948), ("train_features/*_S2_*", 1758), ("train_agbm/*", 338)):
        heads = {p.read_bytes()[:header] for folder in (out, real) for p in folder.glob(glob)}
        assert len(heads) == 1


def test_values_are_plausible(made: tuple[Path, dict[str, Any]]) -> None:
    out, _ = made
    row = table(out / "train_agbm_metadata.csv")[0]
    plan = sample.plan_chip(SEED, 0, "train")
    chip = sample.chip_id(SEED, 0)
    assert row["chip_id"] in {chip, sample.chip_id(SEED, 1)}
    for month in range(T):
        s1 = np.empty(S1_SHAPE, S1.values)
        read_into(out / "train_features" / BIOMASSTERS.feature_name(chip, 0, month), s1)
        blank = (s1 == S1_NODATA).all((0, 1))
        assert np.array_equal(blank, np.repeat(~plan.s1[month], 2))
        assert np.all((s1[..., ~blank] > -45) & (s1[..., ~blank] < 10))
        path = out / "train_features" / BIOMASSTERS.feature_name(chip, 1, month)
        assert path.exists() == plan.s2[month]
        if path.exists():
            s2 = np.empty(S2_SHAPE, S2.values)
            read_into(path, s2)
            assert np.all((s2[..., -1] <= 101) | (s2[..., -1] == 255)) and np.all(s2 <= S2.span)
    label = label_of(out, chip)
    assert label.min() == 0 and np.isfinite(label).all()


def test_the_same_bytes_again_and_more_chips_extend(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = made
    first = sample.make_sample(tmp_path / "a", 1, SEED, threads=1)
    small = content(tmp_path / "a")
    images = {k: v for k, v in small.items() if k.endswith(".tif")}
    assert images.items() <= content(out).items()
    seen: list[tuple[int, int]] = []
    sample.make_sample(tmp_path / "a", 2, SEED, test_chips=1, progress=lambda *at: seen.append(at))
    assert content(tmp_path / "a") == content(out)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert first["chips"] == 1 and first["complete"]
    other = sample.make_sample(tmp_path / "b", 1, SEED + 1)
    assert not set(content(tmp_path / "b")) & set(images) and other["rmse_floor"] != first["rmse_floor"]


def test_an_interrupted_or_damaged_run_completes(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    def stop(done: int, _: int) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt):
        sample.make_sample(out, 2, SEED, test_chips=1, threads=1, progress=stop)
    assert not json.loads((out / "sample.json").read_text())["complete"]
    assert not (out / "features_metadata.csv").exists()
    victims = sorted(out.glob("train_features/*"))[:2]
    victims[0].write_bytes(victims[0].read_bytes()[:1000])
    flipped = bytearray(victims[1].read_bytes())
    flipped[-1] ^= 1
    victims[1].write_bytes(flipped)
    (out / "train_features/.x.tif.1.part").write_bytes(b"left by a killed run")
    sample.make_sample(out, 2, SEED, test_chips=1)
    assert content(out) == content(made[0])


def test_folders_that_hold_something_else(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    before = content(made[0])
    for chips, seed in ((2, SEED + 1), (1, SEED)):
        with pytest.raises(DataError, match=rf"holds another sample \(version 1, seed {SEED}, chips 2"):
            sample.make_sample(made[0], chips, seed, test_chips=1)
    assert content(made[0]) == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty and no sample; choose another folder"):
        sample.make_sample(tmp_path, 1, 0)
    with pytest.raises(DataError, match="is not a folder"):
        sample.make_sample(tmp_path / "thesis.txt", 1, 0)
    assert content(tmp_path) == {"thesis.txt": b"mine"}
    for text in ("{", "[]", '{"version": 1}'):
        (tmp_path / "sample.json").write_text(text)
        with pytest.raises(DataError, match=r"sample\.json: cannot be read"):
            sample.make_sample(tmp_path, 1, 0)
    for chips, tests, seed in ((0, 0, 0), (1, -1, 0), (1, 0, -1)):
        with pytest.raises(ConfigError, match="must be at least"):
            sample.make_sample(tmp_path / "new", chips, seed, tests)


def test_names_for_other_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, names = tmp_path / "a", FEATURE_CSVS_ELSEWHERE
    sample.make_sample(out, 1, SEED)
    assert [(out / name).readlink() for name in names] == [Path("features_metadata.csv")] * 2
    shutil.copytree(out, tmp_path / "moved", symlinks=True)
    assert len(open_index(tmp_path / "moved")) == 1

    # A copy that turned the links into files is extended, and has links again
    shutil.copytree(out, tmp_path / "b")
    assert not any((tmp_path / "b" / name).is_symlink() for name in names)
    assert len(open_index(tmp_path / "b")) == 1
    sample.make_sample(tmp_path / "b", 2, SEED)
    assert all((tmp_path / "b" / name).is_symlink() for name in names) and len(open_index(tmp_path / "b")) == 2

    # One made by hand is as good
    for name, target in zip(names, (tmp_path / "b" / "features_metadata.csv", "train_agbm_metadata.csv")):
        (tmp_path / "b" / name).unlink()
        (tmp_path / "b" / name).symlink_to(target)
    with pytest.raises(DataError, match=rf"{names[1]}: is not the link to features_metadata.csv"):
        sample.make_sample(tmp_path / "b", 2, SEED)
    (tmp_path / "b" / names[1]).unlink()
    sample.make_sample(tmp_path / "b", 2, SEED)
    assert (tmp_path / "b" / names[0]).readlink().is_absolute() and len(open_index(tmp_path / "b")) == 2

    # What someone else put there stays, and nothing else is touched
    for theirs in ("a table", None):
        (out / names[1]).unlink()
        if theirs is None:
            (out / names[1]).symlink_to("elsewhere.csv")
        else:
            (out / names[1]).write_text(theirs)
        before = content(out)
        with pytest.raises(DataError, match=rf"{names[1]}: is not the link to features_metadata.csv.*move it away"):
            sample.make_sample(out, 2, SEED)
        assert content(out) == before

    # A disk that knows no links
    def refuse(path: Path, target: str) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for chips in (1, 2):
        sample.make_sample(tmp_path / "c", chips, SEED)
        for name in names:
            assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "c" / "features_metadata.csv").read_bytes()
    assert len(open_index(tmp_path / "c")) == 2


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        sample.make_sample(tmp_path / "file" / "sample", 1, 0)


def test_chip_ids() -> None:
    numbers = [*range(20_000), *range(sample.FIRST_TEST, sample.FIRST_TEST + 5_000)]
    ids = [sample.chip_id(SEED, n) for n in numbers]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[0-9a-f]{8}", chip) for chip in ids)
    assert len(set(ids) & {sample.chip_id(SEED + 1, n) for n in range(20_000)}) < 10


@needs_real
def test_patterns_are_those_of_the_challenge() -> None:
    months: dict[tuple[str, str], set[int]] = {}
    with gzip.open(SHARED / "features_metadata_public_columns.csv.gz", "rt") as handle:
        for row in csv.DictReader(handle):
            found = months.setdefault((row["split"], row["chip_id"]), set())
            if row["satellite"] == "S2":
                found.add(MONTHS.index(row["month"]))
    counted: dict[str, Counter[str]] = {"train": Counter(), "test": Counter()}
    for (split, _), found in months.items():
        counted[split]["".join("1" if m in found else "0" for m in range(T))] += 1
    assert counted == sample.S2_PATTERNS


def test_missing_rates_over_many_chips() -> None:
    plans = [sample.plan_chip(SEED, n, "train") for n in range(3000)]
    s2, s1 = np.stack([p.s2 for p in plans]), np.stack([p.s1 for p in plans])
    # The training chips of docs/data.md, September first; 3.5 standard errors of 3,000 chips are 0.032 at most.
    real = [0.2105, 0.2105, 0.2955, 0.8560, 0.3967, 0.2105, 0.0596, 0, 0, 0, 0, 0]
    assert np.allclose(1 - s2.mean(0), real, atol=0.032)
    assert np.array_equal(1 - s2.mean(0) == 0, np.array(real) == 0)
    assert abs((~s2[:, :6]).all(1).mean() - 0.2105) < 0.027
    assert np.array_equal((~s2[:, :6]).all(1), ~s2[:, 0]), "September goes only with all months to February"
    assert s1.any(2).all(), "one orbit always remains"
    lost = np.any(~s1, 2)
    never = np.all(lost, 1)
    assert abs(never.mean() - sample.S1_ORBIT_NEVER) < 0.013
    assert abs(lost[~never].mean() - sample.S1_ORBIT_MISSING) < 0.006
    assert abs((~s1).sum((0, 1))[0] / (~s1).sum() - 0.5) < 0.1
    tests = np.stack([sample.plan_chip(SEED, n, "test").s2 for n in range(1000)])
    assert tests[:, [0, 1, 5, 6]].all()


def test_labels_are_like_the_challenge() -> None:
    labels = np.stack([forest.draw_label(SEED, n, forest.draw_stand(SEED, n)) for n in range(60)])
    assert 55 < labels.mean() < 71  # 63; chips differ by 40 %
    assert 370 < np.percentile(labels, 99.9) < 480  # 426
    assert 0.15 < (labels == 0).mean() < 0.27  # 0.19 and 0.24 in the two real chips
    assert 430 < labels.max() < 12_900


def level(biomass: np.ndarray | float) -> forest.Stand:
    """A conifer forest that differs in nothing but biomass, [TILE, TILE] or one value."""
    maps = np.zeros((TILE, TILE), np.float32)
    return forest.Stand(maps + np.float32(biomass), maps, maps + 0.7, maps + 1, maps, 0.5)


def test_bands_follow_biomass_and_saturate() -> None:
    ramp = np.linspace(0, 400, TILE)[None].repeat(TILE, 0)
    stand = level(ramp)
    assert np.array_equal(forest.mixing(stand)[0, 0], [1, 0, 0, 0]), "open land is bare ground"
    for month in range(T):
        power = forest.expected_s1(stand, month)[0].astype(float)
        steps = np.diff(power, axis=0)
        assert np.all(steps > 0), "backscatter grows with biomass"
        assert np.all(steps[-1] < 0.05 * steps[0]), "and saturates"
        spectra = (forest.mixing(stand) @ forest.endmembers(0.5, month))[0]
        bands = slice(None) if forest.snow(0.5)[month] < 0.5 else slice(0, 8)  # snow is black in the shortwave
        assert np.all(np.diff(spectra[:, bands], axis=0) < 0), "the canopy darkens the ground"
        fall = np.abs(np.diff(spectra[:, 8]))
        assert fall[-1] < 0.3 * fall[0]


def test_seasons() -> None:
    open_land = level(0.0)
    for north in (0.0, 1.0):
        february, july = (forest.endmembers(north, month) for month in (5, 10))
        assert np.all(february[0, :3] > 4 * july[0, :3]), "snow on open ground"
        assert february[0, 8] < july[0, 8], "dark in the shortwave infrared"
    assert np.all(forest.snow(0.9) >= forest.snow(0.1))
    frozen, summer = (forest.expected_s1(open_land, month)[0, 0] for month in (5, 10))
    assert frozen[1] < 0.8 * summer[1], "frozen ground is darker in VH"


def test_speckle_and_noise_around_the_expectation() -> None:
    stand = level(120.0)
    power = 10 ** (np.stack([forest.draw_s1(SEED, n, 9, stand) for n in range(6)]).astype(float) / 10)
    within = power.var((1, 2)) / power.mean((1, 2)) ** 2
    assert np.allclose(within * forest.P.s1_looks, 1, atol=0.05)
    expected = forest.expected_s1(stand, 9)[0, 0]
    assert np.allclose(power.mean((0, 1, 2)).reshape(2, 2).mean(0), expected, rtol=0.06)  # of 12 passes
    shares = forest.mixing(stand)
    clear = [i for i in (forest.draw_s2(SEED, n, 9, stand, shares) for n in range(6)) if i[..., -1].max() < 50]
    spectrum = shares[0, 0] @ forest.endmembers(0.5, 9)
    assert len(clear) > 3
    assert np.allclose(np.mean(clear, (0, 1, 2))[:-1], spectrum, rtol=0.06)


def test_clouds_brighten_and_show_in_clp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forest, "P", dataclasses.replace(forest.P, clp_noise=1.0))
    monkeypatch.setattr(forest, "CLOUDY", np.ones(T))
    stand = level(120.0)
    image = forest.draw_s2(SEED, 0, 9, stand, forest.mixing(stand)).astype(float)
    noisy = image[..., -1] == 255
    assert 0 < noisy.mean() < 1 and noisy[noisy.any(1)].all(), "a swath of whole rows"
    clp, red = image[~noisy][:, -1], image[~noisy][:, 2]
    assert clp.max() <= 100
    assert red[clp > 60].mean() > 4 * red[clp < 6].mean()


@pytest.mark.parametrize("biomass", [0.0, 60.0, 380.0, 450.0])
@pytest.mark.parametrize("below", [400.0, np.inf])
def test_moments_of_the_label(biomass: float, below: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Outliers by the hundred, small enough that their mean converges.
    monkeypatch.setattr(forest, "P", dataclasses.replace(forest.P, outlier_rate=0.01, outlier_high=1500.0))
    labels = np.stack([forest.draw_label(SEED, n, level(biomass)) for n in range(4)]).astype(float)
    chance, mean, variance = (float(x) for x in forest.label_moments(np.array(biomass), below))
    kept = labels[labels < below]
    n = labels.size
    assert abs(kept.size / n - chance) < 4 * np.sqrt(chance * (1 - chance) / n) + 1e-6
    assert abs(kept.mean() - mean) < 4 * np.sqrt(variance / kept.size) + 1e-6
    assert np.isclose(kept.var(), variance, rtol=0.08, atol=1e-6)


def test_the_oracle_reaches_the_floor() -> None:
    scores, errors, pixels = [], 0.0, 0
    for n in range(12):
        stand = forest.draw_stand(SEED, n)
        label = forest.draw_label(SEED, n, stand)
        oracle = forest.label_moments(stand.biomass, 400.0)[1]
        kept = label < 400
        errors, pixels = errors + ((label - oracle)[kept] ** 2).sum(dtype=float), pixels + kept.sum()
        scores.append(sample._score(stand.biomass, label, 400.0))
        # Shrinking or stretching the oracle is worse: it is the best.
        for factor in (0.97, 1.03):
            assert ((label - factor * oracle)[kept] ** 2).sum() > ((label - oracle)[kept] ** 2).sum()
    counted, _, _, best = np.sum(scores, 0)
    assert counted == pixels
    assert np.isclose(np.sqrt(errors / pixels), np.sqrt(best / counted), rtol=0.01)


def test_the_numbers_beside_the_data(made: tuple[Path, dict[str, Any]]) -> None:
    out, note = made
    assert json.loads((out / "sample.json").read_text()) == note
    assert (note["version"], note["seed"], note["chips"], note["test_chips"]) == (sample.VERSION, SEED, 2, 1)
    assert note["parameters"]["s1_looks"] == forest.P.s1_looks
    labels = np.stack([label_of(out, sample.chip_id(SEED, n)) for n in range(2)]).astype(float)
    for way, below in (("below_400", 400.0), ("all", np.inf)):
        kept = [label[label < below] for label in labels]
        together = np.concatenate(kept)
        mean, floor, of_mean = (note[key][way] for key in ("label_mean", "rmse_floor", "rmse_of_mean"))
        assert np.isclose(mean, together.mean())
        assert np.isclose(of_mean["pooled"], together.std())
        assert np.isclose(of_mean["per_chip"], np.mean([np.sqrt(((k - mean) ** 2).mean()) for k in kept]))
        assert 0 < floor["pooled"] < 0.35 * of_mean["pooled"]
        assert 0 < floor["per_chip"] < 0.35 * of_mean["per_chip"]
    assert note["rmse_floor"]["all"]["pooled"] > note["rmse_floor"]["below_400"]["pooled"]


def test_least_squares_learns_biomass_from_the_bands() -> None:
    """A quadratic of the months' mean bands, fitted on 5 chips, on 2 others."""
    pixels = np.random.default_rng(0).choice(TILE * TILE, 6000, replace=False)
    chips = [_features(n, pixels) for n in range(7)]
    x, y = (np.concatenate([chip[i] for chip in chips[:5]]) for i in (0, 1))
    test_x, test_y = (np.concatenate([chip[i] for chip in chips[5:]]) for i in (0, 1))
    centre, spread = x.mean(0), x.std(0)
    weights = np.linalg.lstsq(_quadratic((x - centre) / spread), y, rcond=None)[0]
    rmse = np.sqrt(((_quadratic((test_x - centre) / spread) @ weights - test_y) ** 2).mean())
    of_mean = np.sqrt(((test_y - y.mean()) ** 2).mean())
    assert 0.1 * of_mean < rmse < 0.5 * of_mean


def _features(number: int, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean bands over three months with snow-free, snowy and brown ground, [pixels, 15], and labels below 400."""
    stand = forest.draw_stand(SEED, number)
    label, shares = forest.draw_label(SEED, number, stand), forest.mixing(stand)
    s1 = np.mean([forest.draw_s1(SEED, number, m, stand) for m in (5, 7, 9)], 0)
    s2 = np.mean([forest.draw_s2(SEED, number, m, stand, shares) for m in (5, 7, 9)], 0)
    y = label.reshape(-1)[pixels]
    return np.concatenate([s1, s2], -1).reshape(TILE * TILE, -1)[pixels][y < 400], y[y < 400]


def _quadratic(x: np.ndarray) -> np.ndarray:
    i, j = np.triu_indices(x.shape[1])
    return np.concatenate([np.ones((len(x), 1)), x, x[:, i] * x[:, j]], 1)
