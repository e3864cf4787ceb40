"""Where chips are cut out of a grid, which of them are kept, and their folds: whole blocks of land.

Land that lies together is alike, so the chips of a block go to one fold.  Blocks are squares of the grid, and a chip
lies in one as a whole: no two folds share a pixel.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.base.errors import ConfigError, DataError
from engine.data.scene.grid import Grid
from engine.data.selection.folds import stratified

RANGES = 10  # of the target, from the lowest to the highest mean of a chip
RUN = 4  # chips side by side that are read at once: rasters have tiles larger than chips, and each is decoded once


@dataclass(frozen=True)
class Options:
    stride: int  # pixels from a chip to the next
    block: float  # metres a side, at most: as many whole chips as fit
    folds: int = 4
    min_valid: float = 0.5  # share of pixels with a target, and of those with any image
    balance: int | None = None  # at most so many chips in each of RANGES
    seed: int = 0
    form: str = "tiff"  # or a store's: chip_file.STEPS, chip_file.EXACT


class Place(NamedTuple):
    """Of a chip on the grid: its first pixel, and its block."""

    row: int
    column: int
    block: tuple[int, int]

    @property
    def id(self) -> str:
        return f"r{self.row:05d}c{self.column:05d}"


def check(options: Options, workers: int) -> None:
    """Raises ConfigError for what cannot be."""
    if options.stride < 1 or not 0 <= options.min_valid <= 1 or options.folds < 2 or workers < 1 or (
            options.balance is not None and options.balance < 1) or options.seed < 0:
        raise ConfigError(f"stride {options.stride}, min_valid {options.min_valid:g}, folds {options.folds}, balance "
                          f"{options.balance}, seed {options.seed}, workers {workers}: stride, balance and workers are "
                          f"at least 1, folds 2, the seed 0, and min_valid lies between 0 and 1")


def block_pixels(options: Options, grid: Grid, tile: int) -> int:
    """A side of a block: the longest within `options.block` that chips fill."""
    asked = options.block / grid.pixel_metres[0]
    if not tile - 1e-6 <= asked < float("inf"):
        raise ConfigError(f"block {options.block:g} m: is less than a chip, {tile * grid.pixel_metres[0]:g} m" if
                          asked < tile else f"block {options.block:g} m: is no length")
    return tile + int((asked - tile + 1e-6) // options.stride) * options.stride


def places_of(grid: Grid, tile: int, stride: int, side: int) -> list[Place]:
    """Row by row."""
    def starts(length: int) -> list[tuple[int, int]]:
        return [(block, start) for block in range(0, length, side)
                for start in range(block, min(block + side, length) - tile + 1, stride)]

    return [Place(row, column, (down // side, right // side))
            for down, row in starts(grid.height) for right, column in starts(grid.width)]


def balanced(means: dict[Place, float], most: int | None, seed: int) -> list[Place]:
    """Places, in order: all, or at most `most` of each tenth of the range of their means, by chance."""
    if most is None or not means:
        return list(means)
    places, values = list(means), np.array(list(means.values()))
    tenth = np.minimum((values - values.min()) / max(np.ptp(values), 1e-12) * RANGES, RANGES - 1).astype(int)
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(places))
    kept = [index for number in range(RANGES) for index in order[tenth[order] == number][:most]]
    return [places[index] for index in sorted(kept)]


def spatial_folds(means: dict[Place, float], options: Options, places: int) -> list[list[str]]:
    """Ids of chips; each block in one fold, and each fold with its share of high and low ones."""
    foldable(means, options, places)
    blocks: dict[str, list[Place]] = {}
    for place in means:
        blocks.setdefault("{}/{}".format(*place.block), []).append(place)
    level = {block: float(np.mean([means[place] for place in chips])) for block, chips in blocks.items()}
    folds = stratified(list(blocks), dict.fromkeys(blocks, ()), level, options.folds, options.seed)
    return [sorted(place.id for block in fold for place in blocks[block]) for fold in folds]


def foldable(chosen: Collection[Place], options: Options, places: int) -> None:
    """Raises DataError where `chosen` of so many places make no folds."""
    blocks = {place.block for place in chosen}
    if not blocks:
        raise DataError(f"no chip is left of {places}: none has a target and images in {options.min_valid:g} of its "
                        f"pixels; look at the rasters, or take less with --min-valid" if places else
                        "the scene is smaller than a chip")
    if len(blocks) < options.folds:
        raise DataError(f"{len(blocks)} blocks with chips cannot make {options.folds} folds; give smaller ones with "
                        f"--block, or fewer --folds")


def runs_of(places: Sequence[Place], tile: int) -> list[list[Place]]:
    """Those that lie side by side, at most RUN of them."""
    runs: list[list[Place]] = []
    for place in places:
        last = runs[-1][-1] if runs else None
        if last and len(runs[-1]) < RUN and (last.row, last.block) == (place.row, place.block) \
                and place.column <= last.column + tile:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs
