"""300 malformed inputs by a seed, each to what users' commands do with such a file, in a process of its own: none ends
the interpreter, hangs, shows a traceback, or is taken in silence for something else than it says.

Each outcome is an EngineError that names the file, or what the valid file gives.  Where a text's value is changed to
another that is valid, it is another input, and has to be shown as exactly that.  A changed pixel of a TIFF can be seen
by its published checksum alone, and has to be.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import yaml

from engine.base.errors import EngineError
from tests.faults import doors  # with tests.scenes: left out by tests/conftest.py where rasterio is not installed

SEED = int(os.environ.get("FAULTS_SEED", "1"))
SECONDS = 120  # for one case, on a busy machine
MEMORY = 6 << 30  # bytes more than a process has at first, before it is told that there are none
QUICK = 5  # one of so many of each kind is looked at wherever tests run


class Case(NamedTuple):
    """number −1: the valid file."""

    kind: str
    number: int
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.number} of seed {self.seed}"


class Outcome(NamedTuple):
    file: str
    what: str  # was done to it
    data: bytes
    steps: dict[str, tuple[str, Any]]  # ("value", what was read), ("refused", message) or ("traceback", text)
    said: str  # warnings


def cases(seed: int) -> list[Case]:
    return [Case(name, number, seed) for name, kind in doors.KINDS.items() for number in range(kind.count)]


def malformed(case: Case, folder: Path) -> tuple[Path, str, bytes]:
    """A file under `folder`, where all is valid, and what becomes of it."""
    kind, rng = doors.KINDS[case.kind], Random(repr(case))
    files = sorted(path for pattern in kind.files for path in folder.glob(pattern))
    path = files[rng.randrange(len(files))]
    data = path.read_bytes()
    while True:
        what, new = rng.choice(kind.mutations)(data, rng)
        if new != data:
            return path, what, new


# One case, in a worker ---------------------------------------------------------------------------------------------


def run(case: Case, valid: Path) -> Outcome:
    kind, said = doors.KINDS[case.kind], []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    threading.excepthook = lambda args: said.append(f"traceback of a thread: {args.exc_value!r}")
    back = Path.cwd()
    with tempfile.TemporaryDirectory(dir=valid.parent) as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work = Path(folder) / "work"
        shutil.copytree(valid, work, copy_function=os.link)
        what = ""
        if case.number < 0:
            file = next(work.glob(kind.files[0]))
            data = file.read_bytes()
        else:
            file, what, data = malformed(case, work)
            file.unlink()
            file.write_bytes(data)
        os.chdir(work)
        steps: dict[str, tuple[str, Any]] = {}
        for name, step in kind.steps.items():
            try:
                steps[name] = "value", step()
            except EngineError as error:
                steps[name] = "refused", str(error)
            except BaseException:
                steps[name] = "traceback", traceback.format_exc()
        os.chdir(back)
        if Path(work, "executed").exists():
            steps["executed"] = "traceback", "what the file says was executed"
    logging.getLogger().removeHandler(handler)
    said += [str(warning.message) for warning in caught]
    return Outcome(str(file.relative_to(work)), what, data, steps, "\n".join(said))


Run = Callable[[Case, Path], Outcome]


def _work(pipe: Any, valid: Path, run: Run) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    pipe.send("ready")
    while True:
        pipe.send(run(pipe.recv(), valid))


class Worker:
    """A process that takes cases, and is begun anew where one ended it or took too long."""

    def __init__(self, valid: Path, run: Run = run, seconds: float = SECONDS):
        self._valid, self._run, self._seconds = valid, run, seconds
        self._begin()

    def _begin(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.faults.test_malformed"])
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self._valid, self._run), daemon=True)
        self._process.start()
        theirs.close()
        self.pipe.recv()  # ready: what it has to import is no part of a case

    def give(self, case: Case) -> None:
        self.case, self.end = case, time.monotonic() + self._seconds
        self.pipe.send(case)

    def take(self) -> Outcome | str | None:
        """What became of the case; None: not yet."""
        try:
            if self.pipe.poll(0):
                return self.pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self._begin()
            return f"ended the process ({code})"
        if time.monotonic() < self.end:
            return None
        self.close()
        self._begin()
        return f"still at work after {self._seconds} s"

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def outcomes(todo: list[Case], valid: Path, run: Run = run,
             seconds: float = SECONDS) -> Iterator[tuple[Case, Outcome | str]]:
    free = [Worker(valid, run, seconds) for _ in range(2)]
    busy: list[Worker] = []
    todo = todo[::-1]
    try:
        while todo or busy:
            while todo and free:
                busy.append(free.pop())
                busy[-1].give(todo.pop())
            multiprocessing.connection.wait([worker.pipe for worker in busy], 0.5)
            for worker in list(busy):
                outcome = worker.take()
                if outcome is not None:
                    busy.remove(worker)
                    free.append(worker)
                    yield worker.case, outcome
    finally:
        for worker in (*free, *busy):
            worker.close()


# What is asked of it -----------------------------------------------------------------------------------------------

SHOWN = ("recipe", "dataset", "scene", "zones")  # texts of values that may be others


def complaints(case: Case, got: Outcome | str, valid: Outcome) -> Iterator[str]:
    """What is wrong with an outcome."""
    if isinstance(got, str):
        yield got
        return
    if "traceback" in got.said.lower():
        yield got.said
    folder, _, name = got.file.rpartition("/")
    other = case.kind in SHOWN and got.steps["parse"][0] == "value" and got.steps["parse"] != valid.steps["parse"]
    changed = []
    for step, (kind, value) in got.steps.items():
        if step == "said":
            continue
        if kind == "traceback":
            yield f"{step}: {value}"
        elif kind == "refused" and not (other or name in value or _named(value, case, folder)):
            yield f"{step}: does not name {name}: {value[:500]}"
        elif kind == "value" and value != valid.steps[step][1]:
            changed.append(step)
    if case.kind in SHOWN and got.steps["parse"][0] == "value":
        yield from _shown(case.kind, got.data, got.steps["parse"][1])
    if other:
        return
    refused = any(kind == "refused" for kind, _ in got.steps.values())
    silent = changed and name not in got.said and not (refused and set(changed) == {"index"})  # which looks at names
    if case.kind in ("tiff", "packed") and got.steps["verify"][0] != "refused":
        yield "verify does not find it"
    if case.kind == "tiff" and got.steps["pack"][0] != "refused":
        yield "is packed"
    if case.kind in ("tiff", "raster") and silent:
        # GDAL does not look at the checksum of Deflate: what it decompresses to is what such a file says
        if got.steps["said"] == valid.steps["said"] or (case.kind == "tiff" and got.steps["said"][0] != "value"):
            yield f"{', '.join(changed)}: read otherwise than by others: {got.steps['said'][1]}"
    elif case.kind == "csv" and silent:
        # Checksums and sizes are for verify to compare, or to say that there are none
        if set(changed) - {"rows", "verify"} or (got.steps["verify"][0] == "value" and "verify" not in changed):
            yield f"{', '.join(changed)}: other values, in silence"
    elif silent and not _another(case.kind, got, valid):
        yield f"{', '.join(changed)}: other values, in silence"


def _named(text: str, case: Case, folder: str) -> bool:
    """Whether an error names the key of a recipe, or the folder that notes, CSVs and STAC items are of."""
    if case.kind == "recipe":
        return any(f"{section}." in text or f"{section}:" in text for section in yaml.safe_load(doors.RECIPE))
    return case.kind in ("run", "notes", "maps", "csv", "stac") and folder in text


def _shown(kind: str, data: bytes, dump: Any) -> Iterator[str]:
    """Where a text is shown as something else than it says."""
    if kind == "zones":
        raw = json.loads(data)
        if raw.get("crs") == doors.ZONE["crs"]:
            yield from (text for one, other in zip(raw["features"], dump["features"])
                        for text in _other(_plane(one["geometry"]), _plane(other["geometry"]), "geometry"))
        return
    try:
        raw = yaml.safe_load(data)
        twice = list(_twice(yaml.compose(data)))
    except Exception as error:
        yield f"taken, and is no YAML: {error!r}"
        return
    yield from (f"{key}: given twice" for key in twice)
    yield from _other(raw, dump, "")


def _another(kind: str, got: Outcome, valid: Outcome) -> bool:
    """Whether what was read may be other than the valid file's: items of another date or place, other chips in
    quarantine, weights without a checksum or under one that was made right again."""
    if kind == "stac":
        new, old = ([(item["properties"], item["assets"]) for item in json.loads(data)["features"]]
                    for data in (got.data, valid.data))
        return new != old
    if got.file.endswith("quarantine.json"):
        return bool(got.steps["quarantine"][1] == json.loads(got.data))
    return kind == "weights" and got.what.endswith(("without a checksum", "sealed again"))


def _plane(shape: Any) -> Any:
    """Of a polygon's positions x and y."""
    if shape["type"] != "Polygon":
        return shape
    return [[position[:2] for position in ring] for ring in shape["coordinates"]]


