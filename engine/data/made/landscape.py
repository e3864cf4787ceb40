"""Made-up land without end, block by block, behind `launch/prepare.py sample-scene`: the forest and satellites of
`engine.data.made.forest`, and the plain fields of `engine.data.made.fields`, in one piece.

Where a chip has fields and stands of its own, here all are those of `engine.data.made.lattice`: a block is a pure
function of (seed, block), and no line shows where two meet.  What a satellite adds to a pass as a whole, its
calibration, soil moisture or light, is one number of the scene; speckle and noise are white, from a generator a block.

An image is [BLOCK, BLOCK, bands] of the sensor's dtype; a label [BLOCK, BLOCK] of the target's.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from engine.data.biomassters import BIOMASSTERS, S1
from engine.data.dataset import LABEL_DTYPE, Dataset, Sensor
from engine.data.made import fields, forest, lattice
from engine.data.made.lattice import BLOCK

SCENE = 5  # in keys of random streams, apart from those of chips
STAND = forest.TILE // 16  # pixels between the centres of stands
S1_STEP = 1 / 128  # dB.  Finer, speckle is bits that nothing compresses: twice the file
Block = tuple[int, int]


class Landscape(Protocol):
    def image(self, sensor: Sensor, step: int, block: Block) -> np.ndarray: ...

    def label(self, block: Block) -> np.ndarray: ...


def landscape(dataset: Dataset, seed: int) -> Landscape:
    return Forest(seed) if dataset == BIOMASSTERS else Fields(dataset, seed)


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Of the ages of stands, mean 1, and of their shares of conifers."""
    shape = forest.P.stand_shape
    return (lattice.table(lambda rng: rng.gamma(shape, 1 / shape, lattice.ENTRIES)),
            lattice.table(lambda rng: rng.beta(2.0, 0.8, lattice.ENTRIES)))


class Forest(NamedTuple):
    """Boreal forest as BioMassters' two satellites see it."""

    seed: int

    def stand(self, block: Block) -> forest.Stand:
        """The state of the land, all but `north` by pixel."""
        p, key = forest.P, (self.seed, SCENE)
        cell = self._cells(block)
        age, conifer, understory = (cell[name] for name in ("age", "conifer", "understory"))
        region = lattice.field((*key, 0), 3.5, 512, 128, block)
        smooth = p.fertility_spread * lattice.field((*key, 1), 3.5, 64, 4, block)
        rough = p.texture_spread * lattice.field((*key, 2), 1.5, 64, 1, block)
        lakes = lattice.field((*key, 3), 3.5, 64, 2, block) + 0.5 * lattice.field((*key, 4), 3.5, 512, 128, block)
        land = lakes > np.sqrt(1.25) * forest.quantile(p.water_share)
        level = p.forest_biomass * np.exp(p.chip_spread * region - p.chip_spread**2 / 2)
        biomass = level * age * np.exp(smooth + rough) * land
        north = float(forest.generator(*key, 5).random())
        return forest.Stand(biomass.astype(np.float32), (~land).astype(np.float32), conifer, understory,
                            lattice.field((*key, 6), 2.0, 64, 2, block), north)

    def _cells(self, block: Block) -> dict[str, np.ndarray]:
        """What each stand has of its own, by pixel, float32: `age`, `conifer`, `understory`."""
        key = (self.seed, SCENE, 7)
        rows, columns = ((at * BLOCK + np.arange(BLOCK, dtype=np.float32)) / STAND for at in block)
        down = rows[:, None] + 0.35 * lattice.field((*key, 0), 3.0, 64, 4, block)
        right = columns + 0.35 * lattice.field((*key, 1), 3.0, 64, 4, block)
        i, j = (np.arange(int(np.floor(axis.min())) - 1, int(np.floor(axis.max())) + 2) for axis in (down, right))
        centres = np.stack([lattice.uniform((*key, n), i, j) for n in (2, 3)], -1).reshape(-1, 2)
        cell = forest.nearest(down, right, centres, lambda y, x: (y - i[0]) * len(j) + x - j[0])
        ages, conifers = _tables()
        age = lattice.drawn(ages, (*key, 4), i, j)
        age[lattice.uniform((*key, 5), i, j) < forest.P.open_share] = 0
        understory = np.exp(forest.P.s2_understory * lattice.drawn(lattice.normal(), (*key, 7), i, j))
        each = {"age": age, "conifer": lattice.drawn(conifers, (*key, 6), i, j), "understory": understory}
        return {name: values.reshape(-1)[cell] for name, values in each.items()}

    def label(self, block: Block) -> np.ndarray:
        return forest.measured(forest.generator(self.seed, SCENE, 8, *block), self.stand(block).biomass)

    def image(self, sensor: Sensor, step: int, block: Block) -> np.ndarray:
        return self._s1(step, block) if sensor == S1 else self._s2(step, block)

    def _s1(self, month: int, block: Block) -> np.ndarray:
        whole = forest.generator(self.seed, SCENE, 9, month)
        rng, stand = forest.generator(self.seed, SCENE, 10, month, *block), self.stand(block)
        passes = [forest.one_pass(rng, month, stand, whole.normal(0, forest.P.s1_moisture),
                                  whole.normal(0, forest.S1_CALIBRATION)) for _ in ("ascending", "descending")]
        return (np.rint(np.concatenate(passes, -1) / S1_STEP) * S1_STEP).astype(S1.values)

    def _s2(self, month: int, block: Block) -> np.ndarray:
        light = forest.daylight(forest.generator(self.seed, SCENE, 11, month))
        rng, stand = forest.generator(self.seed, SCENE, 12, month, *block), self.stand(block)
        image = forest.reflected(rng, month, stand, forest.mixing(stand), light)
        clouds = lattice.field((self.seed, SCENE, 13, month), 3.0, 512, 4, block)
        forest.cover(image, clouds, forest.CLOUDY[month] * sum(forest.CLOUDED) / 2)
        return forest.counts(image)


class Fields(NamedTuple):
    """A smooth target, and bands that rise or fall with it, for any description."""

    dataset: Dataset
    seed: int

    def _share(self, block: Block) -> np.ndarray:
        return fields.share(lattice.field((self.seed, SCENE, 14), 3.0, 64, 2, block))

    def label(self, block: Block) -> np.ndarray:
        target = self.dataset.target
        return fields.fit((fields.top(target) * self._share(block)).astype(LABEL_DTYPE), np.dtype(target.dtype))

    def image(self, sensor: Sensor, step: int, block: Block) -> np.ndarray:
        own = (self.seed, SCENE, 15, zlib.crc32(sensor.name.encode()), step)
        return fields.image(self.dataset, sensor, self._share(block), step, forest.generator(*own, *block),
                            lambda band: lattice.field((*own, band), 3.0, 64, 2, block))
