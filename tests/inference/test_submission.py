"""The challenge's archive: what is in it, and that nothing else ever bears its name."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from engine.base.errors import ConfigError, DataError
from engine.data.biomassters import TILE
from engine.data.dataset import load_dataset
from engine.data.index import open_index
from engine.data.tiff import tiff
from engine.inference.submission import Submission, submission

DATA = load_dataset("biomassters")
CHIPS = ("a1", "b2", "c3", "d4", "e5", "f6")


def maps(out: Path) -> Submission:
    for n, chip in enumerate(CHIPS):
        tiff.write_map(out / f"{chip}_agbm.tif", np.full((TILE, TILE), n + 0.5, np.float32))
    return Submission(out / "sub" / "s.tar", DATA, CHIPS)


def test_the_archive_holds_the_maps_at_its_root(tmp_path: Path) -> None:
    wanted = maps(tmp_path)
    compressed = tifffile.imread(tmp_path / "b2_agbm.tif")
    tifffile.imwrite(tmp_path / "b2_agbm.tif", compressed, compression="zlib")
    wanted.write(tmp_path)
    with tarfile.open(wanted.path, "r:") as archive:
        assert archive.getnames() == [f"{chip}_agbm.tif" for chip in CHIPS]
        for n, member in enumerate(archive.getmembers()):
            assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
            with tifffile.TiffFile(io.BytesIO(archive.extractfile(member).read())) as file:  # type: ignore[union-attr]
                page = file.pages.first
                assert page.compression == 1 and page.shape == (256, 256) and page.dtype == np.float32
                assert (page.asarray() == n + 0.5).all()


def test_the_same_maps_give_the_same_bytes(tmp_path: Path) -> None:
    first = maps(tmp_path)
    first.write(tmp_path)
    again = Submission(tmp_path / "again.tar", DATA, CHIPS)
    again.write(tmp_path)
    assert again.path.read_bytes() == first.path.read_bytes()


def not_finite(path: Path) -> None:
    tiff.write_map(path, np.where(np.eye(TILE), np.inf, 1).astype(np.float32))


@pytest.mark.parametrize(("harm", "told"), [
    (Path.unlink, "is missing"),
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated"),
    (lambda path: tiff.write(path, np.zeros((TILE, TILE), np.float64)), "holds 256 × 256 float64, where"),
    (lambda path: tiff.write(path, np.zeros((TILE, 128), np.float32)), "holds 256 × 128 float32, where"),
    (not_finite, "holds 256 pixels that are no numbers")])
def test_a_map_that_is_not_right_is_named_and_nothing_written(tmp_path: Path, harm: Callable[[Path], None],
                                                              told: str) -> None:
    wanted = maps(tmp_path)
    harm(tmp_path / "b2_agbm.tif")
    with pytest.raises(DataError) as error:
        wanted.write(tmp_path)
    text = str(error.value)
    assert f"not written: 1 of 6 maps are missing or damaged: {tmp_path / 'b2_agbm.tif'}: {told}" in text
    assert "give the same command again" in text and list(wanted.path.parent.iterdir()) == []


def test_of_many_the_first_are_named_and_all_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="6 of 6 maps are missing .*a1_agbm.tif: is missing; .*e5_agbm.tif: is missing "
                                        "and 1 more; give") as error:
        Submission(tmp_path / "s.tar", DATA, CHIPS).write(tmp_path)
    assert "f6" not in str(error.value)


def test_a_full_disk_leaves_the_old_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = maps(tmp_path)
    wanted.write(tmp_path)
    before = wanted.path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(DataError, match=r"s.tar: cannot be written \(No space left on device\); make room"):
        wanted.write(tmp_path)
    assert [path.name for path in wanted.path.parent.iterdir()] == ["s.tar"] and wanted.path.read_bytes() == before


def linked(sample: Path, root: Path, more: list[str]) -> None:
    """A tree with the chips of `sample`, whose CSV knows `more` test chips."""
    root.mkdir()
    for entry in sample.iterdir():
        (root / entry.name).symlink_to(entry)
    path, *others = sorted(root.glob("*features_metadata*"))  # the same under the names that other libraries look for
    for other in others:
        other.unlink()
    rows = list(csv.reader(path.read_text().splitlines()))
    name, split = rows[0].index("filename"), rows[0].index("split")
    for chip in more:
        row = list(next(row for row in rows if row[split] == "test"))
        row[name] = f"{chip}_S1_00.tif"
        rows.append(row)
    path.unlink()  # the link
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows(rows)


def test_the_metadata_says_which_maps_there_must_be(sample: Path, tmp_path: Path) -> None:
    chips = open_index(sample).split("test")
    assert submission(tmp_path / "s.tar", sample, chips).chips == tuple(sorted(chip.id for chip in chips))
    linked(sample, tmp_path / "data", ["zz1", "zz2"])
    for chosen, absent in ((open_index(tmp_path / "data").split("test"), "2 of the 4 test chips"),
                           (open_index(tmp_path / "data").split("train"), "4 of the 4 test chips")):
        with pytest.raises(DataError, match=f"{absent} of .*features_metadata.csv\\S* are not predicted: .*zz1, zz2; "
                                            "give --split test, and download"):
            submission(tmp_path / "s.tar", tmp_path / "data", chosen)


def test_without_a_csv_the_files_say_it(tree: Path, tmp_path: Path) -> None:
    chips = open_index(tree).chips
    assert len(submission(tmp_path / "s.tar", tree, chips).chips) == 1
    with pytest.raises(DataError, match="no test chips are predicted; give --split test"):
        submission(tmp_path / "s.tar", tree, open_index(tree).split("train"))


def test_another_kind_of_archive_is_refused(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--submission \S+s.zip: give a file that ends in .tar"):
        submission(tmp_path / "s.zip", tree, open_index(tree).chips)
