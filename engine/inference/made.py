"""Whose maps a folder holds: of one list of chips, by the same weights and options.

A command that was killed goes on in its folder: maps that are whole stay.  Batches are cut from the list of chips alike
on any number of ranks, and a batch is made again unless all of it is there, so the folder ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.base.errors import DataError
from engine.base.files import write_text
from engine.base.made import FILE, differences
from engine.base.texts import read_json
from engine.data.dataset import LABEL_DTYPE, Dataset
from engine.data.index import Chip
from engine.data.source import Source
from engine.data.tiff import tiff
from engine.model.weights import weights_file


def description(weights: Path, chips: Sequence[Chip], source: Source, options: Mapping[str, Any]) -> dict[str, Any]:
    """What FILE says: the `options`, and all else that the bytes of a map depend on; long things by their SHA-256."""
    with weights_file(weights).open("rb") as file:
        digest = _sha256(iter(lambda: file.read(1 << 20), b""))
    months = [[chip.id, chip.months] for chip in chips]
    return {"weights": digest, "dataset": _sha256_of(source.dataset.dump(pictures=False)), "floats": source.values,
            "chips": len(chips), "months": _sha256_of(months), **options}


def _sha256_of(content: Any) -> str:
    return _sha256([json.dumps(content, sort_keys=True).encode()])


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def claim(out: Path, about: Mapping[str, Any]) -> bool:
    """Make `out` the folder of the maps that `about` describes (see `description`); whether there may be some already.

    Raises DataError where it holds maps of which FILE says something else, or nothing, and where it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for part in (*out.glob(".*.part"), *out.glob("pictures/.*.part")):
            part.unlink()  # left by a run that was killed
        if next(out.glob("*.tif"), None) is not None:
            _compare(out, about)
            return True
        write_text(out / FILE, json.dumps(about, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); give another --out, or make room and mend its "
                        f"permissions") from None
    return False


def _compare(out: Path, about: Mapping[str, Any]) -> None:
    remedy = "give another --out, or remove the folder"
    try:
        changed = list(differences(dict(read_json(out / FILE).items()), dict(about)))
    except FileNotFoundError:
        raise DataError(f"{out}: holds TIFFs, and no {FILE} says what made them; {remedy}") from None
    except (ValueError, AttributeError, TypeError):
        raise DataError(f"{out / FILE}: is damaged, so nothing says what made the maps here; {remedy}") from None
    if changed:
        raise DataError(f"{out}: holds maps that were made otherwise: {'; '.join(changed)}; {remedy}")


def map_path(out: Path, dataset: Dataset, chip: str) -> Path:
    return out / dataset.label_name(chip)


def read_map(path: Path, dataset: Dataset) -> np.ndarray:
    """[tile, tile] float32.  Raises DataError where that is missing, damaged, or of another shape or dtype."""
    values = np.empty((dataset.tile, dataset.tile), LABEL_DTYPE)
    tiff.read_into(path, values)
    return values


def whole_maps(out: Path, chips: Sequence[Chip]) -> np.ndarray | None:
    """Those of `chips`, [N, tile, tile] float32; None where one is missing, not whole, or not finite."""
    try:
        maps = np.array([read_map(map_path(out, chip.dataset, chip.id), chip.dataset) for chip in chips])
    except DataError:
        return None
    return maps if np.isfinite(maps).all() else None
