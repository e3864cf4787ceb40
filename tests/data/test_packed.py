"""Training's view of a packed store: the same batches as from the TIFFs."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import open_chip
from engine.base.errors import DataError, DeviceError
from engine.config import Augment
from engine.data import pipeline, reference
from engine.data.batch import Batch, Request
from engine.data.biomassters import BIOMASSTERS, S1, S1_NODATA, S2, TILE, C, T
from engine.data.forms import open_source
from engine.data.index import Chip, open_index
from engine.data.loader import Loader
from engine.data.plan import IDENTITY, Draw, dihedral, draw
from engine.data.source import Source, empty_stack, turn_of
from engine.data.store import chip_file
from engine.data.store.source import Blocks, PackedSource
from engine.data.tiff.source import TiffSource

BACKENDS = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
CODES = np.concatenate([S1.code_span, S2.code_span])  # of a band, in codes
FORMS = [pytest.param(False, id="steps"), pytest.param(True, id="lossless")]


def load(chips: list[Chip], draws: list[Draw], backend: str, warp: bool, precision: str = "fp32") -> Batch:
    device = torch.device("cuda", 0) if backend == "gpu" else torch.device("cpu")
    loader = Loader(open_source(chips, backend=backend), batch_size=len(chips), device=device, backend=backend,
                    precision=precision, warp=warp)
    [batch] = loader.batches([[Request(chip, how) for chip, how in zip(chips, draws)]])
    return batch


def pixels(batch: Batch) -> np.ndarray:
    return batch.images.permute(0, 1, 3, 4, 2).float().cpu().numpy()


@pytest.mark.parametrize("backend", BACKENDS)
def test_lossless_batches_are_those_of_the_tiffs(tree: Path, stores: dict[bool, Path], backend: str) -> None:
    augment = Augment(rotate=0.5, month_dropout=1)
    draws = [draw(BIOMASSTERS, augment, 4, 0, position) for position in range(3)]
    assert {turn_of(how.matrix, TILE) is None for how in draws} == {True, False}  # warped and turned ones in one batch
    for warp in (True, False):
        one, other = (load(open_index(root).split("train"), draws, backend, warp) for root in (tree, stores[True]))
        assert torch.equal(one.images, other.images) and torch.equal(one.label, other.label)
        assert torch.equal(one.dropped, other.dropped)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lossless", FORMS)
def test_decoding_is_exact(tree: Path, stores: dict[bool, Path], backend: str, lossless: bool) -> None:
    old, new = open_index(tree).chips, list(open_index(stores[lossless]).chips)
    batch = load(new, [IDENTITY] * len(new), backend, warp=False)
    for b, chip in enumerate(old):
        images, label = reference.transform(TiffSource(BIOMASSTERS).stack(chip), None, steps=not lossless)
        np.testing.assert_allclose(pixels(batch)[b], images, atol=1e-6)  # roundings of (x − low) / span; a step is 1e-4
        np.testing.assert_array_equal(batch.label[b].cpu().numpy(), label)


@pytest.mark.parametrize("backend", BACKENDS)
def test_warped_codes_are_one_rounding_from_the_reference(tree: Path, stores: dict[bool, Path], backend: str) -> None:
    chips = open_index(stores[False]).split("train")
    draws = [draw(BIOMASSTERS, Augment(rotate=1, month_dropout=1), 0, 0, position) for position in range(len(chips))]
    batch = load(chips, draws, backend, warp=True)
    for b, (chip, how) in enumerate(zip(open_index(tree).split("train"), draws)):
        stack = TiffSource(BIOMASSTERS).read(chip, how.keep, empty_stack(BIOMASSTERS))
        images, label = reference.transform(stack, how.matrix, steps=True)
        counts = np.abs(pixels(batch)[b] - images) * CODES
        assert counts.max() < 1.01 and (counts > 0.01).mean() < 0.002
        np.testing.assert_allclose(batch.label[b].cpu().numpy(), label, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("lossless", FORMS)
def test_all_turns_are_exact(stores: dict[bool, Path], lossless: bool) -> None:
    chip = open_index(stores[lossless]).split("train")[1]
    keep = np.arange(T) < 3
    turns = [(flip, k) for flip in (False, True) for k in range(4)]
    batch = load([chip] * 8, [Draw(dihedral(TILE, flip, k, np.eye(3)), keep) for flip, k in turns], "cpu", warp=True)
    plain = load([chip], [Draw(IDENTITY.matrix, keep)], "cpu", warp=False)
    for b, (flip, k) in enumerate(turns):
        for got, original in ((batch.images[b], plain.images[0]), (batch.label[b], plain.label[0])):
            assert torch.equal(got, torch.rot90(original.flip(-1) if flip else original, k, (-2, -1)))


def test_the_cache_changes_nothing_and_reads_once(stores: dict[bool, Path], tree: Path, tmp_path: Path) -> None:
    for root in (stores[False], tree):
        copy = tmp_path / root.parent.name
        shutil.copytree(root, copy)
        chips = open_index(copy).split("train")[:2]
        size = sum(path.stat().st_size for path in copy.rglob(f"{chips[0].id}*"))
        source = open_source(chips, cache_gb=1.0001 * size / 1e9)  # room for the first
        loader = Loader(source, batch_size=1, device=torch.device("cpu"), backend="cpu", precision="fp32", warp=False)
        [first] = loader.batches([[Request(chips[0])]])
        assert len(list(loader.batches([[Request(chips[1])]]))) == 1
        [again] = loader.batches([[Request(chips[0])]])
        assert torch.equal(again.images, first.images)
        shutil.rmtree(copy)
        [again] = loader.batches([[Request(chips[0])]])
        assert torch.equal(again.images, first.images)
        with pytest.raises(DataError, match="stores?.*: the folder is gone|tree.*: the folder is gone"):
            list(loader.batches([[Request(chips[1])]]))


# The GPU's graph, as far as a CPU can follow it ------------------------------------------------------------------


@pytest.mark.parametrize("lossless", FORMS)
@pytest.mark.parametrize("warp", [True, False])
def test_the_gpu_graph_can_be_defined(lossless: bool, warp: bool) -> None:
    form = (pipeline.Form("blocks_apart", BIOMASSTERS, chip_file.EXACT) if lossless
            else pipeline.Form("blocks", BIOMASSTERS, chip_file.STEPS))
    pipe = pipeline.define(lambda: (), form=form, batch_size=2, device_id=0, threads=1, prefetch=1, half=True,
                           warp=warp)
    pipe._build_graph()
    names = [operator.name.strip("_").rpartition("_")[0] for operator in pipe._ops]
    assert names.count("Inflate") == (3 if lossless else 2)
    assert names.count("WarpPerspective") == (5 if warp else 0)  # bands in four groups, and the label
    inputs = {"ExternalSource"}
    for name, operator in zip(names, pipe._ops):
        assert name in inputs or all(output.device == "gpu" for output in operator.outputs), name


def form_of(source: Source) -> pipeline.Form:
    return pipeline.Form(source.form, source.dataset, source.values)


def inflated(blocks: Blocks, tile: int) -> list[np.ndarray]:
    """In nvCOMP's place: [blocks, tile²] uint8 of each table."""
    data = memoryview(blocks.data.tobytes())
    return [np.stack([chip_file.inflate(data[a:a + n], tile ** 2, "it") for a, n in zip(offsets, sizes)])
            for offsets, sizes in zip(blocks.tables[::2], blocks.tables[1::2])]


