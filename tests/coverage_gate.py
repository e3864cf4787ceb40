"""Fails where the suite left lines of the engine out:  coverage run -m pytest …, then python tests/coverage_gate.py

A path that the machine at hand cannot run is one that nothing has run.  So every line of the packages that
`[tool.coverage.run] source` names is run by the suite, or lies in a function that tests/device_only.txt names because
it truly needs a device: `path::function: reason`, one a line, with methods as `Class.method`.  What else is uncovered
is printed, and fails where it is more than 2 % of all lines, or in a function that speaks of CUDA or a GPU.  An entry
that names nothing is stale and fails too, as does, on a machine without a GPU, one whose function is covered.  Run it
in the repository's root.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import coverage
import torch

MOST = 0.02  # of all lines
LIST = Path("tests/device_only.txt")
DEVICE = re.compile("cuda|gpu", re.IGNORECASE)
ENTRY = re.compile(r"(?P<path>[^:\s]+)::(?P<name>[\w.]+): (?P<reason>\S.*)")


class Function(NamedTuple):
    name: str  # qualified: Class.method, function.inner
    first: int  # of its body: the `def` and its decorators run where it is defined
    last: int
    device: bool


def functions(source: str) -> list[Function]:
    """All functions of a file, outer ones before those inside them."""
    def visit(node: ast.AST, names: tuple[str, ...]) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield from visit(child, names)
                continue
            inner = (*names, child.name)
            if not isinstance(child, ast.ClassDef):
                last = child.end_lineno or child.lineno
                text = "\n".join(lines[child.lineno - 1 : last])
                yield Function(".".join(inner), child.body[0].lineno, last, bool(DEVICE.search(text)))
            yield from visit(child, inner)

    lines = source.splitlines()
    return list(visit(ast.parse(source), ()))


def listed() -> tuple[dict[tuple[str, str], int], list[str]]:
    """(path, function) -> line of the list, and what is wrong with the others."""
    found, wrong = {}, []
    for number, line in enumerate(LIST.read_text().splitlines() if LIST.exists() else [], 1):
        if line.strip() and not line.startswith("#"):
            if entry := ENTRY.fullmatch(line.strip()):
                found[entry["path"], entry["name"]] = number
            else:
                wrong.append(f"{LIST}:{number}: not `path::function: reason`: {line}")
    return found, wrong


def measured() -> coverage.Coverage:
    cover = coverage.Coverage()
    if any(Path().glob(".coverage.*")):  # each process of the suite left one
        cover.combine()
        cover.save()
    else:
        cover.load()
    return cover


def main() -> int:
    cover = measured()
    entries, faults = listed()
    needed: set[tuple[str, str]] = set()
    total = excused = open_lines = 0
    sources = [Path(str(name)) for name in cover.get_option("run:source") or []]  # type: ignore[union-attr]
    for path in sorted(path for folder in sources for path in folder.rglob("*.py")):
        source = path.read_text()
        _, statements, _, missing, _ = cover.analysis2(str(path))
        total += len(statements)
        for line in missing:
            around = [f for f in functions(source) if f.first <= line <= f.last]
            names = {(path.as_posix(), f.name) for f in around} & entries.keys()
            needed |= names
            if names:
                excused += 1
                continue
            open_lines += 1
            where = f"{path}:{line}: {around[-1].name if around else 'module'}"
            if any(f.device for f in around) or (not around and DEVICE.search(source.splitlines()[line - 1])):
                faults.append(f"{where}: no test runs this line of a device's path: rehearse it, or say in {LIST} why "
                              "only a device can run it")
            else:
                print(where)
    for path, name in sorted(entries.keys() - needed):
        there = Path(path).exists() and name in {f.name for f in functions(Path(path).read_text())}
        if there and torch.cuda.is_available():
            continue  # the tests that need a GPU covered it
        faults.append(f"{LIST}:{entries[path, name]}: {path}::{name} "
                      + ("is covered: delete the entry" if there else "does not exist"))
    if open_lines > MOST * total:
        faults.append(f"{open_lines} uncovered lines are more than {MOST:.0%} of {total}: test those printed above")
    print(f"coverage: {1 - (open_lines + excused) / max(total, 1):.2%} of {total} lines; uncovered {open_lines}, "
          f"and {excused} that need a device")
    print(*faults, sep="\n", end="\n" if faults else "")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