def _twice(node: Any) -> Iterator[str]:
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        yield from {name for name in names if names.count(name) > 1}
        for _, value in node.value:
            yield from _twice(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _twice(value)


def _other(raw: Any, shown: Any, at: str) -> Iterator[str]:
    if isinstance(raw, dict) and isinstance(shown, dict):
        for key, value in raw.items():
            yield from _other(value, shown.get(key), f"{at}.{key}") if key in shown else [f"{at}.{key} is left out"]
    elif isinstance(raw, list) and isinstance(shown, list) and len(raw) == len(shown):
        for number, (one, other) in enumerate(zip(raw, shown)):
            yield from _other(one, other, f"{at}.{number}")
    elif not _same(raw, shown):
        yield f"{at}: {raw!r} is shown as {shown!r}"


def _same(raw: Any, shown: Any) -> bool:
    if isinstance(raw, float) and not math.isfinite(raw):
        return False
    if isinstance(raw, bool) or isinstance(shown, bool):
        return raw is shown
    if isinstance(raw, str) and isinstance(shown, (int, float)):  # 1e-3, which YAML takes for a text
        with contextlib.suppress(ValueError):
            return float(raw) == shown
    return raw == (shown.encode() if isinstance(raw, bytes) and isinstance(shown, str) else shown)


# The tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "valid"
    doors.make(folder)
    return folder


def found(todo: list[Case], valid: Path) -> list[str]:
    """What is wrong with any of these."""
    kinds = list(dict.fromkeys(case.kind for case in todo))
    as_they_are = [Case(kind, -1, 0) for kind in kinds]
    right: dict[str, Outcome] = {}
    wrong = []
    for case, outcome in outcomes(as_they_are, valid):
        assert not isinstance(outcome, str), f"{case}: {outcome}"
        assert all(kind == "value" for kind, _ in outcome.steps.values()), f"{case}: {outcome.steps}"
        right[case.kind] = outcome
    for case, outcome in outcomes(todo, valid):
        about = "" if isinstance(outcome, str) else f"{outcome.file}, {outcome.what}"
        wrong += [f"{case} ({about}): {text}" for text in complaints(case, outcome, right[case.kind])]
    return wrong


def test_some_malformed_inputs(valid: Path) -> None:
    todo = [case for case in cases(SEED) if case.number % QUICK == 0]
    assert {case.kind for case in todo} == set(doors.KINDS) and len(todo) >= 60
    wrong = found(todo, valid)
    assert not wrong, f"{len(wrong)} of {len(todo)}:\n" + "\n".join(wrong)


@pytest.mark.faults
def test_all_malformed_inputs(valid: Path) -> None:
    todo = cases(SEED)
    assert len(todo) == 300
    wrong = found(todo, valid)
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


def _fails(case: Case, valid: Path) -> Outcome:
    if case.number == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if case.number == 2:
        time.sleep(60)
    return Outcome("file", "nothing", b"", {"read": ("traceback", "ValueError")} if case.number == 3 else {}, "")


def test_what_ends_the_process_or_hangs_is_seen(tmp_path: Path) -> None:
    todo = [Case("maps", number, 0) for number in range(6)]
    became = dict(outcomes(todo, tmp_path, _fails, seconds=3))
    assert became[todo[1]] == f"ended the process ({-signal.SIGSEGV})" and became[todo[2]] == "still at work after 3 s"
    right = Outcome("", "", b"", {}, "")
    assert [case.number for case in todo if list(complaints(case, became[case], right))] == [1, 2, 3]


def test_the_same_seed_gives_the_same(valid: Path) -> None:
    case = Case("recipe", 3, 5)
    assert malformed(case, valid) == malformed(case, valid) != malformed(case._replace(seed=6), valid)
