"""Which chips there are, which months each has, and where the files lie.

The only module that knows how folders are laid out and how the CSVs are named (docs/data.md).  A folder is read from
its CSV files where they exist and from file names where they do not; both give the same `Index`.

The whole challenge is 261,115 files, so an index is made from names alone: every folder is listed once, a chip's months
are bits of one integer until its `Chip` is made, and no object is made for a file (benchmarks/index.py).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from engine.base.errors import DataError
from engine.data.dataset import FILE, Dataset, load_dataset, parse_dataset
from engine.data.store import chip_file
from engine.data.tiff.checksum import cksum_file

# Names under which the two CSVs are found in the wild; several of one kind are fine where they hold the same
FEATURE_CSVS = ("*features_metadata*.csv", "*features_metadata*.csv.gz")
LABEL_CSVS = ("*train_agbm_metadata*.csv", "*train_agbm_metadata*.csv.gz")
# The names that other libraries look for (docs/other-libraries.md): torchgeo, TerraTorch
FEATURE_CSVS_ELSEWHERE = ("biomassters_features_metadata.csv", "The_BioMassters_-_features_metadata.csv.csv")

@dataclass(frozen=True)
class Chip:
    """One place.  `months[s]` holds, for each sensor, which of the T steps have a file; all or none if it is static."""

    id: str
    split: str  # "train" or "test"
    dataset: Dataset
    months: tuple[tuple[bool, ...], ...]  # [sensors][T]
    folder: Path  # of the features
    label: Path | None  # None where the chip has no label
    packed: Path | None = None  # the file that holds all of it, label included, in a packed store

    def path(self, sensor: int, month: int) -> Path:
        return self.folder / self.dataset.feature_name(self.id, sensor, month)

    @property
    def there(self) -> list[int]:
        """The steps with an image."""
        moving = [have for have, sensor in zip(self.months, self.dataset.sensors) if not sensor.static]
        return [t for t in range(self.dataset.months) if any(have[t] for have in moving)]

    @property
    def missing(self) -> tuple[int, ...]:
        """The steps without any image."""
        there = self.there
        return tuple(t for t in range(self.dataset.months) if t not in there)

    @property
    def files(self) -> list[Path]:
        """Its TIFFs."""
        found = [self.path(number, t) for number, sensor in enumerate(self.dataset.sensors)
                 for t in range(1 if sensor.static else self.dataset.months) if self.months[number][t]]
        return found + ([self.label] if self.label is not None else [])


@dataclass(frozen=True)
class Published:
    """What a metadata row says of a file."""

    path: Path
    size: int | None
    cksum: int | None
    url: dict[str, str] = field(default_factory=dict)  # region -> s3 path


@dataclass(frozen=True)
class Index:
    """The chips of a folder, sorted by id."""

    root: Path
    dataset: Dataset
    chips: tuple[Chip, ...]

    @cached_property
    def files(self) -> tuple[Published, ...]:
        """Rows of the CSVs, read when they are first asked for; empty where the folder has none."""
        return () if is_store(self.root) else tuple(read_metadata(self.root, self.dataset))

    def __len__(self) -> int:
        return len(self.chips)

    def by_id(self) -> dict[str, Chip]:
        return {chip.id: chip for chip in self.chips}

    def split(self, name: str) -> list[Chip]:
        return [chip for chip in self.chips if chip.split == name]

    def labelled(self) -> list[Chip]:
        return [chip for chip in self.chips if chip.label is not None]


def open_index(root: Path | str, dataset: Dataset | None = None) -> Index:
    """Index the TIFF tree, or the packed store, under `root`.

    dataset: what lies there; BioMassters where None.  A folder's own dataset.yaml, and a store's manifest, win.

    Raises DataError where the folder is missing or empty, where a CSV names a file that is not there, or where a
    file is there that its CSV does not know (so that a half-finished download never trains in silence).
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the one that holds the chips, or make one with "
                        f"`python launch/prepare.py sample --out {root} --chips 16`")
    if is_store(root):
        return _open_store(root)
    dataset = dataset_at(root, dataset)
    csvs = [path for patterns in (FEATURE_CSVS, LABEL_CSVS) if (path := _find_csv(root, patterns))]
    listed = {row.name for path in csvs for row in _rows(path)}
    tiffs = {folder: _tiffs(folder) for folder in _folders(root, dataset)}
    names = dataset.folders
    expected = f"expected {_example(dataset)} in {names.train}/ or {names.test}/"
    if not any(tiffs.values()):
        raise DataError(f"{root}: no chips here; {expected}, or in the folder itself")
    if listed:
        _agree(root, dataset, listed, set().union(*tiffs.values()))
    chips = _chips(tiffs, dataset)
    if not chips:
        raise DataError(f"{root}: only labels here; {expected}")
    return Index(root, dataset, tuple(chips))


