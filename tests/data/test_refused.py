"""Data that are damaged, mixed up or cannot be read: which file, what is wrong with it, and what to do."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.base.errors import ConfigError, DataError
from engine.config import load_config
from engine.data.biomassters import BIOMASSTERS, S1_NODATA, S1_SHAPE, T
from engine.data.index import Chip, open_index, read_manifest
from engine.data.metadata import Published, read_metadata, verify
from engine.data.selection.chips import select_chips
from engine.data.store import chip_file
from engine.data.store import pack as packing
from engine.data.store.pack import encode_chip, pack
from engine.data.store.source import PackedSource
from engine.data.tiff import tiff
from tests.conftest import ROOT


@contextmanager
def failing_reads(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    def fails(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fails)
        yield


# TIFFs -------------------------------------------------------------------------------------------------------------


def test_a_tiff_that_cannot_be_opened_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = tmp_path / "a.tif", np.zeros((8, 8), np.float32)
    path.write_bytes(tiff.encode(out))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match=r"loop: cannot be read \(Too many levels of symbolic links\)"):
        tiff.read_into(tmp_path / "loop", out)
    with (failing_reads(monkeypatch, "preadv"),
          pytest.raises(DataError, match=r"a\.tif: cannot be read .*the disk, then")):
        tiff.read_into(path, out)


def test_a_read_that_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may give fewer bytes than it was asked for, and a file may shrink while it is read."""
    image = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    path, real = tmp_path / "a.tif", os.preadv
    path.write_bytes(tiff.encode(image))
    calls: list[int] = []

    def some(descriptor: int, buffers: list, offset: int) -> int:
        calls.append(offset)
        if offset:
            return real(descriptor, [buffers[0][:1000]], offset)
        return real(descriptor, [buffers[0], buffers[1][:500]], offset)

    monkeypatch.setattr(os, "preadv", some)
    out = np.zeros_like(image)
    tiff.read_into(path, out)
    assert np.array_equal(out, image) and len(calls) == 17  # 16,384 bytes: 500, then 1,000 a time
    monkeypatch.setattr(os, "preadv", lambda d, buffers, offset: 0 if offset else some(d, buffers, offset))
    out[:] = 0
    tiff.read_into(path, out)  # what is left is read the slow way
    assert np.array_equal(out, image)


def test_a_feature_with_nan_is_named_when_it_is_packed() -> None:
    name = BIOMASSTERS.feature_name("aa", 0, 0)
    data = tiff.encode(np.full((*S1_SHAPE,), np.nan, np.float32))
    with pytest.raises(DataError, match=f"{name}: holds NaN or infinity"):
        encode_chip("aa", "train", BIOMASSTERS, {name: data})


# The index ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "says"), [
    (["train_agbm/aa_agbm.tif"], "only labels here; expected"),
    (["train_features/aa_S1_12.tif"], "aa_S1_12.tif: month 12 does not exist"),
    (["train_features/aa_S1_00.tif", "test_features/aa_S1_01.tif"], "chip aa lies in .*train_features as well"),
    (["train_features/notes.tif"], "notes.tif: not a name of this data"),
    (["test_features/aa_S1_00.tif"], "no training chips; expected train_features/"),
])
def test_folders_that_are_no_data_set(names: list[str], says: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=says):
        select_chips(load_config(ROOT / "configs" / "demo.yaml", [f"data.path={tmp_path}"]))


def test_metadata_that_are_not_the_challenges(tmp_path: Path, sample: Path) -> None:
    path = shutil.copy(sample / "features_metadata.csv", tmp_path)
    first, second, *rest = Path(path).read_text().splitlines()
    at = first.split(",").index("filename")
    cells = second.split(",")
    Path(path).write_text("\n".join([first, ",".join([*cells[:at], "", *cells[at + 1:]]), *rest]))
    with pytest.raises(DataError, match=r"features_metadata.csv:2: empty filename; download the CSV again"):
        list(read_metadata(tmp_path))


def test_a_file_that_cannot_be_looked_at_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    [problem] = verify([Published(tmp_path / "loop", 3, None, {})])
    assert problem.path.name == "loop" and "Too many levels" in problem.what


