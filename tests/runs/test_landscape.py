"""predict.py --scene as a whole: one process, two ranks, killed and begun again; and what users get wrong."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import rasterio
from rio_cogeo.cogeo import cog_validate

from tests.conftest import SHARED, Command
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


@pytest.mark.parametrize(("ranks", "bands"), [(1, 1), (1, 4), (2, 2), (2, 7)])
def test_killed_it_goes_on_to_the_same_bytes(given: list[object], whole: bytes, tmp_path: Path, ranks: int,
                                             bands: int) -> None:
    out, parts = tmp_path / "map.tif", tmp_path / "map.tif.parts"

    def run(log: str, kill: bool) -> None:
        with started(tmp_path / log, "predict", *given, "--out", out,
                     variables=torchrun(ranks) if ranks > 1 else [{}]) as found:
            if kill:
                found[-1].until(lambda: len(list(parts.glob("band*.tif"))) >= bands)
                found[-1].signal(signal.SIGKILL)
            for rank in found:
                assert (rank.wait() == 0) != kill, rank.text()

    run("killed", kill=True)
    assert not out.exists() and len(list(parts.glob("band*.tif"))) >= bands
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
