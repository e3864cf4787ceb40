"""The order of the house: launch, benchmarks, tests → engine → kernels; and in engine, floor by floor:

    trainer → {training, inference} → {run, data, model} → config → base

A module imports from its own room and from the floors below, never from the room beside it, and never in a circle.
"""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

FLOORS = ({"base"}, {"config"}, {"run", "data", "model"}, {"training", "inference"}, {"trainer"})
HEIGHT = {room: height for height, floor in enumerate(FLOORS) for room in floor}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in files("engine")}


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def of(path: Path) -> set[str]:
    return imports(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", files("kernels"), ids=ids)
def test_kernels_know_only_torch_and_triton(path: Path) -> None:
    allowed = {"torch", "triton", "kernels", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in of(path)} <= allowed


@pytest.mark.parametrize("path", files("engine"), ids=ids)
def test_engine_does_not_know_who_uses_it(path: Path) -> None:
    assert not {name.split(".")[0] for name in of(path)} & {"launch", "benchmarks", "tests"}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "engine"])  # the door hands out from all floors
def test_a_module_knows_its_own_room_and_the_floors_below(name: str) -> None:
    room = name.split(".")[1]
    known = {other.split(".")[1] for other in of(MODULES[name]) if other.startswith("engine.")} - {room}
    assert all(HEIGHT[other] < HEIGHT[room] for other in known), known


def test_no_circles() -> None:
    graph = {name: of(path) & MODULES.keys() - {name, "engine"} for name, path in MODULES.items() if name != "engine"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))


@pytest.mark.parametrize("name", [name for name in MODULES if name != "engine"])
def test_no_import_hides_in_a_function(name: str) -> None:
    functions = [node for node in ast.walk(ast.parse(MODULES[name].read_text()))
                 if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not [found for node in functions for found in imports(node) if found.split(".")[0] == "engine"]


def test_no_room_is_a_heap() -> None:
    rooms: dict[Path, int] = {}
    for path in MODULES.values():
        if path.name != "__init__.py":
            rooms[path.parent] = rooms.get(path.parent, 0) + 1
    assert max(rooms.values()) <= 14, rooms


def test_pickles_are_never_executed() -> None:
    """torch.load and pickle.load execute what they read; engine.model.unpickle is the one reader."""
    unsafe = {("torch", "load"), ("pickle", "load"), ("pickle", "loads")}
    for path in [*files("engine"), *files("launch"), *files("kernels")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in unsafe, path
