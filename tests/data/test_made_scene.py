"""Made scenes: one landscape without lines, whatever part is drawn; rasters that are whole and lie where they say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml

from engine.base.errors import ConfigError, DataError
from engine.data.biomassters import BIOMASSTERS, S1, S2, T
from engine.data.dataset import Dataset, Sensor, load_dataset, parse_dataset
from engine.data.made import lattice, scene
from engine.data.made.landscape import Fields, Forest, landscape
from engine.data.made.lattice import BLOCK
from tests.conftest import ROOT, environment

GRASSLAND = load_dataset(ROOT / "configs/datasets/grassland.yaml")
SIZE, SEED = 320, 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scenes")
    for dataset in (BIOMASSTERS, GRASSLAND):
        scene.make_scene(folder / dataset.name, dataset, SIZE, SEED)
    return {dataset.name: folder / dataset.name for dataset in (BIOMASSTERS, GRASSLAND)}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read(path: Path) -> np.ndarray:
    """[H, W, bands]"""
    with rasterio.open(path) as file:
        return np.moveaxis(file.read(), 0, -1)


def whole(draw: Callable[[tuple[int, int]], np.ndarray], blocks: int = 4) -> np.ndarray:
    return np.concatenate([np.concatenate([draw((i, j)) for j in range(blocks)], 1) for i in range(blocks)])


FOREST, FIELDS = Forest(7), Fields(GRASSLAND, 7)
DRAWN: dict[str, Callable[[tuple[int, int]], np.ndarray]] = {
    "rough": lambda block: lattice.field((1,), 1.5, 64, 1, block),
    "smooth": lambda block: lattice.field((2,), 3.5, 64, 4, block),
    "region": lambda block: lattice.field((3,), 3.5, 512, 128, block),
    "biomass": lambda block: FOREST.stand(block).biomass,
    "conifer": lambda block: FOREST.stand(block).conifer,
    "S1": lambda block: FOREST.image(S1, 9, block)[..., 1],
    "S2": lambda block: FOREST.image(S2, 2, block)[..., 3].astype(float),
    "terrain": lambda block: FIELDS.image(GRASSLAND.sensors[2], 0, block)[..., 0],
    "height": FIELDS.label,
}


@pytest.mark.parametrize("name", DRAWN)
def test_no_line_shows_where_blocks_meet(name: str) -> None:
    """What changes from one row or column to the next is no more on a border of blocks, and no less, than elsewhere."""
    image = whole(DRAWN[name])
    for axis in (0, 1):
        change = (np.diff(image, axis=axis) ** 2).mean(1 - axis)
        borders = np.arange(1, 4) * BLOCK - 1
        others = np.delete(change, borders)
        # The change itself varies along a smooth field: a border is compared with the 20 lines around it as well
        for border in borders:
            near = np.delete(change[border - 10:border + 11], 10)
            assert others.min() <= change[border] <= others.max()
            assert 0.8 * near.min() <= change[border] <= 1.25 * near.max()


@pytest.mark.parametrize("slope", [1.5, 3.5])
def test_fields_are_standard_normal_everywhere(slope: float) -> None:
    """On the points of the lattice as between them, which plain interpolation would smooth."""
    many = np.stack([lattice.field((5, n), slope, 64, 4, (2, 9)) for n in range(400)])
    assert abs(many.mean()) < 0.02
    assert np.allclose(many.std(0), 1, atol=0.25) and abs(many.std() - 1) < 0.02
    finest = np.stack([lattice.field((6, n), 2.0, 8, 8, (0, 0)) for n in range(400)])
    by_phase = finest.reshape(400, BLOCK // 8, 8, BLOCK).std((0, 1, 3))
    assert np.allclose(by_phase, 1, atol=0.01)


def test_noise_is_of_its_own_in_every_block_and_step() -> None:
    def fine(sensor: Sensor, step: int, block: tuple[int, int]) -> np.ndarray:
        return np.diff(FOREST.image(sensor, step, block)[..., 0].astype(float)).ravel()

    for sensor in (S1, S2):
        first = fine(sensor, 9, (0, 0))
        for other in (fine(sensor, 9, (0, 1)), fine(sensor, 9, (1, 0)), fine(sensor, 10, (3, 4))):
            assert abs(np.corrcoef(first, other)[0, 1]) < 0.05


def test_the_land_is_as_in_the_chips() -> None:
    """Mean about 63 t/ha, 99.9th percentile about 426; 8 % water, 13 % of the rest open."""
    places = [tuple(place) for place in np.random.default_rng(0).integers(0, 78, (60, 2)).tolist()]
    labels = np.stack([FOREST.label(place) for place in places])
    stands = [FOREST.stand(place) for place in places]
    water = np.stack([stand.water for stand in stands]) > 0
    bare = np.stack([stand.biomass for stand in stands]) == 0
    assert 53 < labels.mean() < 73 and 350 < np.percentile(labels, 99.9) < 500
    assert 0.05 < water.mean() < 0.11 and 0.09 < (bare & ~water).mean() / (~water).mean() < 0.17
    assert not labels[bare].max() > 13_000 and (labels[bare] == 0).mean() > 0.999
    per_block = labels.mean((1, 2))
    assert 10 < per_block.std() < 25, "regions differ as chips do"


@pytest.mark.parametrize("dataset", [BIOMASSTERS, GRASSLAND], ids=lambda dataset: dataset.name)
def test_a_part_drawn_by_itself_is_that_part_of_the_whole(made: dict[str, Path], dataset: Dataset) -> None:
    land, root = landscape(dataset, SEED), made[dataset.name]
    for index, sensor in enumerate(dataset.sensors):
        for step in scene.steps_seen(dataset, SEED)[index][:2]:
            name = f"{sensor.name}.tif" if sensor.static else f"{sensor.name}_{step:02d}.tif"
            there, alone = read(root / "rasters" / name)[BLOCK:, :BLOCK], land.image(sensor, step, (1, 0))
            seen, alone = there != scene.nodata(sensor), alone[:SIZE - BLOCK]
            assert seen.mean() > 0.1 and np.abs(there - alone.astype(float))[seen].max() <= 1  # 1: beside nodata
            assert (there == alone)[seen].mean() > 0.95
    label = read(root / "target.tif")[:BLOCK, :BLOCK, 0]
    assert np.array_equal(*(one[label != scene.nodata(dataset.target)] for one in (label, land.label((0, 0)))))


@pytest.mark.parametrize("dataset", [BIOMASSTERS, GRASSLAND], ids=lambda dataset: dataset.name)
def test_rasters_are_what_the_scene_says(made: dict[str, Path], dataset: Dataset) -> None:
    root = made[dataset.name]
    told = yaml.safe_load((root / "scene.yaml").read_text())
    given = Path(told["dataset"])
    assert load_dataset(root / given if given.suffix else str(given)) == dataset
    west, south, east, north = told["grid"]["bounds"]
    assert told["grid"]["crs"] == "EPSG:3067" and (east - west, north - south) == (SIZE * 10, SIZE * 10)
    files = {root / "target.tif"}
    for index, sensor in enumerate(dataset.sensors):
        steps = scene.steps_seen(dataset, SEED)[index]
        assert steps and (sensor.static or len(steps) <= dataset.months)
        files |= {root / told["images"][sensor.name].format(step=step) for step in steps}
    assert files == set(root.rglob("*.tif"))
    unseen = np.ones((SIZE, SIZE), bool)
    for path in files:
        with rasterio.open(path) as file:
            assert file.crs.to_epsg() == 3067 and file.shape == (SIZE, SIZE)
            assert tuple(file.bounds) == (west, south, east, north)
            sensor = next((one for one in dataset.sensors if path.name.startswith(one.name)), None)
            expected = (dataset.target.dtype, 1) if sensor is None else (sensor.dtype, len(sensor.bands))
            assert (file.dtypes[0], file.count) == expected and file.descriptions[0]
            assert file.nodata == scene.nodata(sensor or dataset.target)
            assert file.block_shapes[0] == (256, 256) and file.compression.name == "deflate"
            empty = file.read() == file.nodata
        if sensor is not None:
            unseen &= empty.all(0)
        else:
            nowhere = empty[0]
    assert 0.01 < unseen.mean() < 0.03 and unseen[-1, -1], "a corner of which nothing is known"
    assert nowhere[unseen].all() and 0.02 < (nowhere & ~unseen).mean() < 0.15


def test_gaps_are_as_in_the_challenge(made: dict[str, Path]) -> None:
    rasters = made["biomassters"] / "rasters"
    orbits = np.stack([(read(rasters / f"S1_{t:02d}.tif") == -9999)[..., ::2] for t in range(T)])
    lacking = orbits[:, :256, :100].mean((1, 2))  # of the part that lies outside the corner
    assert not np.any((lacking > 0).all(1)), "never both"
    assert 2 <= (orbits[:, :160] > 0).any((1, 2, 3)).sum() <= 4
    s2 = [t for t in range(T) if (rasters / f"S2_{t:02d}.tif").exists()]
    pattern = "".join("1" if t in s2 else "0" for t in range(T))
    assert pattern in scene.sample.S2_PATTERNS["train"] and "0" in pattern
    last = read(rasters / f"S2_{s2[-1]:02d}.tif")
    assert last.dtype == np.uint16 and 0.02 < (last[..., -1] == 255).mean() < 0.06
    for t in s2:
        seen = read(rasters / f"S2_{t:02d}.tif")
        assert ((seen == 0).all(-1) == (seen == 0).any(-1)).all(), "nothing that was seen is nodata"


def test_the_same_bytes_again_and_an_interrupted_run_completes(made: dict[str, Path], tmp_path: Path) -> None:
    def stop(done: int, _: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    out = tmp_path / "scene"
    with pytest.raises(KeyboardInterrupt):
        scene.make_scene(out, GRASSLAND, SIZE, SEED, progress=stop)
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.tif")}
    assert len(kept) == 2 and not (out / "scene.yaml").exists(), "2 rasters of 4 tiles, and half of one that is gone"
    (out / "rasters" / ".S2_05.tif.1.part").write_bytes(b"of a run that was killed")
    seen: list[tuple[int, int]] = []
    scene.make_scene(out, GRASSLAND, SIZE, SEED, progress=lambda *at: seen.append(at))
    assert content(out) == content(made["grassland"])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert seen[-1] == (len(seen), len(seen)) and len(seen) == 4 * (len(list(out.rglob("*.tif"))) - len(kept))


def test_memory_does_not_grow_with_the_scene(tmp_path: Path) -> None:
    """A raster of 384 MB is written, and none of it kept."""
    code = """
