"""Scenes: what a YAML file or a folder says, rasters on the grid or warped to it, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml

from engine.base.errors import DataError, EngineError
from engine.data.dataset import load_dataset
from engine.data.scene.grid import Box, Grid, Windows, mirrored
from engine.data.scene.headers import GridKeys, Header, extent, make_grid, moved
from engine.data.scene.rasters import Rasters
from engine.data.scene.scene import open_scene
from engine.data.scene.source import RUN, SceneSource
from engine.data.scene.view import SceneView
from tests.conftest import ROOT, SHARED, Command, environment
from tests.scenes import CRS, DATASET, ORIGIN, TILE, image, make_scene, place, write_raster

HEIGHT, WIDTH = 150, 170
RADAR, OPTICAL, RELIEF = DATASET.sensors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scene")
    make_scene(folder, HEIGHT, WIDTH)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """That a test may change."""
    return Path(shutil.copytree(made, tmp_path / "scene"))


def say(folder: Path, **keys: Any) -> Path:
    path = folder / "scene.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **keys}, sort_keys=False))
    return path


def whole(scene: Any, sensor: int, step: int) -> Any:
    return Rasters(scene, 1).read(sensor, step, Box(0, 0, scene.grid.height, scene.grid.width))


# What a scene says -------------------------------------------------------------------------------------------------


def test_a_pattern_finds_the_steps_that_there_are(made: Path) -> None:
    scene = open_scene(made / "scene.yaml")
    assert scene.months == ((True,) * 3, (True, True, False), (True,) * 3)
    assert (scene.grid.height, scene.grid.width) == (HEIGHT, WIDTH)
    assert scene.grid.pixel_metres == (10, 10) and scene.grid.pixel_hectares == 0.01
    assert len(scene.files) == 6


def test_steps_by_number_and_name_and_a_file_a_band(copy: Path) -> None:
    found = whole(open_scene(copy / "scene.yaml"), 1, 1)
    for band in range(3):
        write_raster(copy / f"b{band}.tif", found.values[..., band], nodata=0)
    path = say(copy, images={"radar": {0: "rasters/radar_00.tif", "July": "rasters/radar_01.tif"},
                             "optical": {"June": ["b0.tif", "b1.tif", "b2.tif"]}, "relief": "rasters/relief.tif"})
    scene = open_scene(path)
    assert sorted(scene.images) == [(0, 0), (0, 2), (1, 1), (2, 0)]
    again = whole(scene, 1, 1)
    assert np.array_equal(again.values, found.values) and np.array_equal(again.seen, found.seen)


def test_what_a_scene_holds_is_said_by_itself_first(copy: Path) -> None:
    scene = open_scene(copy / "scene.yaml", load_dataset("biomassters"))
    assert scene.dataset == DATASET


def test_a_folder_of_one_chips_files(copy: Path) -> None:
    for path in (copy / "rasters").iterdir():
        path.rename(copy / f"place_{path.name}")
    (copy / "scene.yaml").unlink()
    assert open_scene(copy).months == ((True,) * 3, (True, True, False), (True,) * 3)
    late = Path(shutil.copy(copy / "place_radar_00.tif", copy / "place_radar_03.tif"))
    with pytest.raises(DataError, match=re.escape(f"{late}: step 3 does not exist; 'moor' has 3")):
        open_scene(copy)
    late.unlink()
    shutil.copy(copy / "place_radar_00.tif", copy / "other_radar_00.tif")
    with pytest.raises(DataError, match=r"holds 2 scenes: other, place; a folder of one has files named "
                                        r"\{chip\}_radar_00.tif"):
        open_scene(copy)


@pytest.mark.skipif(not (SHARED / "scene").is_dir(), reason=f"{SHARED / 'scene'} does not exist on this machine")
def test_the_real_scene() -> None:
    scene = open_scene(SHARED / "scene", load_dataset("biomassters"))
    assert [step for step, there in enumerate(scene.months[1]) if not there] == [1, 2] and all(scene.months[0])
    assert (scene.grid.height, scene.grid.width, scene.grid.crs.to_epsg()) == (100, 100, 32631)
    with rasterio.open(SHARED / "scene" / "scene_S1_03.tif") as raster:
        wanted = np.moveaxis(raster.read(), 0, -1)
    found = whole(scene, 0, 3)
    assert np.array_equal(found.values, wanted) and found.seen.all()
    assert (found.values[..., 2:] == -9999).all()  # the orbit that it lacks


def test_what_a_map_depends_on_changes_with_a_file(copy: Path) -> None:
    about = [open_scene(copy / "scene.yaml").about()]
    assert about[0] == open_scene(copy / "scene.yaml").about()
    relief, (west, north) = copy / "rasters" / "relief.tif", ORIGIN

    def changed(**keys: Any) -> bool:
        about.append(open_scene(say(copy, **keys)).about())
        return about[-1] not in about[:-1]

    size, time = relief.stat().st_size, relief.stat().st_mtime_ns
    os.utime(relief, ns=(time + 1, time + 1))
    assert changed()
    with relief.open("ab") as file:
        file.write(b"x")
    os.utime(relief, ns=(time, time))
    assert relief.stat().st_size > size and changed()
    for shift in (0, 10):
        assert changed(grid={"bounds": [west + shift, north - 900, west + shift + 900, north]})
    assert changed(resampling={"radar": "nearest"}) and changed(grid={"crs": 32634, "bounds": None, "resolution": 10})


# Pixels ------------------------------------------------------------------------------------------------------------


def test_pixels_and_where_there_are_some(made: Path) -> None:
    scene = open_scene(made / "scene.yaml")
    for sensor, step in ((0, 0), (0, 2), (1, 1)):
        described = DATASET.sensors[sensor]
        with rasterio.open(made / "rasters" / f"{described.name}_{step:02d}.tif") as raster:
            values, nodata = np.moveaxis(raster.read(), 0, -1), raster.nodata
        found = whole(scene, sensor, step)
        assert np.array_equal(found.seen, (values != nodata).any(-1)) and not found.seen.all()
        assert np.array_equal(found.values, np.where(values == nodata, described.absent, values))
    part = Rasters(scene, 1).read(0, 2, Box(20, 30, 50, 60))
    assert np.array_equal(part.values, whole(scene, 0, 2).values[20:70, 30:90])


def test_a_raster_beside_the_grids_corner_is_moved_by_whole_pixels(copy: Path) -> None:
    """Of another extent, with the grid's pixels: not one value is warped."""
    values = image(DATASET, RADAR, 0, 90, 80)
    write_raster(copy / "rasters" / "radar_00.tif", values, transform=place(-200, 300))
    write_raster(copy / "rasters" / "relief.tif", image(DATASET, RELIEF, 0, 200, 220), transform=place(-100, -100))
    # radar_01 gives the grid
    scene = open_scene(say(copy, images={**yaml.safe_load((copy / "scene.yaml").read_text())["images"],
                                         "radar": {1: "rasters/radar_01.tif", 0: "rasters/radar_00.tif"}}))
    found = whole(scene, 0, 0)
    wanted = np.zeros((HEIGHT, WIDTH), bool)
    wanted[30:120, :60] = True
    assert np.array_equal(found.seen, wanted)
    assert np.array_equal(found.values[30:120, :60], values[:, 20:]) and (found.values[~wanted] == -9999).all()
    assert scene.extents[0, 0] == Box(30, 0, 90, 60) and scene.extents[2, 0] == Box(0, 0, HEIGHT, WIDTH)
    for beside in (Box(125, 0, 20, 40), Box(0, 0, 30, 60), Box(40, 60, 20, 20)):
        assert not Rasters(scene, 1).read(0, 0, beside).seen.any()


