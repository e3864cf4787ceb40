"""The GPU's data path, rehearsed (see `tests.rehearsal.device`): batches are right however late the device runs; and
the mistakes that would make them wrong are seen."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.base.errors import ConfigError
from engine.config import Augment
from engine.data import loader as loading
from engine.data import pipeline
from engine.data.batch import BadChip, Produced, Request
from engine.data.biomassters import BIOMASSTERS
from engine.data.forms import open_source
from engine.data.handoff import Handoff
from engine.data.index import open_index
from engine.data.loader import DTYPES, Loader, Piped
from engine.data.plan import Draw, draw
from engine.data.read_ahead import ReadAhead
from engine.data.store.chip_file import EXACT, STEPS
from tests.rehearsal.dali import dali
from tests.rehearsal.device import Device
from tests.rehearsal.state import CUDA, Mistake, memory

CPU = torch.device("cpu")
N = 8  # batches: more than everything that runs ahead holds
PATHS = {  # form, where DALI works
    "TIFFs, GPU": ("tree", "gpu"), "TIFFs, CPU": ("tree", "cpu"), "packed, GPU": ("steps", "gpu"),
    "packed, CPU": ("steps", "cpu"), "lossless, GPU": ("lossless", "gpu"),
}
Taken = tuple[torch.Tensor, ...]


@pytest.fixture(scope="module")
def roots(tree: Path, stores: dict[bool, Path]) -> dict[str, Path]:
    return {"tree": tree, "steps": stores[False], "lossless": stores[True]}


def requests(root: Path) -> list[list[Request]]:
    """One chip a batch, few months: turned, rotated and plain ones."""
    chips = open_index(root).split("train")
    found = []
    for n in range(N):
        how = draw(BIOMASSTERS, Augment(rotate=0.5), 3, 0, n)
        keep = how.keep.copy()
        keep[2:] = False
        keep[n % 2] = True
        found.append([Request(chips[n % len(chips)], Draw(how.matrix, keep), row=n + 1, valid=n % 3 > 0)])
    return found


def loader(root: Path, asked: list[list[Request]], device: torch.device, backend: str,
           precision: str = "fp32") -> Loader:
    source = open_source([request.chip for batch in asked for request in batch], backend=backend)
    return Loader(source, batch_size=1, device=device, backend=backend, precision=precision, warp=True, readers=2,
                  threads=1)


def taken(loader: Loader, asked: list[list[Request]], device: Device | None = None) -> list[Taken]:
    """As a step does it: the device is asked to work on each batch, which is dropped before the device gets there."""
    found = []
    for batch in loader.batches(asked):
        assert batch.dropped.device == CPU
        tensors = batch.images, batch.label, batch.rows, batch.valid
        if device is not None:
            for tensor in tensors:
                assert tensor.device == CUDA and torch.cuda.current_stream() in device.readers[memory(tensor)]
                assert not device.is_("borrowed", tensor) and not device.pinned(tensor)
        found.append((*(tensor.clone() for tensor in tensors), batch.dropped))
        del batch, tensors
    return found


def check(loader: Callable[[], Loader], asked: list[list[Request]], expected: list[Taken],
          pace: str = "late") -> list[str]:
    """`pace`: "late", or "early": what the consumer asks for runs as soon as it may.  Returns the waits."""
    with Device(late=True, early=pace == "early") as device, dali():
        found = taken(loader(), asked, device)
        device.finish()
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected):
        for one, other in zip(got, wanted):
            assert one.dtype == other.dtype and same(one, other)
    return device.waits


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Exactly; but DALI and torch round a value in 50,000 to float16 differently."""
    if one.dtype not in (torch.float16, torch.bfloat16) or torch.equal(one, other):
        return torch.equal(one, other)
    step = torch.finfo(one.dtype).eps * other.float().abs()
    return bool(((one.float() - other.float()).abs() <= step).all() and (one != other).float().mean() < 1e-3)


