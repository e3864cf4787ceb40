"""Training batches in their order, whatever turns bad meanwhile: the step that wanted a bad chip is named, or the chip
replaced."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

from engine.base.errors import DataError
from engine.config import Config
from engine.data.batch import BadChip, Batch, Request
from engine.data.dataset import Dataset
from engine.data.index import Chip
from engine.data.loader import Loader
from engine.data.plan import Sharding, draw, following, training_batches
from engine.data.selection.quarantine import Quarantine, in_training


def training_requests(chips: list[Chip], config: Config, dataset: Dataset, sharding: Sharding,
                      quarantine: Quarantine | None, *, epochs: range, start: int, step: int
                      ) -> Iterator[list[Request]]:
    """This rank's micro-batches of `epochs`, counted over all phases; of the first from its step `start` on, which is
    the one after `step` of the run.  Raises DataError where too many chips in a row have turned bad."""
    seed, steps = config.run.seed, itertools.count(step * sharding.accumulate)
    for epoch in epochs:
        for items in training_batches(len(chips), seed, epoch, sharding, start if epoch == epochs.start else 0,
                                      config.augment, dataset.months):
            step = 1 + next(steps) // sharding.accumulate
            asked = [Request(chips[item.chip], draw(dataset, config.augment, seed, epoch, item.position), step=step,
                             others=partial(_others, chips, seed, epoch, item.position)) for item in items]
            yield asked if quarantine is None else list(map(quarantine.settled, asked))


def _others(chips: list[Chip], seed: int, epoch: int, position: int) -> Iterator[Chip]:
    return (chips[number] for number in following(len(chips), seed, epoch, position))


class Supply(Iterator[Batch]):
    """A phase's micro-batches, `turns` a step.

    requests: those of this rank from the step on that is to be taken next.  quarantine: None where no chip is replaced.
    Where one is, all is read again from the micro-batch on that is wanted next: what is ahead may hold it too, and what
    is in its places has to follow from the plan, not from what was read when.  Raises DataError.
    """

    def __init__(self, loader: Loader, requests: Callable[[], Iterator[list[Request]]], turns: int,
                 quarantine: Quarantine | None):
        self._loader, self._requests, self._turns, self._quarantine = loader, requests, turns, quarantine
        self._turn = 0  # of the step
        self._batches = loader.batches(requests())

    def __next__(self) -> Batch:
        while True:
            try:
                batch = next(self._batches)
            except BadChip as bad:
                if self._quarantine is None:
                    raise DataError(in_training(bad)) from None
                self._quarantine.replace(bad)
            else:
                self._turn = (self._turn + 1) % self._turns
                return batch
            self._batches = self._loader.batches(itertools.islice(self._requests(), self._turn, None))