@pytest.mark.parametrize("method", ["bilinear", "nearest", None])
def test_another_resolution_is_warped(copy: Path, method: str | None) -> None:
    """Twice as coarse: bilinear between its pixels' centres, or the pixel that a centre lies in."""
    y, x = np.mgrid[0:HEIGHT // 2, 0:WIDTH // 2].astype(np.float32)
    values = np.stack([-20 + 0.1 * x, -25 + 0.1 * y], -1)
    write_raster(copy / "rasters" / "radar_02.tif", values, nodata=-9999, transform=place(resolution=20))
    found = whole(open_scene(say(copy, resampling={"radar": method} if method else {})), 0, 2)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    column, row = ((x + 0.5) / 2 - 0.5, (y + 0.5) / 2 - 0.5) if method != "nearest" else (x // 2, y // 2)
    inner = np.s_[2:-2, 2:-2]
    assert found.seen[inner].all()
    assert np.allclose(found.values[inner], np.stack([-20 + 0.1 * column, -25 + 0.1 * row], -1)[inner], atol=1e-4)


@pytest.mark.parametrize(("resolution", "direct"), [(10, True), (10.0002, False)])
def test_pixels_are_taken_as_they_lie_where_the_last_one_lies_on_the_grid_too(copy: Path, resolution: float,
                                                                              direct: bool) -> None:
    path = write_raster(copy / "rasters" / "radar_01.tif", image(DATASET, RADAR, 1, HEIGHT, WIDTH),
                        transform=place(resolution=resolution))
    opened = Rasters(open_scene(copy / "scene.yaml"), 1)._open(path, RADAR)
    assert (opened.raster is opened.source) == direct


@pytest.mark.parametrize(("right", "down"), [(5, 0), (0, 5)])
def test_half_a_pixel_beside_the_grid_is_warped(copy: Path, right: int, down: int) -> None:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    write_raster(copy / "rasters" / "radar_01.tif", np.stack([x / 10, y / 10], -1), transform=place(right, down))
    found = whole(open_scene(copy / "scene.yaml"), 0, 1).values[2:-2, 2:-2]
    assert np.allclose(found, np.stack([(x - right / 10) / 10, (y - down / 10) / 10], -1)[2:-2, 2:-2], atol=1e-4)


def test_the_same_numbers_in_another_zone_are_another_place(copy: Path) -> None:
    scene = open_scene(copy / "scene.yaml")
    west, south, east, north = moved(scene.grid.crs, rasterio.crs.CRS.from_epsg(32634), scene.grid.bounds)
    transform = rasterio.transform.from_origin(west // 10 * 10, north // 10 * 10, 10, 10)
    size = int(north - south) // 10, int(east - west) // 10
    write_raster(copy / "rasters" / "radar_01.tif", image(DATASET, RADAR, 1, *size), crs="EPSG:32634",
                 transform=transform)
    assert whole(open_scene(copy / "scene.yaml"), 0, 1).seen.mean() > 0.95


@pytest.mark.parametrize(("said", "transform"), [(None, place(resolution=20)), (-1, place())])
def test_nodata_of_the_sensor_counts_beside_that_of_the_file(copy: Path, said: float | None, transform: Any) -> None:
    values = image(DATASET, RADAR, 1, HEIGHT, WIDTH)
    values[20:30, 20:30] = -9999
    write_raster(copy / "rasters" / "radar_01.tif", values, nodata=said, transform=transform)
    found = whole(open_scene(copy / "scene.yaml"), 0, 1)
    assert not found.seen.all() and set(np.unique(found.values[found.values < -50])) == {-9999}


def test_another_crs_is_warped_and_each_band_keeps_its_own_holes(copy: Path) -> None:
    """What lies in degrees comes to the grid; nodata of one band neither hides the other nor bleeds into it."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    values = np.stack([-20 + 0.05 * x, -25 + 0.05 * y], -1)
    values[40:80, 40:90, 0] = -9999
    path = write_raster(copy / "utm.tif", values, nodata=-9999)
    with rasterio.open(path) as source, rasterio.vrt.WarpedVRT(source, crs="EPSG:4326", resampling=rasterio.enums.
                                                               Resampling.nearest, UNIFIED_SRC_NODATA="NO") as warped:
        moved, transform = np.moveaxis(warped.read(), 0, -1), warped.transform
    write_raster(copy / "rasters" / "radar_02.tif", moved, nodata=-9999, crs="EPSG:4326", transform=transform)
    found = whole(open_scene(copy / "scene.yaml"), 0, 2)
    inner = np.s_[5:-5, 5:-5]
    assert found.seen[inner].all()  # VH is there where VV is not
    assert np.abs(found.values[inner][..., 1] - values[inner][..., 1]).max() < 0.08  # a pixel and a half
    hole = found.values[..., 0] == -9999
    assert hole[44:76, 44:86].all() and not hole[inner][:30].any()
    both = ~hole[inner] & (values[inner][..., 0] > -9999)
    assert np.abs(found.values[..., 0] - values[..., 0])[inner][both].max() < 0.08


@pytest.mark.parametrize("shift", [0, 5])
def test_a_nodata_that_bytes_cannot_hold_takes_no_values(copy: Path, shift: float) -> None:
    """−9999, cast to a byte, is 241: which is a value."""
    values = np.full((HEIGHT, WIDTH, 2), 241, np.uint8)
    write_raster(copy / "rasters" / "radar_02.tif", values, transform=place(shift, shift))
    found = whole(open_scene(copy / "scene.yaml"), 0, 2)
    assert found.seen[2:, 2:].all() and (found.values[2:, 2:] == 241).all()


@pytest.mark.parametrize("shift", [0, 5])
def test_a_mask_of_a_raster_says_where_it_has_values(copy: Path, shift: float) -> None:
    path, mask = copy / "rasters" / "optical_01.tif", np.full((HEIGHT, WIDTH), 255, np.uint8)
    mask[:40] = 0
    path.unlink()
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(
            path, "w", driver="GTiff", height=HEIGHT, width=WIDTH, count=3, dtype="uint16", crs=CRS,
            transform=place(shift, shift)) as raster:
        raster.write(np.full((3, HEIGHT, WIDTH), 700, np.uint16))
        raster.write_mask(mask)
    found = whole(open_scene(copy / "scene.yaml"), 1, 1)
    assert not found.seen[:40].any() and found.seen[42:, 2:].all()
    assert (found.values[:40] == 0).all() and (found.values[42:, 2:] == 700).all()


def mosaic(folder: Path, kinds: list[str], nodata: list[int], shift: float = 0) -> None:
    """optical_01, by way of a virtual raster, which may say other things of each band."""
    rasters = folder / "rasters"
    if (rasters / "optical_01.tif").exists():
        (rasters / "optical_01.tif").rename(rasters / "source.tif")
    bands = "".join(f'<VRTRasterBand dataType="{kind}" band="{band}"><NoDataValue>{mark}</NoDataValue><SimpleSource>'
                    f'<SourceFilename relativeToVRT="1">source.tif</SourceFilename><SourceBand>{band}</SourceBand>'
                    f'</SimpleSource></VRTRasterBand>' for band, (kind, mark) in enumerate(zip(kinds, nodata), 1))
    place_ = ", ".join(map(str, place(shift).to_gdal()))
    say(folder, images={**yaml.safe_load((folder / "scene.yaml").read_text())["images"],
                        "optical": {0: "rasters/optical_00.tif", 1: "rasters/optical_01.vrt"}})
    (rasters / "optical_01.vrt").write_text(
        f'<VRTDataset rasterXSize="{WIDTH}" rasterYSize="{HEIGHT}"><SRS>{CRS}</SRS><GeoTransform>{place_}'
        f'</GeoTransform>{bands}</VRTDataset>')


def test_each_band_has_its_own_nodata(copy: Path) -> None:
    values = np.full((HEIGHT, WIDTH, 3), 500, np.uint16)
    values[:10] = 7, 8, 9
    values[10:20] = 9, 7, 8
    write_raster(copy / "rasters" / "optical_01.tif", values)
    mosaic(copy, ["UInt16"] * 3, [7, 8, 9])
    found = whole(open_scene(copy / "scene.yaml"), 1, 1)
    assert not found.seen[:10].any() and (found.values[:10] == 0).all()
    assert found.seen[10:].all() and np.array_equal(found.values[10:], values[10:])


def test_bands_that_do_not_go_together_are_refused(copy: Path) -> None:
    path = copy / "rasters" / "optical_01.vrt"
    mosaic(copy, ["UInt16"] * 3, [7, 8, 9], shift=5)
    with pytest.raises(DataError, match=re.escape(f"{path}: does not lie on the grid, and its bands have other nodata "
                                                  f"each (7.0, 8.0, 9.0): GDAL warps with one; give one file a band")):
        whole(open_scene(copy / "scene.yaml"), 1, 1)
    mosaic(copy, ["UInt16", "Byte", "UInt16"], [0, 0, 0])
    with pytest.raises(DataError, match=re.escape(f"{path}: its bands are uint16, uint8, uint16; give bands of one")):
        open_scene(copy / "scene.yaml")


def test_a_raster_that_lies_south_up_is_brought_to_a_grid(copy: Path) -> None:
    path = copy / "rasters" / "radar_00.tif"
    wanted = whole(open_scene(say(copy, grid={"resolution": 10})), 0, 0)
    with rasterio.open(path) as raster:
        values = np.moveaxis(raster.read(), 0, -1)
    upside = rasterio.Affine(10, 0, place().c, 0, 10, place().f - 10 * HEIGHT)
    write_raster(path, values[::-1], nodata=-9999, transform=upside)
    scene = open_scene(copy / "scene.yaml")
    assert (scene.grid.height, scene.grid.transform) == (HEIGHT, place())
    assert np.array_equal(whole(scene, 0, 0).values, wanted.values)


def test_without_nodata_a_warped_raster_is_seen_where_it_lies(copy: Path) -> None:
    values = image(DATASET, OPTICAL, 0, 40, 50)
    values[10:20, 10:20] = 0  # a value like any other here
    write_raster(copy / "rasters" / "optical_00.tif", values, transform=place(205, 305))
    found = whole(open_scene(copy / "scene.yaml"), 1, 0)
    rows, columns = np.flatnonzero(found.seen.any(1)), np.flatnonzero(found.seen.any(0))
    assert abs(rows[0] - 30) <= 1 and abs(rows[-1] - 70) <= 1 and abs(columns[0] - 20) <= 1
    assert found.seen[32:68, 22:68].all() and not found.values[~found.seen].any()


def test_nan_is_nothing_seen_and_infinity_is_refused(copy: Path) -> None:
    values = image(DATASET, RADAR, 1, HEIGHT, WIDTH)
    values[5:9, 5:9] = np.nan
    path = write_raster(copy / "rasters" / "radar_01.tif", values)
    found = whole(open_scene(copy / "scene.yaml"), 0, 1)
    assert not found.seen[5:9, 5:9].any() and found.seen.sum() == HEIGHT * WIDTH - 16
    assert (found.values[5:9, 5:9] == -9999).all()
    values[0, 0, 1] = np.inf
    write_raster(path, values)
    with pytest.raises(DataError, match=re.escape(f"{path}: holds infinity; write nodata")):
        whole(open_scene(copy / "scene.yaml"), 0, 1)


def test_few_files_are_open_at_once(made: Path) -> None:
    scene = open_scene(made / "scene.yaml")
    few, box, opened = Rasters(scene, 1), Box(0, 0, 20, 20), []
    few._most = 2
    for key in (*scene.images, *scene.images):
        assert np.array_equal(few.read(*key, box).values, Rasters(scene, 1).read(*key, box).values)
        held = few._own.held
        opened += [one.source for one in held.values() if one.source not in opened]
        assert len(held) <= 2 and scene.images[key][0][0].path in held  # the one that was used last
    assert len(opened) == 12 and sum(not source.closed for source in opened) == 2


def test_a_file_that_went_away_meanwhile(copy: Path) -> None:
    scene = open_scene(copy / "scene.yaml")
    (copy / "rasters" / "relief.tif").unlink()
    with pytest.raises(DataError, match=r"relief.tif: cannot be opened \(.*\); was it changed meanwhile?"):
        whole(scene, 2, 0)


# Windows as chips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", [0, 2, 4])
def test_a_window_is_what_lies_there_mirrored_at_the_border(made: Path, column: int) -> None:
    scene = open_scene(made / "scene.yaml")
    windows = Windows(HEIGHT, WIDTH, TILE, 32)
    source = SceneSource(scene, windows, 2)
    for row in range(len(windows.rows)):
        stack = source.stack(source.chip(row, column))
        rows = mirrored(windows.rows[row], TILE, HEIGHT)
        columns = mirrored(windows.columns[column], TILE, WIDTH)
        seen = np.zeros((TILE, TILE), bool)
        for slot, step in enumerate(stack.months):
            for sensor in range(3):
                if (sensor, 0 if sensor == 2 else int(step)) in scene.images:
                    found = whole(scene, sensor, 0 if sensor == 2 else int(step))
                    assert np.array_equal(stack.images[sensor][slot], found.values[np.ix_(rows, columns)])
                    if sensor < 2:
                        seen |= found.seen[np.ix_(rows, columns)]
                else:
                    assert (stack.images[sensor][slot] == DATASET.sensors[sensor].absent).all()
        assert np.array_equal(source.seen.pop(f"{row}/{column}"), seen)


def test_steps_without_a_value_are_left_out_of_a_window(copy: Path) -> None:
    for step in (0, 1):  # the left half of two steps: nothing of either sensor
        for sensor in (RADAR, OPTICAL):
            values = image(DATASET, sensor, step, HEIGHT, WIDTH)
            values[:, :100] = -9999 if sensor is RADAR else 0
            write_raster(copy / "rasters" / f"{sensor.name}_{step:02d}.tif", values, nodata=values[0, 0, 0])
    windows = Windows(HEIGHT, WIDTH, TILE, 0)
    source = SceneSource(open_scene(copy / "scene.yaml"), windows, 1)
    stack = source.stack(source.chip(0, 0))
    assert stack.months.tolist() == [2]
    rows, columns = (mirrored(places[0], TILE, length) for places, length in ((windows.rows, HEIGHT),
                                                                              (windows.columns, WIDTH)))
    assert np.array_equal(stack.images[0][0], whole(source.scene, 0, 2).values[np.ix_(rows, columns)])
    assert source.stack(source.chip(0, len(windows.columns) - 1)).months.tolist() == [0, 1, 2]
    write_raster(copy / "rasters" / "optical_01.tif", image(DATASET, OPTICAL, 1, HEIGHT, WIDTH))  # one sensor saw some
    source = SceneSource(open_scene(copy / "scene.yaml"), windows, 1)
    assert source.stack(source.chip(0, 0)).months.tolist() == [1, 2]


def test_a_window_without_any_value_is_one_empty_step(copy: Path) -> None:
    for path in (copy / "rasters").glob("*_0*.tif"):
        sensor = RADAR if path.name.startswith("radar") else OPTICAL
        values = image(DATASET, sensor, 0, HEIGHT, WIDTH)
        values[:, :100] = -9999 if sensor is RADAR else 0
        write_raster(path, values, nodata=values[0, 0, 0])
    source = SceneSource(open_scene(copy / "scene.yaml"), Windows(HEIGHT, WIDTH, TILE, 0), 1)
    stack = source.stack(source.chip(1, 0))
    assert stack.months.tolist() == [0] and (stack.images[0] == -9999).all() and not stack.images[1].any()
    assert not source.seen["1/0"].any()


def test_a_buffer_holds_nothing_of_the_window_before(made: Path) -> None:
    source = SceneSource(open_scene(made / "scene.yaml"), Windows(HEIGHT, WIDTH, TILE, 0), 1)
    into = source.buffer()
    for values in (*into.images, into.label):
        values.fill(7)
    found, clean = source.read(source.chip(1, 1), None, into), source.stack(source.chip(1, 1))
    assert all(np.array_equal(a, b) for a, b in zip(found.images, clean.images)) and not found.label.any()


def test_a_run_of_windows_is_read_once_by_whoever_comes_first(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = open_scene(made / "scene.yaml")
    windows, read, calls = Windows(HEIGHT, WIDTH, TILE, 32), Rasters.read, []

    def slow(self: Rasters, *args: Any) -> Any:
        calls.append(args)
        time.sleep(0.005)
        return read(self, *args)

    monkeypatch.setattr(Rasters, "read", slow)
    source = SceneSource(scene, windows, 4)
    chips = [source.chip(row, column) for row in range(2) for column in range(len(windows.columns))]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(source.stack, chips))
    runs = -(-len(windows.columns) // RUN)
    assert runs > 1 and len(calls) == len(set(calls)) == 2 * runs * len(scene.images)
    assert not source._runs  # nor held for longer than it takes


def test_a_file_that_cannot_be_read_is_told_to_all_its_windows(copy: Path) -> None:
    path = write_raster(copy / "rasters" / "radar_01.tif", image(DATASET, RADAR, 1, HEIGHT, WIDTH), compress=None)
    path.write_bytes(path.read_bytes()[:2_000])
    source = SceneSource(open_scene(copy / "scene.yaml"), Windows(HEIGHT, WIDTH, TILE, 0), 1)
    told = []

    def read(column: int) -> None:
        with pytest.raises(DataError, match="radar_01.tif: cannot be read"):
            source.stack(source.chip(0, column))
        told.append(column)

    for column in (0, 1):
        thread = threading.Thread(target=read, args=(column,), daemon=True)
        thread.start()
        thread.join(20)
    assert told == [0, 1]


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "words"), [
    ({"imagse": {}}, "imagse: is not a key of a scene"),
    ({"images": {"radra": "x_{step}.tif"}}, "'radra' is no sensor of 'moor'; is it 'radar'?"),
    ({"images": {"radar": "rasters/radar_00.tif"}}, "images.radar: give a pattern with {step}"),
    ({"images": {"radar": "rasters/none_{step:02d}.tif"}}, "no file has a name of 'rasters/none_{step:02d}.tif'"),
    ({"images": {"radar": {"Juni": "a.tif"}}},
     "'Juni' is no step: give a number from 0 to 2, or one of May, June, July"),
    ({"images": {"radar": {3: "a.tif"}}}, "3 is no step"),
    ({"images": {"radar": {1: "a.tif", "June": "b.tif"}}}, "images.radar: 1 is given twice, by number and by name"),
    ({"images": {"radar": f"{'x' * 300}{{step}}.tif"}}, "images.radar: no file has a name of 'xxx"),
    ({"grid": {"bounds": [0, 0, 1e9, 1e9]}}, "are larger than the Earth; give xmin, ymin, xmax, ymax"),
    ({"grid": {"crs": "+proj=ortho +lat_0=-60 +lon_0=-150"}}, "has no place in PROJCS"),
    ({"grid": {"resolution": 1e-320}}, "the grid's pixels are"),
    ({"images": {"radar": {-1: "rasters/radar_00.tif"}}}, "-1 is no step"),
    ({"images": {"radar": "rasters/radar_{step:02d}{chip}.tif"}}, "images.radar: give a pattern with {step}"),
    ({"images": {"radar": "{step}/radar_{step:02d}.tif"}}, "images.radar: give a pattern with {step}"),
    ({"images": {"radar": {0: ["rasters/radar_00.tif"] * 3}}}, "3 files for 2 bands (VV, VH)"),
    ({"images": {"optical": {0: ["rasters/optical_00.tif"] * 2}}}, "2 files for 3 bands (red, nir, swir)"),
    ({"resampling": {"radra": "nearest"}}, "'radra' is no sensor of 'moor'"),
    ({"stac": {"items": "items.json", "assets": {"radra": ["vv"]}}}, "'radra' is no sensor of 'moor'"),
    ({"images": {"radar": {0: ["a.tif", "b.tif", "c.tif"]}}}, "3 files for 2 bands (VV, VH)"),
    ({"images": {"relief": {0: "rasters/relief.tif"}}}, "images.relief: is static"),
    ({"images": {"relief": "rasters/relief.tif"}}, "has no image of radar, optical"),
    ({"images": {"radar": "rasters/radar_{step:02d}.tif"}}, "has no relief, which 'moor' needs"),
    ({"resampling": {"radar": "cubic"}}, "resampling.radar: Input should be 'bilinear' or 'nearest'"),
    ({"grid": {"crs": "EPSG:99999999"}}, "grid.crs 'EPSG:99999999'"),
    ({"grid": {"crs": "EPSG:4326"}}, "the grid is in degrees (EPSG:4326), the model knows pixels of 10 m"),
    ({"grid": {"resolution": 20}}, "the grid's pixels are 20 m, those of 'moor' 10 m"),
    ({"grid": {"bounds": [500000, 6800000, 500000, 6800000]}}, "are empty; give xmin"),
    ({"grid": {"bounds": [0, 0, 5000, 5000]}}, "lies beside the scene's grid"),
])
def test_scenes_that_do_not_hold(copy: Path, keys: dict[str, Any], words: str) -> None:
    path = say(copy, **keys)
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        open_scene(path)
    assert str(caught.value).startswith(str(copy))


def test_a_grid_in_metres_is_proposed_for_rasters_in_degrees(tmp_path: Path) -> None:
    transform = rasterio.transform.from_origin(27.0, 61.0, 1e-4, 1e-4)
    make_scene(tmp_path)
    for path in (tmp_path / "rasters").iterdir():
        with rasterio.open(path) as raster:
            values, nodata = np.moveaxis(raster.read(), 0, -1), raster.nodata
        write_raster(path, values, nodata=nodata, crs="EPSG:4326", transform=transform)
    with pytest.raises(DataError, match="give the scene a grid in metres, grid: {crs: EPSG:…}, here EPSG:32635"):
        open_scene(tmp_path / "scene.yaml")
    scene = open_scene(say(tmp_path, grid={"crs": "EPSG:32635"}))
    assert scene.grid.pixel_metres == (10, 10) and whole(scene, 0, 0).seen.mean() > 0.5
    west, south, _, north = scene.grid.bounds
    assert west % 10 == north % 10 == 0 and (north - south) / 10 == scene.grid.height


def header(epsg: int, transform: Any, width: int = 100, height: int = 80) -> Header:
    return Header(rasterio.crs.CRS.from_epsg(epsg), transform, width, height, 2, np.dtype(np.float32), None)


def test_the_zone_that_is_proposed_is_the_places_own() -> None:
    for west, north, epsg in ((27.0, 61.0, 32635), (-179.9, -20.0, 32701), (5.99, -33.0, 32731)):
        degrees = header(4326, rasterio.transform.from_origin(west, north, 1e-4, 1e-4))
        with pytest.raises(DataError, match=f"here EPSG:{epsg}$"):
            make_grid(Path("s"), degrees, GridKeys(), DATASET)
    with pytest.raises(DataError, match="EPSG:…}$"):  # where the degrees are what was asked for
        make_grid(Path("s"), header(32635, place()), GridKeys(crs="EPSG:4326"), DATASET)


def test_a_grid_that_is_asked_for() -> None:
    first, (x, y) = header(32635, place()), ORIGIN
    grid = make_grid(Path("s"), first, GridKeys(bounds=(x + 3, y - 404, x + 203, y - 4)), DATASET)
    assert grid.bounds == (x + 3, y - 404, x + 203, y - 4) and (grid.height, grid.width) == (40, 20)
    grid = make_grid(Path("s"), first, GridKeys(resolution=10.05), DATASET)
    assert grid.pixel_metres == (10.05, 10.05) and grid.bounds[::3] == (x, y) and (grid.height, grid.width) == (80, 100)
    feet = make_grid(Path("s"), header(32617, rasterio.transform.from_origin(600_003, 3_900_007, 10, 10)),
                     GridKeys(crs="EPSG:2264"), DATASET)
    assert feet.pixel_metres == pytest.approx((10, 10)) and 75 < feet.height < 95 and 95 < feet.width < 115
    west, _, _, north = (value / feet.transform.a for value in feet.bounds)
    assert west == pytest.approx(round(west), abs=1e-6) and north == pytest.approx(round(north), abs=1e-6)
    west, south, east, north = moved(rasterio.crs.CRS.from_epsg(32617), feet.crs, (600_003, 3_899_207, 601_003,
                                                                                  3_900_007))
    assert feet.bounds[0] <= west and feet.bounds[1] <= south + 33 and feet.bounds[2] >= east - 33 \
        and feet.bounds[3] >= north


@pytest.mark.parametrize(("transform", "keys", "words"), [
    (rasterio.Affine(10, 0, 5e5, 0, -20, 68e5), {}, "the grid's pixels are 20 m, those of 'moor' 10 m"),
    (place(), {"resolution": 10.2}, "the grid's pixels are 10.2 m"),
    (place(), {"bounds": (5e5, 68e5, 5e5 + 3, 68e5 + 90)}, "are empty"),
    (place(), {"bounds": (5e5, 68e5, 5e5 + 90, 68e5 + 3)}, "are empty"),
    (place(5e9), {"crs": 3067}, r"\[.*\] in EPSG:32635 has no place in EPSG:3067")])
def test_grids_that_cannot_be(transform: Any, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        make_grid(Path("s"), header(32635, transform), GridKeys(**keys), DATASET)


def test_what_has_no_place_on_earth_is_moved_nowhere() -> None:
    plan = rasterio.crs.CRS.from_wkt('LOCAL_CS["site plan",UNIT["metre",1]]')
    with pytest.raises(DataError, match=r"\[0, 0, 9, 9\] in .* has no place in EPSG:32635 \(Cannot find coordinate op"):
        moved(plan, rasterio.crs.CRS.from_epsg(32635), (0, 0, 9, 9))


def test_extents_are_the_box_around_what_a_raster_covers() -> None:
    grid = Grid(rasterio.crs.CRS.from_epsg(32635), place(), 50, 40)
    for x, y, box in ((-33, -57, Box(0, 0, 35, 47)), (107, 106, Box(10, 10, 30, 40)), (490, 390, Box(39, 49, 1, 1)),
                      (0.001, -0.001, Box(0, 0, 40, 50)), (500, 0, None), (0, 400, None), (-500, 0, None),
                      (0, -400, None)):
        assert extent(header(32635, place(x, y), 50, 40), grid) == box


def test_rasters_that_do_not_hold(copy: Path) -> None:
    scene, path = copy / "scene.yaml", copy / "rasters" / "radar_01.tif"

    def refused(words: str) -> None:
        with pytest.raises(DataError, match=re.escape(f"{path}: {words}")):
            whole(open_scene(scene), 0, 1)

    good = image(DATASET, RADAR, 1, HEIGHT, WIDTH)
    write_raster(path, good[..., :1])
    refused("has 1 bands, not the 2 of radar (VV, VH)")
    write_raster(path, good[..., [0, 1, 1]])
    refused("has 3 bands, not the 2 of radar (VV, VH)")
    write_raster(path, good.astype(np.float64))
    refused("is float64, where radar is float32; convert it")
    write_raster(path, good, transform=rasterio.Affine.identity())
    refused("has no CRS or no place")
    write_raster(path, good, crs="")
    refused("has no CRS or no place")
    for where in (place(float("nan")), place(1e300), rasterio.Affine(10, 10, 0, 10, 10, 0)):
        write_raster(path, good, transform=where)
        refused("has no CRS or no place")
    write_raster(path, good, transform=place(50_000))
    refused("lies beside the scene's grid")
    path.write_bytes(b"no raster")
    refused("is no raster that GDAL reads")
    write_raster(path, good, compress=None)
    path.write_bytes(path.read_bytes()[:-20_000])
    refused("cannot be read at rows 0 to 150 of its place on the grid")
    write_raster(path, good, crs=CRS)
    assert whole(open_scene(scene), 0, 1).seen.all()


@pytest.mark.parametrize(("text", "words"), [("[", "is no YAML"), ("- 1", "is no scene"), ("a: b", "is not a key")])
def test_files_that_are_no_scene(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(DataError, match=words):
        open_scene(tmp_path / "s.yaml")
    with pytest.raises(DataError, match="no scene: cannot be read"):
        open_scene(tmp_path / "none.yaml")
    with pytest.raises(DataError, match="holds no scenes"):
        open_scene(tmp_path)


def test_a_narrower_dtype_is_taken(copy: Path) -> None:
    values = (image(DATASET, OPTICAL, 0, HEIGHT, WIDTH) // 64).astype(np.uint8)
    write_raster(copy / "rasters" / "optical_00.tif", values)
    assert np.array_equal(whole(open_scene(copy / "scene.yaml"), 1, 0).values, values)


# STAC --------------------------------------------------------------------------------------------------------------


def collection(folder: Path, *items: tuple[str, str, float, dict[str, str]]) -> None:
    """items.json of (id, date, clouds, assets)."""
    (folder / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": [
        {"type": "Feature", "stac_version": "1.0.0", "id": name, "geometry": None, "links": [],
         "properties": {"datetime": f"{date}T10:00:00Z", "eo:cloud_cover": clouds},
         "assets": {asset: {"href": href} for asset, href in assets.items()}}
        for name, date, clouds, assets in items]}))


def test_items_of_a_month_fill_one_another_the_clearest_first(copy: Path) -> None:
    rasters, images = copy / "rasters", [image(DATASET, OPTICAL, step, HEIGHT, WIDTH) for step in (0, 1)]
    clear, cloudy = images[0].copy(), images[1]
    clear[:, 90:] = 0
    for name, values in (("clear", clear), ("cloudy", cloudy)):
        for band, asset in enumerate(("r", "n", "s")):
            write_raster(rasters / f"{name}_{asset}.tif", values[..., band], nodata=0)
    assets = {name: {asset: f"rasters/{name}_{asset}.tif" for asset in ("r", "n", "s")} for name in ("clear", "cloudy")}
    collection(copy, ("b", "2021-06-20", 60, assets["cloudy"]), ("a", "2021-06-03", 5, assets["clear"]),
               ("c", "2021-11-03", 0, assets["clear"]), ("d", "2021-07-03", 0, {"r": "rasters/clear_r.tif"}))
    said = yaml.safe_load((copy / "scene.yaml").read_text())["images"]
    del said["optical"]
    path = say(copy, images=said, stac={"items": "items.json", "assets": {"optical": ["r", "n", "s"]}})
    scene = open_scene(path)
    assert [key for key in scene.images if key[0] == 1] == [(1, 1)] and len(scene.images[1, 1]) == 2
    found = whole(scene, 1, 1)
    assert np.array_equal(found.values[:, :90], clear[:, :90]) and np.array_equal(found.values[:, 90:], cloudy[:, 90:])
    assert found.seen.all()


def test_tiles_side_by_side_are_one_image(copy: Path) -> None:
    first = write_raster(copy / "a.tif", image(DATASET, RADAR, 0, 60, 50), nodata=-9999, transform=place(100, 200))
    write_raster(copy / "b.tif", image(DATASET, RADAR, 1, 50, 80), nodata=-9999, transform=place(300, 400))
    collection(copy, ("a", "2021-06-20", 0, {"vv": "a.tif"}), ("b", "2021-06-21", 1, {"vv": "b.tif"}))
    west, north = ORIGIN
    scene = open_scene(say(copy, images={"relief": "rasters/relief.tif"},
                           grid={"bounds": [west, north - 1500, west + 1700, north]},
                           stac={"items": "items.json", "assets": {"radar": ["vv"]}}))
    assert scene.extents[0, 1] == Box(20, 10, 70, 100)
    found, wanted = whole(scene, 0, 1), np.full((HEIGHT, WIDTH, 2), -9999, np.float32)
    for name, part in (("b", np.s_[40:90, 30:110]), ("a", np.s_[20:80, 10:60])):
        with rasterio.open(first.with_name(f"{name}.tif")) as raster:
            wanted[part] = np.moveaxis(raster.read(), 0, -1)
    assert np.array_equal(found.values, wanted) and np.array_equal(found.seen, wanted[..., 0] != -9999)


@pytest.mark.parametrize(("assets", "href", "words"), [
    (["r", "x"], "rasters/radar_00.tif", "no item of these months has the assets r, x of optical; its items have r"),
    (["r"], "https://example.com/r.tif", "asset r of item a is not on this machine (https://example.com/r.tif)"),
    (["r"], "rasters/none.tif", "none.tif: no such file")])
def test_items_that_do_not_hold(copy: Path, assets: list[str], href: str, words: str) -> None:
    collection(copy, ("a", "2021-06-20", 60, {"r": href}))
    with pytest.raises(DataError, match=re.escape(words)):
        open_scene(say(copy, images={"relief": "rasters/relief.tif"},
                       stac={"items": "items.json", "assets": {"optical": assets}}))
    (copy / "items.json").write_text("{}")
    with pytest.raises(DataError, match=r"items.json: is no STAC item collection"):
        open_scene(copy / "scene.yaml")


def test_what_items_say_and_do_not_say(copy: Path) -> None:
    """Clouds are not told of radar; an item may have a start instead of a date; hrefs may be URLs of files."""
    relief = (copy / "rasters" / "relief.tif").resolve()
    collection(copy, ("a", "2021-06-20", 0, {"vv": "rasters/radar_00.tif"}), ("b", "2021-07-03", 0, {"vv": ""}),
               ("c", "2020-12-24", 0, {"height": f"file://{relief}"}))
    said = json.loads((copy / "items.json").read_text())
    first, second, _ = said["features"]
    del first["properties"]["eo:cloud_cover"]
    second["assets"]["vv"]["href"] = "rasters/radar_01.tif"
    second["properties"] = {"datetime": None, "start_datetime": "2021-07-03T10:00:00Z",
                            "end_datetime": "2021-07-04T10:00:00Z"}
    (copy / "items.json").write_text(json.dumps(said))
    keys = {"items": "items.json", "assets": {"radar": ["vv"], "relief": ["height"]}}
    scene = open_scene(say(copy, images={}, stac=keys))
    assert {key: image[0][0].path.name for key, image in scene.images.items()} == {
        (0, 1): "radar_00.tif", (0, 2): "radar_01.tif", (2, 0): "relief.tif"}
    del second["properties"]["start_datetime"]
    (copy / "items.json").write_text(json.dumps(said))
    with pytest.raises(DataError, match="items.json: is no STAC item collection .*start_datetime"):
        open_scene(copy / "scene.yaml")


def test_images_go_before_items(copy: Path) -> None:
    collection(copy, ("a", "2021-06-20", 0, {"vv": "rasters/radar_00.tif"}), ("b", "2021-07-20", 0,
                                                                              {"vv": "rasters/radar_01.tif"}))
    scene = open_scene(say(copy, images={"radar": {"July": "rasters/radar_02.tif"}, "relief": "rasters/relief.tif"},
                           stac={"items": "items.json", "assets": {"radar": ["vv"]}}))
    assert [scene.images[0, step][0][0].path.name for step in (1, 2)] == ["radar_00.tif", "radar_02.tif"]


def test_steps_that_are_no_months_take_no_items(copy: Path) -> None:
    collection(copy, ("a", "2021-06-20", 5, {"r": "rasters/radar_00.tif"}))
    described = yaml.safe_load((copy / "dataset.yaml").read_text())
    for steps in (["May", "June", "leafless"], ["MAY", "Jun", "jul"]):
        (copy / "dataset.yaml").write_text(yaml.safe_dump({**described, "steps": steps}))
        path = say(copy, images={"relief": "rasters/relief.tif"},
                   stac={"items": "items.json", "assets": {"radar": ["r"]}})
        if "leafless" in steps:
            with pytest.raises(DataError, match="items belong to steps by their month, and 'moor' has steps May, June"):
                open_scene(path)
        else:
            assert (0, 1) in open_scene(path).images


def test_items_want_pystac(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pystac", None)
    with pytest.raises(EngineError, match=r"needs pystac: pip install -e '.\[stac\]'"):
        open_scene(say(copy, stac={"items": "items.json", "assets": {}}))


def test_a_scene_of_nothing(copy: Path) -> None:
    with pytest.raises(DataError, match="names no rasters; give images"):
        open_scene(say(copy, images={}))


# To look at --------------------------------------------------------------------------------------------------------


def test_inspect_says_where_it_lies_and_what_it_has(made: Path, tmp_path: Path, command: Command) -> None:
    done = command("prepare", "inspect", "--scene", made / "scene.yaml", "--out", tmp_path / "look.png")
    assert done.returncode == 0, done.stderr
    assert "'moor', 150 × 170 pixels of 10 m, 6 files" in done.stdout
    assert "EPSG:32635: x 500000 to 501700, y 6798500 to 6800000" in done.stdout
    assert re.search(r"longitude 27\.0000 to 27\.0\d+, latitude 61\.\d+ to 61\.\d+", done.stdout), done.stdout
    seen = [whole(open_scene(made / "scene.yaml"), sensor, 0).seen.mean() for sensor in (0, 1)]
    assert re.search(rf"May +{seen[0]:.1%} +{seen[1]:.1%}\n", done.stdout)
    assert re.search(r"July +\d+\.\d% +–\n", done.stdout) and "relief: 100.0%" in done.stdout
    nothing = 1 - np.any([whole(open_scene(made / "scene.yaml"), *key).seen for key in ((0, 0), (0, 1), (1, 0))], 0)
    assert f"without a value in any step: {nothing.mean():.1%}" in done.stdout
    assert (tmp_path / "look.png").stat().st_size > 10_000


def test_a_large_scene_is_looked_at_from_afar(tmp_path: Path) -> None:
    scene = open_scene(make_scene(tmp_path, 700, 1400))
    view = SceneView(scene)
    assert view.pixels[0, 1].seen.shape == (256, 512)
    exact, seen = whole(scene, 0, 1), view.pixels[0, 1]
    assert abs(exact.seen.mean() - seen.seen.mean()) < 0.01
    assert np.isin(seen.values[seen.seen][:, 0], exact.values[exact.seen][:, 0]).all()  # pixels of its own


@pytest.mark.parametrize("words", [["--data", "x"], ["--scene", "x", "--chip", "a"], []])
def test_inspect_wants_a_chip_or_a_scene(command: Command, words: list[str]) -> None:
    done = command("prepare", "inspect", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_without_the_extra_it_is_named(tmp_path: Path) -> None:
    code = ("import sys; sys.modules['rasterio'] = None; sys.argv = ['prepare.py', 'inspect', '--scene', 'x']; "
            "import runpy; runpy.run_path('launch/prepare.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "scenes need rasterio and rio-cogeo" in done.stderr
    assert "pip install -e '.[scene]'" in done.stderr and "Traceback" not in done.stderr
