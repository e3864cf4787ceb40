"""Whose maps a folder holds, and which of them are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.base.errors import DataError
from engine.base.progress import Progress
from engine.data.index import Chip
from engine.data.tiff import tiff
from engine.inference import made
from engine.inference.predictor import Writer
from tests.data.test_dataset import small

DATA = small()
ABOUT = {"weights": "a" * 64, "tta": ["id", "h"], "batch": 4, "backbone": None}


def chips(count: int = 3) -> list[Chip]:
    return [Chip(f"c{n}", "test", DATA, ((True,) * DATA.months,) * len(DATA.sensors), Path(), None)
            for n in range(count)]


def fill(out: Path, count: int = 3) -> list[Chip]:
    made.claim(out, ABOUT)
    for n, chip in enumerate(chips(count)):
        tiff.write_map(made.map_path(out, DATA, chip.id), np.full((DATA.tile, DATA.tile), n, np.float32))
    return chips(count)


def test_a_folder_is_claimed_once_and_goes_on(tmp_path: Path) -> None:
    assert made.claim(tmp_path / "a" / "b", ABOUT) is False
    fill(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / ".c9.tif.17.part").touch()
    assert made.claim(tmp_path / "a" / "b", ABOUT) is True
    assert json.loads((tmp_path / "a" / "b" / made.FILE).read_text()) == ABOUT
    assert not list((tmp_path / "a" / "b").glob(".*"))


def test_a_folder_without_maps_takes_other_options(tmp_path: Path) -> None:
    made.claim(tmp_path, ABOUT)
    assert made.claim(tmp_path, {**ABOUT, "batch": 8}) is False
    assert json.loads((tmp_path / made.FILE).read_text())["batch"] == 8


@pytest.mark.parametrize(("change", "told"), [
    ({"weights": "b" * 64}, f"made otherwise: weights {'b' * 12} instead of {'a' * 12}; give another --out, or remove"),
    ({"tta": ["id"], "batch": 8}, 'made otherwise: tta ["id"] instead of ["id", "h"]; batch 8 instead of 4; give'),
    ({"colour": 1}, "made otherwise: colour 1 instead of null"),
])
def test_other_maps_are_not_mixed(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    fill(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError) as error:
        made.claim(tmp_path, {**ABOUT, **change})
    assert told in str(error.value) and str(error.value).startswith(f"{tmp_path}: holds maps")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("text", "told"), [
    (None, "holds TIFFs, and no made.json says what made them; give another --out"),
    ("{", "made.json: is damaged"), ("[]", "made.json: is damaged"), ("3", "made.json: is damaged")])
def test_maps_of_which_nothing_is_known_are_not_mixed(tmp_path: Path, text: str | None, told: str) -> None:
    fill(tmp_path)
    (tmp_path / made.FILE).unlink() if text is None else (tmp_path / made.FILE).write_text(text)
    with pytest.raises(DataError, match=told):
        made.claim(tmp_path, ABOUT)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(DataError, match=f"{place}: cannot be written .*; give another --out"):
            made.claim(place, ABOUT)


def test_what_maps_depend_on_is_in_the_description(tmp_path: Path) -> None:
    weights = tmp_path / "w"
    weights.write_bytes(b"1" * 3_000_000)

    def told(of: list[Chip], batch: int = 4, **source: Any) -> dict[str, Any]:
        form: Any = SimpleNamespace(**{"dataset": DATA, "values": "exact", **source})
        return made.description(weights, of, form, {"batch": batch})

    first = told(chips())
    assert first == told(chips()) and first["chips"] == 3
    fewer = [*chips()[:2], Chip("c2", "test", DATA, ((True, False),) * len(DATA.sensors), Path(), None)]
    others = [told(fewer), told(chips(), values="steps"), told(chips(), dataset=small(pixel_metres=5)),
              told(chips(), batch=5)]
    weights.write_bytes(b"1" * 2_999_999 + b"2")
    others.append(told(chips()))
    changed = [[key for key in first if other[key] != first[key]] for other in others]
    assert changed == [["months"], ["floats"], ["dataset"], ["batch"], ["weights"]]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def nan(path: Path) -> None:
    values = made.read_map(path, DATA)
    values[3, 4] = np.nan
    tiff.write_map(path, values)


@pytest.mark.parametrize("harm", [
    Path.unlink, cut, nan, lambda path: path.write_bytes(b""),
    lambda path: tiff.write(path, np.zeros((DATA.tile, DATA.tile), np.float64)),
    lambda path: tiff.write(path, np.zeros((DATA.tile, DATA.tile - 1), np.float32))])
def test_maps_are_kept_only_where_all_of_a_batch_is_whole(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    maps = made.whole_maps(tmp_path, fill(tmp_path))
    assert maps is not None and maps.dtype == np.float32 and maps[:, 0, 0].tolist() == [0, 1, 2]
    harm(made.map_path(tmp_path, DATA, "c1"))
    assert made.whole_maps(tmp_path, chips()) is None
    assert made.whole_maps(tmp_path, chips()[:1]) is not None


def test_a_disk_that_fills_up_behind_the_device_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next batch, or the end: on the thread that predicts."""
    import torch

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    batch: Any = SimpleNamespace(chips=chips(2), valid=torch.tensor([True, True]))
    with Progress("p", 2, "chip", quiet=True) as progress, Writer(tmp_path, progress) as writer:
        writer.add(batch, torch.ones(2, 1, DATA.tile, DATA.tile))
        writer.finish()
        monkeypatch.setattr(tiff, "atomic_write", full)
        writer.add(batch, torch.ones(2, 1, DATA.tile, DATA.tile))
        with pytest.raises(DataError, match=r"c0\S+: cannot be written \(No space left on device\); make room"):
            writer.finish()
    assert progress.done == 2