import re, sys, numpy as np
from pathlib import Path
from engine.data.made import scene
raster = scene.Raster(Path(sys.argv[1]), 4096, 10, np.dtype("u2"), 0, tuple("abcdefghijkl"))
def draw(window):
    return np.ones((window.height, window.width, 12), np.uint16)
def peak():  # not ru_maxrss, which begins with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before = peak()
assert sum(1 for _ in scene._write(raster, draw)) == 64
print(peak() - before)
"""
    done = run(code, tmp_path / "large.tif")
    assert float(done.stdout) < 64 + 60, "MB, 64 of them GDAL's; 412 where all is drawn at once"


@pytest.mark.parametrize("lacking", [1, 3000])  # bytes: of the file's directory, and of its pixels
def test_a_full_disk_leaves_no_raster_that_is_not_whole(made: dict[str, Path], tmp_path: Path, lacking: int) -> None:
    """GDAL writes the last of a file when it is closed, and rasterio does not tell that this failed."""
    code = """
import resource, signal, sys
from engine.data.dataset import load_dataset
from engine.data.made.scene import make_scene
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    make_scene(sys.argv[1], load_dataset(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
except Exception as error:
    print(error)
"""
    short = (made["grassland"] / "target.tif").stat().st_size - lacking
    done = run(code, tmp_path / "out", short, ROOT / "configs/datasets/grassland.yaml", SIZE, SEED)
    assert "cannot be written" in done.stdout and "goes on where it stopped" in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scene.json"]


def run(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, env=environment(), text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_what_cannot_be_made_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    for size, seed in ((255, 0), (256, -1)):
        with pytest.raises(ConfigError, match=f"size {size}, seed {seed}: .* at least 256 pixels a side, its tile"):
            scene.make_scene(tmp_path / "none", BIOMASSTERS, size, seed)
    assert not (tmp_path / "none").exists()
    for other in ({"size": 321}, {"seed": 4}, {"dataset": GRASSLAND}):
        asked = {"dataset": BIOMASSTERS, "size": SIZE, "seed": SEED, **other}
        with pytest.raises(DataError, match=r"another scene \(version 1, dataset biomassters, size 320, seed 3\)"):
            scene.make_scene(made["biomassters"], **asked)  # type: ignore[arg-type]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("")
    with pytest.raises(DataError, match="is not empty and no scene"):
        scene.make_scene(tmp_path / "full", BIOMASSTERS, SIZE, SEED)
    (tmp_path / "full" / "scene.json").write_text("{")
    with pytest.raises(DataError, match=r"scene.json: cannot be read .*; remove"):
        scene.make_scene(tmp_path / "full", BIOMASSTERS, SIZE, SEED)
    with pytest.raises(DataError, match="cannot be written .*Not a directory"):
        scene.make_scene(tmp_path / "full" / "letter.txt" / "below", BIOMASSTERS, SIZE, SEED)


def test_what_is_seen_is_never_nodata(tmp_path: Path) -> None:
    """Also where nodata lies among the values, or at their top."""
    raw = GRASSLAND.dump() | {"sensors": [
        {"name": "a", "file": "{chip}_a_{step}.tif", "bands": ["a"], "low": [0], "high": [300], "dtype": "uint8",
         "nodata": 255},
        {"name": "b", "file": "{chip}_b_{step}.tif", "bands": ["b"], "low": [-1], "high": [1], "dtype": "int16"}],
        "pictures": []}
    dataset = parse_dataset(raw, "raw")
    note = scene.make_scene(tmp_path / "s", dataset, 128, 0)
    assert json.loads((tmp_path / "s" / "scene.json").read_text()) == note
    for name, nothing in (("a", 255), ("b", -32768)):
        for path in (tmp_path / "s" / "rasters").glob(f"{name}_*.tif"):
            assert not (read(path)[:64, :20] == nothing).any()