def by_the_gpus_operators(chip: Chip, how: Draw, warp: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images and label by what follows the reading, or inflation, in the GPU's graph, run by DALI on the CPU."""
    import nvidia.dali.fn as fn
    from nvidia.dali import Pipeline
    from nvidia.dali.types import DALIDataType

    source = open_source([chip], backend="gpu")
    read, form = source.read(chip, how.keep, source.buffer(), None), form_of(source)
    fed = inflated(read, chip.dataset.tile) if isinstance(read, Blocks) else read.arrays()
    layouts = ("",) * len(fed) if form.gpu_only else form.layouts
    pipe = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipe:
        *inputs, matrix = fn.external_source(source=lambda: [[x] for x in (*fed, how.matrix)], batch=True,
                                             num_outputs=len(fed) + 1, layout=(*layouts, ""))
        stored = pipeline.assemble(form, inputs) if form.gpu_only else inputs
        pipe.set_outputs(*pipeline.finish(form, stored, matrix, warp, DALIDataType.FLOAT))
    pipe.build()
    images, label = (np.asarray(output.as_array())[0] for output in pipe.run())
    return images, label


@pytest.mark.parametrize("lossless", FORMS)
def test_blocks_hold_the_chip_as_the_gpu_will_see_it(stores: dict[bool, Path], lossless: bool) -> None:
    """The bytes and tables that go to the device, inflated here in nvCOMP's place; then the graph's own operators."""
    import nvidia.dali.fn as fn
    from nvidia.dali import Pipeline

    keep = np.arange(T) < 4
    chip = open_index(stores[lossless]).split("train")[1]
    source = open_source([chip], backend="gpu")
    blocks = source.read(chip, keep, source.buffer())
    assert isinstance(blocks, Blocks)
    planes = inflated(blocks, TILE)
    pipe = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipe:
        inputs = fn.external_source(source=lambda: [[x] for x in planes], num_outputs=len(planes), batch=True)
        pipe.set_outputs(*pipeline.assemble(form_of(source), list(inputs)))
    pipe.build()
    *images, label = [np.asarray(output.as_array())[0] for output in pipe.run()]
    stack = PackedSource(chip.packed, "mask").stack(chip)  # type: ignore[arg-type]
    s1, s2 = np.split(np.concatenate(images, axis=-1), [len(S1.bands)], axis=-1)
    filled = np.where(stack.images[0][:4] == S1_NODATA, S1.zero, stack.images[0][:4])
    np.testing.assert_array_equal(s1, filled if lossless else chip_file.codes(filled, S1))
    np.testing.assert_array_equal(s2, stack.images[1][:4])
    np.testing.assert_array_equal(label, stack.label)


def test_the_gpus_operators_agree_with_the_cpus_kernel(tree: Path, stores: dict[bool, Path]) -> None:
    """What follows the inflation in the GPU's graph, run by DALI on the CPU, against kernels/packed_chip."""
    chip = open_index(stores[False]).split("train")[1]
    how = draw(BIOMASSTERS, Augment(rotate=1, month_dropout=0), 3, 0, 0)
    images, label = by_the_gpus_operators(chip, how, True)
    batch = load([chip], [how], "cpu", warp=True)
    counts = np.abs(pixels(batch)[0] - images) * CODES
    assert counts.max() < 1.01 and (counts > 0.01).mean() < 0.002
    np.testing.assert_allclose(batch.label[0], label, rtol=1e-4, atol=1e-2)


# The kernel of the CPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", [
    pytest.param([[1, 0, 300.25], [0, 1, -700.5]], id="mirrored more than once"),
    pytest.param([[3, 0, -100], [0, 3, -100]], id="shrunk"),
    pytest.param([[0.7, -0.7, 120], [0.7, 0.7, -60]], id="turned by 45 degrees"),
    pytest.param([[1, 0, 0], [0, 1, 0.5]], id="half a pixel")])
