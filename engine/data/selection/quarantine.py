"""Bad chips under `data.bad_chips: quarantine`: found before the first step and left out, or replaced by others of the
epoch's order where they turn bad later.

Order and augmentation follow from the list of training chips, so that list must not change while a run lasts: every
chip is checked before the first step, and RUN/quarantine.json says which are left out.  A training chip that turns bad
afterwards stays in the list, and in its places, from the step that wanted it on, comes the next chip of the order that
is not bad; the file says since which step.  So it is the same on any number of ranks, and after a resume.  Validation
chips are not replaced, or scores would not compare.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from engine.base.distributed import from_rank_0, of_all, rank, share_of_host, together, world
from engine.base.errors import DataError, GoneError
from engine.base.files import write_text
from engine.base.progress import Progress
from engine.base.texts import read_json
from engine.config import Config
from engine.data.batch import BadChip, Request
from engine.data.forms import open_source
from engine.data.index import Chip, open_index
from engine.data.metadata import verify
from engine.data.source import Source
from engine.data.store import chip_file

REPORT = "quarantine.json"
MOST = 8  # chips tried in place of one: where as many in a row are bad, it is not the chips

log = logging.getLogger(__name__)


def find(path: Path | str, chips: Sequence[Chip], nodata_months: str, workers: int = 4) -> dict[str, str]:
    """chip id → what is wrong, of those of `chips` (of the data at `path`) that cannot be used.

    Every byte is read: TIFFs are compared with their published checksums and decoded, packed chips with their own.
    Under a launcher ranks share the work, and all return the same.
    """
    published = {file.path: file for file in open_index(path).files}
    source = _source(chips, nodata_months)

    def check(chip: Chip) -> str | None:
        try:
            if chip.packed is not None:
                chip_file.verify_file(chip.packed)
            else:
                for problem in verify((published[file] for file in chip.files if file in published), workers=1):
                    return f"{problem.path}: {problem.what}"
            source.stack(chip)
        except DataError as error:
            return str(error)
        return None

    mine, bad = chips[rank()::world()], {}
    with ThreadPoolExecutor(workers) as pool, Progress("checking", len(mine), "chip", quiet=rank() != 0) as progress:
        for chip, problem in zip(mine, pool.map(check, mine)):
            progress.advance()
            if problem is not None:
                bad[chip.id] = problem
    return dict(sorted(item for part in of_all(bad) for item in part.items()))


def _source(chips: Sequence[Chip], nodata_months: str) -> Source:
    """By the first of `chips` that can be read: a store says in each what it holds."""
    for chip in chips:
        try:
            return open_source([chip], nodata_months=nodata_months, need_target=True)
        except DataError as error:
            last = error
    raise last


class Turned(NamedTuple):
    """Since when a chip is bad: the first step that wanted it, counted from 1 as in the run's history."""

    since_step: int
    why: str


class News(NamedTuple):
    """What the rank that finds a chip bad tells the others."""

    chip: str
    turned: Turned
    stand_in: str  # the chip in its place


