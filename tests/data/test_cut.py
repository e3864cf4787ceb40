"""Chips cut out of a scene: the pixels of their place, enough of them, in folds that share no land."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import rasterio

from engine.base.errors import ConfigError, DataError
from engine.base.made import alone
from engine.data.dataset import Dataset, load_dataset, parse_dataset
from engine.data.forms import open_source, read_label
from engine.data.index import open_index
from engine.data.scene import cut as cutting
from engine.data.scene.blocks import Options, Place, balanced, block_pixels, places_of, runs_of, spatial_folds
from engine.data.scene.cut import cut
from engine.data.scene.grid import Box
from engine.data.scene.rasters import Rasters
from engine.data.scene.scene import Scene, open_scene
from engine.data.selection.folds import load_folds
from engine.data.store import chip_file
from engine.data.tiff import tiff
from tests.scenes import CRS, DATASET, TILE, make_scene, place, waves, write_raster

HEIGHT, WIDTH = 330, 400  # 5 × 6 chips and a rest
OPTIONS = Options(stride=TILE, block=2 * TILE * 10, folds=3)


class Made(NamedTuple):
    scene: Path
    target: Path
    truth: np.ndarray  # [HEIGHT, WIDTH], NaN where there is none

    @property
    def opened(self) -> Scene:
        return open_scene(self.scene)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("cut")
    scene = make_scene(folder, HEIGHT, WIDTH)
    with rasterio.open(folder / "rasters" / "radar_00.tif", "r+") as first:  # two chips and a bit see nothing then
        first.write(np.full((2, HEIGHT, 130), -9999, np.float32), window=rasterio.windows.Window(0, 0, 130, HEIGHT))
    truth = (100 * waves(HEIGHT, WIDTH, 9)).astype(np.float32)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    truth[(x + 2 * y > 150) & (x + 2 * y < 330)] = np.nan
    return Made(scene, write_target(folder / "target.tif", truth), truth)


def write_target(path: Path, truth: np.ndarray, nodata: float | None = -1, **more: Any) -> Path:
    return write_raster(path, np.where(np.isnan(truth), nodata, truth).astype(np.float32) if nodata is not None
                        else truth, nodata=nodata, **more)


@pytest.fixture(scope="module")
def tree(made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("chips") / "tree"
    return out, cut(made.opened, made.target, out, OPTIONS, workers=2)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_chip_is_its_place_in_the_rasters(made: Made, tree: tuple[Path, dict[str, Any]]) -> None:
    out, note = tree
    missing = 0
    index, rasters = open_index(out), Rasters(made.opened, 1)
    assert index.dataset == parse_dataset(
        DATASET.dump() | {"target": DATASET.dump()["target"] | {"nodata": -1}}, "with nodata")
    assert {chip.id for chip in index.chips} == note["chips"].keys() and len(index.labelled()) == len(index.chips)
    for chip in index.chips:
        row, column = (note["chips"][chip.id][key] for key in ("row", "column"))
        assert chip.id == f"r{row:05d}c{column:05d}"
        there = made.truth[row:row + TILE, column:column + TILE]
        assert np.array_equal(read_label(chip), there, equal_nan=True)
        assert np.isclose(note["chips"][chip.id]["mean"], np.nanmean(there, dtype=float), atol=1e-3)
        for number, sensor in enumerate(DATASET.sensors):
            for step in range(1 if sensor.static else DATASET.months):
                found = rasters.read(number, step, Box(row, column, TILE, TILE)) if (
                    number, step) in made.opened.images else None
                assert chip.months[number][step] == (found is not None and found.seen.any())
                missing += found is not None and not found.seen.any()
                if chip.months[number][step]:
                    image = np.empty(DATASET.shape(sensor), sensor.values)
                    tiff.read_into(chip.path(number, step), image)
                    assert found is not None and np.array_equal(image, found.values)
    assert missing > 5, "steps of which a chip sees nothing"


def test_chips_know_their_place_and_are_read_in_the_fast_way(
        made: Made, tree: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    out, note = tree
    monkeypatch.setattr(tiff, "_read_any", None)
    for path in [*out.glob("train_features/*.tif"), *out.glob("train_target/*.tif")]:
        where = note["chips"][path.name.split("_")[0]]
        with rasterio.open(path) as file:
            assert file.crs == rasterio.crs.CRS.from_string(CRS)
            assert file.transform == place(10 * where["column"], 10 * where["row"])
            assert file.nodata == (-9999 if "radar" in path.name else -1 if "carbon" in path.name else None)
            pixels = np.moveaxis(file.read(), 0, -1)
        again = np.empty(pixels.shape, pixels.dtype)
        tiff.read_into(path, again)
        assert np.array_equal(again, pixels)


def expected(made: Made, share: float, tile: int = TILE) -> set[str]:
    """Of the places at a stride of a tile, those with a target and images in at least `share` of their pixels."""
    rasters, seen = Rasters(made.opened, 1), np.zeros((HEIGHT, WIDTH), bool)
    for number, step in made.opened.images:
        if not DATASET.sensors[number].static:
            seen |= rasters.read(number, step, Box(0, 0, HEIGHT, WIDTH)).seen
    blocks = itertools.product(range(0, HEIGHT - tile + 1, tile), range(0, WIDTH - tile + 1, tile))
    return {f"r{y:05d}c{x:05d}" for y, x in blocks
            if (~np.isnan(made.truth[y:y + tile, x:x + tile])).mean() >= share
            and seen[y:y + tile, x:x + tile].mean() >= share}


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_chips_with_too_little_are_left_out(made: Made, tmp_path: Path, share: float) -> None:
    note = cut(made.opened, made.target, tmp_path / "out", dataclasses.replace(OPTIONS, min_valid=share))
    assert note["chips"].keys() == expected(made, share)
    assert note["places"] == 30 and 30 - note["without_target"] - note["without_images"] == len(note["chips"])
    assert note["without_target"] > 0 and note["without_images"] > 0
    assert {path.name.split("_")[0] for path in (tmp_path / "out").glob("train_features/*")} == note["chips"].keys()


@pytest.mark.parametrize(("stride", "block"), [(TILE, 2 * TILE), (TILE // 4, 2 * TILE), (TILE // 2, 150), (100, 170)])
def test_folds_share_no_land(made: Made, tmp_path: Path, stride: int, block: int) -> None:
    options = Options(stride, block * 10, folds=3, min_valid=0.3)
    note = cut(made.opened, made.target, tmp_path / "out", options)
    assert TILE <= note["block_pixels"] <= block and (note["block_pixels"] - TILE) % stride == 0
    folds = load_folds(tmp_path / "out" / "split.json")
    assert len(folds) == 3 and sorted(itertools.chain(*folds)) == sorted(note["chips"])
    land = []
    for number, fold in enumerate(folds):
        mask = np.zeros((HEIGHT, WIDTH), bool)
        for chip in fold:
            where = note["chips"][chip]
            assert where["fold"] == number
            mask[where["row"]:where["row"] + TILE, where["column"]:where["column"] + TILE] = True
        land.append(mask)
    assert (np.sum(land, 0) <= 1).all() and all(mask.any() for mask in land)
    means = [np.mean([note["chips"][chip]["mean"] for chip in fold]) for fold in folds]
    assert np.ptp(means) < np.ptp([where["mean"] for where in note["chips"].values()]) / 2


def test_blocks_hold_whole_chips() -> None:
    grid: Any = type("G", (), {"height": 300, "width": 210, "pixel_metres": (10.0, 10.0)})()
    for stride, block, side in ((64, 1280, 128), (64, 1919, 128), (64, 1920, 192), (32, 1280, 128), (32, 640, 64),
                                (100, 1640, 164)):
        assert block_pixels(Options(stride, block), grid, 64) == side
    places = places_of(grid, 64, 32, 128)
    assert [one.row for one in places if one.column == 0] == [0, 32, 64, 128, 160, 192]
    assert {one.column for one in places} == {0, 32, 64, 128} and Place(192, 128, (1, 1)) in places
    assert places[0].id == "r00000c00000"
    runs = runs_of(places, 64)
    assert list(itertools.chain(*runs)) == places and {len(run) for run in runs} == {1, 3}
    far = [Place(0, column, (0, 0)) for column in (0, 64, 129, 193, 257, 321, 385)]
    assert [len(run) for run in runs_of(far, 64)] == [2, 4, 1]


def test_every_fold_has_its_share_of_high_and_low_blocks() -> None:
    means = {Place(0, 128 * block + column, (0, block)): float(3 * block % 8)
             for block in range(8) for column in (0, 64)}
    low, high = spatial_folds(means, Options(TILE, 640, folds=2), 16)
    assert sorted([*low, *high]) == sorted(place.id for place in means)
    of = [[mean for place, mean in means.items() if place.id in fold] for fold in (low, high)]
    assert [sorted({mean // 2 for mean in values}) for values in of] == [[0, 1, 2, 3]] * 2, "one of each two alike"
    assert all(len(values) == 2 * len(set(values)) for values in of), "both chips of a block"


def test_balance_takes_from_what_there_is_most_of() -> None:
    means = {Place(0, n, (0, n)): value for n, value in enumerate([*np.linspace(0, 9, 40), *np.linspace(90, 100, 3)])}
    kept = balanced(means, 4, 1)
    values = np.array([means[one] for one in kept])
    assert kept == sorted(kept) and ((values < 10).sum(), (values >= 90).sum()) == (4, 3)
    assert balanced(means, 4, 1) == kept != balanced(means, 4, 2)
    assert balanced(means, None, 0) == list(means) and balanced({}, 3, 0) == []


def test_a_balanced_cut_says_what_it_left_out(made: Made, tmp_path: Path) -> None:
    note = cut(made.opened, made.target, tmp_path / "out", Options(TILE, 640, folds=2, balance=1))
    tenths = [where["mean"] for where in note["chips"].values()]
    assert note["over_balance"] > 5 and 2 <= len(tenths) <= 10


@pytest.mark.parametrize("form", [chip_file.STEPS, chip_file.EXACT])
def test_a_store_holds_what_the_tree_does(made: Made, tree: tuple[Path, dict[str, Any]], tmp_path: Path,
                                          form: str) -> None:
    note = cut(made.opened, made.target, tmp_path / "out", Options(TILE, OPTIONS.block, 3, form=form))
    assert note["chips"] == tree[1]["chips"]
    assert (tmp_path / "out" / "split.json").read_bytes() == (tree[0] / "split.json").read_bytes()
    ours, theirs = open_index(tmp_path / "out").chips, open_index(tree[0]).chips
    for chip, other in zip(ours, theirs):
        a, b = open_source(ours).stack(chip), open_source(theirs).stack(other)
        assert np.array_equal(a.label, b.label, equal_nan=True) and np.array_equal(a.months, b.months)
        for number, (one, two) in enumerate(zip(a.images, b.images)):
            exact = number > 0 or form == chip_file.EXACT
            assert np.array_equal(one, two) if exact else np.abs(one - two).max() <= 0.0051


def test_an_interrupted_cut_goes_on(made: Made, tree: tuple[Path, dict[str, Any]], tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int) -> None:
        if done >= 6:
            raise KeyboardInterrupt

    out, options = tmp_path / "out", OPTIONS
    with pytest.raises(KeyboardInterrupt):
        cut(made.opened, made.target, out, options, workers=1, progress=stop)
    labels = {path: path.stat().st_mtime_ns for path in (out / "train_target").iterdir()}
    assert 6 <= len(labels) < len(tree[1]["chips"]) and not (out / "split.json").exists()
    (out / "train_features" / ".r00000c00000_radar_00.tif.1.part").write_bytes(b"of a run that was killed")
    (out / ".folds.png.1.part").write_bytes(b"too")
    read: list[Box] = []
    plain = Rasters.read
    monkeypatch.setattr(Rasters, "read", lambda self, sensor, step, box: read.append(box) or plain(
        self, sensor, step, box))
    assert cut(made.opened, made.target, out, options) == tree[1]
    assert content(out) == content(tree[0])
    assert all(path.stat().st_mtime_ns == before for path, before in labels.items())
    pixels = sum(box.height * box.width for box in read) / len(made.opened.images)
    assert pixels <= (tree[1]["places"] - len(labels)) * TILE**2, "no chip that is whole is read again"


def test_a_target_elsewhere_is_warped(made: Made, tmp_path: Path) -> None:
    """From another CRS and coarser pixels, and one that covers a part only."""
    with rasterio.open(made.target) as file:
        left, bottom, right, top = rasterio.warp.transform_bounds(CRS, "EPSG:3067", *file.bounds)
        shape = round((top - bottom) / 20), round((right - left) / 20)
        transform = rasterio.transform.from_origin(left, top, 20, 20)
        truth = np.full(shape, -1, np.float32)
        rasterio.warp.reproject(rasterio.band(file, 1), truth, dst_transform=transform, dst_crs="EPSG:3067",
                                src_nodata=-1, dst_nodata=-1, resampling=rasterio.enums.Resampling.average)
    target = write_raster(tmp_path / "other.tif", truth[:shape[0] * 2 // 3], nodata=-1, crs="EPSG:3067",
                          transform=transform)
    note = cut(made.opened, target, tmp_path / "out", OPTIONS)
    assert 5 < len(note["chips"]) < 20 and max(one["row"] for one in note["chips"].values()) < HEIGHT * 2 / 3
    for chip in open_index(tmp_path / "out").chips:
        row, column = (note["chips"][chip.id][key] for key in ("row", "column"))
        label, there = read_label(chip), made.truth[row:row + TILE, column:column + TILE]
        assert np.nanmax(np.abs(label - there)) < 6 and np.nanmean(np.abs(label - there)) < 1


def test_what_of_the_target_is_unknown(made: Made, tmp_path: Path) -> None:
    def described(**target: Any) -> Dataset:
        return parse_dataset(DATASET.dump() | {"target": DATASET.dump()["target"] | target}, "d")

    def run(target: Path, **keys: Any) -> Any:
        dataset = described(**keys)
        scene = open_scene(made.scene)
        scene = Scene(scene.path, dataset, scene.grid, scene.images, scene.resampling, scene.extents)
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        note = cut(scene, target, out, Options(TILE, 2 * TILE * 10, folds=2))
        return load_dataset(out / "dataset.yaml").target.nodata, note["chips"].keys()

    some = expected(made, 0.5)
    assert run(made.target) == (-1, some)
    assert run(made.target, nodata=-5) == (-5, some), "the description's"
    assert run(write_target(tmp_path / "nan.tif", made.truth, None)) == (-9999, some), "floats can spare one"
    assert run(write_target(tmp_path / "n.tif", made.truth, float("nan"))) == (-9999, some)
    whole = np.nan_to_num(made.truth, nan=3).astype(np.uint8)
    bare, chips = run(write_raster(tmp_path / "bytes.tif", whole[:, :200]), dtype="uint8")
    assert bare is None and {chip[7:] for chip in chips} == {"00000", "00064", "00128"}, "only where all of it is known"
    assert run(write_raster(tmp_path / "b.tif", whole, nodata=3), dtype="uint8")[0] == 3


Broken = Callable[[Made, Path], Path]


def two_bands(made: Made, folder: Path) -> Path:
    return write_raster(folder / "two.tif", np.zeros((HEIGHT, WIDTH, 2), np.float32))


def of_doubles(made: Made, folder: Path) -> Path:
    return write_raster(folder / "double.tif", np.zeros((HEIGHT, WIDTH)))


def beside(made: Made, folder: Path) -> Path:
    return write_target(folder / "beside.tif", made.truth, transform=place(x=WIDTH * 10 + 10))


def empty(made: Made, folder: Path) -> Path:
    return write_target(folder / "empty.tif", np.full_like(made.truth, np.nan))


def missing(made: Made, folder: Path) -> Path:
    return folder / "none.tif"


def nowhere(made: Made, folder: Path) -> Path:
    tiff.write(folder / "nowhere.tif", made.truth)
    return folder / "nowhere.tif"


@pytest.mark.parametrize(("target", "says"), [
    (two_bands, "two.tif: has 2 bands, a target one"),
    (of_doubles, "double.tif: is float64, where the target of 'moor' is float32"),
    (beside, "beside.tif: lies beside the scene's grid"),
    (empty, "no chip is left of 30: none has a target and images in 0.5 of its pixels"),
    (missing, "none.tif: no such file"),
    (nowhere, "has no CRS or no place"),
])
def test_targets_that_do_not_fit_are_refused(made: Made, tmp_path: Path, target: Broken, says: str) -> None:
    with pytest.raises(DataError, match=says):
        cut(made.opened, target(made, tmp_path), tmp_path / "out", OPTIONS)


def test_what_cannot_be_cut_is_refused(made: Made, tree: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for wrong in ({"stride": 0}, {"folds": 1}, {"min_valid": 1.1}, {"balance": 0}, {"seed": -1}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}"):
            cut(made.opened, made.target, out, Options(**{"stride": TILE, "block": 1280, **wrong}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="block 600 m: is less than a chip, 640 m"):
        cut(made.opened, made.target, out, Options(TILE, 600))
    for block in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"block {block} m: is no length"):
            cut(made.opened, made.target, out, Options(TILE, block))
    assert not out.exists()
    with pytest.raises(DataError, match="1 blocks with chips cannot make 3 folds; give smaller ones with --block"):
        cut(made.opened, made.target, out, Options(TILE, 9999, folds=3))
    with pytest.raises(DataError, match=r"out: was cut otherwise \(block_pixels, options differ, see cut.json\)"):
        cut(made.opened, made.target, out, OPTIONS)
    (out / "cut.json").write_text("[]")
    with pytest.raises(DataError, match="cut.json: cannot be read"):
        cut(made.opened, made.target, out, OPTIONS)
    (out / "cut.json").unlink()
    (out / "letter.txt").write_text("")
    with pytest.raises(DataError, match="is not empty and nothing that was cut"):
        cut(made.opened, made.target, out, OPTIONS)
    with pytest.raises(DataError, match="below: cannot be made \\(Not a directory"):
        cut(made.opened, made.target, out / "letter.txt" / "below", OPTIONS)
    with alone(tmp_path / "busy"), pytest.raises(DataError, match="busy: another process writes here; wait for it"):
        cut(made.opened, made.target, tmp_path / "busy", OPTIONS)
    small = make_scene(tmp_path / "small", TILE - 1, 300)
    with pytest.raises(DataError, match="the scene is smaller than a chip"):
        cut(open_scene(small), write_target(tmp_path / "t.tif", made.truth), tmp_path / "s", OPTIONS)


def test_a_changed_raster_is_not_the_same_cut(made: Made, tree: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = Path(shutil.copytree(tree[0], tmp_path / "out"))
    assert cut(made.opened, made.target, out, OPTIONS) == tree[1] == json.loads((out / cutting.NOTE).read_text())
    target = write_target(tmp_path / "target.tif", made.truth + 1)
    with pytest.raises(DataError, match=r"was cut otherwise \(target, of differ"):
        cut(made.opened, target, out, OPTIONS)
