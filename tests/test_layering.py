"""launch, benchmarks, tests → engine → kernels; kernels know torch alone; two modules of engine compose the rest."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

COMPOSERS = {"engine/trainer.py", "engine/predictor.py"}
# What may be imported by whom inside engine: a module never imports a composer, and data never imports the model side
DATA_MAY_USE = {"engine.errors", "engine.files", "engine.config", "engine.progress"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", files("kernels"), ids=ids)
def test_kernels_know_only_torch_and_triton(path: Path) -> None:
    import sys

    allowed = {"torch", "triton", "kernels", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", files("engine"), ids=ids)
def test_engine_does_not_know_who_uses_it(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"launch", "benchmarks", "tests"}
    if ids(path) not in COMPOSERS:
        assert not imports(path) & {"engine.trainer", "engine.predictor"}


@pytest.mark.parametrize("path", files("engine/data"), ids=ids)
def test_the_data_path_does_not_know_the_model(path: Path) -> None:
    inside = {name for name in imports(path) if name.startswith("engine.") and not name.startswith("engine.data")}
    assert all(any(name == m or name.startswith(f"{m}.") for m in DATA_MAY_USE) for name in inside), inside


def test_pickles_are_never_executed() -> None:
    """torch.load and pickle.load execute what they read; engine.unpickle is the one reader."""
    unsafe = {("torch", "load"), ("pickle", "load"), ("pickle", "loads")}
    for path in [*files("engine"), *files("launch"), *files("kernels")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in unsafe, path
