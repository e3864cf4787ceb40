"""Builds a C++ source for this machine at first use and loads it.

The library is compiled once (some seconds), with the C++ compiler named by $CXX or found as c++, g++ (12 or newer) or
clang++, and kept under $XDG_CACHE_HOME/biomass-kernels (default ~/.cache) by a hash of its source, the compiler, its
options and, where these say `native`, the processor.

$KERNELS_CPU chooses the instructions on x86-64: avx512, avx2 or sse.  Unset or empty, a library takes all that the
machine has.  It is read when a library is first loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

_FLAGS = (
    "-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fopenmp",
    "-fPIC", "-shared",
)  # fmt: skip
_NATIVE = ("-march=native",)
# What $KERNELS_CPU may say, and the features beyond x86-64's own SSE2: -m options that /proc/cpuinfo calls the same
INSTRUCTION_SETS = {
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"),
    "avx2": ("avx2", "fma"),
    "sse": (),
}
_CPUINFO = Path("/proc/cpuinfo")


def find_compiler() -> str | None:
    """The C++ compiler's path, or None where there is none."""
    named = os.environ.get("CXX")
    found = (shutil.which(name) for name in ([named] if named else ["c++", "g++", "clang++"]))
    return next((path for path in found if path), None)


def _told(*keys: str) -> list[str]:
    """The distinct lines of /proc/cpuinfo under these keys; none where there is no such file."""
    lines = set(_CPUINFO.read_text().splitlines()) if _CPUINFO.exists() else set()
    return sorted(line for line in lines if line.startswith(keys))


def _processor() -> list[str]:
    """What -march=native depends on: a home folder may be shared by machines of several kinds."""
    return [platform.machine(), *_told("flags", "Features", "model name")]


@functools.cache
def lacking(name: str) -> list[str]:
    """What this machine lacks for one of INSTRUCTION_SETS: nothing where it can run it."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["x86-64"]
    has = {word for line in _told("flags") for word in line.split()}
    return [feature for feature in INSTRUCTION_SETS[name] if feature not in has]


def instructions() -> tuple[str, ...]:
    """The compiler's options for $KERNELS_CPU.  RuntimeError for a value that is unknown or that cannot run here."""
    name = os.environ.get("KERNELS_CPU")
    if not name:
        return _NATIVE
    if name not in INSTRUCTION_SETS:
        trouble = "is unknown"
    elif lacks := lacking(name):
        trouble = f"cannot run here (this machine lacks {', '.join(lacks)})"
    else:
        return ("-march=x86-64", *(f"-m{feature}" for feature in INSTRUCTION_SETS[name]))
    allowed = ["unset", *(name for name in INSTRUCTION_SETS if not lacking(name))]
    raise RuntimeError(f"KERNELS_CPU={name}, the instruction set of the C++ kernels, {trouble}: "
                       f"here it may be {' or '.join(allowed)}")


def own_folder(folder: Path) -> Path:
    """`folder`, made if need be, in which nobody else can write: what lies there is executed.

    Raises OSError where it cannot be made, and PermissionError where it is another user's, or a link.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{folder} belongs to another user of this machine, or is a link")
    if status.st_uid == os.geteuid() and status.st_mode & 0o022:
        folder.chmod(status.st_mode & 0o755)
    return folder


def _ours(library: Path) -> bool:
    """Whether nobody else can have written it."""
    status = library.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022


def load(source: Path) -> ctypes.CDLL:
    """The compiled library, built if the cache has none; callers keep it.

    Raises RuntimeError where that fails, with the compiler's words or the folder's trouble, and as `instructions` does.
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
    chosen = instructions()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    processor = _processor() if chosen == _NATIVE else []
    key = "\0".join([source.read_text(), *_FLAGS, *chosen, compiler, version, *processor])
    folder = own_folder(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "biomass-kernels")
    target = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not (target.exists() and _ours(target)):
        handle, beside = tempfile.mkstemp(dir=folder, suffix=".tmp")
        os.close(handle)
        try:
            command = [compiler, *_FLAGS, *chosen, str(source), "-o", beside]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-4000:]}")
            Path(beside).chmod(0o700)
            Path(beside).replace(target)  # several ranks may build at once: each puts a whole file in place
        finally:
            Path(beside).unlink(missing_ok=True)
    try:
        return ctypes.CDLL(str(target))
    except OSError:  # cut short by a power cut, say: the next start builds it again
        target.unlink(missing_ok=True)
        raise
