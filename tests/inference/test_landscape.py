"""Maps of landscapes: held to a plain float64 join of windows, seamless, the same bytes however they come about."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rio_cogeo.cogeo import cog_validate

from engine.base.errors import ConfigError, DataError
from engine.data.reference import transform
from engine.data.scene.grid import Box, Window, Windows
from engine.data.scene.scene import open_scene
from engine.data.scene.source import SceneSource
from engine.inference.landscape import bands as bands_module
from engine.inference.landscape import mapper
from engine.inference.landscape.area import Area, read_zones, summary
from engine.inference.landscape.bands import NODATA
from engine.inference.landscape.blend import Blend, weights
from engine.inference.landscape.mapper import Options, predict_scene, share
from engine.inference.landscape.picture import map_figure
from engine.model.weights import load_model
from tests.scenes import DATASET, ORIGIN, TILE, make_scene, write_weights

CPU = torch.device("cpu")
HEIGHT, WIDTH = 150, 170


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scene(tmp_path_factory.mktemp("scene"), HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("weights")
    return [write_weights(folder / f"{seed}.safetensors", seed) for seed in (0, 1)]


Make = Callable[..., Path]


@pytest.fixture
def make(scene: Path, trained: list[Path], tmp_path: Path) -> Make:
    """make("a", overlap=32) -> a.tif"""
    def run(name: str = "map", zones: Path | None = None, of: Path = scene, by: list[Path] = trained[:1],
            readers: int = 2, **options: Any) -> Path:
        out = tmp_path / name / "map.tif"
        predict_scene(by, of, out, Options(**options), device=CPU, zones=zones, readers=readers, threads=1)
        return out

    return run


def read(path: Path, band: int = 1) -> np.ndarray:
    """float64, NaN where there is no value."""
    with rasterio.open(path) as raster:
        values = raster.read(band).astype(np.float64)
        assert raster.nodata == NODATA
    return np.where(values == NODATA, np.nan, values)


def plainly(scene: Path, weights_path: Path, overlap: int, tta: tuple[str, ...] = ("id",)) -> np.ndarray:
    """The map as its definition says it, all of it in memory, in float64, by the model as it trains."""
    found, model = open_scene(scene), load_model(weights_path).eval()
    windows = Windows(HEIGHT, WIDTH, TILE, overlap)
    source, side = SceneSource(found, windows, 1), np.ones(TILE)
    if overlap:
        ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(overlap) + 0.5) / overlap)
        side = np.concatenate([ramp, np.ones(TILE - 2 * overlap), ramp[::-1]])
    total, weight, pad = np.zeros((2, HEIGHT + 4 * TILE, WIDTH + 4 * TILE)), np.outer(side, side), 2 * TILE
    seen = np.zeros(total.shape[1:], bool)
    for i, row in enumerate(windows.rows):
        for j, column in enumerate(windows.columns):
            stack = source.stack(source.chip(i, j))
            images = torch.from_numpy(transform(stack, None)[0]).permute(0, 3, 1, 2)[None, :len(stack.months)]
            mask = source.seen.pop(f"{i}/{j}")
            place = np.s_[pad + row:pad + row + TILE, pad + column:pad + column + TILE]
            seen[place] |= mask
            if not mask.any():
                continue
            with torch.inference_mode():
                views = [model(images)]
                if "v" in tta:
                    views.append(model(images.flip(-2)).flip(-2))
            total[0][place] += np.mean([view[0, 0].double().numpy() for view in views], 0) * weight
            total[1][place] += weight
    inside = np.s_[pad:pad + HEIGHT, pad:pad + WIDTH]
    return np.where(seen[inside], total[0][inside] / np.maximum(total[1][inside], 1e-30), np.nan)


# Blending ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0, 2, 16, 30, 32])
def test_the_weights_of_neighbours_add_up_to_one(overlap: int) -> None:
    side = weights(TILE, overlap)
    stride = TILE - overlap
    assert len(side) == TILE and np.allclose(side[:overlap] + side[stride:], 1, atol=1e-6) and (side > 0).all()
    assert np.array_equal(side, side[::-1])
    if overlap:
        assert side[0] < (2 / overlap) ** 2  # a window ends with next to nothing


@given(st.integers(1, 230), st.integers(1, 150), st.sampled_from([0, 16, 32]), st.data())
def test_a_band_does_not_depend_on_where_work_was_begun(height: int, width: int, overlap: int, data: Any) -> None:
    windows = Windows(height, width, TILE, overlap)
    rng = np.random.default_rng(height)
    answers = rng.normal(50, 20, (len(windows.rows), len(windows.columns), 1, TILE, TILE)).astype(np.float32)
    begin = data.draw(st.integers(0, len(windows.rows) - 1))

    def bands(first: int) -> list[np.ndarray]:
        blend = Blend(windows, 1)
        found = []
        for row in range(max(0, first - 1) if overlap else first, len(windows.rows)):
            for column, place in enumerate(windows.in_row(row)):
                blend.add(place, answers[row, column], np.ones((TILE, TILE), bool))
            found.append(blend.finish_row(row))
        return found[-(len(windows.rows) - first):]

    whole, part = bands(0), bands(begin)
    assert sum(band.shape[1] for band in whole) == height and not np.isnan(np.concatenate(whole, 1)).any()
    assert all(np.array_equal(a, b) for a, b in zip(whole[begin:], part))


def test_where_windows_say_the_same_the_map_does() -> None:
    windows = Windows(100, 90, TILE, 32)
    blend = Blend(windows, 2)
    answer = np.stack([np.full((TILE, TILE), 7.0), np.full((TILE, TILE), -3.0)]).astype(np.float32)
    found = []
    for row in range(len(windows.rows)):
        for place in windows.in_row(row):
            seen = np.ones((TILE, TILE), bool)
            if place == Window(windows.rows[0], windows.columns[0]):
                seen[:] = False
                continue
            blend.add(place, answer, seen)
        found.append(blend.finish_row(row))
    whole = np.concatenate(found, 1)
    there = ~np.isnan(whole[0])
    assert np.allclose(whole[0][there], 7) and np.allclose(whole[1][there], -3)
    row, column = windows.rows[1], windows.columns[1]  # before these, there is only the window that saw nothing
    assert not there[:row, :column].any() and there[row:].all() and there[:, column:].all() and min(row, column) > 0


# The map -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0, 16, 32])
def test_it_is_what_its_definition_says(make: Make, scene: Path, trained: list[Path], overlap: int) -> None:
    found, wanted = read(make(overlap=overlap)), plainly(scene, trained[0], overlap)
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    there = ~np.isnan(wanted)
    assert 0.7 < there.mean() < 0.95  # the scene has a corner without a value
    assert wanted[there].std() > 5
    assert np.abs(found - wanted)[there].max() < 1e-3 * wanted[there].std()


def test_views_are_averaged_and_their_spread_is_a_band(make: Make, scene: Path, trained: list[Path]) -> None:
    out = make(tta=("id", "v"), spread=True, overlap=0)
    assert np.allclose(read(out), plainly(scene, trained[0], 0, ("id", "v")), atol=0.05, equal_nan=True)
    said = json.loads(out.with_suffix(".json").read_text())
    assert said["map"] == "map.tif"
    assert said["mean"] == pytest.approx(np.nanmean(read(out)))  # of the map, not of the spread
    one, other = read(make("id", overlap=0)), read(make("v", tta=("v",), overlap=0))
    # Of two views it is half their distance, where one window has the pixel
    spread = read(out, 2)
    there = ~np.isnan(spread)
    assert np.array_equal(there, ~np.isnan(one))
    assert np.allclose(spread[there], np.abs(one - other)[there] / 2, atol=0.02)
    with rasterio.open(out) as raster:
        assert raster.descriptions == ("carbon", "carbon, standard deviation over views")


def test_an_ensemble_is_the_mean_of_its_weights(make: Make, trained: list[Path]) -> None:
    both = read(make("both", by=trained, overlap=16))
    each = [read(make(str(n), by=[path], overlap=16)) for n, path in enumerate(trained)]
    assert np.allclose(both, np.mean(each, 0), atol=0.01, equal_nan=True)
    assert np.nanstd(each[0] - each[1]) > 1


def test_the_file(make: Make, trained: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[SceneSource] = []
    monkeypatch.setattr(mapper, "SceneSource", lambda *args: sources.append(SceneSource(*args)) or sources[-1])
    out = make(overlap=16)
    assert len(sources) == 1 and not sources[0].seen and not sources[0]._runs  # memory does not grow with the map
    valid, errors, warnings = cog_validate(out, strict=True)
    assert valid, (errors, warnings)
    with rasterio.open(out) as raster:
        assert raster.crs.to_epsg() == 32635 and tuple(raster.transform)[:6] == (10, 0, ORIGIN[0], 0, -10, ORIGIN[1])
        assert (raster.height, raster.width, raster.dtypes) == (HEIGHT, WIDTH, ("float32",))
        assert raster.block_shapes == [(512, 512)] and raster.units == ("t/ha",)
        tags = raster.tags()
    assert tags["UNITS"] == "t/ha" and tags["MODEL"] == str(trained[0]) and len(tags["MODEL_SHA256"]) == 64
    assert sorted(path.name for path in out.parent.iterdir()) == ["map.json", "map.png", "map.tif"]
    assert out.with_suffix(".png").stat().st_size > 10_000
    said, values = json.loads(out.with_suffix(".json").read_text()), read(out)
    there = ~np.isnan(values)
    assert said["mean"] == pytest.approx(values[there].mean()) and said["target"] == "carbon"
    assert said["total"] == pytest.approx(values[there].sum() / 100) and said["total_unit"] == "t"
    assert said["area_without_value_ha"] == pytest.approx((~there).sum() / 100)


def test_a_large_map_has_overviews(tmp_path: Path, trained: list[Path]) -> None:
    scene = make_scene(tmp_path / "scene", 70, 1100)
    out = tmp_path / "map.tif"
    predict_scene(trained[:1], scene, out, Options(overlap=0), device=CPU)
    with rasterio.open(out) as raster:
        assert raster.overviews(1) == [2, 4]
    assert cog_validate(out, strict=True)[0]


def test_a_map_a_few_pixels_wide_is_one(tmp_path: Path, trained: list[Path]) -> None:
    """Whose overviews would be a pixel wide, all of them."""
    out = tmp_path / "map.tif"
    predict_scene(trained[:1], make_scene(tmp_path / "scene", 1100, 1, hole=False), out, Options(overlap=0), device=CPU)
    assert cog_validate(out)[0] and not np.isnan(read(out)).all()


def test_a_batch_is_a_row_of_windows_at_most(make: Make) -> None:
    """A larger one would take memory for nothing."""
    assert make("many", batch=10**18).read_bytes() == make("one", batch=1).read_bytes()


# The same bytes ------------------------------------------------------------------------------------------------------


def test_neither_batches_nor_threads_change_a_byte(make: Make) -> None:
    first = make("first", overlap=32, batch=1, readers=1).read_bytes()
    assert all(make(f"{batch}", overlap=32, batch=batch, readers=readers).read_bytes() == first
               for batch, readers in ((3, 2), (16, 3)))


@pytest.mark.parametrize("after", [1, 5, 11])
def test_what_was_cut_off_goes_on_to_the_same_bytes(make: Make, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    whole = make("whole", overlap=32, batch=2)
    calls = []
    predict = mapper.Mapper._predict

    def cut_off(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return predict(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(mapper.Mapper, "_predict", cut_off)
        with pytest.raises(KeyboardInterrupt):
            make("cut", overlap=32, batch=2)
    parts = whole.parent.parent / "cut" / "map.tif.parts"
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("band*")}
    assert not (parts.parent / "map.tif").exists() and bool(before) == (after > 4)
    kept: dict[str, int] = {}
    remove = shutil.rmtree

    def look(folder: Path, **options: Any) -> None:
        kept.update({path.name: path.stat().st_mtime_ns for path in parts.glob("band*") if path.name in before})
        remove(folder, **options)

    monkeypatch.setattr(mapper.shutil, "rmtree", look)
    assert make("cut", overlap=32, batch=2).read_bytes() == whole.read_bytes()
    assert kept == before  # what was done was not done again
    assert not parts.exists()


def test_what_was_begun_otherwise_is_refused(make: Make, trained: list[Path], scene: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Path(shutil.copytree(scene.parent, tmp_path / "mine")) / "scene.yaml"
    with monkeypatch.context() as patch:
        patch.setattr(mapper, "write_cog", lambda *_: (_ for _ in ()).throw(DataError("the disk is full")))
        with pytest.raises(DataError, match="the disk is full"):
            make(of=mine, overlap=16)
    for words, change in (("overlap 32 instead of 16", {"overlap": 32}), ("tta", {"overlap": 16, "tta": ("id", "h")}),
                          ("weights", {"overlap": 16, "by": trained[1:]}), ("spread", {"overlap": 16, "spread": True})):
        with pytest.raises(DataError, match=f"map.tif.parts: what is done there was made otherwise .*{words}"):
            make(of=mine, **change)
    (mine.parent / "rasters" / "relief.tif").touch()
    with pytest.raises(DataError, match=r"made otherwise \(scene.images.relief May .*; remove .* to begin anew"):
        make(of=mine, overlap=16)


def test_a_finished_map_is_not_made_again(make: Make, trained: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(overlap=16)
    before, said = out.stat(), out.with_suffix(".json").read_bytes()
    out.with_suffix(".json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(mapper.Mapper, "run", lambda *_: pytest.fail("predicted again"))
        make(overlap=16)
    assert out.stat().st_mtime_ns == before.st_mtime_ns and out.with_suffix(".json").read_bytes() == said
    with pytest.raises(DataError, match="is there already, and is no map of this scene by these weights and options"):
        make(by=trained[1:], overlap=16)
    out.write_bytes(b"mine")
    with pytest.raises(DataError, match="is there already"):
        make(overlap=16)
    assert out.read_bytes() == b"mine"


@pytest.mark.parametrize("room", [2, 4])
def test_a_disk_that_fills_up_keeps_what_is_done(make: Make, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    whole, written = make("whole", overlap=32), []
    write = bands_module.tiff.write

    def full(path: Path, values: np.ndarray, **options: Any) -> None:
        if len(written) == room:
            raise DataError(f"{path}: cannot be written (No space left on device); make room or write elsewhere")
        written.append(path)
        write(path, values, **options)

    with monkeypatch.context() as patch:
        patch.setattr(bands_module.tiff, "write", full)
        with pytest.raises(DataError, match="No space left on device.*run the same command again: it goes on"):
            make("full", overlap=32)
    assert all(path.exists() for path in written) and not (whole.parent.parent / "full" / "map.tif").exists()
    assert make("full", overlap=32).read_bytes() == whole.read_bytes()


def test_a_map_that_was_not_kept_whole_is_seen(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = mapper.write_cog

    def lossy(bands: Any, *args: Any) -> None:
        write(bands, *args)
        band = bands.read(1)
        band[3, 4] += 1
        bands.path(1).unlink()
        bands_module.tiff.write(bands.path(1), band)

    monkeypatch.setattr(mapper, "write_cog", lossy)
    with pytest.raises(DataError, match="does not hold what was written"):
        make(overlap=32)
    assert not any(path.suffix in (".tif", ".png", ".json") for path in (tmp_path / "map").iterdir())


def test_a_band_that_was_damaged_is_told_with_the_way_out(make: Make, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tmp_path / "map" / "map.tif.parts"
    with monkeypatch.context() as patch:
        patch.setattr(mapper, "write_cog", lambda *_: (_ for _ in ()).throw(DataError("the disk is full")))
        with pytest.raises(DataError, match="the disk is full"):
            make(overlap=32)
    band = parts / "band_00000.tif"
    whole = band.read_bytes()
    for content in (whole[:-40], b""):
        band.write_bytes(content)
        with pytest.raises(DataError, match=f"cannot be written .*band_00000.tif.* a file of {parts} that is dam"):
            make(overlap=32)
    band.unlink()
    (parts / "band_00003.tif").unlink()  # and no row of windows between
    assert make(overlap=32).read_bytes() == make("whole", overlap=32).read_bytes()


def test_a_map_is_on_the_disk_before_it_has_its_name(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    for module in (bands_module, mapper):
        monkeypatch.setattr(module, "fsync", lambda path: synced.append(
            (path.name, (path.parent / "map" / "map.tif").exists() or (path.parent / "map.tif").exists())))
    make(overlap=0)
    assert synced == [(".map.tif.part.tif", False), ("map", True)]


def test_maps_that_gdal_made_badly_or_that_were_damaged_since(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bands_module, "cog_validate", lambda *_, **__: (False, ["no tiles"], []))
        with pytest.raises(DataError, match=r"is no valid Cloud-Optimised GeoTIFF \(no tiles\); is the disk"):
            make(overlap=0)
    out = make(overlap=0)
    with out.open("r+b") as file:
        file.truncate(out.stat().st_size // 2)
    with pytest.raises(DataError, match="map.tif: cannot be read .*; make it again"):
        make(overlap=0)


def test_all_that_changes_a_byte_is_compared(scene: Path, trained: list[Path]) -> None:
    found = open_scene(scene)

    def about(device: str = "cpu", by: list[Path] = trained, **options: Any) -> str:
        windows = Windows(HEIGHT, WIDTH, TILE, options.get("overlap", 16))
        return mapper._digest(mapper._about(by, found, Options(**options), windows, torch.device(device)))

    first = about()
    others = [about("cuda"), about("cuda", batch=7), about(by=trained[::-1]), about(by=trained[:1]), about(tta=("h",)),
              about(precision="bf16"), about(overlap=32), about(spread=True), about(compile=True),
              about(compile=True, batch=7), about("cuda", compile=True, batch=7)]
    assert len({first, *others}) == 12
    assert about(batch=7) == first  # one by one


def test_a_quarter_of_a_window_overlaps_an_even_number() -> None:
    assert [mapper._overlap(Options(), tile) for tile in (256, 64, 36, 2)] == [64, 16, 8, 0]


def test_a_row_of_windows_costs_what_images_reach_it(scene: Path, trained: list[Path], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    found, windows = open_scene(scene), Windows(HEIGHT, WIDTH, TILE, 0)
    rows = windows.rows
    extents = {(0, 0): Box(0, 0, HEIGHT, 1), (0, 1): Box(0, 0, rows[1], 1), (0, 2): Box(rows[2], 0, 5, 1)}
    less = dataclasses.replace(found, extents=extents)
    costs = [mapper._cost(less, windows, number) for number in range(3)]
    assert len(rows) == 3 and costs == [3, 2, 3]
    asked = []
    monkeypatch.setattr(mapper, "open_scene", lambda *_: less)
    monkeypatch.setattr(mapper, "share", lambda numbers, costs, *_: asked.append(costs) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict_scene(trained[:1], scene, tmp_path / "map.tif", Options(overlap=0), device=CPU)
    assert asked == [costs]


def test_the_picture_shows_what_there_is(tmp_path: Path) -> None:
    values = np.linspace(20, 120, 300 * 2000, dtype=np.float32).reshape(1, 300, 2000)
    values[0, 0, :5] = 1e6  # hides nothing
    values[:, :, 1000:] = NODATA
    path, crs = tmp_path / "map.tif", "EPSG:32635"
    with rasterio.open(path, "w", driver="GTiff", height=300, width=2000, count=1, dtype="float32", nodata=NODATA,
                       crs=crs, transform=rasterio.transform.from_origin(*ORIGIN, 10, 10)) as raster:
        raster.write(values)
        raster.set_band_description(1, "carbon")
    (panel, bar) = map_figure(path, DATASET.target, "map").axes
    (shown,), (line,) = panel.images, panel.lines
    assert shown.get_array().shape == (180, 1200) and shown.get_array().mask[:, 600:].all()
    assert not shown.get_array().mask[:, :599].any() and shown.get_clim()[0] == 0 and 110 < shown.get_clim()[1] < 125
    assert (panel.get_title(), bar.get_ylabel(), panel.texts[0].get_text()) == ("carbon", "t/ha", "2 km")
    assert np.ptp(line.get_xdata()) == pytest.approx(2000 / 10 / 2000 * 1200)
    values[...] = NODATA
    with rasterio.open(path, "r+") as raster:
        raster.write(values)
    assert map_figure(path, DATASET.target, "map").axes[0].images[0].get_array().mask.all()


def test_bands_on_another_hosts_disk_are_missed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapper, "share", lambda numbers, *_: numbers[:2])
    with pytest.raises(DataError, match=r"3 of 5 bands that other ranks have made are not there; put --out on a disk"):
        make(overlap=32)


def test_two_processes_do_not_write_one_map(make: Make, tmp_path: Path) -> None:
    with mapper.alone(tmp_path / "map" / "map.tif.parts"), \
            pytest.raises(DataError, match="another process writes here"):
        make(overlap=16)


@given(st.lists(st.integers(0, 300), min_size=0, max_size=40, unique=True), st.integers(1, 7), st.data())
def test_bands_are_shared_by_cost(numbers: list[int], ranks: int, data: Any) -> None:
    numbers.sort()
    costs = data.draw(st.lists(st.floats(1, 50), min_size=len(numbers), max_size=len(numbers)))
    parts = [share(numbers, costs, ranks, rank) for rank in range(ranks)]
    assert [number for part in parts for number in part] == numbers
    cost = dict(zip(numbers, costs))
    if numbers:
        fair, largest = sum(costs) / ranks, max(costs)
        assert max(sum(cost[n] for n in part) for part in parts) <= fair + largest + 1e-6


# Areas ---------------------------------------------------------------------------------------------------------------


def polygon(west: float, north: float, side: float) -> dict[str, Any]:
    """A square, in metres from the scene's corner."""
    x, y = ORIGIN[0] + west, ORIGIN[1] - north
    corners = [(x, y), (x + side, y), (x + side, y - side), (x, y - side), (x, y)]
    return {"type": "Polygon", "coordinates": [[list(corner) for corner in corners]]}


