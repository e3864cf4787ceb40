"""Which chips there are, which months each has, and where the files lie.

The only module that knows the folder layouts and CSV names of DESIGN §2.  A folder is read from its CSV files
where they exist and from file names where they do not; both give the same `Index`.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.base.errors import DataError
from engine.data.dataset import FEATURE_NAME, LABEL_NAME, MONTHS, SENSORS, T, feature_name
from engine.data.store import chip_file
from engine.data.tiff.checksum import cksum_file

# Names under which the two CSVs are found in the wild
FEATURE_CSVS = ("*features_metadata*.csv", "*features_metadata*.csv.gz")
LABEL_CSVS = ("*train_agbm_metadata*.csv", "*train_agbm_metadata*.csv.gz")


@dataclass(frozen=True)
class Chip:
    """One place.  `months[s]` holds, per sensor of SENSORS, which of the 12 months have a file."""

    id: str
    split: str  # "train" or "test"
    months: tuple[tuple[bool, ...], ...]  # [len(SENSORS)][T]
    folder: Path  # of the features
    label: Path | None  # None where the chip has no label
    packed: Path | None = None  # the file that holds all of it, label included, in a packed store

    def path(self, sensor: int, month: int) -> Path:
        return self.folder / feature_name(self.id, SENSORS[sensor], month)

    @property
    def missing(self) -> tuple[int, ...]:
        """The months without any image."""
        return tuple(t for t in range(T) if not any(have[t] for have in self.months))


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
    chips: tuple[Chip, ...]
    files: tuple[Published, ...]  # rows of the CSVs; empty where the folder has none

    def __len__(self) -> int:
        return len(self.chips)

    def by_id(self) -> dict[str, Chip]:
        return {chip.id: chip for chip in self.chips}

    def split(self, name: str) -> list[Chip]:
        return [chip for chip in self.chips if chip.split == name]

    def labelled(self) -> list[Chip]:
        return [chip for chip in self.chips if chip.label is not None]


def open_index(root: Path | str) -> Index:
    """Index the TIFF tree, or the packed store, under `root`.

    Raises DataError where the folder is missing or empty, where a CSV names a file that is not there, or where a
    file is there that its CSV does not know (so that a half-finished download never trains in silence).
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the one that holds train_features/ and train_agbm/, or make "
                        f"one with `python launch/prepare.py sample --out {root} --chips 16`")
    if is_store(root):
        return _open_store(root)
    files = tuple(read_metadata(root))
    on_disk = {path.name: path for path in _tiffs(root)}
    if not on_disk:
        raise DataError(f"{root}: no chips here; expected {{chip}}_S1_00.tif in train_features/ or test_features/, "
                        f"or in the folder itself")
    if files:
        _agree(root, files, on_disk)
    chips = _chips(on_disk)
    if not chips:
        raise DataError(f"{root}: only labels here; expected {{chip}}_S1_00.tif in train_features/ or test_features/")
    return Index(root, tuple(chips), files)


def is_store(root: Path) -> bool:
    """Whether `root` holds packed chips (engine.data.store.pack), finished or not."""
    return (root / chip_file.MANIFEST).is_file() or (root / chip_file.CHIPS).is_dir()


