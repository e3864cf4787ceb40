"""Builds a C++ source for this machine at first use and loads it.

The library is compiled once (some seconds), with the C++ compiler named by $CXX or found as c++, g++ (12 or newer) or
clang++, and kept under $XDG_CACHE_HOME/biomass-kernels (default ~/.cache) by a hash of its source, the compiler and the
processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi",
    "-fopenmp", "-fPIC", "-shared",
)  # fmt: skip


def find_compiler() -> str | None:
    """The C++ compiler's path, or None where there is none."""
    named = os.environ.get("CXX")
    found = (shutil.which(name) for name in ([named] if named else ["c++", "g++", "clang++"]))
    return next((path for path in found if path), None)


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines of several kinds."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = set(cpuinfo.read_text().splitlines()) if cpuinfo.exists() else set()
    told = sorted(line for line in lines if line.startswith(("flags", "Features", "model name")))
    return "\n".join([platform.machine(), *told])


def load(source: Path) -> ctypes.CDLL:
    """The compiled library, built if the cache has none; callers keep it.

    Raises RuntimeError where that fails, with the compiler's words or the folder's trouble.
    """
    try:
        return _load(source)
    except OSError as error:
        raise RuntimeError(f"{source.parent.name}: cannot be built or loaded ({error}); point XDG_CACHE_HOME to a "
                           "folder that can be written to and executed from") from None


def _load(source: Path) -> ctypes.CDLL:
    name = f"{source.parent.name}-{source.stem}"
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError(f"{name} needs a C++ compiler (c++, g++, clang++ or $CXX): none was found")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = "\0".join([source.read_text(), *_FLAGS, compiler, version, _processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "biomass-kernels"
    target = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=folder, suffix=".tmp")
        os.close(handle)
        try:
            command = [compiler, *_FLAGS, str(source), "-o", beside]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-4000:]}")
            Path(beside).replace(target)  # several ranks may build at once: each puts a whole file in place
        finally:
            Path(beside).unlink(missing_ok=True)
    try:
        return ctypes.CDLL(str(target))
    except OSError:  # cut short by a power cut, say: the next start builds it again
        target.unlink(missing_ok=True)
        raise
