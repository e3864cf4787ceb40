"""Which chips train and which validate.  Pure functions of the chip ids (and, stratified, of what is known of them).

`kfold` equals scikit-learn's `KFold(n_folds, shuffle=True, random_state=seed)` over the sorted unique ids, which
the 1st-place solution used; written out, it is a shuffle by NumPy's legacy generator and a cut into equal parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from engine.base.errors import DataError
from engine.base.files import write_text
from engine.base.texts import read_json


def kfold(chip_ids: Sequence[str], n_folds: int = 10, seed: int = 314159) -> list[list[str]]:
    """Folds of validation chip ids, each sorted; together every id once.

    Raises DataError with fewer distinct ids than folds.
    """
    ids = _distinct(chip_ids, n_folds)
    order = np.arange(len(ids))
    np.random.RandomState(seed).shuffle(order)
    return [[ids[i] for i in sorted(part)] for part in np.array_split(order, n_folds)]


def stratified(chip_ids: Sequence[str], missing: Mapping[str, Sequence[bool]], mean: Mapping[str, float],
               n_folds: int = 10, seed: int = 314159) -> list[list[str]]:
    """Folds that each see the same mix of missing-image patterns and of mean labels.

    `missing[id]`: which images the chip lacks (any length); `mean[id]`: the mean of its label.  Chips are
    ordered by pattern, then mean, and dealt out in rounds of `n_folds`, each round shuffled: neighbours in that
    order land in different folds.  Patterns rarer than a round are dealt together, ordered by their number of
    missing months, so that no fold collects them.  Raises DataError like `kfold`.
    """
    ids = _distinct(chip_ids, n_folds)
    patterns = {chip: tuple(bool(x) for x in missing[chip]) for chip in ids}
    count: dict[tuple[bool, ...], int] = {}
    for pattern in patterns.values():
        count[pattern] = count.get(pattern, 0) + 1

    def key(chip: str) -> tuple[bool, int, tuple[bool, ...], float, str]:
        pattern = patterns[chip]
        rare = count[pattern] < n_folds
        return rare, sum(pattern), () if rare else pattern, mean[chip], chip

    ordered = sorted(ids, key=key)
    generator = np.random.Generator(np.random.Philox(key=seed))
    folds: list[list[str]] = [[] for _ in range(n_folds)]
    for start in range(0, len(ordered), n_folds):
        for fold, chip in zip(generator.permutation(n_folds), ordered[start:start + n_folds]):
            folds[fold].append(chip)
    return [sorted(fold) for fold in folds]


def save_folds(path: Path | str, folds: list[list[str]], how: dict[str, object]) -> None:
    """Publish a split: JSON with the folds and how they were made."""
    write_text(path, json.dumps({"how": how, "folds": folds}, indent=1) + "\n")


def load_folds(path: Path | str) -> list[list[str]]:
    """Read a published split.  Raises DataError where the file is missing, malformed or repeats a chip."""
    try:
        folds = read_json(path)["folds"]
        flat = [chip for fold in folds for chip in fold]
    except FileNotFoundError:
        raise DataError(f"{path}: no such split file; make one with `launch/prepare.py splits`") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a split file") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f'{path}: not a split file; it holds {{"folds": [[chip, …], …]}}') from None
    if not all(isinstance(chip, str) for chip in flat):
        raise DataError(f"{path}: chip ids are strings; quote them")
    if len(set(flat)) < len(flat):
        twice = next(chip for chip in flat if flat.count(chip) > 1)
        raise DataError(f"{path}: chip {twice} is listed twice; keep one")
    return folds


def _distinct(chip_ids: Sequence[str], n_folds: int) -> list[str]:
    ids = sorted(set(chip_ids))
    if len(ids) < n_folds:
        raise DataError(f"{len(ids)} chips cannot make {n_folds} folds; set data.split.folds to at most {len(ids)}, "
                        f"or data.overfit: true to train and validate on the same chips")
    return ids
