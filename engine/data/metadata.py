"""The challenge's metadata CSVs: what they say of each file, and files compared with it."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from engine.base.errors import DataError
from engine.data.dataset import Folders, load_dataset
from engine.data.tiff.checksum import cksum_file

# Names under which the two CSVs are found in the wild; several of one kind are fine where they hold the same
FEATURE_CSVS = ("*features_metadata*.csv", "*features_metadata*.csv.gz")
LABEL_CSVS = ("*train_agbm_metadata*.csv", "*train_agbm_metadata*.csv.gz")
# The names that other libraries look for (docs/other-libraries.md): torchgeo, TerraTorch
FEATURE_CSVS_ELSEWHERE = ("biomassters_features_metadata.csv", "The_BioMassters_-_features_metadata.csv.csv")

_PLAIN = re.compile(r"(?!\.{1,2}$)[^/\\\x00-\x1f]{1,255}")  # a file's name, in its folder
_SPLIT = re.compile(r"\w{0,50}")
_LONGEST = 1 << 16


@dataclass(frozen=True)
class Published:
    """What a metadata row says of a file."""

    path: Path
    size: int | None
    cksum: int | None
    url: dict[str, str] = field(default_factory=dict)  # region -> s3 path


class Row(NamedTuple):
    """A row of a metadata CSV."""

    name: str
    split: str  # "" in the labels' CSV, which has no such column
    size: int | None
    cksum: int | None
    url: dict[str, str]  # region -> s3 path


def read_metadata(root: Path, folders: Folders | None = None) -> Iterator[Published]:
    """The rows of the metadata CSVs in `root` as files with their published size and checksum."""
    names = folders or load_dataset("biomassters").folders
    features_in = {"train": root / names.train, "test": root / names.test}
    split_folders = any(folder.is_dir() for folder in features_in.values())
    if features := find_csv(root, FEATURE_CSVS):
        for row in rows(features):
            folder = features_in.get(row.split or "train", root / f"{row.split}_features") if split_folders else root
            yield Published(folder / row.name, row.size, row.cksum, row.url)
    if labels := find_csv(root, LABEL_CSVS):
        folder = root / names.target
        folder = folder if folder.is_dir() else root
        for row in rows(labels):
            yield Published(folder / row.name, row.size, row.cksum, row.url)


def find_csv(root: Path, patterns: tuple[str, ...]) -> Path | None:
    found = sorted({path for pattern in patterns for path in root.glob(pattern)})
    for path in found:
        if not path.exists():
            raise DataError(f"{path}: is a link to nothing; remove it, or bring back {path.readlink()}")
    for other in found[1:]:
        if not same_content(found[0], other):
            raise DataError(f"{root}: {found[0].name} and {other.name} are metadata of one kind and differ; keep one")
    return found[0] if found else None


def same_content(one: Path, other: Path) -> bool:
    """Whether two CSVs are one file, or hold the same bytes (decompressed, where they end in .gz)."""
    if one.samefile(other):
        return True
    with _open(one) as a, _open(other) as b:
        blocks = ((a.read(1 << 20), b.read(1 << 20)) for _ in count())
        return all(x == y for x, y in takewhile(any, blocks))


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def rows(path: Path) -> Iterator[Row]:
    """Raises DataError for a CSV that is damaged, or of another kind."""
    try:
        yield from _rows(path)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); download the CSV again") from None


def _rows(path: Path) -> Iterator[Row]:
    with _open(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as handle:
        reader = csv.reader(_lines(handle))
        header = next(reader, [])
        width, columns = len(header), {column: place for place, column in enumerate(header)}
        if "filename" not in columns:
            raise DataError(f"{path}: column filename is missing; is this the challenge's CSV?")
        name, size, cksum, split = (columns.get(column, width) for column in ("filename", "size", "cksum", "split"))
        regions = [(column.removeprefix("s3path_"), place) for column, place in columns.items()
                   if column.startswith("s3path_")]
        for cells in reader:
            if not cells:
                continue
            del cells[width:]
            cells += [""] * (width + 1 - len(cells))  # the last one stands for columns that are not there
            if not cells[name]:
                raise DataError(f"{path}:{reader.line_num}: empty filename; download the CSV again")
            try:
                row_size, row_cksum = (int(cells[place]) if cells[place] else None for place in (size, cksum))
            except ValueError:
                raise DataError(f"{path}: size or cksum of {cells[name]} is no number; download the CSV "
                                f"again") from None
            if not _PLAIN.fullmatch(cells[name]) or not _SPLIT.fullmatch(cells[split]):
                raise DataError(f"{path}:{reader.line_num}: filename {cells[name][:80]!r} of split "
                                f"{cells[split][:80]!r} is no file in a folder of this data; download the CSV again")
            yield Row(cells[name], cells[split], row_size, row_cksum,
                       {region: cells[place] for region, place in regions})


def _lines(handle: io.TextIOWrapper) -> Iterator[str]:
    """Raises csv.Error for a line that a few bytes of a .gz can make as long as the memory."""
    while line := handle.readline(_LONGEST):
        if len(line) == _LONGEST:
            raise csv.Error(f"a line of more than {_LONGEST} characters")
        yield line


@dataclass(frozen=True)
class Problem:
    path: Path
    what: str


def verify(files: Iterable[Published], workers: int = 4,
           progress: Callable[[int], None] | None = None) -> list[Problem]:
    """Compare files with their published size and `cksum`.  `progress` is called with 1 after each file."""

    def check(file: Published) -> Problem | None:
        try:
            actual = file.path.stat().st_size
        except FileNotFoundError:
            return Problem(file.path, "missing")
        except OSError as error:
            return Problem(file.path, str(error))
        if file.size is not None and actual != file.size:
            return Problem(file.path, f"{actual} bytes, published {file.size}")
        if file.cksum is not None:
            crc, _ = cksum_file(file.path)
            if crc != file.cksum:
                return Problem(file.path, f"cksum {crc}, published {file.cksum}")
        return None

    problems = []
    with ThreadPoolExecutor(workers) as pool:
        for problem in pool.map(check, files):
            if problem:
                problems.append(problem)
            if progress:
                progress(1)
    return problems
