from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.base.errors import DataError
from engine.data.biomassters import T
from engine.data.index import _rows, months_table, open_index, read_metadata, verify
from tests.conftest import SHARED


@pytest.fixture
def copy(sample: Path, tmp_path: Path) -> Path:
    """Two made chips of the sample, free to be damaged."""
    ids = [chip.id for chip in open_index(sample).split("train")[:2]]
    root = tmp_path / "data"
    for folder in ("train_features", "train_agbm"):
        (root / folder).mkdir(parents=True)
        for path in (sample / folder).iterdir():
            if path.name.split("_")[0] in ids:
                shutil.copy(path, root / folder)
    for name in ("features_metadata.csv", "train_agbm_metadata.csv"):
        lines = (sample / name).read_text().splitlines(keepends=True)
        (root / name).write_text("".join(line for i, line in enumerate(lines) if not i or line.split("_")[0] in ids))
    return root


def test_the_real_chips(real_data: Path) -> None:
    index = open_index(real_data)
    whole, single = index.by_id()["0060c0a5"], index.by_id()["001b0634"]
    assert len(index) == 2 and len(index.labelled()) == 2
    assert whole.months[0] == (True,) * T and whole.missing == ()
    assert single.missing == tuple(range(1, T)) and single.months[1][0]
    assert whole.path(1, 0).is_file() and whole.label is not None and whole.label.is_file()
    assert verify(index.files) == []


def test_names_alone_give_the_same_chips(sample: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for folder in ("train_features", "test_features", "train_agbm"):
        (bare / folder).symlink_to(sample / folder)
    with_csv, without = open_index(sample), open_index(bare)
    assert without.files == () and len(with_csv.files) > 0
    assert [(c.id, c.split, c.months) for c in with_csv.chips] == [(c.id, c.split, c.months) for c in without.chips]
    assert len(with_csv.split("train")) == 8 and len(with_csv.split("test")) == 2
    assert all(chip.label is None for chip in with_csv.split("test"))


def test_a_flat_folder(copy: Path) -> None:
    for path in [*copy.rglob("*_S?_*.tif"), *copy.rglob("*_agbm.tif")]:
        path.rename(copy / path.name)
    for folder in ("train_features", "train_agbm"):
        (copy / folder).rmdir()
    assert len(open_index(copy).labelled()) == 2


@pytest.mark.parametrize("name", ["The_BioMassters_-_features_metadata.csv.csv", "features_metadata_FzP19JI.csv",
                                  "biomassters_features_metadata.csv", "features_metadata.csv.gz"])
def test_csv_names_in_the_wild(copy: Path, name: str) -> None:
    original = copy / "features_metadata.csv"
    if name.endswith(".gz"):
        (copy / name).write_bytes(gzip.compress(original.read_bytes()))
    else:
        (copy / name).write_bytes(original.read_bytes())
    original.unlink()
    index = open_index(copy)
    assert sum(1 for file in index.files if "_S1_" in file.path.name) == 2 * T
    assert verify(index.files) == []


def test_verify_finds_every_kind_of_damage(copy: Path) -> None:
    files = {file.path.name: file.path for file in read_metadata(copy)}
    s1 = sorted(path for name, path in files.items() if "_S1_" in name)
    flipped, short, gone = s1[0], s1[1], s1[2]
    data = bytearray(flipped.read_bytes())
    data[500_000] ^= 1
    flipped.write_bytes(data)
    short.write_bytes(short.read_bytes()[:-1])
    gone.unlink()
    problems = {problem.path: problem.what for problem in verify(read_metadata(copy))}
    assert set(problems) == {flipped, short, gone}
    assert problems[flipped].startswith("cksum") and "bytes" in problems[short] and problems[gone] == "missing"


def test_a_hole_in_a_chip_is_refused(copy: Path) -> None:
    path = next(copy.glob("train_features/*_S1_03.tif"))
    path.unlink()
    with pytest.raises(DataError, match=f"first {path.name}.*download"):
        open_index(copy)


def test_chips_that_were_not_downloaded_at_all_are_fine(copy: Path) -> None:
    gone = open_index(copy).chips[0].id
    for path in copy.rglob(f"{gone}_*.tif"):
        path.unlink()
    assert [chip.id for chip in open_index(copy).chips] != [] and gone not in open_index(copy).by_id()


def test_a_file_the_csv_does_not_know_is_refused(copy: Path) -> None:
    some = next(copy.glob("train_features/*_S1_00.tif"))
    shutil.copy(some, some.with_name("ffffffff_S1_00.tif"))
    with pytest.raises(DataError, match="not in the metadata CSV, first ffffffff_S1_00.tif"):
        open_index(copy)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder.*prepare.py sample"):
        open_index(tmp_path / "none")
    with pytest.raises(DataError, match="no chips here"):
        open_index(tmp_path)
    (tmp_path / "holiday.tif").touch()
    with pytest.raises(DataError, match=r"holiday.tif: not a name of this data"):
        open_index(tmp_path)


def test_bad_csvs(copy: Path) -> None:
    path = copy / "features_metadata.csv"
    text = path.read_text()
    path.write_text(text.replace("filename", "file", 1))
    with pytest.raises(DataError, match=r"features_metadata.csv: column filename is missing"):
        open_index(copy)
    path.write_text(text.replace("1049524", "many", 1))
    with pytest.raises(DataError, match="is no number"):
        open_index(copy)
    path.write_text(text)
    shutil.copy(path, copy / "features_metadata_2.csv")
    with pytest.raises(DataError, match="several metadata files"):
        open_index(copy)


def test_the_challenge_s_metadata() -> None:
    """docs/data.md from the real rows: 11,462 chips; 16.5 % of S2 files missing, December 84 %, none from April on."""
    path = SHARED / "features_metadata_public_columns.csv.gz"
    if not path.exists():
        pytest.skip(f"{path} does not exist on this machine")
    table = np.array(list(months_table(_rows(path, {"filename"})).values()))
    assert table.shape == (8689 + 2773, 2, T)
    assert table[:, 0].all()
    missing = 1 - table[:, 1].mean(0)
    assert abs(missing.mean() - 0.165) < 0.001 and abs(missing[3] - 0.84) < 0.005 and not missing[7:].any()
