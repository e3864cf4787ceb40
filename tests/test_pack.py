"""Packing a tree, and training's view of the store: the same as of the TIFFs."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import quarantine
from engine.config import Augment
from engine.data import open_chip, pipeline, reference, store
from engine.data import pack as packing
from engine.data.bands import S1, S1_NODATA, S2, SENSORS, TILE, C, T
from engine.data.index import Chip, open_index
from engine.data.loader import Batch, Loader
from engine.data.pack import pack, verify_store
from engine.data.packed import Blocks, PackedSource
from engine.data.plan import IDENTITY, Draw, dihedral, draw
from engine.data.request import Request
from engine.data.source import TiffSource, open_source, turn_of
from engine.errors import DataError
from engine.selection import mean_biomass
from engine.splits import kfold
from tests.conftest import ROOT, Command, environment

BACKENDS = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
FORMS = [pytest.param(False, id="steps"), pytest.param(True, id="lossless")]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labelled chips, two of them with few months, and one without label; one lacks an orbit in a month, and in
    another an orbit has a hole."""
    from engine.data import tiff
    from engine.data.sample import make_sample

    root = tmp_path_factory.mktemp("tree") / "data"
    make_sample(root, 3, 7, test_chips=1)
    for csv in root.glob("*.csv"):
        csv.unlink()  # they are no longer right after what follows
    for chip in open_index(root).chips[1:]:
        for month in range(4, T):
            for path in root.rglob(f"{chip.id}_S?_{month:02d}.tif"):
                path.unlink()
    first, second = open_index(root).split("train")[:2]
    for chip, where in ((first, slice(None)), (second, slice(0, 90))):
        s1 = np.empty(S1.shape, S1.dtype)
        path = chip.path(0, 2)
        tiff.read_into(path, s1)
        s1[where, :, 2:] = S1_NODATA
        tiff.write(path, s1)
    return root