def _open_store(root: Path) -> Index:
    manifest = read_manifest(root)
    folder = root / chip_file.CHIPS
    there = {path.name for path in folder.glob(f"*{chip_file.SUFFIX}")}
    chips = []
    for entry in manifest["chips"]:
        path = folder / f"{entry['id']}{chip_file.SUFFIX}"
        if path.name not in there:
            raise DataError(f"{path}: is in {chip_file.MANIFEST} but not on disk; {chip_file.REMEDY}")
        chips.append(Chip(entry["id"], entry["split"],
                          tuple(tuple(month == "1" for month in entry["months"][sensor.name]) for sensor in SENSORS),
                          folder, path if entry["label"] else None, path))
    return Index(root, tuple(chips), ())


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a packed store.  Raises DataError where it is missing, unreadable or of another version."""
    path = root / chip_file.MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version, _ = manifest["version"], manifest["chips"][0]["id"]
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


def _tiffs(root: Path) -> Iterator[Path]:
    folders = [f for f in (root / "train_features", root / "test_features", root / "train_agbm") if f.is_dir()]
    for folder in folders or [root]:
        yield from folder.glob("*.tif")


def _chips(on_disk: dict[str, Path]) -> list[Chip]:
    months: dict[str, np.ndarray] = {}
    folders: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    for name, path in on_disk.items():
        if match := FEATURE_NAME.match(name):
            chip, month = match["chip"], int(match["month"])
            if month >= T:
                raise DataError(f"{path}: month {month} does not exist (00 is {MONTHS[0]}, 11 {MONTHS[-1]})")
            sensor = [s.name for s in SENSORS].index(match["sensor"])
            months.setdefault(chip, np.zeros((len(SENSORS), T), bool))[sensor, month] = True
            if folders.setdefault(chip, path.parent) != path.parent:
                raise DataError(f"{path}: chip {chip} lies in {folders[chip]} as well; keep one of them")
        elif match := LABEL_NAME.match(name):
            labels[match["chip"]] = path
        else:
            raise DataError(f"{path}: not a name of this data ({{chip}}_S1_00.tif, {{chip}}_agbm.tif); move it away")
    return [
        Chip(chip, "test" if folders[chip].name.startswith("test") else "train",
             tuple(tuple(bool(x) for x in row) for row in have), folders[chip], labels.get(chip))
        for chip, have in sorted(months.items())
    ]


def _agree(root: Path, files: Iterable[Published], on_disk: dict[str, Path]) -> None:
    listed = {file.path.name for file in files}
    absent = sorted(listed - on_disk.keys())
    if absent:
        # One folder often holds a part of the challenge with its whole CSV: chips of which nothing is there are fine.
        started = {name.split("_")[0] for name in on_disk if FEATURE_NAME.match(name)}
        holes = [name for name in absent if name.split("_")[0] in started]
        if holes:
            raise DataError(f"{root}: {len(holes)} files are in the metadata CSV but not on disk, first {holes[0]}; "
                            f"download them (`launch/prepare.py verify --data {root}` lists all)")
    features_listed = any(FEATURE_NAME.match(name) for name in listed)
    extra = sorted(name for name in on_disk.keys() - listed
                   if (FEATURE_NAME.match(name) and features_listed))
    if extra:
        raise DataError(f"{root}: {len(extra)} files are on disk but not in the metadata CSV, first {extra[0]}; "
                        f"move them away or remove the CSV to index by file names")


def read_metadata(root: Path) -> Iterator[Published]:
    """The rows of the metadata CSVs in `root` as files with their published size and checksum."""
    features, labels = _find_csv(root, FEATURE_CSVS), _find_csv(root, LABEL_CSVS)
    split_folder = (root / "train_features").is_dir() or (root / "test_features").is_dir()
    if features:
        for row in _rows(features, {"filename"}):
            split = row.get("split") or "train"
            yield _published(root / f"{split}_features" if split_folder else root, row, features)
    if labels:
        for row in _rows(labels, {"filename"}):
            yield _published(root / "train_agbm" if (root / "train_agbm").is_dir() else root, row, labels)


def _find_csv(root: Path, patterns: tuple[str, ...]) -> Path | None:
    found = sorted({path for pattern in patterns for path in root.glob(pattern)})
    if len(found) > 1:
        raise DataError(f"{root}: several metadata files of one kind: {', '.join(p.name for p in found)}; keep one")
    return found[0] if found else None


def _rows(path: Path, required: set[str]) -> Iterator[dict[str, str]]:
    opener: Callable[..., object] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", newline="", encoding="utf-8-sig") as handle:  # type: ignore[attr-defined]
        reader = csv.DictReader(handle)
        lacking = required - set(reader.fieldnames or ())
        if lacking:
            raise DataError(f"{path}: column {', '.join(sorted(lacking))} is missing; is this the challenge's CSV?")
        for number, row in enumerate(reader, start=2):
            if not row["filename"]:
                raise DataError(f"{path}:{number}: empty filename; download the CSV again")
            yield row


def _published(folder: Path, row: dict[str, str], source: Path) -> Published:
    try:
        size = int(row["size"]) if row.get("size") else None
        cksum = int(row["cksum"]) if row.get("cksum") else None
    except ValueError:
        raise DataError(f"{source}: size or cksum of {row['filename']} is no number; download the CSV again") from None
    urls = {key.removeprefix("s3path_"): value for key, value in row.items() if key and key.startswith("s3path_")}
    return Published(folder / row["filename"], size, cksum, urls)


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


def months_table(rows: Iterable[dict[str, str]]) -> dict[str, np.ndarray]:
    """chip -> [len(SENSORS), T] bool from metadata rows alone (planning without the files)."""
    table: dict[str, np.ndarray] = {}
    for row in rows:
        match = FEATURE_NAME.match(row["filename"])
        if not match:
            raise DataError(f"metadata row {row['filename']!r}: not a feature file name")
        sensor = [s.name for s in SENSORS].index(match["sensor"])
        table.setdefault(match["chip"], np.zeros((len(SENSORS), T), bool))[sensor, int(match["month"])] = True
    return table
