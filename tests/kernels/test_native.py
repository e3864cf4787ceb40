"""How C++ is built for a machine, and the packed chip's kernel under every instruction set that this machine has.

`INSTRUCTIONS` and `choose` serve the month attention's tests too.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import native, packed_chip
from kernels.month_attention import cpu, resolve
from tests.conftest import ROOT
from tests.data import test_packed

INSTRUCTIONS = [
    pytest.param("", id="native"),
    *(pytest.param(name, marks=pytest.mark.skipif(bool(lacks), reason=f"{name}: this machine lacks {', '.join(lacks)}"))
      for name in native.INSTRUCTION_SETS for lacks in [native.lacking(name)]),
]
NAMED = INSTRUCTIONS[1:]

needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler on this machine")

# What a library was compiled for
_SOURCE = """
extern "C" int instructions() {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
    return 512;
#elif defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
    return 256;
#elif !defined(__SSE3__)
    return 128;
#else
    return 0;
#endif
}
"""


def choose(monkeypatch: pytest.MonkeyPatch, instructions: str) -> None:
    """Until the test's end the kernels run as built for these instructions, whatever was loaded before."""
    monkeypatch.setenv("KERNELS_CPU", instructions)
    monkeypatch.setattr(cpu, "library", functools.cache(cpu.library.__wrapped__))
    monkeypatch.setattr(packed_chip, "_library", functools.cache(packed_chip._library.__wrapped__))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A C++ file that compiles in no time, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "small.cpp"
    path.write_text(_SOURCE)
    return path


def built(source: Path) -> list[str]:
    return sorted(path.name for path in (source.parent / "cache" / "biomass-kernels").iterdir())


def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str) -> None:
    """This machine, as far as /proc/cpuinfo tells."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("".join(f"processor\t: {i}\nflags\t\t: fpu sse sse2 {flags}\n" for i in range(2)))
    monkeypatch.setattr(native, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(native, "lacking", functools.cache(native.lacking.__wrapped__))
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")


@needs_compiler
@pytest.mark.parametrize("instructions", NAMED)
def test_the_variable_chooses(source: Path, instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELS_CPU", instructions)
    assert native.load(source).instructions() == {"avx512": 512, "avx2": 256, "sse": 128}[instructions]


@pytest.mark.parametrize(("value", "flags", "message"), [
    ("avx512", "avx2 fma avx512f avx512bw avx512vl", r"KERNELS_CPU=avx512.*lacks avx512dq\).* unset or avx2 or sse$"),
    ("avx2", "avx", r"KERNELS_CPU=avx2.*lacks avx2, fma\): here it may be unset or sse$"),
    ("AVX2", "avx2 fma", r"KERNELS_CPU=AVX2.*is unknown: here it may be unset or avx2 or sse$"),
])
def test_instructions_that_cannot_run_are_refused(
    value: str, flags: str, message: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    machine(monkeypatch, tmp_path, flags)
    monkeypatch.setenv("KERNELS_CPU", value)
    monkeypatch.setenv("CXX", sys.executable)  # is there; not called
    for attempt in (lambda: native.load(source), lambda: resolve("compile", "cpu"), lambda: resolve("auto", "cpu")):
        with pytest.raises(RuntimeError, match=message):
            attempt()


def test_other_machines_have_no_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, tmp_path, "")
    monkeypatch.setattr(native.platform, "machine", lambda: "aarch64")
    monkeypatch.setenv("KERNELS_CPU", "sse")
    with pytest.raises(RuntimeError, match=r"lacks x86-64\): here it may be unset$"):
        native.instructions()


@needs_compiler
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_a_home_shared_by_machines(
    source: Path, tmp_path: Path, instructions: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What is built for all that one machine has must not reach another; what is built for a set serves both."""
    monkeypatch.setenv("KERNELS_CPU", instructions)
    for more in ("", " amx_tile"):
        machine(monkeypatch, tmp_path, " ".join(native.INSTRUCTION_SETS["avx512"]) + more)
        native.load(source)
    assert len(built(source)) == (1 if instructions else 2)


def test_a_folder_that_others_can_write_in(tmp_path: Path) -> None:
    """What lies there is executed."""
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    assert native.own_folder(folder).stat().st_mode & 0o777 == 0o755
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(PermissionError, match="belongs to another user"):
        native.own_folder(tmp_path / "link")
    if os.geteuid() == 0:
        os.chown(folder, 1234, 1234)
        with pytest.raises(PermissionError, match="belongs to another user"):
            native.own_folder(folder)


@needs_compiler
def test_a_library_that_others_can_have_written_is_built_anew(source: Path) -> None:
    native.load(source)
    [name] = built(source)
    library = source.parent / "cache" / "biomass-kernels" / name
    library.unlink()  # it is loaded
    library.write_bytes(b"another's")
    library.chmod(0o777)
    assert native.load(source).instructions() != 0
    assert library.stat().st_mode & 0o777 == 0o700 and library.read_bytes()[:4] == b"\x7fELF"


@needs_compiler
def test_processes_that_build_at_once(source: Path) -> None:
    code = ("import sys; from pathlib import Path; from kernels import native; sys.stdin.readline();"
            "print(native.load(Path(sys.argv[1])).instructions())")
    started = [subprocess.Popen([sys.executable, "-c", code, str(source)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    for process in started:
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    ends = [process.communicate(timeout=60) for process in started]
    assert len({out for out, _ in ends if out}) == 1 and not any(err for _, err in ends)
    assert len(built(source)) == 1


@needs_compiler
@pytest.mark.parametrize("instructions", NAMED)
def test_packed_chips(
    instructions: str, tree: Path, stores: dict[bool, Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What test_packed.py shows of the kernel as it is built without a choice."""
    choose(monkeypatch, instructions)
    test_packed.test_decoding_is_exact(tree, stores, "cpu", True)
    test_packed.test_any_affine_matrix(tree, stores, [[0.61, -0.33, 40.1], [0.37, 0.83, -11.3]])  # few ties to round
    test_packed.test_the_kernel_stays_within_its_output(15)
