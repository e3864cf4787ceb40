"""Bad chips under `data.bad_chips: quarantine`: found before the first step, reported, and left out.

Order and augmentation follow from the list of training chips, so that list must not change while a run lasts: every
chip is checked before the first step, the bad ones are written to RUN/quarantine.json, and a resume that finds others
is refused.  A chip that turns bad in the middle of a run stops it under either policy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.base.distributed import of_all, rank, world
from engine.base.errors import DataError
from engine.base.files import write_text
from engine.base.progress import Progress
from engine.data.forms import open_source
from engine.data.index import Chip, open_index
from engine.data.metadata import verify
from engine.data.store import chip_file

REPORT = "quarantine.json"


def find(path: Path | str, chips: Sequence[Chip], nodata_months: str, workers: int = 4) -> dict[str, str]:
    """chip id → what is wrong, of those of `chips` (of the data at `path`) that cannot be used.

    Every byte is read: TIFFs are compared with their published checksums and decoded, packed chips with their own.
    Under a launcher ranks share the work, and all return the same.
    """
    published = {file.path: file for file in open_index(path).files}
    source = open_source(chips, nodata_months=nodata_months, need_target=True)

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


def record(folder: Path, bad: dict[str, str]) -> None:
    """Write RUN/quarantine.json.  Raises DataError where the run was begun with other chips in quarantine.

    For rank 0: all have found the same.
    """
    path = folder / REPORT
    before = json.loads(path.read_text()) if path.exists() else None
    if before is not None and before.keys() != bad.keys():
        changed = sorted(before.keys() ^ bad.keys())
        raise DataError(f"{path}: this run was begun with {len(before)} chips in quarantine, now there are {len(bad)} "
                        f"({', '.join(changed[:5])} changed), and its order would be another; restore them as they "
                        f"were, or give this run another run.name")
    if before is None:
        write_text(path, json.dumps(bad, indent=1) + "\n")
        for chip, problem in bad.items():
            print(f"left out: chip {chip}: {problem}", flush=True)
        print(f"{len(bad)} chips in quarantine, see {path}", flush=True)
