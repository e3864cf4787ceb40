"""Which chips a recipe trains and validates on: the data index, checked, and split."""

from __future__ import annotations

import numpy as np

from engine.config import Config
from engine.data import tiff
from engine.data.bands import AGBM_DTYPE, TILE, label_name
from engine.data.index import Chip, open_index, verify
from engine.errors import ConfigError, DataError
from engine.splits import kfold, load_folds, stratified


def select_chips(config: Config) -> tuple[list[Chip], list[Chip]]:
    """(training, validation) chips of a recipe.  Raises DataError where a chip has no label or does not exist."""
    index = open_index(config.data.path)
    if config.data.verify:
        problems = verify(index.files)
        if problems:
            raise DataError(f"{index.root}: {len(problems)} of {len(index.files)} files differ from what was "
                            f"published, first {problems[0].path}: {problems[0].what}; download them again")
    chips = {chip.id: chip for chip in index.split("train")}
    if config.data.chips is not None:
        unknown = sorted(set(config.data.chips) - chips.keys())
        if unknown:
            raise DataError(f"data.chips: {', '.join(unknown[:5])} not among the {len(chips)} chips of {index.root}")
        chips = {chip: chips[chip] for chip in sorted(set(config.data.chips))}
    if not chips:
        raise DataError(f"{index.root}: no training chips; expected train_features/ and train_agbm/")
    for chip in chips.values():
        if chip.label is None:
            raise DataError(f"chip {chip.id} has no label: {label_name(chip.id)} is missing in "
                            f"{chip.folder.parent / 'train_agbm'}; download it, or leave the chip out with data.chips")
    if config.data.overfit:
        return list(chips.values()), list(chips.values())
    held_out = set(_folds(config, chips)[config.data.split.fold])
    return ([chip for chip in chips.values() if chip.id not in held_out],
            [chip for chip in chips.values() if chip.id in held_out])


def _folds(config: Config, chips: dict[str, Chip]) -> list[list[str]]:
    split = config.data.split
    if split.scheme == "kfold":
        return kfold(list(chips), split.folds, split.seed)
    if split.scheme == "stratified":
        return stratified(list(chips), {c.id: [not have for have in c.months[1]] for c in chips.values()},
                          mean_biomass(list(chips.values())), split.folds, split.seed)
    assert split.path is not None
    folds = load_folds(split.path)
    if split.fold >= len(folds):
        raise ConfigError(f"data.split.fold {split.fold}: {split.path} has {len(folds)} folds")
    absent = [chip for chip in chips if not any(chip in fold for fold in folds)]
    if absent:
        raise DataError(f"{split.path}: chip {absent[0]} and {len(absent) - 1} more of the data are in no fold; make "
                        f"the split from this data with `launch/prepare.py splits`")
    return folds


def mean_biomass(chips: list[Chip]) -> dict[str, float]:
    """Mean label of each chip, t/ha, read from the files."""
    label = np.empty((TILE, TILE), AGBM_DTYPE)
    means = {}
    for chip in chips:
        assert chip.label is not None
        tiff.read_into(chip.label, label)
        means[chip.id] = float(label.mean(dtype=np.float64))
    return means
