"""predict.py --scene as a whole: one process, two ranks, killed and begun again; and what users get wrong."""

from __future__ import annotations

import functools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import rasterio
import yaml
from rio_cogeo.cogeo import cog_validate

from tests.conftest import ROOT, SHARED, Command, environment
from tests.faults.harness import signal_itself
from tests.hosts import started, torchrun
from tests.scenes import make_scene, write_weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Words of a command that makes a map of 9 bands."""
    folder = tmp_path_factory.mktemp("landscape")
    return ["--weights", write_weights(folder / "w.safetensors"), "--scene", make_scene(folder / "scene", 260, 200),
            "--overlap", 32, "--tta", "id,r90", "--device", "cpu", "--batch", 2]


@pytest.fixture(scope="module")
def whole(given: list[object], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The map by one process."""
    out = tmp_path_factory.mktemp("whole") / "map.tif"
    with started(out.parent / "log", "predict", *given, "--out", out, variables=[{}]) as (rank,):
        assert rank.wait() == 0, rank.text()
        assert re.search(r"map.tif: mean [-\d.]+ t/ha over [\d.]+ ha, in all [\d.]+ Mt; [\d.]+ ha without", rank.text())
        assert "mapping: 63/63 windows" in rank.text()
    assert cog_validate(out, strict=True)[0]
    return out.read_bytes()


def test_two_ranks_make_the_same_bytes(given: list[object], whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "map.tif"
    with started(tmp_path / "log", "predict", *given, "--out", out, variables=torchrun(2)) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text() + ranks[1].text()
        assert "windows" not in ranks[1].text()
        # Of 9 rows of windows of 7
        done = re.search(r"mapping: (\d+)/\1 windows", ranks[0].text())
        assert done is not None and int(done[1]) in (4 * 7, 5 * 7)
    assert out.read_bytes() == whole


@pytest.mark.parametrize(("ranks", "band"), [(1, 2), (1, 5), (2, 1), (2, 4)])
def test_killed_it_goes_on_to_the_same_bytes(given: list[object], whole: bytes, tmp_path: Path, ranks: int,
                                             band: int) -> None:
    """The last rank is killed before it writes that one of its bands, of nine in all."""
    out, parts = tmp_path / "map.tif", tmp_path / "map.tif.parts"
    fatal = functools.partial(signal_itself, signal.SIGKILL, "engine.inference.landscape.bands:Bands.write", band)

    def run(log: str, kill: bool) -> None:
        with started(tmp_path / log, "predict", *given, "--out", out, before={ranks - 1: fatal} if kill else None,
                     variables=torchrun(ranks) if ranks > 1 else [{}]) as found:
            for rank in found:
                assert (rank.wait() == 0) != kill, rank.text()

    run("killed", kill=True)
    assert not out.exists() and len(list(parts.glob("band*.tif"))) >= band - 1
    run("again", kill=False)
    assert out.read_bytes() == whole and not parts.exists()


@pytest.mark.skipif(not (SHARED / "scene").is_dir(), reason=f"{SHARED / 'scene'} does not exist on this machine")
def test_the_real_scene_becomes_a_map(command: Command, tmp_path: Path) -> None:
    """By the winner's own file, of random weights: whether it says anything is not asked."""
    out = tmp_path / "map.tif"
    done = command("predict", "--weights", SHARED / "winner_fixture" / "model_last.pth", "--backbone",
                   "tf_mobilenetv3_small_minimal_100", "--scene", SHARED / "scene", "--out", out, "--device", "cpu",
                   "--tta", "d4", "--spread")
    assert done.returncode == 0, done.stderr
    assert cog_validate(out, strict=True)[0]
    with rasterio.open(out) as raster:
        assert (raster.crs.to_epsg(), raster.shape, raster.count) == (32631, (100, 100), 2)
        assert (raster.read() != raster.nodata).all() and raster.read(2).min() >= 0
    assert json.loads(out.with_suffix(".json").read_text())["area_ha"] == 100


@pytest.mark.parametrize(("words", "said"), [
    (["--split", "all"], "--split: go with --data; leave them out"),
    (["--batch", "0"], "--batch 0: at least 1"),
    (["--tta", "x"], "tta"),
    (["--zones", "none.geojson"], "none.geojson: cannot be read")])
def test_what_users_get_wrong(command: Command, given: list[object], tmp_path: Path, words: list[str],
                              said: str) -> None:
    done = command("predict", *given, "--out", tmp_path / "map.tif", *words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_chips_take_no_landscapes_options(command: Command, given: list[object], tmp_path: Path) -> None:
    done = command("predict", *given[:2], "--data", tmp_path, "--out", tmp_path / "maps", "--spread")
    assert done.returncode == 2 and "--spread: go with --scene; leave them out" in done.stderr


PEAK = """
import json, re, sys
from pathlib import Path
import torch
from engine.data.dataset import load_dataset
from engine.inference.landscape import mapper

grey = load_dataset(Path(sys.argv[1]).parent / "d.yaml")
mapper._models = lambda *_: ([lambda images, dropped: images[:, 0, :1]], grey)
mapper.weights.identify = lambda path: {"path": str(path), "sha256": ""}
mapper.predict_scene([Path("none")], Path(sys.argv[1]), Path(sys.argv[2]), mapper.Options(), device=torch.device("cpu"))
# Not ru_maxrss, which begins with that of the process that started this one
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def test_memory_does_not_grow_with_the_map(tmp_path: Path) -> None:
    """A map of 320 MB is made in little more memory than one of 8 MB: a row of windows, and a few bands.  (Whole, with
    the real sizes: benchmarks/landscape.py.)"""
    dataset = {"name": "grey", "tile": 256, "pixel_metres": 10, "steps": ["one"], "target": {
        "name": "grey", "unit": "", "file": "{chip}_t.tif"}, "sensors": [{
            "name": "eye", "file": "{chip}_{step}.tif", "dtype": "uint16", "bands": ["grey"], "low": [0], "high": [1]}]}
    peaks = []
    for height, width in ((2000, 1000), (4000, 20_000)):
        folder = tmp_path / str(width)
        folder.mkdir()
        with rasterio.open(folder / "0.tif", "w", driver="GTiff", height=height, width=width, count=1, dtype="uint16",
                           tiled=True, sparse_ok=True, crs="EPSG:3067",
                           transform=rasterio.transform.from_origin(400_000, 7_000_000, 10, 10)):
            pass  # blocks that are not there are 0, a value here
        (folder / "d.yaml").write_text(yaml.safe_dump(dataset))
        (folder / "s.yaml").write_text(yaml.safe_dump({"dataset": "d.yaml", "images": {"eye": "{step}.tif"}}))
        done = subprocess.run([sys.executable, "-c", PEAK, folder / "s.yaml", folder / "map.tif"], cwd=ROOT,
                              env=environment(traced=False), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 240, peaks  # 165 were seen; the map whole would be 320 more
