"""Brings the challenge's files here: which there are, which are missing, and where they go.

Behind `launch/prepare.py download`.  The metadata CSVs say what there is (`select`); `Tree` and `Store` are the two
places it can go to, which know what of it they hold already; `engine.data.fetch.s3` fetches and verifies the rest and
hands it on: to a TIFF tree file by file, to a packed store chip by chip, so that the 312 GB of TIFFs never lie on the
disk.

The layout on S3 and the CSVs' columns are those of biomassters_download_instructions.txt on the challenge's data
page.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, pairwise
from pathlib import Path

from engine.base.errors import ConfigError, DataError
from engine.base.progress import Progress
from engine.data.biomassters import BIOMASSTERS, FEATURE_NAMES, LABEL_NAME
from engine.data.fetch.s3 import ByChip, Deliver, Remote
from engine.data.metadata import FEATURE_CSVS, LABEL_CSVS, Published, read_metadata, verify
from engine.data.store import chip_file, pack
from engine.data.tiff.tiff import write_bytes

DATA_PAGE = "https://www.drivendata.org/competitions/99/biomass-estimation/data/"
FOLDERS = {"train_features": "train", "test_features": "test", "train_agbm": "train"}  # on S3 -> split
_PLACE = re.compile(rf"s3://(?P<bucket>[^/]+)/(?P<key>(.*/)?(?P<folder>{'|'.join(FOLDERS)})/(?P<name>[^/]+))")
BLOCK = 4096  # bytes a file system gives out at a time


def select(metadata: Path, region: str = "us", split: str = "all", chips: str | None = None) -> list[Remote]:
    """The files of the CSVs in `metadata` that belong to `split` and `chips`, chip after chip.

    `chips` is a number (so many, in the order of their ids, which are random) or a text file of ids, one a line.
    Raises DataError where a CSV is missing, lacks the region or names anything that is not of this layout, and
    where a chip is not in the CSV; ConfigError for an impossible number.
    """
    rows = list(read_metadata(metadata))
    kinds = {any(name.fullmatch(row.path.name) for name in FEATURE_NAMES) for row in rows}
    for kind, name in ((True, "features_metadata.csv"), (False, "train_agbm_metadata.csv")):
        if kind not in kinds and (kind or split != "test"):
            raise DataError(f"{metadata}: no {name} here; it is on {DATA_PAGE} (free account); put it there")
    files = sorted((_remote(row, region) for row in rows), key=lambda file: (file.chip, file.name))
    for one, other in pairwise(files):
        if one.name == other.name:
            raise DataError(f"{metadata}: {one.name} is in the metadata CSV twice; get it again from {DATA_PAGE}")
    files = [file for file in files if split in ("all", FOLDERS[file.folder])]
    if chips is None:
        return files
    there = sorted({file.chip for file in files})
    wanted = _chosen(chips, there)
    return [file for file in files if file.chip in wanted]


def _remote(row: Published, region: str) -> Remote:
    name = row.path.name
    if not row.url.get(region):
        others = ", ".join(key for key, value in row.url.items() if value) or "none"
        raise DataError(f"{name}: the metadata CSV has no s3path_{region} (it has: {others}); give --region one of "
                        f"these, or get the CSV from {DATA_PAGE}")
    url = row.url[region]
    place = _PLACE.fullmatch(url)
    match = next(filter(None, (known.fullmatch(name) for known in (*FEATURE_NAMES, LABEL_NAME))), None)
    if not place or not match or place["name"] != name:
        raise DataError(f"{name}: its place {url!r} is not s3://BUCKET/FOLDER/{name} with FOLDER one of "
                        f"{', '.join(FOLDERS)}; get the CSV from {DATA_PAGE}")
    return Remote(name, match["chip"], place["folder"], place["bucket"], place["key"], row.size, row.cksum)


def _chosen(chips: str, there: list[str]) -> set[str]:
    if chips.isdecimal():
        if not 1 <= int(chips) <= len(there):
            raise ConfigError(f"--chips {chips}: there are {len(there)}; give a number from 1 on, or a file of ids")
        return set(there[: int(chips)])
    try:
        wanted = set(Path(chips).read_text().split())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chips {chips}: neither a number nor a text file of chip ids ({error})") from None
    unknown = sorted(wanted - set(there))
    if unknown or not wanted:
        raise DataError(f"{chips}: {len(unknown)} of its {len(wanted)} chips are not in the metadata CSV and split"
                        f"{', first ' + unknown[0] if unknown else ''}; give ids as in the column chip_id, one a line")
    return wanted


class Tree:
    """The TIFF tree, in the layout of S3 (or flat, where `out` itself holds TIFFs already)."""

    def __init__(self, out: Path, metadata: Path):
        self.out, self._metadata = out, metadata
        flat = not any((out / folder).is_dir() for folder in FOLDERS) and any(out.glob("*.tif"))
        self._folders = {folder: out if flat else out / folder for folder in FOLDERS}

    def missing(self, files: list[Remote], workers: int, progress: Callable[[int], None]) -> list[Remote]:
        """Those of `files` that are not there as published; reads the ones that are.  `progress(1)` a file."""
        places = {self._folders[file.folder] / file.name: file for file in files}
        problems = verify((Published(path, f.size, f.cksum) for path, f in places.items()), workers, progress)
        return [places[problem.path] for problem in problems]

    def room(self, files: Iterable[Remote]) -> int:
        """Bytes that `files` take on the disk, in whole blocks."""
        return sum(-(-file.expected // BLOCK) * BLOCK for file in files)

    def deliver(self, files: Iterable[Remote]) -> Deliver:
        def write(file: Remote, data: bytes | None) -> None:
            if data is not None:
                write_bytes(self._folders[file.folder] / file.name, data)

        return write

    def sweep(self) -> None:
        """Remove what a killed download left half-written."""
        for folder in {self.out, *self._folders.values()}:
            for part in folder.glob(".*.part"):
                part.unlink(missing_ok=True)

    def finish(self) -> None:
        """Copy the CSVs to where `prepare.py verify` and the index look for them, unless there are some."""
        for patterns in (FEATURE_CSVS, LABEL_CSVS):
            if not any(path for pattern in patterns for path in self.out.glob(pattern)):
                for path in (path for pattern in patterns for path in self._metadata.glob(pattern)):
                    write_bytes(self.out / path.name, path.read_bytes())


class Store:
    """A packed store (engine.data.store.pack): chips are packed as they arrive, the TIFFs never lie on the disk."""

    def __init__(self, out: Path, lossless: bool):
        self.out, self._values = out, chip_file.EXACT if lossless else chip_file.STEPS

    def missing(self, files: list[Remote], workers: int, progress: Callable[[int], None]) -> list[Remote]:
        """The files of all chips that are not packed from them, whole; reads the ones that are.  `progress(1)` a file.

        Raises DataError where `out` is something else than a store, or one of other settings.
        """
        pack.check_settings(self.out, BIOMASSTERS, self._values)
        chips = [list(group) for _, group in groupby(files, key=lambda file: file.chip)]
        todo: list[Remote] = []
        with ThreadPoolExecutor(workers) as pool:
            for chip, packed in zip(chips, pool.map(self._packed, chips)):
                todo += [] if packed else chip
                progress(len(chip))
        return todo

    def _path(self, chip: str) -> Path:
        return self.out / chip_file.CHIPS / f"{chip}{chip_file.SUFFIX}"

    def _packed(self, chip: list[Remote]) -> bool:
        path = self._path(chip[0].chip)
        if not path.exists():
            return False
        try:
            sources = chip_file.verify_file(path).sources
        except DataError:
            return False
        return sources.keys() == {file.name for file in chip} and all(
            file.size in (None, sources[file.name][0]) and file.cksum in (None, sources[file.name][1]) for file in chip)

    def room(self, files: Iterable[Remote]) -> int:
        """Bytes that the chips of `files` take on the disk at most."""
        return int(pack.SHARE[self._values] * sum(file.expected for file in files))

    def deliver(self, files: Iterable[Remote]) -> Deliver:
        files = list(files)
        splits = {file.chip: FOLDERS[file.folder] for file in files}
        if files:
            (self.out / chip_file.MANIFEST).unlink(missing_ok=True)  # from here on the store is unfinished
        return ByChip(files, lambda chip, data: pack.write_chip(
            self._path(chip), pack.encode_chip(chip, splits[chip], BIOMASSTERS, data, self._values)))

    def sweep(self) -> None:
        """Remove what a killed download left half-written."""
        pack.sweep(self.out / chip_file.CHIPS)

    def finish(self) -> None:
        """Write the manifest, of all chips that the store holds."""
        pack.write_manifest(self.out, BIOMASSTERS, self._values)


def check_space(folder: Path, needed: int) -> None:
    """Raise DataError where the disk of `folder` has less than `needed` bytes free."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DataError(f"{folder}: {size_text(needed)} are to be written and {size_text(free)} are free; make room, "
                        f"choose another folder, or take a part (--split, --chips)")


def size_text(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def megabytes(progress: Progress, done: int) -> Callable[[int], None]:
    """Advance `progress`, which counts megabytes and starts at `done` bytes, by bytes."""

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress.advance(done // 10**6 - progress.done)

    return advance