@pytest.fixture(scope="module")
def stores(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("stores")
    for lossless in (False, True):
        pack(tree, folder / str(lossless), lossless=lossless, workers=2, verify=True)
    return {lossless: folder / str(lossless) for lossless in (False, True)}


@pytest.mark.parametrize(("lossless", "limit"), [(False, 0.45), (True, 0.60)])
def test_real_chips_shrink_as_promised(real_data: Path, tmp_path: Path, lossless: bool, limit: float) -> None:
    made = pack(real_data, tmp_path / "store", lossless=lossless, workers=2, verify=True)
    tiffs = sum(path.stat().st_size for path in real_data.rglob("*.tif"))
    files = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*.safetensors"))
    assert (made["tiff_bytes"], made["bytes"]) == (tiffs, files)
    assert files <= limit * tiffs


def test_a_store_indexes_as_its_tree(tree: Path, stores: dict[bool, Path]) -> None:
    old, new = open_index(tree), open_index(stores[False])
    assert [(c.id, c.split, c.months, c.label is None) for c in old.chips] == [
        (c.id, c.split, c.months, c.label is None) for c in new.chips]
    assert kfold([c.id for c in old.labelled()], 2) == kfold([c.id for c in new.labelled()], 2)
    assert mean_biomass(old.labelled()) == mean_biomass(new.labelled())


def test_the_manifest_says_what_there_is(tree: Path, stores: dict[bool, Path]) -> None:
    manifest = json.loads((stores[False] / "manifest.json").read_text())
    assert manifest["settings"]["s1"] == "0.01 dB"
    for chip, entry in zip(open_index(tree).chips, manifest["chips"]):
        assert entry["months"]["S2"] == "".join("01"[x] for x in chip.months[1])
        for name, (size, cksum) in entry["sources"].items():
            path = next(tree.rglob(name))
            printed = subprocess.run(["cksum", path], capture_output=True, text=True, check=True).stdout.split()
            assert [str(cksum), str(size)] == printed[:2]


# The loader's view ---------------------------------------------------------------------------------------------


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
    draws = [draw(augment, 4, 0, position) for position in range(3)]
    assert {turn_of(how.matrix) is None for how in draws} == {True, False}  # warped and turned ones in one batch
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
        images, label = reference.transform(TiffSource().stack(chip), None, steps=not lossless)
        np.testing.assert_allclose(pixels(batch)[b], images, atol=1e-6)  # roundings of (x − low) / span; a step is 1e-4
        np.testing.assert_array_equal(batch.label[b].cpu().numpy(), label)


@pytest.mark.parametrize("backend", BACKENDS)
def test_warped_codes_are_one_rounding_from_the_reference(tree: Path, stores: dict[bool, Path], backend: str) -> None:
    chips = open_index(stores[False]).split("train")
    draws = [draw(Augment(rotate=1, month_dropout=1), 0, 0, position) for position in range(len(chips))]
    batch = load(chips, draws, backend, warp=True)
    span = np.concatenate([(S1.high - S1.low) / 0.01, S2.high])
    for b, (chip, how) in enumerate(zip(open_index(tree).split("train"), draws)):
        stack = TiffSource().read(chip, how.keep, TiffSource().buffer())
        images, label = reference.transform(stack, how.matrix, steps=True)
        counts = np.abs(pixels(batch)[b] - images) * span
        assert counts.max() < 1.01 and (counts > 0.01).mean() < 0.002
        np.testing.assert_allclose(batch.label[b].cpu().numpy(), label, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("lossless", FORMS)
def test_all_turns_are_exact(stores: dict[bool, Path], lossless: bool) -> None:
    chip = open_index(stores[lossless]).split("train")[1]
    keep = np.arange(T) < 3
    turns = [(flip, k) for flip in (False, True) for k in range(4)]
    batch = load([chip] * 8, [Draw(dihedral(flip, k, np.eye(3)), keep) for flip, k in turns], "cpu", warp=True)
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
        first, _ = loader.batches([[Request(chip)] for chip in chips])
        [again] = loader.batches([[Request(chips[0])]])
        assert torch.equal(again.images, first.images)
        shutil.rmtree(copy)
        [again] = loader.batches([[Request(chips[0])]])
        assert torch.equal(again.images, first.images)
        with pytest.raises(DataError, match="is missing"):
            list(loader.batches([[Request(chips[1])]]))


# The GPU's graph, as far as a CPU can follow it ------------------------------------------------------------------


@pytest.mark.parametrize("lossless", FORMS)
@pytest.mark.parametrize("warp", [True, False])
def test_the_gpu_graph_can_be_defined(lossless: bool, warp: bool) -> None:
    form = "blocks_float" if lossless else "blocks"
    pipe = pipeline.define(lambda: (), form=form, batch_size=2, device_id=0, threads=1, prefetch=1, half=True,
                           warp=warp)
    pipe._build_graph()
    names = [operator.name.strip("_").rpartition("_")[0] for operator in pipe._ops]
    assert names.count("Inflate") == (3 if lossless else 2)
    assert names.count("WarpPerspective") == (5 if warp else 0)  # bands in four groups, and the label
    inputs = {"ExternalSource"}
    for name, operator in zip(names, pipe._ops):
        assert name in inputs or all(output.device == "gpu" for output in operator.outputs), name


@pytest.mark.parametrize("lossless", FORMS)
def test_blocks_hold_the_chip_as_the_gpu_will_see_it(stores: dict[bool, Path], lossless: bool) -> None:
    """The bytes and tables that go to the device, inflated here in nvCOMP's place; then the graph's own operators."""
    import lz4.block
    import nvidia.dali.fn as fn
    from nvidia.dali import Pipeline

    keep = np.arange(T) < 4
    chip = open_index(stores[lossless]).split("train")[1]
    source = open_source([chip], backend="gpu")
    blocks = source.read(chip, keep, source.buffer())
    assert isinstance(blocks, Blocks)
    data = blocks.data.tobytes()
    planes = []
    for offsets, sizes in zip(blocks.tables[::2], blocks.tables[1::2]):
        planes.append(np.stack([np.frombuffer(lz4.block.decompress(data[a:a + n], uncompressed_size=TILE * TILE),
                                              np.uint8) for a, n in zip(offsets.tolist(), sizes.tolist())]))
    pipe = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipe:
        inputs = fn.external_source(source=lambda: [[x] for x in planes], num_outputs=len(planes), batch=True)
        pipe.set_outputs(*pipeline.assemble(source.form, list(inputs)))
    pipe.build()
    *images, label = [np.asarray(output.as_array())[0] for output in pipe.run()]
    stack = PackedSource(chip.packed, "mask").stack(chip)  # type: ignore[arg-type]
    s1, s2 = np.split(np.concatenate(images, axis=-1), [len(S1.bands)], axis=-1)
    filled = np.where(stack.s1[:4] == S1_NODATA, S1.low, stack.s1[:4])
    np.testing.assert_array_equal(s1, filled if lossless else store.s1_codes(filled))
    np.testing.assert_array_equal(s2, stack.s2[:4])
    np.testing.assert_array_equal(label, stack.label)


# Faults --------------------------------------------------------------------------------------------------------


def digest(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve chips of one month each: quick to pack."""
    from engine.data import tiff
    from engine.data.bands import feature_name, label_name

    root = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    for n in range(12):
        chip = f"{n:08x}"
        tiff.write(root / feature_name(chip, SENSORS[0], n), rng.normal(-12, 3, S1.shape).astype(np.float32))
        tiff.write(root / feature_name(chip, SENSORS[1], n), rng.integers(0, 4000, S2.shape, np.uint16))
        tiff.write_map(root / label_name(chip), rng.gamma(2, 30, (TILE, TILE)).astype(np.float32))
    return root


_PACK = """
import sys
from pathlib import Path
from engine.data.pack import pack
print("begun", flush=True)
pack(Path(sys.argv[1]), Path(sys.argv[2]), workers=2)
"""


def test_a_killed_pack_resumes_to_the_same_bytes(small: Path, tmp_path: Path) -> None:
    """SIGKILL at 20 random moments, each time after the last."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.perf_counter()
    pack(small, whole, workers=2)
    took = time.perf_counter() - start
    rng = np.random.default_rng(4)
    cut_short = 0
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", _PACK, small, killed], stdout=subprocess.PIPE, cwd=ROOT,
                                   env=environment())
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        time.sleep(rng.uniform(0, took / 6))
        process.send_signal(signal.SIGKILL)
        cut_short += process.wait() == -signal.SIGKILL
        process.stdout.close()
        for path in (killed / store.CHIPS).glob(f"[!.]*{store.SUFFIX}"):
            store.verify_file(path)
        if not (killed / store.MANIFEST).exists() and killed.exists():
            with pytest.raises(DataError, match="packing is not finished"):
                open_index(killed)
    assert cut_short >= 10
    pack(small, killed, workers=2)
    assert digest(killed) == digest(whole)


def test_a_full_disk_is_reported_and_what_is_there_stays_valid(small: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    written, real = [], packing.atomic_write

    def limited(path: Path):  # type: ignore[no-untyped-def]
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        return real(path)

    monkeypatch.setattr(packing, "atomic_write", limited)
    with pytest.raises(DataError, match=r"\.safetensors: .*the disk is full.* run the same command again"):
        pack(small, tmp_path / "store", workers=2)
    monkeypatch.undo()
    there = list((tmp_path / "store" / store.CHIPS).iterdir())
    assert len(there) == 5
    for path in there:
        store.verify_file(path)
    made = pack(small, tmp_path / "store", workers=2)
    assert made["new"] == 7 and verify_store(tmp_path / "store") == []


def test_a_write_that_the_system_cuts_short_leaves_no_file(small: Path, tmp_path: Path) -> None:
    """The real thing: the kernel refuses bytes beyond a limit, in the middle of a chip."""
    code = ("import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n" + _PACK)
    done = subprocess.run([sys.executable, "-c", code, small, tmp_path / "store"], cwd=ROOT, env=environment(),
                          text=True, capture_output=True, timeout=120)
    assert done.returncode != 0 and "the disk is full" in done.stderr
    assert list((tmp_path / "store" / store.CHIPS).iterdir()) == []


def test_other_settings_versions_and_folders_are_refused(small: Path, stores: dict[bool, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"was packed without --lossless .* now it is asked for with --lossless"):
        pack(small, stores[False], lossless=True)
    with pytest.raises(DataError, match="is a packed store already"):
        pack(stores[False], tmp_path / "x")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep me")
    with pytest.raises(DataError, match="holds something else"):
        pack(small, tmp_path / "notes")
    copy = tmp_path / "copy"
    shutil.copytree(stores[False], copy)
    path = copy / store.MANIFEST
    path.write_text(path.read_text().replace('"version": 1', '"version": 2', 1))
    with pytest.raises(DataError, match="format version 2, this program reads 1"):
        open_index(copy)
    chip = next((copy / store.CHIPS).iterdir())
    chip.write_bytes(chip.read_bytes().replace(b'"version":"1"', b'"version":"7"', 1))
    with pytest.raises(DataError, match=f"{chip.name}: is of format version 7, this program reads 1"):
        pack(small, copy)


def test_a_tiff_that_is_not_as_published_is_not_packed(sample: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sample, copy)
    path = open_index(copy).chips[0].path(1, 7)
    data = bytearray(path.read_bytes())
    data[-77] ^= 16
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{path.name}: cksum \d+, published \d+; download it again"):
        pack(copy, tmp_path / "store", workers=1)


def test_a_missing_or_swapped_chip_is_seen(stores: dict[bool, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stores[False], copy)
    one, other = (chip.packed for chip in open_index(copy).chips[:2])
    assert one is not None and other is not None
    shutil.copy(one, other)
    with pytest.raises(DataError, match=f"{other.name}: holds chip {one.stem}"):
        load(list(open_index(copy).chips[:2]), [IDENTITY] * 2, "cpu", warp=False)
    assert [problem.path for problem in verify_store(copy)] == [other]
    other.unlink()
    with pytest.raises(DataError, match=f"{other.name}: is in manifest.json but not on disk"):
        open_index(copy)


@pytest.mark.parametrize("packed", [False, True])
def test_quarantine_finds_bad_chips_of_either_form(sample: Path, tmp_path: Path, packed: bool) -> None:
    copy = tmp_path / "copy"
    if packed:
        few = tmp_path / "few"
        few.mkdir()
        for chip in open_index(sample).split("train")[:3]:
            for path in sample.rglob(f"{chip.id}_*0[0-2].tif"):
                shutil.copy(path, few)
            shutil.copy(chip.label, few)  # type: ignore[arg-type]
        pack(few, copy, workers=2)
    else:
        shutil.copytree(sample, copy)
    chips = open_index(copy).split("train")
    assert quarantine.find(copy, chips, "fail", workers=2) == {}
    bad = chips[1].packed or chips[1].path(0, 1)
    data = bytearray(bad.read_bytes())
    data[len(data) // 2] ^= 1
    bad.write_bytes(data)
    found = quarantine.find(copy, chips, "fail", workers=2)
    assert list(found) == [chips[1].id] and bad.name in found[chips[1].id]
    quarantine.record(tmp_path / "run", found)
    assert json.loads((tmp_path / "run" / "quarantine.json").read_text()) == found
    quarantine.record(tmp_path / "run", found)
    with pytest.raises(DataError, match=f"{chips[1].id} changed.*another run.name"):
        quarantine.record(tmp_path / "run", {})


# Commands ------------------------------------------------------------------------------------------------------


def test_the_commands(small: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "store"
    packed = command("prepare", "pack", "--data", small, "--out", out, "--workers", 2, "--verify")
    assert packed.returncode == 0 and "12 chips" in packed.stdout and "compared with them" in packed.stdout
    shown = command("prepare", "inspect", "--data", out, "--chip", "00000003", "--out", tmp_path / "a.png")
    assert shown.returncode == 0 and "December" in shown.stdout and (tmp_path / "a.png").stat().st_size > 10_000
    assert "12 chips are as they were packed" in command("prepare", "verify", "--data", out).stdout
    path = out / store.CHIPS / "00000003.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    broken = command("prepare", "verify", "--data", out)
    assert broken.returncode != 0 and "00000003.safetensors: is truncated" in broken.stderr
    assert "Traceback" not in broken.stderr


@pytest.mark.slow
def test_training_does_not_know_the_form(sample: Path, tmp_path: Path, command: Command) -> None:
    """One recipe and one key: the same losses from the TIFFs and from a lossless store."""
    pack(sample, tmp_path / "store", lossless=True, workers=2)
    losses = []
    for name, data in (("tiff", sample), ("packed", tmp_path / "store")):
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(f"""
data: {{path: {data}, split: {{folds: 4}}, readers: 2, bad_chips: quarantine}}
run: {{name: {name}, folder: {tmp_path}}}
model: {{backbone: tf_mobilenetv3_small_minimal_100, decoder_channels: [8, 8, 8, 8, 8]}}
train: {{micro_batch: 2, precision: fp32, device: cpu}}
phases: [{{epochs: 1}}]
log: {{every: 1, chips: 1}}
""")
        done = command("train", "--config", recipe)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads((tmp_path / name / "quarantine.json").read_text()) == {}
        rows = [json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if row["kind"] == "step"])
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.parametrize("form", ["tree", "steps", "lossless"])
def test_a_chip_opens_for_people(tree: Path, stores: dict[bool, Path], form: str) -> None:
    xarray = pytest.importorskip("xarray")
    chip = open_index(tree).split("train")[0]
    view = open_chip(tree if form == "tree" else stores[form == "lossless"], chip.id)
    data = view.to_xarray()
    assert isinstance(data, xarray.Dataset) and data.images.dims == ("month", "band", "y", "x")
    assert data.images.shape == (T, C, TILE, TILE) and data.attrs["chip"] == chip.id
    raw = TiffSource().stack(chip)
    np.testing.assert_allclose(data.images.sel(month="November", band="VV asc"), raw.s1[2, ..., 0],
                               atol=0.00501 if form == "steps" else 0)
    assert np.isnan(data.images.sel(month="November", band="VH desc")).all()  # the orbit that is missing
    np.testing.assert_array_equal(data.agbm, raw.label[..., 0])
    absent = [t for t in range(T) if not chip.months[1][t]]
    assert absent and np.isnan(data.images[absent, 4:]).all() and "November" in view.table()
    with pytest.raises(DataError, match="no chip 'nope'"):
        open_chip(tree, "nope")
