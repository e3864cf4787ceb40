"""The gate of `make test` on a small package: what it lets through, and what it says of the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PYPROJECT = """
[tool.coverage.run]
source = ["made"]
patch = ["subprocess", "_exit"]
"""
PACKAGE = f"""
def used():
{chr(10).join(["    x = 1"] * 199)}
    return x

def mistaken(x):
    if x:
        raise ValueError
    return 1

class Work:
    def run(self, x):
        def inner():
            return "on it"
        if x.is_cuda:
            return inner()
        return 2
"""
MAIN = """
import subprocess, sys
from types import SimpleNamespace
from made import Work, used

Work().run(SimpleNamespace(is_cuda=False))
used()
subprocess.run([sys.executable, "-c", "import os, made; made.mistaken(0); os._exit(0)"], check=True)
"""
# In the real one's place: whether the machine has a GPU
TORCH = """
import os
from types import SimpleNamespace
cuda = SimpleNamespace(is_available=lambda: "HAS_GPU" in os.environ)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, its main.py run under coverage."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "made").mkdir()
    (folder / "tests").mkdir()
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "made" / "__init__.py").write_text(PACKAGE)
    (folder / "main.py").write_text(MAIN)
    (folder / "torch.py").write_text(TORCH)
    done = python(folder, "-m", "coverage", "run", "main.py")
    assert done.returncode == 0, done.stderr
    return folder


def python(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")}  # this suite is measured itself
    return subprocess.run([sys.executable, *words], cwd=folder, env={**own, "PYTHONPATH": str(folder)}, text=True,
                          capture_output=True)


def gate(folder: Path, *entries: str) -> tuple[int, str]:
    (folder / "tests" / "device_only.txt").write_text("# what needs a device\n\n" + "\n".join(entries))
    done = python(folder, ROOT / "tests" / "coverage_gate.py")
    assert not done.stderr
    return done.returncode, done.stdout


RUN = "made/__init__.py::Work.run: needs CUDA"


def test_a_listed_function_and_a_few_lines_pass(made: Path) -> None:
    code, out = gate(made, RUN)
    assert code == 0 and "made/__init__.py:206: mistaken\n" in out
    assert "212 lines; uncovered 1, and 2 that need a device" in out  # a child that left by os._exit counts


def test_a_line_of_a_devices_path_is_run_or_listed(made: Path) -> None:
    code, out = gate(made)
    assert code == 1 and "made/__init__.py:214: Work.run: no test runs this line of a device's path" in out
    assert "made/__init__.py:212: Work.run.inner: no test runs" in out and "__init__.py:206: mistaken\n" in out
    code, out = gate(made, "made/__init__.py::Work.run.inner: needs CUDA")
    assert code == 1 and "py:214: Work.run: no test" in out and "py:212" not in out


@pytest.mark.parametrize(("entry", "says"), [
    ("made/__init__.py::used: slow", "device_only.txt:4: made/__init__.py::used is covered: delete the entry"),
    ("made/__init__.py::gone: slow", "device_only.txt:4: made/__init__.py::gone does not exist"),
    ("made/gone.py::used: slow", "device_only.txt:4: made/gone.py::used does not exist"),
    ("made/__init__.py::mistaken", "device_only.txt:4: not `path::function: reason`: made/__init__.py::mistaken"),
])
def test_a_stale_or_empty_entry_fails(made: Path, entry: str, says: str) -> None:
    code, out = gate(made, RUN, entry)
    assert code == 1 and says in out


def test_on_a_machine_with_a_gpu_an_entry_may_be_covered(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAS_GPU", "1")
    assert gate(made, RUN, "made/__init__.py::used: slow")[0] == 0
    code, out = gate(made, RUN, "made/__init__.py::gone: slow")
    assert code == 1 and "does not exist" in out


def test_two_percent_may_be_uncovered_and_not_more(made: Path) -> None:
    """Lines of a file that nothing imports count too."""
    lost = made / "made" / "lost.py"
    try:
        lost.write_text("x = 1\n" * 3)
        code, out = gate(made, RUN)
        assert code == 0 and "215 lines; uncovered 4" in out
        lost.write_text("x = 1\n" * 4)
        code, out = gate(made, RUN)
        assert code == 1 and "made/lost.py:4: module" in out and "5 uncovered lines are more than 2% of 216" in out
    finally:
        lost.unlink()
