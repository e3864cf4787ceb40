"""Which chips there are, which months each has, and where the files lie.

The only module that knows the folder layouts and CSV names, which docs/data.md describes.  A folder is read from its
CSV files where they exist and from file names where they do not; both give the same `Index`.
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
from engine.data.dataset import FILE, Dataset, load_dataset, parse_dataset
from engine.data.store import chip_file
from engine.data.tiff.checksum import cksum_file

# Names under which the two CSVs are found in the wild
FEATURE_CSVS = ("*features_metadata*.csv", "*features_metadata*.csv.gz")
LABEL_CSVS = ("*train_agbm_metadata*.csv", "*train_agbm_metadata*.csv.gz")


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
    files: tuple[Published, ...]  # rows of the CSVs; empty where the folder has none

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
        raise DataError(f"{root}: no such folder; give the one that holds train_features/ and train_agbm/, or make "
                        f"one with `python launch/prepare.py sample --out {root} --chips 16`")
    if is_store(root):
        return _open_store(root)
    dataset = dataset_at(root, dataset)
    files = tuple(read_metadata(root))
    on_disk = {path.name: path for path in _tiffs(root, dataset)}
    expected = f"expected {_example(dataset)} in {dataset.folders.train}/ or {dataset.folders.test}/"
    if not on_disk:
        raise DataError(f"{root}: no chips here; {expected}, or in the folder itself")
    if files:
        _agree(root, dataset, files, on_disk)
    chips = _chips(on_disk, dataset)
    if not chips:
        raise DataError(f"{root}: only labels here; {expected}")
    return Index(root, dataset, tuple(chips), files)


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
    there = {path.name for path in folder.glob(f"*{chip_file.SUFFIX}")}
    chips = []
    for entry in manifest["chips"]:
        path = folder / f"{entry['id']}{chip_file.SUFFIX}"
        if path.name not in there:
            raise DataError(f"{path}: is in {chip_file.MANIFEST} but not on disk; {chip_file.REMEDY}")
        chips.append(Chip(entry["id"], entry["split"], dataset,
                          tuple(tuple(month == "1" for month in entry["months"][sensor.name])
                                for sensor in dataset.sensors),
                          folder, path if entry["label"] else None, path))
    return Index(root, dataset, tuple(chips), ())


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


def _tiffs(root: Path, dataset: Dataset) -> Iterator[Path]:
    names = dataset.folders
    folders = [f for f in (root / names.train, root / names.test, root / names.target) if f.is_dir()]
    for folder in folders or [root]:
        yield from folder.glob("*.tif")


def _chips(on_disk: dict[str, Path], dataset: Dataset) -> list[Chip]:
    months: dict[str, np.ndarray] = {}
    folders: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    for name, path in on_disk.items():
        found = _parse(name, dataset)
        if found is None:
            raise DataError(f"{path}: not a name of this data ({_example(dataset)}, {dataset.label_name('{chip}')}); "
                            f"move it away")
        chip, sensor, month = found
        if sensor is None:
            labels[chip] = path
            continue
        if month is not None and month >= dataset.months:
            raise DataError(f"{path}: month {month} does not exist (00 is {dataset.steps[0]}, {dataset.months - 1} "
                            f"{dataset.steps[-1]})")
        months.setdefault(chip, np.zeros((len(dataset.sensors), dataset.months), bool))[
            sensor, slice(None) if month is None else month] = True
        if folders.setdefault(chip, path.parent) != path.parent:
            raise DataError(f"{path}: chip {chip} lies in {folders[chip]} as well; keep one of them")
    return [
        Chip(chip, "test" if folders[chip].name == dataset.folders.test else "train", dataset,
             tuple(tuple(bool(x) for x in row) for row in have), folders[chip], labels.get(chip))
        for chip, have in sorted(months.items())
    ]


def _parse(name: str, dataset: Dataset) -> tuple[str, int | None, int | None] | None:
    """(chip, sensor, step) of a file's name; no sensor for a label, no step for a static image; None for neither."""
    for number, pattern in enumerate(dataset.names):
        if match := pattern.fullmatch(name):
            if number == len(dataset.sensors):
                return match["chip"], None, None
            return match["chip"], number, None if dataset.sensors[number].static else int(match["step"])
    return None


def _agree(root: Path, dataset: Dataset, files: Iterable[Published], on_disk: dict[str, Path]) -> None:
    def is_feature(name: str) -> bool:
        found = _parse(name, dataset)
        return found is not None and found[1] is not None

    listed = {file.path.name for file in files}
    absent = sorted(listed - on_disk.keys())
    if absent:
        # One folder often holds a part of the challenge with its whole CSV: chips of which nothing is there are fine.
        started = {name.split("_")[0] for name in on_disk if is_feature(name)}
        holes = [name for name in absent if name.split("_")[0] in started]
        if holes:
            raise DataError(f"{root}: {len(holes)} files are in the metadata CSV but not on disk, first {holes[0]}; "
                            f"download them (`launch/prepare.py verify --data {root}` lists all)")
    features_listed = any(map(is_feature, listed))
    extra = sorted(name for name in on_disk.keys() - listed
                   if is_feature(name) and features_listed)
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