@pytest.fixture(scope="module")
def expected(roots: dict[str, Path]) -> Callable[[str, str], list[Taken]]:
    """What the CPU's loader gives, for a path of PATHS."""
    found: dict[str, list[Taken]] = {}

    def get(path: str, precision: str) -> list[Taken]:
        root, backend = roots[PATHS[path][0]], PATHS[path][1]
        if path not in found:
            asked = requests(root)
            if path == "packed, GPU":  # not the kernel's numbers, one rounding apart: DALI's own operators, not late
                with Device(), dali():
                    found[path] = taken(loader(root, asked, CUDA, "gpu"), asked)
            else:
                found[path] = taken(loader(root, asked, CPU, "cpu"), asked)
        half = backend == "gpu" and precision != "fp32"  # by way of DALI's float16
        return [((images.half() if half else images).to(DTYPES[precision]), *rest) for images, *rest in found[path]]

    return get


@pytest.mark.parametrize(("path", "precision"), [
    *((path, "fp32") for path in PATHS), ("TIFFs, GPU", "bf16"), ("TIFFs, CPU", "fp16"), ("packed, GPU", "fp16"),
    ("packed, CPU", "bf16")])
def test_batches_are_right_however_late_the_device_runs(roots: dict[str, Path], path: str, precision: str,
                                                        expected: Any) -> None:
    form, backend = PATHS[path]
    asked = requests(roots[form])
    waits = check(lambda: loader(roots[form], asked, CUDA, backend, precision), asked, expected(path, precision))
    kinds = {wait.partition(" (")[0] for wait in waits}
    assert ("a copy from pageable host memory" in kinds) == (path == "TIFFs, CPU")  # DALI's own
    assert {wait.partition("engine/")[2].partition(":")[0] for wait in waits} == {"data/handoff.py"}


def test_a_slab_is_page_locked_once_and_unlocked_when_it_dies(roots: dict[str, Path]) -> None:
    asked = requests(roots["steps"])
    with Device(late=True) as device:
        direct = loader(roots["steps"], asked, CUDA, "cpu")
        for _ in range(2):
            taken(direct, asked)
        assert len(device.locked) == len(set(device.locked)) == len(device.registered) <= 2 * 7
        device.finish()
        del direct
        gc.collect()
        assert not device.registered


@pytest.mark.parametrize("path", ["TIFFs, GPU", "packed, GPU", "packed, CPU"])
def test_after_a_bad_chip_all_is_made_anew(roots: dict[str, Path], path: str, expected: Any, tmp_path: Path) -> None:
    """Nothing of what was ahead when it was met comes in the next iteration."""
    form, backend = PATHS[path]
    asked = requests(roots[form])
    chip = asked[4][0].chip
    lost = dataclasses.replace(chip, label=tmp_path / "none", packed=chip.packed and tmp_path / "none")
    unlucky = [*asked[:4], [asked[4][0]._replace(chip=lost)], *asked[5:]]
    with Device(late=True) as device, dali():
        one = loader(roots[form], asked, CUDA, backend)
        with pytest.raises(BadChip, match="none"):
            taken(one, unlucky, device)
        found = taken(one, asked, device)
        device.finish()
    for got, wanted in zip(found, expected(path, "fp32"), strict=True):
        assert all(map(same, got, wanted))


def test_a_batch_of_too_many_blocks_is_refused(roots: dict[str, Path]) -> None:
    """DALI 2.4 fills blocks up by a grid with a column each."""
    with pytest.raises(ConfigError, match=r"a batch of 183 packed chips has 65,880 blocks.* give at most 182 chips "
                                          r"\(train.micro_batch, validate.micro_batch, --batch\)"):
        pipeline.define(lambda: (), form=pipeline.Form("blocks", BIOMASSTERS, STEPS), batch_size=183, device_id=0,
                        threads=1, prefetch=1, half=False, warp=True)
    with pytest.raises(ValueError, match="form 'blocks' is inflated on a GPU"):
        pipeline.define(lambda: (), form=pipeline.Form("blocks", BIOMASSTERS, STEPS), batch_size=1, device_id=None,
                        threads=1, prefetch=1, half=False, warp=True)
    for form, values, most in (("blocks", STEPS, 182), ("blocks_apart", EXACT, 455)):
        pipeline.define(lambda: (), form=pipeline.Form(form, BIOMASSTERS, values), batch_size=min(most, 124),
                        device_id=0, threads=1, prefetch=1, half=False, warp=True)


