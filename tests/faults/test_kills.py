"""Killed at any moment: the same command again ends as if nothing had been, to the bit."""

from __future__ import annotations

import functools
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Whole
from tests.faults.harness import EVENTS, SEED, Moment, go_on, kill, note_all, noted, recipe, running, same, was_killed

Wholes = Callable[[int], Whole]

ANY = "any event"

# Of the run of `harness`: around the phases' end at step 6, and around what is written then
BOUNDARY = [Moment("validate", 4), Moment("export", 3), Moment("export", 4), Moment("write weights", 3),
            Moment("name weights", 4), Moment("save", 4), Moment("write a checkpoint", 11),
            Moment("end a checkpoint", 4), Moment("remove a checkpoint", 2), Moment("finish a phase", 1),
            Moment("make a model", 2), Moment("make an engine", 2), Moment("step", 7)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_again_and_again(data: Path, whole: Wholes, tmp_path: Path, ranks: int) -> None:
    """One run: in a step, while a checkpoint is written, between validation and its save, with a checkpoint between two
    lines of the log, between a phase's last validation and its save, between the phases, before the next one's first
    step, and when the last checkpoint has its name."""
    path, last = recipe(tmp_path, data), ranks - 1
    moments = [Moment("update", 2, last), Moment("write a checkpoint", 2), Moment("save", 2, last),
               Moment("end a checkpoint", 2), Moment("export", 2, last), Moment("make a model", 2, last),
               Moment("step", 1, last), Moment("end a checkpoint", 2)]
    for moment in moments if ranks == 1 else moments[3:6]:
        kill(path, ranks, moment)
    go_on(path, ranks)
    same(whole(ranks).run, path.parent / "run")


def moments(ranks: int, whole: Whole) -> list[Moment]:
    """Drawn by the seed: twelve events and eight times, as so many events from the start and a tenth of a second."""
    chance, found = random.Random(f"{SEED} {ranks}"), []
    for event in [*chance.sample([event for event in EVENTS if event != "leave"], 12), *[ANY] * 8]:
        rank = chance.choice([rank for rank in range(ranks) if event in (ANY, *whole.events[rank])])
        most = whole.events[rank][event] if event != ANY else whole.events[rank].total() - 10
        found.append(Moment(event, chance.randint(1, most), rank))
    return found


@pytest.mark.faults
@pytest.mark.parametrize("number", range(20))
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_a_random_moment(data: Path, whole: Wholes, tmp_path: Path, ranks: int, number: int) -> None:
    path, moment = recipe(tmp_path, data), moments(ranks, whole(ranks))[number]
    print(moment)
    if moment.event == ANY:
        notes = tmp_path / "events"
        with running(path, ranks, {moment.rank: functools.partial(note_all, notes)}) as processes:
            processes[moment.rank].until(lambda: noted(notes).total() >= moment.number)
            time.sleep(random.Random(number).random() / 10)
            processes[moment.rank].signal(signal.SIGKILL)
            was_killed(processes, moment.rank)
    else:
        kill(path, ranks, moment)
    go_on(path, ranks)
    same(whole(ranks).run, path.parent / "run")


@pytest.mark.faults
@pytest.mark.parametrize("moment", BOUNDARY, ids=lambda moment: f"{moment.event} {moment.number}")
def test_killed_at_the_end_of_a_phase(data: Path, whole: Wholes, tmp_path: Path, moment: Moment) -> None:
    path = recipe(tmp_path, data)
    kill(path, 1, moment)
    go_on(path, 1)
    same(whole(1).run, path.parent / "run")
