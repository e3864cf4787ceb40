"""Packing a tree, and training's view of the store: the same as of the TIFFs."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.base.errors import DataError
from engine.data.biomassters import BIOMASSTERS, S1_SHAPE, S2_SHAPE, TILE
from engine.data.dataset import parse_dataset
from engine.data.forms import open_source
from engine.data.index import open_index
from engine.data.selection import quarantine
from engine.data.selection.chips import mean_label
from engine.data.selection.folds import kfold
from engine.data.store import chip_file
from engine.data.store import pack as packing
from engine.data.store.pack import pack, verify_store
from tests.conftest import ROOT, Command, environment

BACKENDS = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
FORMS = [pytest.param(False, id="steps"), pytest.param(True, id="lossless")]


@pytest.mark.parametrize(("lossless", "limit"), [(False, 0.45), (True, 0.60)])
def test_real_chips_shrink_as_promised(real_data: Path, tmp_path: Path, lossless: bool, limit: float) -> None:
    made = pack(real_data, tmp_path / "store", lossless=lossless, workers=2, verify=True)
    tiffs = sum(path.stat().st_size for path in real_data.rglob("*.tif"))
    files = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*.safetensors"))
    assert (made["tiff_bytes"], made["bytes"]) == (tiffs, files)
    assert files <= limit * tiffs


def test_a_store_indexes_as_its_tree(tree: Path, stores: dict[bool, Path]) -> None:
    old, new = open_index(tree), open_index(stores[False])
    assert [(c.id, c.split, c.months, c.label is None) for c in old.chips] == [
        (c.id, c.split, c.months, c.label is None) for c in new.chips]
    assert kfold([c.id for c in old.labelled()], 2) == kfold([c.id for c in new.labelled()], 2)
    assert mean_label(old.labelled()) == mean_label(new.labelled())


def test_the_manifest_says_what_there_is(tree: Path, stores: dict[bool, Path]) -> None:
    manifest = json.loads((stores[False] / "manifest.json").read_text())
    assert manifest["settings"]["values"] == "steps" and parse_dataset(manifest["dataset"], "it") == BIOMASSTERS
    for chip, entry in zip(open_index(tree).chips, manifest["chips"]):
        assert entry["months"]["S2"] == "".join("01"[x] for x in chip.months[1])
        assert "sources" not in entry, "they are in the chip's head; here they made an index slow to open"
        head = chip_file.read_head(stores[False] / "chips" / f"{chip.id}.safetensors")
        for name, (size, cksum) in head.sources.items():
            path = next(tree.rglob(name))
            printed = subprocess.run(["cksum", path], capture_output=True, text=True, check=True).stdout.split()
            assert [str(cksum), str(size)] == printed[:2]


# Faults --------------------------------------------------------------------------------------------------------


def digest(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve chips of one month each: quick to pack."""
    from engine.data.tiff import tiff

    root = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    for n in range(12):
        chip = f"{n:08x}"
        tiff.write(root / BIOMASSTERS.feature_name(chip, 0, n), rng.normal(-12, 3, S1_SHAPE).astype(np.float32))
        tiff.write(root / BIOMASSTERS.feature_name(chip, 1, n), rng.integers(0, 4000, S2_SHAPE, np.uint16))
        tiff.write_map(root / BIOMASSTERS.label_name(chip), rng.gamma(2, 30, (TILE, TILE)).astype(np.float32))
    return root


_PACK = """
import sys
from pathlib import Path
from engine.data.store.pack import pack
print("begun", flush=True)
pack(Path(sys.argv[1]), Path(sys.argv[2]), workers=2)
"""


