"""The plan: everything random about training data, as pure functions of (seed, epoch, position).

DALI executes what is decided here and draws nothing itself.  A global batch is a slice of the epoch's order, dealt to
micro-batches so that they keep about as many months, and these to ranks: so the same chips with the same augmentation
enter each step at any world size, in the same micro-batches where they are of one size, and a run resumes from two
integers.  Random numbers come from Philox, a counter-based generator (Salmon et al.
2011): the state is the counter, and the counter is (epoch, position).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.base.errors import ConfigError
from engine.config import Augment
from engine.data.dataset import Dataset

# Streams that must not share numbers: the second word of Philox's 128-bit key
_ORDER, _AUGMENT, _MONTHS, _ROUNDING = 1, 2, 3, 4


def _generator(stream: int, seed: int, epoch: int, position: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed | stream << 64, counter=[0, 0, position, epoch]))


class Draw(NamedTuple):
    """What happens to one chip.  `matrix` [3, 3] float32 maps output to input coordinates, in pixels with the
    origin at the corner of the first pixel (its centre is (0.5, 0.5)); it is applied to images and label alike."""

    matrix: np.ndarray
    keep: np.ndarray | None  # [T] bool; None: all


IDENTITY = Draw(np.eye(3, dtype=np.float32), None)


def draw(dataset: Dataset, augment: Augment, seed: int, epoch: int, position: int) -> Draw:
    """The augmentation of the chip at `position` of an epoch.

    Always consumes the same count of random numbers, so that changing one option leaves the others' draws alone.
    Dropped months are drawn for a group of chips at once: see `_group_keep`.
    """
    u = _generator(_AUGMENT, seed, epoch, position).random(6)
    flip = u[0] < augment.hflip
    quarter_turns = int(u[1] * 4) if augment.rot90 else 0
    angle = math.radians((2 * u[3] - 1) * augment.degrees) if u[2] < augment.rotate else 0.0
    tile = dataset.tile
    centre = tile * (0.5 + (2 * u[4:6] - 1) * augment.centre_jitter)
    keep = _group_keep(augment, dataset.months, seed, epoch, position // augment.group)[position % augment.group]
    return Draw(dihedral(tile, flip, quarter_turns, rotation(angle, centre)), keep)


@functools.lru_cache(maxsize=64)
def _group_keep(augment: Augment, months: int, seed: int, epoch: int, group: int) -> np.ndarray:
    """Kept months (of T = `months`) of a group of successive positions, [augment.group, T] bool.

    Drawn chip by chip, then brought to a multiple of `months_step` in sum.  Groups lie in the order of the epoch, so
    the result knows nothing of ranks and micro-batches.
    """
    u = _generator(_MONTHS, seed, epoch, group).random((augment.group, months + 2))
    keep = (u[:, months] >= augment.month_dropout)[:, None] | (u[:, :months] >= augment.drop_month)
    empty = ~keep.any(1)
    keep[empty, (u[empty, months + 1] * months).astype(int)] = True
    step, kept = augment.months_step, int(keep.sum())
    if step > 1 and kept % step:
        generator = _generator(_ROUNDING, seed, epoch, group)
        up = generator.random() * step < kept % step
        _change(keep, generator, step - kept % step if up else -(kept % step), u[:, months] < augment.month_dropout)
    return keep


def _change(keep: np.ndarray, generator: np.random.Generator, by: int, losing: np.ndarray) -> None:
    """Restore (`by` > 0) or drop (`by` < 0) that many months at random, among the chips that lose months at all;
    a chip keeps at least one."""
    for place in generator.permutation(keep.size):
        chip, month = divmod(int(place), keep.shape[1])
        if by > 0 and losing[chip] and not keep[chip, month]:
            keep[chip, month], by = True, by - 1
        elif by < 0 and losing[chip] and keep[chip, month] and keep[chip].sum() > 1:
            keep[chip, month], by = False, by + 1
        if by == 0:
            return


def rotation(angle: float, centre: np.ndarray) -> np.ndarray:
    """Output → input for a rotation by `angle` radians about `centre` (x, y), [3, 3] float64."""
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = centre
    return np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y], [0, 0, 1]])


def dihedral(tile: int, flip: bool, quarter_turns: int, then: np.ndarray) -> np.ndarray:
    """Output → input for: flip the image of `tile` pixels a side, turn it by `quarter_turns` × 90°, then apply `then`.

    Flips and turns are of small integers, exact in floating point.
    """
    matrix = np.eye(3)
    if flip:
        matrix = matrix @ np.array([[-1.0, 0, tile], [0, 1, 0], [0, 0, 1]])
    for _ in range(quarter_turns % 4):
        matrix = matrix @ np.array([[0.0, -1, tile], [1, 0, 0], [0, 0, 1]])
    return (matrix @ then).astype(np.float32)


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `n` chips in an epoch, [n] int64."""
    return _generator(_ORDER, seed, epoch, 0).permutation(n)