def zones_file(path: Path, *shapes: tuple[str, dict[str, Any]], crs: str | None = "EPSG:32635") -> Path:
    said = {"crs": {"type": "name", "properties": {"name": crs}}} if crs else {}
    path.write_text(json.dumps({"type": "FeatureCollection", **said, "features": [
        {"type": "Feature", "properties": {"name": name}, "geometry": shape} for name, shape in shapes]}))
    return path


def test_zones(make: Make, tmp_path: Path) -> None:
    file = zones_file(tmp_path / "zones.geojson", ("north", polygon(200, 100, 400)), ("corner", polygon(900, 700, 900)))
    out = make(overlap=16, zones=file)
    values = read(out)
    north, corner = json.loads(out.with_suffix(".json").read_text())["zones"]
    assert north["name"] == "north" and north["area_ha"] == 16
    assert north["mean"] == pytest.approx(values[10:50, 20:60].mean())
    inside = values[70:150, 90:170]
    assert corner["area_ha"] == pytest.approx(inside.size / 100)
    assert corner["area_without_value_ha"] == pytest.approx(np.isnan(inside).sum() / 100) and np.isnan(inside).any()
    assert corner["total"] == pytest.approx(np.nansum(inside) / 100)


def test_zones_in_longitude_and_latitude(make: Make, tmp_path: Path) -> None:
    moved = rasterio.warp.transform_geom("EPSG:32635", "EPSG:4326", polygon(200, 100, 400), precision=9)
    out = make(overlap=16, zones=zones_file(tmp_path / "zones.json", ("north", moved), crs=None))
    (zone,) = json.loads(out.with_suffix(".json").read_text())["zones"]
    assert zone["mean"] == pytest.approx(read(out)[10:50, 20:60].mean(), rel=1e-2)
    assert zone["area_ha"] == pytest.approx(16, abs=0.5)