# The test of the test: each of these went unseen on a machine without a GPU ----------------------------------------


def _by_name(self: Piped) -> Any:
    outputs = self._pipe.run(cuda_stream=torch.cuda.current_stream())
    return tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)


def _to_any(self: Piped) -> Any:
    return tuple(torch.from_dlpack(output.as_tensor()) for output in self._pipe.run(torch.cuda.current_stream()))


def _of_another_stream(self: Piped) -> Any:
    return tuple(torch.from_dlpack(output.as_tensor()) for output in self._pipe.run(torch.cuda.Stream()))


class _Forgetful(Handoff):
    def take(self, made: Any, read: Any) -> list[torch.Tensor]:
        tensors = super().take(made, read)
        self._held = type(self._held)((event, None) for event, _ in self._held)
        return tensors


def _take(event: bool = True, wait: bool = True, recorded: bool = True) -> Any:
    def take(self: Handoff, made: Produced, read: Any) -> list[torch.Tensor]:
        with torch.cuda.stream(self._stream):
            tensors = read(made)
            passed = torch.cuda.Event()
            if event:
                passed.record(self._stream)
        self._held.append((passed, made))
        self._let_go(loading.MOST)
        consumer = torch.cuda.current_stream()
        if wait:
            consumer.wait_event(passed)
        for tensor in tensors if recorded else []:
            tensor.record_stream(consumer)
        return tensors

    return take


def _lent(self: Handoff, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return tensor.to(self._device, dtype or tensor.dtype, non_blocking=True)


def _short(*args: Any, hold: int, **kwargs: Any) -> ReadAhead:
    return ReadAhead(*args, hold=1, **kwargs)


MISTAKES: dict[str, tuple[str, object, str, Any, type[Exception], str]] = {
    # where it is seen, what is exchanged for what, and how it shows
    "a stream by name": ("TIFFs, GPU", Piped, "_run", _by_name, RuntimeError, "pipeline_inputs"),
    "a stream on the CPU": ("TIFFs, CPU", Piped, "_run", _to_any, Mistake, "one on the CPU is not"),
    "another stream": ("TIFFs, GPU", Piped, "_run", _of_another_stream, AssertionError, "same"),
    "outputs let go": ("TIFFs, GPU", loading, "Handoff", _Forgetful, Mistake, "its owner has let go"),
    "a slab let go": ("packed, CPU", loading, "Handoff", _Forgetful, Mistake, "its owner has let go"),
    "no wait": ("TIFFs, GPU", Handoff, "take", _take(wait=False), AssertionError, "same"),
    "not recorded": ("packed, CPU", Handoff, "take", _take(recorded=False), KeyError, ""),
    "no event": ("packed, CPU", Handoff, "take", _take(event=False), Mistake, "never recorded"),
    "lent, not copied": ("TIFFs, GPU", Handoff, "own", _lent, AssertionError, "borrowed"),
    "buffers used too soon": ("TIFFs, GPU", loading, "ReadAhead", _short, Mistake, "filled again"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(roots: dict[str, Path], expected: Any, monkeypatch: pytest.MonkeyPatch,
                           mistake: str) -> None:
    path, owner, name, wrong, error, words = MISTAKES[mistake]
    form, backend = PATHS[path]
    asked, wanted = requests(roots[form]), expected(path, "fp32")
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(error, match=words or None):
        for pace in ("late", "early"):
            check(lambda: loader(roots[form], asked, CUDA, backend), asked, wanted, pace)