def following(n: int, seed: int, epoch: int, position: int) -> Iterator[int]:
    """The other chips of an epoch, as they come after `position` of its order, whose end its beginning follows."""
    chips = np.roll(order(n, seed, epoch), -position)
    return map(int, chips[1:])


@dataclass(frozen=True)
class Sharding:
    """How a global batch of world × accumulate × micro_batch chips is cut."""

    micro_batch: int
    accumulate: int = 1
    world: int = 1
    rank: int = 0

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulate * self.world

    def steps(self, n: int) -> int:
        """Training steps in an epoch of `n` chips; the rest of an epoch's order, less than a batch, is left out.

        Raises ConfigError where not even one batch fits.
        """
        if n < self.global_batch:
            raise ConfigError(f"a step takes {self.global_batch} chips but only {n} train; lower train.global_batch")
        return n // self.global_batch


class Item(NamedTuple):
    """One chip of a micro-batch: which, and where in the epoch (the counter of its augmentation)."""

    chip: int
    position: int
    valid: bool = True


def training_batches(n: int, seed: int, epoch: int, sharding: Sharding, start_step: int = 0,
                     augment: Augment | None = None, months: int = 0) -> Iterator[list[Item]]:
    """This rank's micro-batches of an epoch, from optimizer step `start_step` on.

    augment: what of `months` (T) are dropped by, for dealing; None: a global batch is cut in its order.
    """
    if augment is not None and months < 1:
        raise ValueError("months: dealing needs to know of how many some are dropped")
    chips = order(n, seed, epoch)
    s = sharding
    for step in range(start_step, s.steps(n)):
        first = step * s.global_batch
        kept = [0] * s.global_batch if augment is None else \
            [kept_months(augment, months, seed, epoch, p) for p in range(first, first + s.global_batch)]
        dealt = deal(kept, s.accumulate * s.world)
        for turn in range(s.accumulate):
            yield [Item(int(chips[first + k]), first + k) for k in dealt[turn * s.world + s.rank]]


def kept_months(augment: Augment, months: int, seed: int, epoch: int, position: int) -> int:
    """How many of `months` the chip at `position` of an epoch keeps, of those that it has."""
    return int(_group_keep(augment, months, seed, epoch, position // augment.group)[position % augment.group].sum())


def deal(months: Sequence[int], hands: int) -> list[list[int]]:
    """Indices of `months` in `hands` equal hands of about equal sums, each in rising order.

    The most first, and in every second round the other way round (as children choose teams): a rank's work is the
    months that it encodes, and all wait for the one that has most.
    """
    if len(set(months)) == 1:
        size = len(months) // hands
        return [list(range(hand * size, (hand + 1) * size)) for hand in range(hands)]
    dealt: list[list[int]] = [[] for _ in range(hands)]
    for place, index in enumerate(sorted(range(len(months)), key=lambda i: (-months[i], i))):
        turn, hand = divmod(place, hands)
        dealt[hands - 1 - hand if turn % 2 else hand].append(index)
    return [sorted(hand) for hand in dealt]


def evaluation_batches(n: int, sharding: Sharding) -> Iterator[list[Item]]:
    """This rank's batches over all `n` chips once, in order; the last global batch is filled up with invalid items
    (repeats of the last chip), so that all ranks take equally many equally large batches."""
    s = Sharding(sharding.micro_batch, 1, sharding.world, sharding.rank)
    for start in range(0, n, s.global_batch):
        first = start + s.rank * s.micro_batch
        yield [Item(min(p, n - 1), p, p < n) for p in range(first, first + s.micro_batch)]