def test_folds_of_other_data(sample: Path, tmp_path: Path) -> None:
    ids = [chip.id for chip in open_index(sample).split("train")]
    path = tmp_path / "folds.json"

    def chosen(*overrides: str) -> object:
        return select_chips(load_config(ROOT / "configs" / "demo.yaml", [
            f"data.path={sample}", "data.split.scheme=file", f"data.split.path={path}", *overrides]))

    from engine.data.selection.folds import save_folds

    save_folds(path, [ids[:4], ids[4:]], {})
    assert chosen("data.split.fold=1")
    with pytest.raises(ConfigError, match=r"data.split.fold 2: .*folds.json has 2 folds"):
        chosen("data.split.fold=2")
    save_folds(path, [ids[:4], ids[5:]], {})
    with pytest.raises(DataError, match=f"folds.json: chip {ids[4]} and 0 more of the data are in no fold"):
        chosen()


def test_verify_says_what_it_cannot_compare(sample: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(sample, tmp_path / "data", symlinks=True)
    config = load_config(ROOT / "configs" / "demo.yaml", [f"data.path={tmp_path / 'data'}", "data.verify=true",
                                                          "data.overfit=true"])
    assert len(select_chips(config)[0]) == 8 and caplog.records == []
    (tmp_path / "data" / "train_agbm_metadata.csv").unlink()
    select_chips(config)
    assert [record.message.partition(", the")[0] for record in caplog.records] == [
        f"data.verify: nothing says what 8 files in {tmp_path / 'data'} should hold"]


# Packed stores -----------------------------------------------------------------------------------------------------


@pytest.fixture
def chip(stores: dict[bool, Path], tmp_path: Path) -> Chip:
    """One packed chip, in a copy that may be damaged."""
    whole = open_index(stores[False]).split("train")[0]
    assert whole.packed is not None
    path = Path(shutil.copy(whole.packed, tmp_path))
    return dataclasses.replace(whole, folder=tmp_path, packed=path, label=path)


def test_a_packed_file_that_cannot_be_read(chip: Chip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chip.packed is not None
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match=r"loop: cannot be read"):
        chip_file.read_head(tmp_path / "loop")
    with failing_reads(monkeypatch, "pread"), pytest.raises(DataError, match=r"cannot be read .*the disk, then"):
        chip_file.read_head(chip.packed)
    head, descriptor = chip_file.read_head(chip.packed), chip_file.open_file(chip.packed)
    try:
        with failing_reads(monkeypatch, "preadv"), pytest.raises(DataError, match=r"cannot be read .*the disk, then"):
            chip_file.read_section(descriptor, head, chip_file.LABEL, chip.packed, check=True)
        os.truncate(chip.packed, head.end - 1)  # while it is open
        last = max(t for t in range(T) if head.sizes[t].any())
        with pytest.raises(DataError, match="is truncated"):
            chip_file.read_section(descriptor, head, chip_file.FIRST_STEP + last, chip.packed, check=True)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("block", [b"", b"\xff" * 50])
def test_a_block_that_is_none(block: bytes) -> None:
    with pytest.raises(DataError, match="a.chip: is damaged .a block does not inflate"):
        chip_file.inflate(block, 65_536, "a.chip")


def test_months_that_the_manifest_does_not_know(chip: Chip) -> None:
    assert chip.packed is not None
    other = tuple(tuple(not month for month in row) for row in chip.months)
    with pytest.raises(DataError, match=f"holds other months than {chip_file.MANIFEST} says"):
        PackedSource(chip.packed, "mask").stack(dataclasses.replace(chip, months=other))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1, "chips": []}'])
def test_a_damaged_manifest(text: str, tmp_path: Path) -> None:
    (tmp_path / chip_file.MANIFEST).write_text(text)
    with pytest.raises(DataError, match="is damaged; run `launch/prepare.py pack` again"):
        read_manifest(tmp_path)


GOOD = {"id": "x", "split": "train", "months": {"S1": "1" * 12, "S2": "1" * 12}, "label": None}