def test_a_killed_pack_resumes_to_the_same_bytes(small: Path, tmp_path: Path) -> None:
    """SIGKILL at 20 random moments, each time after the last."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.perf_counter()
    pack(small, whole, workers=2)
    took = time.perf_counter() - start
    rng = np.random.default_rng(4)
    cut_short = 0
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", _PACK, small, killed], stdout=subprocess.PIPE, cwd=ROOT,
                                   env=environment())
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        time.sleep(rng.uniform(0, took / 6))
        process.send_signal(signal.SIGKILL)
        cut_short += process.wait() == -signal.SIGKILL
        process.stdout.close()
        for path in (killed / chip_file.CHIPS).glob(f"[!.]*{chip_file.SUFFIX}"):
            chip_file.verify_file(path)
        if not (killed / chip_file.MANIFEST).exists() and killed.exists():
            with pytest.raises(DataError, match="packing is not finished"):
                open_index(killed)
    assert cut_short >= 10
    pack(small, killed, workers=2)
    assert digest(killed) == digest(whole)


def test_a_full_disk_is_reported_and_what_is_there_stays_valid(small: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    written, real = [], packing.atomic_write

    def limited(path: Path):  # type: ignore[no-untyped-def]
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        return real(path)

    monkeypatch.setattr(packing, "atomic_write", limited)
    with pytest.raises(DataError, match=r"\.safetensors: .*the disk is full.* run the same command again"):
        pack(small, tmp_path / "store", workers=2)
    monkeypatch.undo()
    there = list((tmp_path / "store" / chip_file.CHIPS).iterdir())
    assert len(there) == 5
    for path in there:
        chip_file.verify_file(path)
    made = pack(small, tmp_path / "store", workers=2)
    assert made["new"] == 7 and verify_store(tmp_path / "store") == []


def test_a_write_that_the_system_cuts_short_leaves_no_file(small: Path, tmp_path: Path) -> None:
    """The real thing: the kernel refuses bytes beyond a limit, in the middle of a chip."""
    code = ("import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n" + _PACK)
    done = subprocess.run([sys.executable, "-c", code, small, tmp_path / "store"], cwd=ROOT, env=environment(),
                          text=True, capture_output=True, timeout=120)
    assert done.returncode != 0 and "the disk is full" in done.stderr
    assert list((tmp_path / "store" / chip_file.CHIPS).iterdir()) == []


def test_other_settings_versions_and_folders_are_refused(small: Path, stores: dict[bool, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="was packed without --lossless, now it is asked for with --lossless"):
        pack(small, stores[False], lossless=True)
    with pytest.raises(DataError, match="is a packed store already"):
        pack(stores[False], tmp_path / "x")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep me")
    with pytest.raises(DataError, match="holds something else"):
        pack(small, tmp_path / "notes")
    copy = tmp_path / "copy"
    shutil.copytree(stores[False], copy)
    path = copy / chip_file.MANIFEST
    path.write_text(path.read_text().replace('"version": 2', '"version": 1', 1))
    with pytest.raises(DataError, match="format version 1, this program reads 2"):
        open_index(copy)
    chip = next((copy / chip_file.CHIPS).iterdir())
    chip.write_bytes(chip.read_bytes().replace(b'"version":"2"', b'"version":"7"', 1))
    with pytest.raises(DataError, match=f"{chip.name}: is of format version 7, this program reads 2"):
        pack(small, copy)


def test_a_tiff_that_is_not_as_published_is_not_packed(sample: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sample, copy)
    path = open_index(copy).chips[0].path(1, 7)
    data = bytearray(path.read_bytes())
    data[-77] ^= 16
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{path.name}: cksum \d+, published \d+; download it again"):
        pack(copy, tmp_path / "store", workers=1)


def test_a_missing_or_swapped_chip_is_seen(stores: dict[bool, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stores[False], copy)
    one, other = (chip.packed for chip in open_index(copy).chips[:2])
    assert one is not None and other is not None
    shutil.copy(one, other)
    with pytest.raises(DataError, match=f"{other.name}: holds chip {one.stem}"):
        open_source(open_index(copy).chips).stack(open_index(copy).by_id()[other.stem])
    assert [problem.path for problem in verify_store(copy)] == [other]
    other.unlink()
    with pytest.raises(DataError, match=f"{other.name}: is in manifest.json but not on disk"):
        open_index(copy)


def test_a_manifest_that_tells_of_other_files(stores: dict[bool, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stores[False], copy)
    path, chip = copy / chip_file.MANIFEST, open_index(copy).chips[0]
    assert verify_store(copy) == [] and chip.packed is not None
    whole = json.loads(path.read_text())
    entry, *rest = whole["chips"]

    def with_chips(*entries: dict[str, Any]) -> None:
        path.write_text(json.dumps({**whole, "chips": entries}))

    with_chips({**entry, "crc32": entry["crc32"] ^ 1}, *rest)
    [problem] = verify_store(copy)
    assert problem.path == chip.packed and "is not the file that manifest.json tells of" in problem.what
    for changed in ({"split": "test"}, {"label": None}):
        with_chips({**entry, **changed}, *rest)
        with pytest.raises(DataError, match=f"{chip.packed.name}: holds other months .* or is of another split"):
            open_source([chip]).stack(open_index(copy).chips[0])
    with_chips(entry, entry, *rest)
    with pytest.raises(DataError, match="manifest.json: is damaged"):
        open_index(copy)
    with_chips(*rest)
    with pytest.raises(DataError, match=f"{chip.packed.name}: is not in manifest.json, nor are 0 more; run"):
        open_index(copy)


@pytest.mark.parametrize("packed", [False, True])
def test_quarantine_finds_bad_chips_of_either_form(sample: Path, tmp_path: Path, packed: bool) -> None:
    copy = tmp_path / "copy"
    if packed:
        few = tmp_path / "few"
        few.mkdir()
        for chip in open_index(sample).split("train")[:3]:
            for path in sample.rglob(f"{chip.id}_*0[0-2].tif"):
                shutil.copy(path, few)
            shutil.copy(chip.label, few)  # type: ignore[arg-type]
        pack(few, copy, workers=2)
    else:
        shutil.copytree(sample, copy)
    chips = open_index(copy).split("train")
    assert quarantine.find(copy, chips, "fail", workers=2) == {}
    bad = chips[1].packed or chips[1].path(0, 1)
    data = bytearray(bad.read_bytes())
    data[len(data) // 2] ^= 1
    bad.write_bytes(data)
    found = quarantine.find(copy, chips, "fail", workers=2)
    assert list(found) == [chips[1].id] and bad.name in found[chips[1].id]
    quarantine.Quarantine(tmp_path / "run", found, None).begin(0)
    assert json.loads((tmp_path / "run" / "quarantine.json").read_text()) == found


# Commands ------------------------------------------------------------------------------------------------------


def test_the_commands(small: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "store"
    packed = command("prepare", "pack", "--data", small, "--out", out, "--workers", 2, "--verify")
    assert packed.returncode == 0 and "12 chips" in packed.stdout and "compared with them" in packed.stdout
    shown = command("prepare", "inspect", "--data", out, "--chip", "00000003", "--out", tmp_path / "a.png")
    assert shown.returncode == 0 and "December" in shown.stdout and (tmp_path / "a.png").stat().st_size > 10_000
    assert "12 chips are as they were packed" in command("prepare", "verify", "--data", out).stdout
    path = out / chip_file.CHIPS / "00000003.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    broken = command("prepare", "verify", "--data", out)
    assert broken.returncode != 0 and "00000003.safetensors: is truncated" in broken.stderr
    assert "Traceback" not in broken.stderr