class Quarantine:
    """The bad chips of a run, the same on all ranks; rank 0 writes them down.

    found: what `find` has found now.  before: RUN/quarantine.json of a run that goes on, see `load`.
    validating: ids of chips that may not turn bad.
    """

    def __init__(self, folder: Path, found: Mapping[str, str], before: Mapping[str, Any] | None,
                 validating: Container[str] = ()):
        self._path, self._found, self._begun = folder / REPORT, found, before is not None
        begun = found if before is None else before
        self.left_out = {chip: why for chip, why in begun.items() if isinstance(why, str)}
        self.turned = {chip: Turned(**how) for chip, how in begun.items() if not isinstance(how, str)}
        self._validating = validating
        self._news: list[News] = []

    def kept(self, chips: Sequence[Chip]) -> list[Chip]:
        """Those of `chips` that the run was begun with.  Raises DataError where there is none."""
        kept = [chip for chip in chips if chip.id not in self.left_out]
        if not self.whole(kept):
            raise DataError(f"{self._path}: {len(self._found)} chips are bad, and none is left to train or to validate "
                            f"on; the first: {next(iter(self._found.values()))}")
        return kept

    def whole(self, chips: Sequence[Chip]) -> list[Chip]:
        """Those of `chips` that are not bad now."""
        return [chip for chip in chips if chip.id not in self._found]

    def begin(self, step: int) -> None:
        """Before the first step after `step` of them: what turned bad while the run stood still has turned bad there.

        Raises DataError where the run was begun with other chips: some are no longer bad, or one that validates is.
        """
        whole = sorted(self.left_out.keys() - self._found.keys())
        new = {chip: why for chip, why in self._found.items() if chip not in self.left_out and chip not in self.turned}
        lost = next((chip for chip in new if chip in self._validating), None)
        if whole:
            raise DataError(f"{self._path}: this run was begun with {len(self.left_out)} chips in quarantine, and "
                            f"{len(whole)} of them ({', '.join(whole[:5])}) are no longer bad: its order would be "
                            f"another; restore them as they were, or give this run another run.name")
        if lost is not None:
            raise DataError(f"chip {lost}: {new[lost]}; {_COMPARABLE}")
        self.turned.update({chip: Turned(step + 1, why) for chip, why in new.items()})
        if rank() == 0 and (new or not self._begun):
            self._write()
            for chip, why in (new if self._begun else self.left_out).items():
                print(f"{'to be replaced' if self._begun else 'left out'}: chip {chip}: {why}", flush=True)
            print(f"{len(self.left_out) + len(self.turned)} chips in quarantine, see {self._path}", flush=True)

    def settled(self, request: Request) -> Request:
        """`request`, of another chip where its own is bad at its step.  Raises DataError where too many are."""
        if not self._is_bad(request.chip.id, request.step):
            return request
        assert request.others is not None
        tried = list(itertools.islice(request.others(), MOST))
        for chip in tried:
            if not self._is_bad(chip.id, request.step):
                return request._replace(chip=chip)
        raise DataError(f"training step {request.step}: chip {request.chip.id}: {self.turned[request.chip.id].why}; so "
                        f"are the {len(tried)} chips that could take its place, too many to be chance: look at the "
                        f"disk, then run the same command again")

    def _is_bad(self, chip: str, step: int) -> bool:
        return chip in self.turned and self.turned[chip].since_step <= step

    def replace(self, bad: BadChip) -> None:
        """From the step that wanted it on, a chip is replaced.  Raises DataError where it cannot be."""
        request = bad.request
        chip, step = request.chip.id, request.step
        if isinstance(bad.error, GoneError) or chip in self._validating:
            remedy = f"; {_COMPARABLE}" if chip in self._validating else ""
            raise DataError(f"{in_training(bad)}{remedy}")
        if self._is_bad(chip, step):  # read ahead before others told
            return
        self.turned[chip] = Turned(step, str(bad))
        self._news.append(News(chip, self.turned[chip], self.settled(request).chip.id))

    def news(self) -> list[News] | None:
        """What this rank has to tell; None for nothing."""
        news, self._news = self._news, []
        return news or None

    def hear(self, told: Sequence[Sequence[News]]) -> None:
        """What ranks have told."""
        for chip, how, stand_in in (news for said in told for news in said):
            turned = Turned(*how)
            if chip not in self.turned or turned.since_step <= self.turned[chip].since_step:
                self.turned[chip] = turned
            if rank() == 0:
                log.warning(f"training step {turned.since_step}: chip {chip}: {turned.why}; chip {stand_in} takes its "
                            f"place. From now on the chip is replaced wherever it comes, see {self._path}")
        if told and rank() == 0:
            try:
                self._write()
            except OSError as error:  # a resume would look at all chips again
                log.warning(f"{self._path} cannot be written ({error})")

    def _write(self) -> None:
        rows = {**self.left_out, **{chip: how._asdict() for chip, how in self.turned.items()}}
        write_text(self._path, json.dumps(rows, indent=1) + "\n")


_COMPARABLE = ("chips that validate are not replaced, since scores would not compare: restore it, and the same command "
               "goes on")


def load(folder: Path) -> dict[str, Any] | None:
    """RUN/quarantine.json; None where there is none.  Raises DataError where it is damaged."""
    path = folder / REPORT
    try:
        found = read_json(path)
        for how in found.values():
            if not isinstance(how, str) and not (how.keys() == {"since_step", "why"} and isinstance(how["why"], str)
                                                 and type(how["since_step"]) is int and how["since_step"] > 0):
                raise ValueError(f"{how} does not say since which step and why")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is damaged ({error}), so nothing says which chips this run was begun without; bring "
                        f"it back, or give this run another run.name") from None
    return found


def inspect(config: Config, chips: Sequence[Chip], validating: Sequence[Chip], restart: bool) -> Quarantine:
    """All of a recipe's `chips` looked at, and what its run says of them unless it begins anew (`restart`)."""
    before = None
    with together():
        if rank() == 0 and not restart:
            before = load(config.run_folder)
    data, by_id = config.data, {chip.id: chip for chip in chips}
    found = find(data.path, list(by_id.values()), data.nodata_months, share_of_host(data.readers))
    return Quarantine(config.run_folder, found, from_rank_0(before), {chip.id for chip in validating})


def in_training(bad: BadChip) -> str:
    return f"training step {bad.request.step}: chip {bad.request.chip.id}: {bad}"


def in_validation(bad: BadChip, step: int) -> DataError:
    """Of a validation after `step`."""
    return DataError(f"validation after step {step}: chip {bad.request.chip.id}: {bad}; {_COMPARABLE}")
