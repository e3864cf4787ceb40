"""The challenge's archive: a .tar with the map of every test chip at its root, {chip}_agbm.tif, one band of float32.

https://www.drivendata.org/competitions/99/biomass-estimation/ takes .tar, .tgz or .zip and wants 2,773 TIFFs of
256 × 256; the order does not matter.  Here they lie in order of their names, without times and owners, so that the same
maps give the same archive, byte for byte.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.base.errors import ConfigError, DataError
from engine.base.files import atomic_write
from engine.base.progress import Progress
from engine.data.dataset import Dataset
from engine.data.index import Chip, is_store
from engine.data.metadata import FEATURE_CSVS, find_csv, rows
from engine.data.tiff import tiff
from engine.inference.made import map_path, read_map

_SHOWN = 5  # of what is wrong
LONGEST = 100  # of USTAR


class Submission(NamedTuple):
    """An archive to be written, and the chips that it has to hold."""

    path: Path
    dataset: Dataset
    chips: tuple[str, ...]

    def write(self, out: Path) -> None:
        """Write it from the maps in `out`, each checked and coded anew, holding one at a time.

        Raises DataError that names the maps that are missing, of another size or dtype, or not finite, and where it
        cannot be written; there is no archive then.
        """
        wrong: list[str] = []
        with Progress("archive", len(self.chips), "map") as progress:
            try:
                with atomic_write(self.path) as handle, tarfile.open(fileobj=handle, mode="w",
                                                                     format=tarfile.USTAR_FORMAT) as archive:
                    for chip in self.chips:
                        self._add(archive, map_path(out, self.dataset, chip), wrong)
                        progress.advance()
                    if wrong:
                        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
                        raise DataError(f"{self.path}: not written: {len(wrong)} of {len(self.chips)} maps are missing "
                                        f"or damaged: {'; '.join(wrong[:_SHOWN])}{more}; give the same command again, "
                                        f"it makes what is not whole")
            except OSError as error:
                raise DataError(f"{self.path}: cannot be written ({error.strerror}); make room or write it "
                                f"elsewhere") from None

    def _add(self, archive: tarfile.TarFile, path: Path, wrong: list[str]) -> None:
        try:
            values = read_map(path, self.dataset)
        except DataError as error:
            wrong.append(str(error).removesuffix(f"; {tiff.REMEDY}"))
            return
        if not np.isfinite(values).all():
            wrong.append(f"{path}: holds {np.count_nonzero(~np.isfinite(values))} pixels that are no numbers")
        if not wrong:
            data = tiff.encode(values)
            about = tarfile.TarInfo(path.name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))


def submission(path: Path, data: Path, chosen: Sequence[Chip]) -> Submission:
    """The archive `path` of the test chips of `data`, by its metadata CSV where it has one, else by its files.

    Raises ConfigError for another kind of file than .tar, DataError where there are no test chips, or some of them are
    not among the `chosen` ones, of which there will be a map.
    """
    if path.suffix != ".tar":
        raise ConfigError(f"--submission {path}: give a file that ends in .tar")
    dataset, there = chosen[0].dataset, {chip.id for chip in chosen if chip.split == "test"}
    csv = None if is_store(data) else find_csv(data, FEATURE_CSVS)
    wanted = _in_csv(csv, dataset) if csv else there
    if not wanted:
        raise DataError(f"--submission {path}: no test chips {f'in {csv}' if csv else 'are predicted'}; give --split "
                        f"test, and data that has some")
    absent = sorted(wanted - there)
    if absent:
        shown = ", ".join(absent[:_SHOWN]) + (" …" if len(absent) > _SHOWN else "")
        raise DataError(f"--submission {path}: {len(absent)} of the {len(wanted)} test chips of {csv} are not "
                        f"predicted: {shown}; give --split test, and download what is not in {data}")
    longest = max((dataset.label_name(chip) for chip in wanted), key=len)
    if len(longest.encode()) > LONGEST:
        raise DataError(f"--submission {path}: {longest} is longer than the {LONGEST} bytes that a name in an archive "
                        f"has; shorten the chip's id")
    return Submission(path, dataset, tuple(sorted(wanted)))


def _in_csv(csv: Path, dataset: Dataset) -> set[str]:
    names = (row.name for row in rows(csv) if row.split == "test")
    return {match["chip"] for name in names for pattern in dataset.names[:-1] if (match := pattern.fullmatch(name))}