def test_any_affine_matrix(tree: Path, stores: dict[bool, Path], matrix: list[list[float]]) -> None:
    how = Draw(np.array([*matrix, [0, 0, 1]], np.float32), np.arange(T) < 3)
    old, new = (open_index(root).split("train")[1] for root in (tree, stores[False]))
    batch = load([new], [how], "cpu", warp=True)
    stack = TiffSource(BIOMASSTERS).read(old, how.keep, empty_stack(BIOMASSTERS))
    images, label = reference.transform(stack, how.matrix, steps=True)
    counts = np.abs(pixels(batch)[0] - images) * CODES
    assert counts.max() < 1.01 and (counts > 0.01).mean() < 0.003  # exact halves: each instruction set rounds its way
    np.testing.assert_allclose(batch.label[0], label, rtol=1e-4, atol=1e-2)


def test_memory_is_used_again_only_when_a_batch_is_dropped(stores: dict[bool, Path]) -> None:
    chips = open_index(stores[False]).split("train")
    requests = [[Request(chips[n % 3])] for n in range(8)]
    loader = Loader(open_source(chips), batch_size=1, device=torch.device("cpu"), backend="cpu", precision="fp32",
                    warp=False, prefetch=1)
    held = list(loader.batches(requests))
    assert len({batch.images.data_ptr() for batch in held}) == len(held)
    for batch, again in zip(held, held[3:]):  # chips come round
        assert torch.equal(batch.images, again.images) and torch.equal(batch.label, again.label)
    view = held[0].images[0, :, 3]  # a view alone holds the memory too
    before, place = view.clone(), held[0].images.data_ptr()
    held.clear()
    del batch, again
    places = {batch.images.data_ptr() for batch in loader.batches(requests)}
    assert len(places) < len(requests) and place not in places and torch.equal(view, before)