def dataset_at(root: Path, dataset: Dataset | None = None) -> Dataset:
    """The description of the TIFF tree at `root`: its own, else `dataset`, else BioMassters'."""
    if (root / FILE).is_file():
        return load_dataset(root / FILE)
    return dataset or load_dataset("biomassters")


def _example(dataset: Dataset) -> str:
    return dataset.feature_name("{chip}", 0, 0)


def is_store(root: Path) -> bool:
    """Whether `root` holds packed chips (engine.data.store.pack), finished or not."""
    return (root / chip_file.MANIFEST).is_file() or (root / chip_file.CHIPS).is_dir()


def _open_store(root: Path) -> Index:
    manifest = read_manifest(root)
    dataset = parse_dataset(manifest["dataset"], f"{root / chip_file.MANIFEST}, dataset")
    folder = root / chip_file.CHIPS
    there = set(_names(folder)) if folder.is_dir() else set()
    row = cache(lambda months: tuple(month == "1" for month in months))  # few chips have months of their own
    chips = []
    for entry in manifest["chips"]:
        name = f"{entry['id']}{chip_file.SUFFIX}"
        path = folder / name
        if name not in there:
            raise DataError(f"{path}: is in {chip_file.MANIFEST} but not on disk; {chip_file.REMEDY}")
        months = tuple(row(entry["months"][sensor.name]) for sensor in dataset.sensors)
        chips.append(Chip(entry["id"], entry["split"], dataset, months, folder, path if entry["label"] else None, path))
    return Index(root, dataset, tuple(chips))


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a packed store.  Raises DataError where it is missing, unreadable or of another version."""
    path = root / chip_file.MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version, _ = manifest["version"], manifest["chips"][0]["id"]
        if version == chip_file.VERSION:
            manifest["dataset"]
    except FileNotFoundError:
        raise DataError(f"{root}: packing is not finished (there is no {chip_file.MANIFEST}); run the same "
                        f"`launch/prepare.py pack` or `download` again, it goes on from where it stopped") from None
    except (ValueError, KeyError, TypeError, IndexError):
        raise DataError(f"{path}: is damaged; run `launch/prepare.py pack` again, it keeps the packed chips and writes "
                        f"the manifest anew") from None
    if version != chip_file.VERSION:
        raise DataError(f"{path}: a store of format version {version}, this program reads {chip_file.VERSION}; take "
                        f"the program that packed it, or pack the TIFFs anew")
    return manifest


def _folders(root: Path, dataset: Dataset) -> list[Path]:
    """The folders of a tree; one that has none of them is flat, and holds all files itself."""
    names = dataset.folders
    folders = [root / name for name in (names.train, names.test, names.target, names.test_target)]
    return [folder for folder in folders if folder.is_dir()] or [root]


def _tiffs(folder: Path) -> list[str]:
    return [name for name in _names(folder) if name.endswith(".tif")]


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); mend its permissions or its disk") from None


def _chips(tiffs: dict[Path, list[str]], dataset: Dataset) -> list[Chip]:
    """Chips by id, of the names of the TIFFs in each folder."""
    steps = dataset.months
    months: dict[str, int] = {}  # chip -> a bit for each of its images, sensor by sensor
    folders: dict[str, Path] = {}
    labels: dict[str, Path] = {}  # chip -> the folder of its label
    for folder, names in tiffs.items():
        for name in names:
            found = _parsed(name, dataset)
            if found is None:
                raise DataError(f"{folder / name}: not a name of this data ({_example(dataset)}, "
                                f"{dataset.label_name('{chip}')}); move it away")
            chip, sensor, step = found
            if sensor is None:
                if labels.setdefault(chip, folder) is not folder:
                    raise DataError(f"{folder / name}: lies in {labels[chip]} as well; keep one of them")
                continue
            if step >= steps:
                raise DataError(f"{folder / name}: month {step} does not exist (00 is {dataset.steps[0]}, "
                                f"{steps - 1:02d} {dataset.steps[-1]})")
            bits = (1 << steps) - 1 if dataset.sensors[sensor].static else 1 << step
            months[chip] = months.get(chip, 0) | bits << sensor * steps
            if folders.setdefault(chip, folder) is not folder:
                raise DataError(f"{folder / name}: chip {chip} lies in {folders[chip]} as well; keep one of them")
    rows = cache(lambda bits: tuple(tuple(bool(bits >> s * steps + t & 1) for t in range(steps))
                                    for s in range(len(dataset.sensors))))  # few chips have months of their own
    return [Chip(chip, "test" if folders[chip].name == dataset.folders.test else "train", dataset, rows(have),
                 folders[chip], labels[chip] / dataset.label_name(chip) if chip in labels else None)
            for chip, have in sorted(months.items())]


def _parsed(name: str, dataset: Dataset) -> tuple[str, int | None, int] | None:
    """(chip, sensor, step) of a file's name; no sensor for a label, step 0 for a static image; None for other names."""
    for number, pattern in enumerate(dataset.names):
        if match := pattern.fullmatch(name):
            if number == len(dataset.sensors):
                return match["chip"], None, 0
            return match["chip"], number, 0 if dataset.sensors[number].static else int(match["step"])
    return None


