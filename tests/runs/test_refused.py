"""launch/*.py in this process: what they print, and one message, with exit code 2, for what they do not take."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.base.progress import Progress
from engine.config import ConfigError, load_config
from engine.data.fetch.s3 import connect
from engine.data.index import open_index
from tests.conftest import ROOT

Said = tuple[int, str, str]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """As the command line, without the seconds that a new process takes to import torch."""

    def run(script: str, *words: object) -> Said:
        monkeypatch.setattr(sys, "argv", [f"launch/{script}.py", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "launch" / f"{script}.py"), run_name="__main__")
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_a_made_sample_is_data(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = call("prepare", "sample", "--out", tmp_path / "data", "--chips", 2, "--seed", 1)
    assert code == 0 and f"chips in {tmp_path / 'data'}; RMSE of the best predictor" in out
    assert len(open_index(tmp_path / "data").split("train")) == 2
    code, _, err = call("prepare", "sample", "--out", tmp_path / "none", "--chips", 0)
    assert code == 2 and "--chips 0" in err and "give at least one chip" in err
    assert not (tmp_path / "none").exists()


def test_a_made_scene_has_rasters(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dataset = ROOT / "configs/datasets/grassland.yaml"
    words = ("prepare", "sample-scene", "--out", tmp_path / "scene", "--dataset", dataset)
    code, out, err = call(*words, "--size", 140)
    assert code == 0 and f"140 × 140 pixels of 'grassland' in {tmp_path / 'scene' / 'scene.yaml'}" in out
    assert f"{len(list(tmp_path.rglob('*.tif')))} rasters" in out and "tiles" in err
    code, _, err = call(*words, "--size", 100)
    assert code == 2 and "size 100, seed 0: a scene of 'grassland' has at least 128 pixels a side" in err


def test_a_dry_run_trains_nothing(call, sample: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = call("train", "--config", ROOT / "configs" / "demo.yaml", "--dry-run", "--set",
                        f"data.path={sample}", "--set", f"run.folder={tmp_path}", "--set", "data.split.folds=4")
    assert code == 0 and "2 chips validate" in out and list(tmp_path.iterdir()) == []


def test_folds_by_chance(call, sample: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from engine.data.selection.folds import kfold, load_folds

    code, out, _ = call("prepare", "splits", "--data", sample, "--out", tmp_path / "f.json", "--folds", 4,
                        "--scheme", "kfold", "--seed", 3)
    ids = [chip.id for chip in open_index(sample).split("train")]
    assert code == 0 and "4 folds of 2–2 chips" in out and load_folds(tmp_path / "f.json") == kfold(ids, 4, 3)


@pytest.mark.parametrize(("words", "says"), [
    (("verify", "--data", "{}/none"), "none: no such folder"),
    (("verify", "--data", "{}"), "no features_metadata.csv or train_agbm_metadata.csv to compare with"),
    (("splits", "--data", "{}/test", "--out", "{}/f.json"), "no labelled chips to split"),
    (("download", "--out", "{}/d", "--workers", "0"), "--workers 0 --retries"),
    (("download", "--out", "{}/d", "--lossless"), "--lossless is for --into-store"),
    (("download", "--into-store", "{}/d"), "--into-store needs --metadata"),
    (("download", "--out", "{}/d", "--metadata", "{sample}", "--chips", "{}/none.txt"), "neither a number nor a text"),
    (("download", "--out", "{}/file", "--metadata", "{sample}"), "file: cannot be made"),
    (("download", "--out", "{}/d", "--metadata", "{sample}", "--endpoint-url", "x"), "--endpoint-url x or the AWS"),
])
def test_what_prepare_does_not_take(words: tuple[str, ...], says: str, call, sample: Path,  # type: ignore[no-untyped-def]
                                    tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    chip = open_index(sample).split("test")[0]
    (tmp_path / "test" / "test_features").mkdir(parents=True)
    for path in (sample / "test_features").glob(f"{chip.id}_S1_00.tif"):
        (tmp_path / "test" / "test_features" / path.name).symlink_to(path)
    code, _, err = call("prepare", *(word.replace("{sample}", str(sample)).replace("{}", str(tmp_path))
                                     for word in words))
    assert code == 2 and says in err and "Traceback" not in err


def test_an_endpoint_that_is_none() -> None:
    with pytest.raises(ConfigError, match="--endpoint-url x or the AWS settings"):
        connect(2, "x")


def test_an_empty_recipe_lacks_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("# nothing yet\n")
    with pytest.raises(ConfigError, match=r"r.yaml: .*data"):
        load_config(tmp_path / "r.yaml", [])


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("packing", 3, "chip") as progress:
        for n in range(3):
            progress.advance(1, f"loss {n}")
        progress.say("a line that stays")
    said = capsys.readouterr().err
    assert "a line that stays\n" in said and "packing" in said and "/3" in said
    assert np.char.count(said, "\n") <= 2  # the bar itself leaves none
