"""Which chips there are, which months each has, and where the files lie.

The only module that knows how folders are laid out (docs/data.md); `engine.data.metadata` knows the CSVs.  A folder is
read from file names, and held to its CSVs where it has any.

The whole challenge is 261,115 files, so an index is made from names alone: every folder is listed once, a chip's months
are bits of one integer until its `Chip` is made, and no object is made for a file (benchmarks/index.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from engine.base.errors import DataError
from engine.base.texts import read_json
from engine.data.dataset import FILE, Dataset, load_dataset, parse_dataset
from engine.data.metadata import FEATURE_CSVS, LABEL_CSVS, Published, find_csv, read_metadata, rows
from engine.data.store import chip_file


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
class Index:
    """The chips of a folder, sorted by id."""

    root: Path
    dataset: Dataset
    chips: tuple[Chip, ...]

    @cached_property
    def files(self) -> tuple[Published, ...]:
        """Rows of the CSVs, read when they are first asked for; empty where the folder has none."""
        return () if is_store(self.root) else tuple(read_metadata(self.root, self.dataset.folders))

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
    csvs = [path for patterns in (FEATURE_CSVS, LABEL_CSVS) if (path := find_csv(root, patterns))]
    listed = {row.name for path in csvs for row in rows(path)}
    tiffs = {folder: _tiffs(folder) for folder in _folders(root, dataset)}
    names = dataset.folders
    expected = f"expected {_example(dataset)} in {names.train}/ or {names.test}/"
    if not any(tiffs.values()):
        raise DataError(f"{root}: no chips here; {expected}, or in the folder itself")
    if listed:
        _agree(root, dataset, listed, set().union(*tiffs.values()))
    chips = _chips(root, tiffs, dataset)
    if not chips:
        raise DataError(f"{root}: only labels here; {expected}")
    return Index(root, dataset, tuple(chips))


def dataset_at(root: Path, dataset: Dataset | None = None) -> Dataset:
    """The description of the TIFF tree at `root`: its own, else `dataset`, else BioMassters'."""
    if os.path.lexists(root / FILE):  # a link to nothing must not be passed over
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
    try:
        for entry in manifest["chips"]:
            name = f"{entry['id']}{chip_file.SUFFIX}"
            path = folder / name
            if name not in there:
                raise DataError(f"{path}: is in {chip_file.MANIFEST} but not on disk; {chip_file.REMEDY}")
            if not (isinstance(entry["id"], str) and entry["id"]) or entry["split"] not in ("train", "test"):
                raise TypeError
            months = tuple(row(entry["months"][sensor.name]) for sensor in dataset.sensors)
            label = path if entry["label"] else None
            chips.append(Chip(entry["id"], entry["split"], dataset, months, folder, label, path))
    except (KeyError, TypeError):
        raise _damaged(root / chip_file.MANIFEST) from None
    listed = {chip.packed.name for chip in chips if chip.packed is not None}
    if len(listed) < len(chips) or any(len(have) != dataset.months for chip in chips for have in chip.months):
        raise _damaged(root / chip_file.MANIFEST)
    more = sorted(name for name in there - listed if name.endswith(chip_file.SUFFIX) and not name.startswith("."))
    if more:
        raise DataError(f"{folder / more[0]}: is not in {chip_file.MANIFEST}, nor are {len(more) - 1} more; run "
                        f"`launch/prepare.py pack` again, it writes {chip_file.MANIFEST} anew, or move them away")
    return Index(root, dataset, tuple(chips))


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a packed store.  Raises DataError where it is missing, unreadable or of another version."""
    path = root / chip_file.MANIFEST
    try:
        manifest = read_json(path)
        version, _ = manifest["version"], manifest["chips"][0]["id"]
        if version == chip_file.VERSION:
            manifest["dataset"]
    except FileNotFoundError:
        raise DataError(f"{root}: packing is not finished (there is no {chip_file.MANIFEST}); run the same "
                        f"`launch/prepare.py pack` or `download` again, it goes on from where it stopped") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend its permissions or its disk") from None
    except (ValueError, KeyError, TypeError, IndexError):
        raise _damaged(path) from None
    if version != chip_file.VERSION:
        raise DataError(f"{path}: a store of format version {version}, this program reads {chip_file.VERSION}; take "
                        f"the program that packed it, or pack the TIFFs anew")
    return manifest


def _damaged(manifest: Path) -> DataError:
    return DataError(f"{manifest}: is damaged; run `launch/prepare.py pack` again, it keeps the packed chips and "
                     f"writes the manifest anew")


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


def _chips(root: Path, tiffs: dict[Path, list[str]], dataset: Dataset) -> list[Chip]:
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
                                f"{dataset.label_name('{chip}')}); move it away, or describe the data in "
                                f"{root / FILE}")
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
    months_of = cache(lambda bits: tuple(tuple(bool(bits >> s * steps + t & 1) for t in range(steps))
                                    for s in range(len(dataset.sensors))))  # few chips have months of their own
    return [Chip(chip, "test" if folders[chip].name == dataset.folders.test else "train", dataset, months_of(have),
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