@pytest.mark.parametrize(("content", "words"), [
    ("{", "cannot be read"), ("[" * 100_000, "cannot be read"), ("[]", "is no GeoJSON"),
    ('{"type": "FeatureCollection", "features": []}', "holds no polygon; give some, or leave --zones out"),
    ('{"type": "Polygon", "coordinates": [[]]}', "is no GeoJSON"),
    (f'{{"type": "Polygon", "coordinates": [[[1{"0" * 400}, 1], [2, 2], [1{"0" * 400}, 1]]]}}', "is no GeoJSON"),
    ('{"type": "Polygon", "coordinates": [[[1, 1], [2, 2], [3, 1], [2, 1]]]}', "zone 1 has a ring that is not closed"),
    ('{"type": "Feature"}', "is no GeoJSON"),
    ('{"type": "Point", "coordinates": [0, 0]}', "zone 1 is a Point; give polygons"),
    (json.dumps(polygon(200, 100, 400)), "lies outside of the map")])  # metres, said to be degrees
def test_files_that_hold_no_zones(scene: Path, tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "zones.json"
    path.write_text(content)
    with pytest.raises(DataError, match=words) as caught:
        read_zones(path, open_scene(scene).grid)
    assert str(caught.value).startswith(str(path))


def test_zones_beside_the_map(scene: Path, tmp_path: Path) -> None:
    grid = open_scene(scene).grid
    for name, shape in (("west", polygon(-500, 0, 400)), ("south", polygon(0, 1500, 400))):
        with pytest.raises(DataError, match=f"zone {name} lies outside of the map; take it out"):
            read_zones(zones_file(tmp_path / "z.json", (name, shape)), grid)
    with pytest.raises(DataError, match="cannot be read"):
        read_zones(tmp_path / "none.json", grid)


def test_what_a_map_adds_up_to_in_words(scene: Path) -> None:
    area = Area(open_scene(scene).grid, "t/ha", [])
    area.add(0, np.full((100, 170), np.nan, np.float32))
    assert summary(area.result()) == "no value; 170.00 ha without a value"
    area.add(100, np.full((50, 170), 200, np.float32))
    assert summary(area.result()) == "mean 200 t/ha over 85.00 ha, in all 0.017 Mt; 170.00 ha without a value"
    height = Area(open_scene(scene).grid, "m", [])
    height.add(0, np.full((100, 170), 12, np.float32))
    assert summary(height.result()) == "mean 12 m over 170.00 ha; 0.00 ha without a value"


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [-2, 15, 34])
def test_overlaps(make: Make, overlap: int) -> None:
    with pytest.raises(ConfigError, match=f"--overlap {overlap}: give an even number of pixels from 0 to 32"):
        make(overlap=overlap)


