"""Shared fixtures: made data (small, cached for the session), the real chips, and the commands as subprocesses."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: see engine/base/cli.py
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there are as many workers as cores
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more would be processes that import torch first
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"

# A UNet small enough for a test, with every part of the real one
TINY = ["--set", "model.backbone=tf_mobilenetv3_small_minimal_100", "--set", "model.decoder_channels=[8,8,8,8,8]"]


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may not be there
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: a worker a core that this process may use, and one for the tenth of their time in which they wait
    for what they have started; at most 8: one took 3 GB, beside the runs it starts."""
    return min(len(os.sched_getaffinity(0)) + 1, 8)


SCENES = importlib.util.find_spec("rasterio") is not None


def pytest_report_header() -> str:
    return "" if SCENES else "without rasterio: tests of scenes are left out"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Where the extra `scene` is not installed, as on a borrowed GPU machine."""
    if SCENES or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text()
    return True if any(word in text for word in ("rasterio", "engine.data.scene", "tests.scenes")) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "faults" not in config.option.markexpr:  # nor by any other -m
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("faults")])
        items[:] = [item for item in items if not item.get_closest_marker("faults")]  # keywords have the folder's name
    items.sort(key=lambda item: "slow" not in item.keywords)  # workers end together where the last tests are short
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine, two threads that wait for each other in every layer take five times as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` has filled, once for all workers: fixtures of a module would do it on each of them."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The two real chips of ../shared/data/biomassters."""
    path = SHARED / "biomassters"
    if not path.is_dir():
        pytest.skip(f"{path} does not exist on this machine")
    return path


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made data set of 8 labelled chips and 2 without label.  Tests that change files copy it first."""
    from engine.data.made.sample import make_sample

    folder = tmp_path_factory.mktemp("sample") / "data"
    make_sample(folder, 8, 5, test_chips=2, test_labels=False)
    return folder


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labelled chips, two of them with few months, and one without label; one lacks an orbit in a month, and in
    another an orbit has a hole."""
    import numpy as np

    from engine.data.biomassters import S1, S1_NODATA, S1_SHAPE, T
    from engine.data.index import open_index
    from engine.data.made.sample import make_sample
    from engine.data.tiff import tiff

    root = tmp_path_factory.mktemp("tree") / "data"
    make_sample(root, 3, 7, test_chips=1, test_labels=False)
    for csv in root.glob("*.csv"):
        csv.unlink()  # they are no longer right after what follows
    for chip in open_index(root).chips[1:]:
        for month in range(4, T):
            for path in root.rglob(f"{chip.id}_S?_{month:02d}.tif"):
                path.unlink()
    first, second = open_index(root).split("train")[:2]
    for chip, where in ((first, slice(None)), (second, slice(0, 90))):
        s1 = np.empty(S1_SHAPE, S1.values)
        path = chip.path(0, 2)
        tiff.read_into(path, s1)
        s1[where, :, 2:] = S1_NODATA
        tiff.write(path, s1)
    return root


@pytest.fixture(scope="session")
def stores(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """`tree` packed: in steps under False, lossless under True."""
    from engine.data.store.pack import pack

    folder = tmp_path_factory.mktemp("stores")
    for lossless in (False, True):
        pack(tree, folder / str(lossless), lossless=lossless, workers=2, verify=True)
    return {lossless: folder / str(lossless) for lossless in (False, True)}


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command() -> Command:
    """Run launch/X.py with arguments and return what it printed and its exit code: train and predict in a fork of a
    process that has imported torch and DeepSpeed, which saves ten seconds; with `ranks`, as `deepspeed launch/X.py …`.
    """
    from tests.hosts import forked

    def run(script: str, *args: object, ranks: int = 0, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        if script != "prepare" and not ranks:
            return forked(script, *args, timeout=timeout)
        return subprocess.run(command_line(script, *args, ranks=ranks), cwd=ROOT, env=environment(), text=True,
                              capture_output=True, timeout=timeout)

    return run


def command_line(script: str, *args: object, ranks: int = 0) -> list[str]:
    words = [f"launch/{script}.py", *map(str, args)]
    if ranks:
        deepspeed = Path(sys.executable).with_name("deepspeed")
        return [str(deepspeed), "--num_accelerators", str(ranks), "--master_port", str(free_port()), *words]
    return [sys.executable, *words]


def stop_tracing() -> Any:
    """coverage.py measures this process no longer.  For compilers, whose Python takes twice as long under it.

    Returns the measurement, which can go on by `start()`; None where there was none.
    """
    running = sys.modules["coverage"].Coverage.current() if "coverage" in sys.modules else None
    if running is not None:
        running.stop()
    return running


@contextmanager
def untraced() -> Iterator[None]:
    stopped = stop_tracing()
    try:
        yield
    finally:
        if stopped is not None:
            stopped.start()


def free_port() -> int:
    """Below the ports that the system gives to outgoing connections, one of which could take it before it is used; by
    chance, so that two workers do not find the same one free."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)  # tests seed the other one
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port


def environment(traced: bool = True) -> dict[str, str]:
    """As on any machine; one thread a process, since two of them share two cores.

    traced: coverage.py measures the process, if it measures this one; a compiler's Python takes twice as long then.
    """
    kept = {key: value for key, value in os.environ.items() if traced or not key.startswith("COVERAGE_")}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(key, None)  # left by a test that joined others in its own process
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu",
            "TORCHINDUCTOR_COMPILE_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
