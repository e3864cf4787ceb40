"""A scene as a source for the loader: its windows are the chips.

Windows of a row overlap, so those that lie side by side are read as one run, once, by whichever thread comes first.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from engine.data.index import Chip
from engine.data.scene.grid import Box, Windows, mirrored
from engine.data.scene.rasters import Pixels, Rasters
from engine.data.scene.scene import Scene
from engine.data.source import UPRIGHT, Stack, Turn, empty_stack, fill
from engine.data.store.chip_file import EXACT

RUN = 4  # windows; more would be read with less overlap, and take 20 MB each


class SceneSource:
    """Windows of a scene, for at most `threads` threads; steps in which a window saw nothing are left out of it.

    Beyond the grid a window shows the scene mirrored at its border.  `seen`: for each window that was read and by its
    chip's id, [tile, tile] bool: some step has a value.  A window without any has one step, of nothing; whoever takes
    a window's mask takes it out.
    """

    form, values = "stack", EXACT

    def __init__(self, scene: Scene, windows: Windows, threads: int):
        self.dataset, self.scene, self.windows = scene.dataset, scene, windows
        self.seen: dict[str, np.ndarray] = {}
        self._rasters = Rasters(scene, threads)
        self._runs: dict[tuple[int, int], _Run] = {}
        self._lock = threading.Lock()

    def chip(self, row: int, column: int) -> Chip:
        """The window at that place among the windows."""
        return Chip(f"{row}/{column}", "scene", self.dataset, self.scene.months, self.scene.path, None)

    def buffer(self) -> Stack:
        return empty_stack(self.dataset)

    def stack(self, chip: Chip) -> Stack:
        return self.read(chip, None, self.buffer())

    def read(self, chip: Chip, keep: np.ndarray | None, into: Stack, turn: Turn | None = UPRIGHT) -> Stack:
        """Raises DataError naming the file that cannot be read.  keep, turn: all steps, upright; no others are asked
        for."""
        row, column = map(int, chip.id.split("/"))
        run = self._run(row, column)
        windows, tile = self.windows, self.dataset.tile
        rows = mirrored(windows.rows[row], tile, windows.height) - run.box.row
        columns = mirrored(windows.columns[column], tile, windows.width) - run.box.column
        place = _plain(rows), _plain(columns)
        seen = np.zeros((tile, tile), bool)
        months: list[int] = []
        for step in range(self.dataset.months):
            there = [number for number, sensor in enumerate(self.dataset.sensors)
                     if not sensor.static and (number, step) in run.pixels]
            masks = {number: _at(run.pixels[number, step].seen, place) for number in there}
            if not any(mask.any() for mask in masks.values()):
                continue
            for mask in masks.values():
                seen |= mask
            self._fill(run, place, step, into, len(months))
            months.append(step)
        if not months:
            months = [0]
            self._fill(run, place, -1, into, 0)
        self.seen[chip.id] = seen
        into.label.fill(0)
        k = len(months)
        return Stack(self.dataset, tuple(images[:k] for images in into.images), into.label, np.array(months))

    def _fill(self, run: _Held, place: _Place, step: int, into: Stack, slot: int) -> None:
        """A step's images; step -1: nothing seen."""
        for number, sensor in enumerate(self.dataset.sensors):
            found = run.pixels.get((number, 0 if sensor.static else step))
            if found is None:
                fill(into.images[number][slot], sensor.absent)
            else:
                into.images[number][slot] = _at(found.values, place)

    # Runs ----------------------------------------------------------------------------------------------------

    def _run(self, row: int, column: int) -> _Held:
        key = row, column // RUN
        with self._lock:
            run = self._runs.get(key)
            first = run is None
            if run is None:
                run = self._runs[key] = _Run(Future(), min(RUN, len(self.windows.columns) - key[1] * RUN))
        if first:
            try:
                run.result.set_result(self._read_run(*key))
            except BaseException as error:
                run.result.set_exception(error)
        held = run.result.result()
        with self._lock:
            run.left -= 1
            if not run.left:
                del self._runs[key]
        return held

    def _read_run(self, row: int, number: int) -> _Held:
        windows = self.windows
        columns = windows.columns[number * RUN:(number + 1) * RUN]
        top, bottom = _inside(windows.rows[row], windows.rows[row] + windows.tile, windows.height)
        left, right = _inside(columns[0], columns[-1] + windows.tile, windows.width)
        box = Box(top, left, bottom - top, right - left)
        return _Held(box, {(sensor, step): self._rasters.read(sensor, step, box) for sensor, step in self.scene.images})


class _Held(NamedTuple):
    box: Box
    pixels: dict[tuple[int, int], Pixels]  # as `Scene.images`


class _Run:
    def __init__(self, result: Future[_Held], left: int):
        self.result, self.left = result, left  # windows that are still to be taken from it


_Place = tuple[slice | np.ndarray, slice | np.ndarray]  # rows and columns of a run's box


def _plain(places: np.ndarray) -> slice | np.ndarray:
    """A slice where nothing is mirrored: it moves values once, and several times as quickly."""
    first = int(places[0])
    return slice(first, first + len(places)) if (np.diff(places) == 1).all() else places


def _at(values: np.ndarray, place: _Place) -> np.ndarray:
    rows, columns = place
    return values[rows][:, columns]


def _inside(first: int, end: int, length: int) -> tuple[int, int]:
    return max(0, first), min(end, length)