@pytest.mark.parametrize("bad", [
    "x", {"id": "x"}, {key: GOOD[key] for key in ("id", "split", "months")}, {**GOOD, "months": {"S1": "1" * 12}},
    {**GOOD, "months": {"S1": "1" * 11, "S2": "1" * 12}}, {**GOOD, "months": {"S1": 5, "S2": 5}}], ids=str)
def test_a_manifest_with_a_damaged_entry(bad: Any, tmp_path: Path) -> None:
    (tmp_path / chip_file.CHIPS).mkdir()
    (tmp_path / chip_file.CHIPS / f"x{chip_file.SUFFIX}").touch()
    text = {"version": chip_file.VERSION, "dataset": BIOMASSTERS.dump(), "chips": [GOOD, bad]}
    (tmp_path / chip_file.MANIFEST).write_text(json.dumps(text))
    with pytest.raises(DataError, match="manifest.json: is damaged; run `launch/prepare.py pack` again"):
        open_index(tmp_path)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """One labelled chip with months in which every value is nodata."""
    root = tmp_path / "data"
    (root / "train_features").mkdir(parents=True)
    (root / "train_agbm").mkdir()
    for month in (0, 1):
        tiff.write(root / "train_features" / BIOMASSTERS.feature_name("aa", 0, month),
                   np.full(S1_SHAPE, S1_NODATA, np.float32), 2)
    tiff.write_map(root / "train_agbm" / "aa_agbm.tif", np.ones((256, 256), np.float32))
    return root


def test_a_chip_without_a_single_value(empty: Path, tmp_path: Path) -> None:
    pack(empty, tmp_path / "store")
    [chip] = open_index(tmp_path / "store").chips
    assert chip.packed is not None
    with pytest.raises(DataError, match="no month holds any data; remove the chip"):
        PackedSource(chip.packed, "mask").stack(chip)
    with pytest.raises(DataError, match="month 00: every value is nodata .*nodata_months: mask, or delete the TIFF"):
        PackedSource(chip.packed, "error").stack(chip)


def test_a_packed_chip_is_compared_with_its_tiffs(tree: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "store"
    shutil.copytree(tree, data)
    pack(data, out, workers=2)
    path = data / "train_agbm" / f"{open_index(data).split('train')[0].id}_agbm.tif"
    label = np.empty((256, 256), np.float32)
    tiff.read_into(path, label)
    tiff.write_map(path, label + 1)  # of the same size, so an earlier call's file is kept
    with pytest.raises(DataError, match="its label differs from the TIFFs of chip .*remove the file and pack again"):
        pack(data, out, workers=2, verify=True)
    with pytest.raises(ConfigError, match="--workers 0: at least 1"):
        pack(data, out, workers=0)


def test_tiffs_are_compared_with_what_was_published(tree: Path, tmp_path: Path) -> None:
    path = next(tree.rglob("*_S1_00.tif"))
    size = path.stat().st_size
    assert packing._read(path, Published(path, size, None, {})) == path.read_bytes()
    with pytest.raises(DataError, match=f"{size} bytes, published {size + 1}"):
        packing._read(path, Published(path, size + 1, None, {}))
    with pytest.raises(DataError, match=r"cksum \d+, published 1;"):
        packing._read(path, Published(path, size, 1, {}))
    with pytest.raises(DataError, match=r"gone.tif: cannot be read \(No such file"):
        packing._read(tmp_path / "gone.tif", None)


def test_a_manifest_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "write_text", fails)
    with pytest.raises(DataError, match="cannot be written .No space left on device.; make room"):
        packing.write_manifest(tmp_path, BIOMASSTERS, chip_file.STEPS)


def test_only_what_dead_packs_left_is_swept(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], text=True, capture_output=True,
                          check=True).stdout.strip()
    names = {who: tmp_path / f".aa{chip_file.SUFFIX}.{who}.part" for who in (dead, str(os.getpid()), "1", "x")}
    for path in names.values():
        path.touch()
    packing.sweep(tmp_path)  # process 1 is always there; our own number came back to us after another's death
    assert {who for who, path in names.items() if path.exists()} == {"1", "x"}
