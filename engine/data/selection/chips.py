"""Which chips a recipe trains and validates on: the data index, checked, and split."""

from __future__ import annotations

import logging
import math

import numpy as np

from engine.base.distributed import rank
from engine.base.errors import ConfigError, DataError
from engine.base.progress import Progress
from engine.config import Config
from engine.data.dataset import load_dataset
from engine.data.forms import read_label
from engine.data.index import Chip, Index, is_store, open_index
from engine.data.metadata import verify
from engine.data.selection.folds import kfold, load_folds, stratified
from engine.data.store.pack import verify_store

log = logging.getLogger(__name__)


def select_chips(config: Config) -> tuple[list[Chip], list[Chip]]:
    """(training, validation) chips of a recipe.  Raises DataError where a chip has no label or does not exist."""
    index = open_index(config.data.path, load_dataset(config.data.dataset))
    if config.data.verify:
        stored = is_store(index.root)
        with Progress("verifying", len(index) if stored else len(index.files), "chip" if stored else "file",
                      quiet=rank() != 0) as progress:
            problems = (verify_store(index.root, progress=progress.advance) if stored else
                        verify(index.files, progress=progress.advance))
        if problems:
            raise DataError(f"{index.root}: {len(problems)} of {len(index) if stored else len(index.files)} files "
                            f"differ from what was {'packed' if stored else 'published'}, first {problems[0].path}: "
                            f"{problems[0].what}; {'pack' if stored else 'download'} them again")
        if unchecked := 0 if stored else _unpublished(index):
            log.warning(f"data.verify: nothing says what {unchecked} files in {index.root} should hold, the metadata "
                        f"CSVs have no checksum of them; they are taken as they are")
    chips = {chip.id: chip for chip in index.split("train")}
    if config.data.chips is not None:
        unknown = sorted(set(config.data.chips) - chips.keys())
        if unknown:
            raise DataError(f"data.chips: {', '.join(unknown[:5])} not among the {len(chips)} chips of {index.root}")
        chips = {chip: chips[chip] for chip in sorted(set(config.data.chips))}
    if not chips:
        folders = index.dataset.folders
        raise DataError(f"{index.root}: no training chips; expected {folders.train}/ and {folders.target}/")
    for chip in chips.values():
        if chip.label is None:
            folder = chip.folder.parent / index.dataset.folders.target
            raise DataError(f"chip {chip.id} has no label: {index.dataset.label_name(chip.id)} is missing in {folder}; "
                            f"download it, or leave the chip out with data.chips")
    if config.data.overfit:
        return list(chips.values()), list(chips.values())
    held_out = set(_folds(config, chips)[config.data.split.fold])
    return ([chip for chip in chips.values() if chip.id not in held_out],
            [chip for chip in chips.values() if chip.id in held_out])


def _unpublished(index: Index) -> int:
    """How many files of its chips have no published checksum."""
    known = {file.path for file in index.files if file.cksum is not None}
    return sum(path not in known for chip in index.chips for path in chip.files)


def _folds(config: Config, chips: dict[str, Chip]) -> list[list[str]]:
    split = config.data.split
    if split.scheme == "kfold":
        return kfold(list(chips), split.folds, split.seed)
    if split.scheme == "stratified":
        return stratified(list(chips), missing_images(list(chips.values())), mean_label(list(chips.values())),
                          split.folds, split.seed)
    assert split.path is not None
    folds = load_folds(split.path)
    if split.fold >= len(folds):
        raise ConfigError(f"data.split.fold {split.fold}: {split.path} has {len(folds)} folds")
    absent = [chip for chip in chips if not any(chip in fold for fold in folds)]
    if absent:
        raise DataError(f"{split.path}: chip {absent[0]} and {len(absent) - 1} more of the data are in no fold; make "
                        f"the split from this data with `launch/prepare.py splits`")
    return folds


def missing_images(chips: list[Chip]) -> dict[str, list[bool]]:
    """Which images each chip lacks, of the sensor that lacks most over all: what `stratified` balances."""
    lacking = [sum(not have for chip in chips for have in chip.months[number])
               for number in range(len(chips[0].months))]
    most = lacking.index(max(lacking))
    return {chip.id: [not have for have in chip.months[most]] for chip in chips}


def mean_label(chips: list[Chip]) -> dict[str, float]:
    """Mean label of each chip, in the target's unit, read from the files; −∞ for one without a pixel of target."""
    labels = ((chip.id, read_label(chip)) for chip in chips)
    return {chip: -math.inf if np.isnan(label).all() else float(np.nanmean(label, dtype=np.float64))
            for chip, label in labels}
