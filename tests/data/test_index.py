from __future__ import annotations

import csv
import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.base.errors import DataError
from engine.data import index, metadata
from engine.data.biomassters import BIOMASSTERS, T
from engine.data.dataset import FILE
from engine.data.index import open_index
from engine.data.metadata import read_metadata, verify
from engine.data.store.pack import pack
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
    real = open_index(real_data)
    whole, single = real.by_id()["0060c0a5"], real.by_id()["001b0634"]
    assert len(real) == 2 and len(real.labelled()) == 2
    assert whole.months[0] == (True,) * T and whole.missing == ()
    assert single.missing == tuple(range(1, T)) and single.months[1][0]
    assert whole.path(1, 0).is_file() and whole.label is not None and whole.label.is_file()
    assert verify(real.files) == []


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
    files = open_index(copy).files
    assert sum(1 for file in files if "_S1_" in file.path.name) == 2 * T
    assert verify(files) == []


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


@pytest.mark.parametrize(("name", "content"), [
    ("features_metadata.csv", b"filename\n\xff.tif\n"), ("features_metadata.csv", "filename\n".encode("utf-16")),
    ("features_metadata.csv", b'filename\n"' + b"a" * 200_000), ("features_metadata.csv.gz", b"no gzip"),
    ("features_metadata.csv.gz", gzip.compress(b"filename\na.tif")[:-9])],
    ids=["latin-1", "utf-16", "a quote without end", "no gzip", "cut off"])
def test_a_csv_that_cannot_be_read(copy: Path, name: str, content: bytes) -> None:
    (copy / "features_metadata.csv").unlink()
    (copy / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: cannot be read .*download the CSV again"):
        open_index(copy)


def test_a_description_that_is_a_link_to_nothing(copy: Path) -> None:
    (copy / FILE).symlink_to(copy / "nowhere.yaml")
    with pytest.raises(DataError, match=f"{FILE}: cannot be read"):
        open_index(copy)


def test_a_csv_under_several_names(copy: Path) -> None:
    """One tree for several libraries: a link, a copy and a compressed one are fine, another content is not."""
    path, expected = copy / "features_metadata.csv", open_index(copy)
    the = "The_BioMassters_-_features_metadata.csv.csv"
    (copy / the).symlink_to(path.name)
    shutil.copy(path, copy / "biomassters_features_metadata.csv")
    (copy / "features_metadata.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    several = open_index(copy)
    assert several.chips == expected.chips and len(several.files) == len(expected.files)
    assert verify(several.files) == []
    for first, other in ((the, "biomassters_features_metadata.csv"),
                         ("train_agbm_metadata.csv", "train_agbm_metadata_2.csv")):
        data = (copy / first).read_bytes()
        for wrong in (data[:-1], data + b"\n", data.replace(b"0", b"1", 1)):
            (copy / other).write_bytes(wrong)
            with pytest.raises(DataError, match=f"{first} and {other} are metadata of one kind and differ; keep one"):
                open_index(copy)
        (copy / other).write_bytes(data)
        open_index(copy)
    path.rename(copy / "aside")
    with pytest.raises(DataError, match=rf"{the}: is a link to nothing; remove it, or bring back features_"):
        open_index(copy)


def test_test_labels_are_read(copy: Path) -> None:
    """Those of the challenge were published in test_agbm/; its CSVs do not know them."""
    other, chip = open_index(copy).chips
    (copy / "test_features").mkdir()
    for path in (copy / "train_features").glob(f"{chip.id}_*"):
        path.rename(copy / "test_features" / path.name)
    label = copy / "test_agbm" / BIOMASSTERS.label_name(chip.id)
    label.parent.mkdir()
    (copy / "train_agbm_metadata.csv").unlink()
    shutil.copy(copy / "train_agbm" / label.name, label)
    with pytest.raises(DataError, match=rf"{label.name}: lies in .*train_agbm as well; keep one of them"):
        open_index(copy)
    (copy / "train_agbm" / label.name).unlink()
    opened = open_index(copy)
    assert [(c.id, c.split) for c in opened.labelled()] == [(other.id, "train"), (chip.id, "test")]
    assert opened.by_id()[chip.id].label == label
    store = copy.parent / "store"
    pack(copy, store, workers=1, verify=True)
    assert [c.id for c in open_index(store).split("test") if c.label is not None] == [chip.id]


def test_rows_of_any_length(copy: Path) -> None:
    """A blank line, a row that is cut short, one with a cell too many, no cksum column."""
    rows = [f"{chip.id}_S1_{t:02d}.tif" for chip in open_index(copy).chips for t in range(T)]
    text = f"filename,size,s3path_us\n{rows[0]},7,s3://b/x,more\n\n{rows[1]}\n"
    (copy / "features_metadata.csv").write_text(text)
    (copy / "train_agbm_metadata.csv").unlink()
    first, second = read_metadata(copy)
    assert (first.path, first.size, first.cksum) == (copy / "train_features" / rows[0], 7, None)
    assert first.url == {"us": "s3://b/x"}
    assert (second.path.name, second.size, second.cksum, second.url) == (rows[1], None, None, {"us": ""})
    (copy / "features_metadata.csv").write_text(text + "\n,7\n")
    with pytest.raises(DataError, match=r"features_metadata.csv:6: empty filename"):
        open_index(copy)


def test_opening_makes_no_object_for_a_file(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a million of them took longer than all the rest; they are made for those who ask."""
    made: list[Path] = []
    published = index.Published
    monkeypatch.setattr(metadata, "Published", lambda path, *rest: made.append(path) or published(path, *rest))
    opened = open_index(copy)
    assert not made
    assert [file.path for file in opened.files] == made == [file.path for file in opened.files] and len(made) > 2 * T


def test_a_file_in_both_splits_is_refused(copy: Path) -> None:
    path = next(copy.glob("train_features/*_S1_00.tif"))
    (copy / "test_features").mkdir()
    shutil.copy(path, copy / "test_features")
    with pytest.raises(DataError, match=rf"test_features/{path.name}: chip .* lies in .*train_features as well"):
        open_index(copy)


def test_a_folder_that_cannot_be_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(folder: Path) -> object:
        if Path(folder).name == "train_features":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(index.os, "scandir", refuse)
    with pytest.raises(DataError, match=r"train_features: cannot be read \(Permission denied\)"):
        open_index(copy)


def test_the_challenge_s_metadata() -> None:
    """docs/data.md from the real rows: 11,462 chips; 16.5 % of S2 files missing, December 84 %, none from April on."""
    path = SHARED / "features_metadata_public_columns.csv.gz"
    if not path.exists():
        pytest.skip(f"{path} does not exist on this machine")
    chips: dict[str, np.ndarray] = {}
    with gzip.open(path, "rt", newline="") as rows:
        for row in csv.DictReader(rows):
            chip, sensor, month = index._parsed(row["filename"], BIOMASSTERS)  # type: ignore[misc]
            chips.setdefault(chip, np.zeros((2, T), bool))[sensor, month] = True
    table = np.array(list(chips.values()))
    assert table.shape == (8689 + 2773, 2, T)
    assert table[:, 0].all()
    missing = 1 - table[:, 1].mean(0)
    assert abs(missing.mean() - 0.165) < 0.001 and abs(missing[3] - 0.84) < 0.005 and not missing[7:].any()