def test_zones_are_not_written_over(make: Make, tmp_path: Path) -> None:
    (tmp_path / "map").mkdir()
    zones = zones_file(tmp_path / "map" / "map.json", ("north", polygon(200, 100, 400)))
    before = zones.read_bytes()
    with pytest.raises(ConfigError, match="is where the map's own numbers go; give --out or the zones another name"):
        make(zones=zones)
    assert zones.read_bytes() == before


@pytest.mark.parametrize("kind", ["json", "png"])
def test_what_lies_beside_a_map_and_cannot_be_written(make: Make, tmp_path: Path, kind: str) -> None:
    (tmp_path / "map" / f"map.{kind}").mkdir(parents=True)
    with pytest.raises(DataError, match=rf"map.{kind}: cannot be written \(Is a directory\); make room"):
        make()
    assert not (tmp_path / "map" / "map.tif").exists()
    (tmp_path / "map" / f"map.{kind}").rmdir()
    assert cog_validate(make())[0]


def test_names_of_maps(scene: Path, trained: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a map is a GeoTIFF; give a name that ends in .tif"):
        predict_scene(trained, scene, tmp_path / "map.png", Options(), device=CPU)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/file/map.tif.parts: cannot be made")):
        predict_scene(trained[:1], scene, tmp_path / "file" / "map.tif", Options(), device=CPU)


def test_weights_of_other_data(scene: Path, trained: list[Path], tmp_path: Path) -> None:
    other = DATASET.model_copy(update={"steps": ("May", "June", "August")})
    path = write_weights(tmp_path / "other.safetensors", 0, other)
    with pytest.raises(DataError, match="was trained on other data than .* \\(steps May, June, August instead of"):
        predict_scene([trained[0], path], scene, tmp_path / "map.tif", Options(), device=CPU)
    target = DATASET.target.model_copy(update={"name": "height"})
    height = write_weights(tmp_path / "height.safetensors", 0, DATASET.model_copy(update={"target": target}))
    with pytest.raises(DataError, match=r"was trained on other data than .* \(its target is height\)"):
        predict_scene([trained[0], height], scene, tmp_path / "map.tif", Options(), device=CPU)
    with pytest.raises(DataError, match="scene.yaml: does not hold what .* was trained on: steps"):
        predict_scene([path], scene, tmp_path / "map.tif", Options(), device=CPU)


def test_a_scene_without_any_value_is_a_map_without_any(make: Make, tmp_path: Path) -> None:
    path = make_scene(tmp_path / "empty", 80, 90)
    for raster in (path.parent / "rasters").glob("*_0*.tif"):
        with rasterio.open(raster, "r+") as file:
            file.write(np.full((file.count, 80, 90), file.nodata, file.dtypes[0]))
    out = make("nothing", of=path, overlap=16)
    assert np.isnan(read(out)).all()
    assert "mean" not in json.loads(out.with_suffix(".json").read_text())
    assert yaml.safe_load(path.read_text())["dataset"] == "dataset.yaml"