def _agree(root: Path, dataset: Dataset, listed: set[str], on_disk: set[str]) -> None:
    def chip_of(name: str) -> str | None:
        """Of an image; None for other files."""
        found = _parsed(name, dataset)
        return found[0] if found is not None and found[1] is not None else None

    absent = listed - on_disk
    if absent:
        # One folder often holds a part of the challenge with its whole CSV: chips of which nothing is there are fine.
        started = {chip_of(name) for name in on_disk} - {None}
        holes = sorted(name for name in absent if (_parsed(name, dataset) or (None,))[0] in started)
        if holes:
            raise DataError(f"{root}: {len(holes)} files are in the metadata CSV but not on disk, first {holes[0]}; "
                            f"download them (`launch/prepare.py verify --data {root}` lists all)")
    extra = sorted(name for name in on_disk - listed if chip_of(name))
    if extra and any(map(chip_of, listed)):
        raise DataError(f"{root}: {len(extra)} files are on disk but not in the metadata CSV, first {extra[0]}; "
                        f"move them away or remove the CSV to index by file names")


class _Row(NamedTuple):
    """A row of a metadata CSV."""

    name: str
    split: str  # "" in the labels' CSV, which has no such column
    size: int | None
    cksum: int | None
    url: dict[str, str]  # region -> s3 path


def read_metadata(root: Path, dataset: Dataset | None = None) -> Iterator[Published]:
    """The rows of the metadata CSVs in `root` as files with their published size and checksum."""
    names = dataset_at(root, dataset).folders
    folders = {"train": root / names.train, "test": root / names.test}
    split_folders = any(folder.is_dir() for folder in folders.values())
    if features := _find_csv(root, FEATURE_CSVS):
        for row in _rows(features):
            folder = folders.get(row.split or "train", root / f"{row.split}_features") if split_folders else root
            yield Published(folder / row.name, row.size, row.cksum, row.url)
    if labels := _find_csv(root, LABEL_CSVS):
        folder = root / names.target
        folder = folder if folder.is_dir() else root
        for row in _rows(labels):
            yield Published(folder / row.name, row.size, row.cksum, row.url)


def _find_csv(root: Path, patterns: tuple[str, ...]) -> Path | None:
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


def _rows(path: Path) -> Iterator[_Row]:
    with _open(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as handle:
        reader = csv.reader(handle)
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
            yield _Row(cells[name], cells[split], row_size, row_cksum,
                       {region: cells[place] for region, place in regions})


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