def test_a_block_that_does_not_inflate_is_named(stores: dict[bool, Path], tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums would have caught it; without them the kernel does, and writes nowhere it should not."""
    copy = tmp_path / "copy"
    shutil.copytree(stores[False], copy)
    chip = open_index(copy).split("train")[0]
    assert chip.packed is not None
    data = bytearray(chip.packed.read_bytes())
    first, _ = chip_file.read_head(chip.packed).section(chip_file.FIRST_STEP)
    data[first:first + 64] = bytes(64)
    chip.packed.write_bytes(data)
    with pytest.raises(DataError, match=rf"{chip.packed.name}: is damaged \(the checksum of its month 00"):
        load([chip], [IDENTITY], "cpu", warp=False)
    monkeypatch.setattr(chip_file, "check_section", lambda *_: None)
    with pytest.raises(DataError, match=rf"{chip.packed.name}: is damaged \(a block does not inflate"):
        load([chip], [IDENTITY], "cpu", warp=False)


@pytest.mark.parametrize("bands", [1, 4, 15, 16, 17, 40])
def test_the_kernel_stays_within_its_output(bands: int) -> None:
    """It stores whole vectors; what lies behind the chip may be another thread's."""
    import lz4.block

    from engine.data.store.cpu_batches import _inflate
    from kernels import packed_chip

    side, rng = 16, np.random.default_rng(bands)
    codes = rng.integers(1, 60_000, (side * side, bands), np.uint16)
    planes = [lz4.block.compress(plane.tobytes(), store_size=False) for band in codes.T
              for plane in np.ascontiguousarray(band).view(np.uint8).reshape(-1, 2).T]
    file = np.frombuffer(b"".join(planes), np.uint8)
    sizes = np.array([len(plane) for plane in planes], np.uint32)
    blocks = (file.ctypes.data + np.cumsum(sizes, dtype=np.uint64) - sizes)[::2].copy()  # of each band, the first plane
    meaning = np.zeros((bands, 3), np.uint16)
    low, scale = np.full(bands, 5, np.float32), np.full(bands, 0.5, np.float32)
    out = np.full(2 * codes.size + 64, -1, np.float32)
    matrix, scratch = np.eye(3, dtype=np.float32), np.empty((2 * bands + 32) * side * side, np.uint8)
    tile = scratch[2 * bands * side * side:]
    assert packed_chip.images()(
        blocks.ctypes.data, sizes.ctypes.data, 1, 2, bands, side, meaning.ctypes.data, low.ctypes.data,
        scale.ctypes.data, matrix.ctypes.data, _inflate(), scratch.ctypes.data, tile.ctypes.data, out.ctypes.data) == -1
    np.testing.assert_array_equal(out[:codes.size], ((codes.astype(np.float32) - 5) * 0.5).ravel())
    assert not out[codes.size:2 * codes.size].any() and (out[2 * codes.size:] == -1).all()


def test_bad_files_leave_nothing_open(stores: dict[bool, Path], tmp_path: Path) -> None:
    chip = open_index(stores[False]).split("train")[0]
    assert chip.packed is not None
    other = tmp_path / chip.packed.name
    shutil.copy(chip.packed, other)
    renamed = dataclasses.replace(chip, id="ffffffff", packed=other)
    source = open_source([renamed])
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(DataError, match="holds chip"):
            source.stack(renamed)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_without_a_compiler_it_says_so(stores: dict[bool, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import native, packed_chip

    packed_chip._library.cache_clear()
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    chips = open_index(stores[False]).split("train")[:1]
    with pytest.raises(DeviceError, match=r"packed store on the CPU .*needs a C\+\+ compiler.*; install"):
        load(list(chips), [IDENTITY], "cpu", warp=False)


# For people ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tree", "steps", "lossless"])
def test_a_chip_opens_for_people(tree: Path, stores: dict[bool, Path], form: str) -> None:
    xarray = pytest.importorskip("xarray")
    chip = open_index(tree).split("train")[0]
    view = open_chip(tree if form == "tree" else stores[form == "lossless"], chip.id)
    data = view.to_xarray()
    assert isinstance(data, xarray.Dataset) and data.images.dims == ("month", "band", "y", "x")
    assert data.images.shape == (T, C, TILE, TILE) and data.attrs["chip"] == chip.id
    raw = TiffSource(BIOMASSTERS).stack(chip)
    np.testing.assert_allclose(data.images.sel(month="November", band="VV asc"), raw.images[0][2, ..., 0],
                               atol=0.00501 if form == "steps" else 0)
    assert np.isnan(data.images.sel(month="November", band="VH desc")).all()  # the orbit that is missing
    np.testing.assert_array_equal(data.agbm, raw.label[..., 0])
    absent = [t for t in range(T) if not chip.months[1][t]]
    assert absent and np.isnan(data.images[absent, 4:]).all() and "November" in view.table()
    with pytest.raises(DataError, match="no chip 'nope'"):
        open_chip(tree, "nope")
