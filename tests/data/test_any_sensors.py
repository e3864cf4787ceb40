"""Any description through all forms: TIFFs, packed and packed lossless, by DALI and the CPU's kernel, against NumPy."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import lz4.block
import numpy as np
import pytest

from engine.base.errors import ConfigError, DataError
from engine.config import Augment
from engine.data import pipeline, reference
from engine.data.chip_view import open_chip
from engine.data.dataset import Dataset, Sensor, load_dataset, parse_dataset
from engine.data.forms import open_source, read_label
from engine.data.index import Chip, open_index
from engine.data.made.fields import make_fields
from engine.data.plan import IDENTITY, dihedral, draw
from engine.data.selection import quarantine
from engine.data.selection.chips import mean_label
from engine.data.source import Turn, empty_stack
from engine.data.store import chip_file
from engine.data.store.pack import pack
from engine.data.tiff import tiff
from engine.data.tiff.source import TiffSource
from tests.conftest import ROOT
from tests.data.test_packed import by_the_gpus_operators, load, pixels


def sensor(name: str, bands: int, low: float, high: float, **more: Any) -> dict[str, Any]:
    file = f"{{chip}}_{name}.tif" if more.get("static") else f"{{chip}}_{name}_{{step}}.tif"
    return {"name": name, "file": file, "bands": [f"{name}{n}" for n in range(bands)], "low": [low] * bands,
            "high": [high + n for n in range(bands)], **more}


def description(name: str, tile: int, steps: int, *sensors: dict[str, Any], target: str = "float32",
                nodata: float | None = None) -> Dataset:
    return parse_dataset({
        "name": name, "tile": tile, "pixel_metres": 30, "steps": [f"s{t}" for t in range(steps)], "sensors": sensors,
        "target": {"name": "cover", "unit": "%", "file": "{chip}_cover.tif", "dtype": target, "nodata": nodata}}, name)


DATASETS = {data.name: data for data in [
    # Integers with nodata above, below and inside what is seen, and without; static ones first and last, with holes
    description("integers", 64, 5, sensor("e", 3, 5, 90, dtype="uint8", static=True),
                sensor("a", 3, 0, 9000, dtype="uint16", nodata=65_535),
                sensor("b", 2, -2500, 500, dtype="int16", nodata=-32_768),
                sensor("c", 1, 10, 200, dtype="uint8", nodata=255),
                sensor("d", 2, 100, 3000, dtype="int16", nodata=700, static=True), target="uint16",
                nodata=65_535),
    description("bare", 32, 3, sensor("a", 5, 0, 250, dtype="uint8"), sensor("b", 1, -300, 300, dtype="int16"),
                sensor("c", 2, 40, 60_000, dtype="uint16", nodata=0), target="uint8"),
    # A low that no float has, in steps of a size that none has; nodata among the values
    description("floats", 32, 4, sensor("a", 2, -0.3, 0.9, packed_step=0.001),
                sensor("b", 6, 0.7, 30, packed_step=0.1, nodata=-9999),
                sensor("c", 1, -1, 1, packed_step=0.01, nodata=0.25),
                sensor("d", 1, 0.1, 2.3, packed_step=0.1, static=True, nodata=-1), target="int16", nodata=0),
    # Without a step, floats are floats in any store
    description("mixed", 32, 2, sensor("a", 2, 0.1, 0.7), sensor("b", 4, -7, 90, dtype="int16"),
                sensor("c", 1, -0.1, 55, nodata=1e9), sensor("d", 3, 0, 200, dtype="uint8", static=True),
                nodata=-9999.9),
    description("one", 128, 1, sensor("a", 1, 0, 100, dtype="uint8", nodata=0)),
    description("many", 32, 64, sensor("a", 14, 0, 5000, dtype="uint16"),
                sensor("b", 4, -20, 5, packed_step=0.01, nodata=-9999)),
]}
FORMS = ["tiff", "steps", "exact"]


class Made(NamedTuple):
    dataset: Dataset
    roots: dict[str, Path]

    def chips(self, form: str) -> list[Chip]:
        return list(open_index(self.roots[form]).chips)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(name: str) -> Made:
        root, data = tmp_path_factory.mktemp(name), DATASETS[name]
        make_fields(root / "tiff", data, 2, seed=3, test_chips=1)
        _spoil(root / "tiff")
        for form in ("steps", "exact"):
            pack(root / "tiff", root / form, lossless=form == "exact", workers=1, verify=True)
        return Made(data, {form: root / form for form in FORMS})

    return make


def _spoil(root: Path) -> None:
    """Holes in a label and in a band, a band and an image that are nodata throughout, a sensor that one chip lacks, and
    static images that another lacks."""
    index = open_index(root)
    data, (first, second, third) = index.dataset, index.chips
    if data.target.nodata is not None:
        assert first.label is not None
        label = np.empty((data.tile, data.tile), data.target.dtype)
        tiff.read_into(first.label, label)
        label[5::7, 3:] = data.target.nodata  # lines of it, and pixels on their own
        label[:8, :8], label[3, 3] = data.target.nodata, 9
        label[data.tile - 9:, data.tile - 9:] = data.target.nodata
        label[data.tile - 1, data.tile - 1] = 7
        tiff.write(first.label, label)
    blanked = False
    for number, one in enumerate(data.sensors):
        if one.nodata is None:
            continue
        for month, image in _images(first, number):
            image[data.tile // 4:data.tile // 2, 3:data.tile // 2, -1] = one.nodata
            if len(one.bands) > 1 and (month == data.months - 1 or one.static):
                image[..., 0] = one.nodata
            others = [n for n, other in enumerate(data.sensors) if n != number and not other.static]
            if not (blanked or one.static) and any(first.months[n][month] for n in others):
                image[...], blanked = one.nodata, True
            tiff.write(first.path(number, month), image)
    if len(data.sensors) > 1:
        for month, _ in _images(second, 1):
            if any(second.months[n][month] for n, other in enumerate(data.sensors) if n != 1 and not other.static):
                second.path(1, month).unlink()
    for number, one in enumerate(data.sensors):
        if one.static:
            third.path(number, 0).unlink()


def _images(chip: Chip, number: int) -> list[tuple[int, np.ndarray]]:
    data, found = chip.dataset, []
    for month in range(1 if data.sensors[number].static else data.months):
        if chip.months[number][month]:
            image = np.empty(data.shape(data.sensors[number]), data.sensors[number].values)
            tiff.read_into(chip.path(number, month), image)
            found.append((month, image))
    return found


def test_what_is_rounded_to_nodata_was_seen() -> None:
    one = DATASETS["floats"].sensors[2]
    assert (one.nodata, one.packed_step) == (0.25, 0.01)
    values = np.array([0.25, 0.251, 0.2499, 0.24, 0.26], np.float32)
    again = chip_file.decoded(chip_file.codes(values, one), one)
    assert (again == np.float32(one.nodata)).tolist() == [True, False, False, False, False]
    assert np.abs(again - values).max() < 0.0015


def in_codes(data: Dataset, values: str) -> tuple[np.ndarray, np.ndarray]:
    """[C] of each band: what a whole code, or the range of floats, is after scaling; and whether it is in codes."""
    coded = [chip_file.is_coded(one, values) for one in data.sensors]
    span = [one.code_span if code else one.span for one, code in zip(data.sensors, coded)]
    return np.concatenate(span), np.repeat(coded, [len(one.bands) for one in data.sensors])


def same(found: np.ndarray, expected: np.ndarray, data: Dataset, values: str) -> None:
    """After a warp: at most a code apart, and hardly ever; floats to their last bits."""
    span, coded = in_codes(data, values)
    apart = np.abs(found - expected) * span
    if coded.any():
        assert apart[..., coded].max() < 1.01 and (apart[..., coded] > 0.01).mean() < 0.01
    if not coded.all():
        np.testing.assert_allclose(found[..., ~coded], expected[..., ~coded], atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", DATASETS)
def test_unwarped_it_is_the_reference(name: str, form: str, made: Any) -> None:
    data, chips = made(name).dataset, made(name).chips(form)
    batch = load(chips, [IDENTITY] * len(chips), "cpu", warp=False)
    assert batch.images.shape == (len(chips), data.months, data.channels, data.tile, data.tile)
    for b, chip in enumerate(made(name).chips("tiff")):
        stack = TiffSource(data).stack(chip)
        images, label = reference.transform(stack, None, steps=form == "steps")
        np.testing.assert_allclose(pixels(batch)[b], images, atol=1e-6, rtol=1e-6)
        np.testing.assert_array_equal(batch.label[b].numpy(), label)
        assert batch.dropped[b].tolist() == [k >= len(stack.months) for k in range(data.months)]
        np.testing.assert_array_equal(read_label(chips[b]), label)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", DATASETS)
def test_augmented_it_is_the_reference(name: str, form: str, made: Any) -> None:
    data, chips = made(name).dataset, made(name).chips(form)
    values = chip_file.STEPS if form == "steps" else chip_file.EXACT
    draws = [draw(data, Augment(rotate=1, month_dropout=p % 2), 5, 0, p) for p in range(len(chips))]
    batch = load(chips, draws, "cpu", warp=True)
    for b, (chip, how) in enumerate(zip(made(name).chips("tiff"), draws)):
        stack = TiffSource(data).read(chip, how.keep, empty_stack(data))
        images, label = reference.transform(stack, how.matrix, steps=form == "steps")
        same(pixels(batch)[b], images, data, values)
        np.testing.assert_allclose(batch.label[b], label, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", DATASETS)
def test_turning_a_label_loses_no_pixel_of_target(name: str, form: str, made: Any) -> None:
    """By the GPU's operators too, which warp what the CPU turns: NaN that has no weight is not to spread."""
    data, chips = made(name).dataset, made(name).chips(form)
    stack = TiffSource(data).stack(made(name).chips("tiff")[0])
    assert np.isnan(stack.label).any() == (data.target.nodata is not None)
    for turn in map(Turn._make, np.ndindex(2, 4)):
        how = IDENTITY._replace(matrix=dihedral(data.tile, turn.flip, turn.quarters, np.eye(3)))
        expected = turn.view(stack.label[..., 0])
        np.testing.assert_array_equal(reference.transform(stack, how.matrix)[1], expected)
        np.testing.assert_array_equal(load(chips[:1], [how], "cpu", warp=True).label[0], expected)
        np.testing.assert_array_equal(by_the_gpus_operators(chips[0], how, True)[1], expected)


@pytest.mark.parametrize("name", DATASETS)
def test_a_lossless_store_gives_the_tiffs_batches_but_for_the_kernels_order(name: str, made: Any) -> None:
    """By DALI to the last bit; by the kernel, where nothing is a float, to a rounding of (x − low) / span."""
    data = made(name).dataset
    draws = [draw(data, Augment(rotate=0, month_dropout=1), 5, 0, p) for p in range(3)]
    one, other = (load(made(name).chips(form), draws, "cpu", warp=True) for form in ("tiff", "exact"))
    if open_source(made(name).chips("exact")).form == "stack":
        np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_allclose(one.images, other.images, atol=1e-6)
    np.testing.assert_array_equal(one.label, other.label)


@pytest.mark.parametrize("name", DATASETS)
def test_nodata_and_what_is_missing_is_zero(name: str, made: Any) -> None:
    """Written out once more, from the files' values."""
    data, chip = made(name).dataset, made(name).chips("tiff")[0]
    for form in FORMS:
        batch = load([next(c for c in made(name).chips(form) if c.id == chip.id)], [IDENTITY], "cpu", warp=False)
        first, seen = 0, 0
        for number, one in enumerate(data.sensors):
            bands = slice(first, first := first + len(one.bands))
            there = dict(_images(chip, number))
            for slot, month in enumerate(TiffSource(data).stack(chip).months):
                image = there.get(0 if one.static else int(month))
                got = pixels(batch)[0, slot, ..., bands]
                if image is None:
                    assert not got.any()
                elif one.nodata is not None:
                    hole = image == one.values.type(one.nodata)
                    assert not got[hole].any()
                    seen += int(hole.sum())
        assert (seen > 0) == any(one.nodata is not None for one in data.sensors)


# The GPU's graph, as far as a CPU can follow it ------------------------------------------------------------------


@pytest.mark.parametrize("values", [chip_file.STEPS, chip_file.EXACT])
@pytest.mark.parametrize("warp", [True, False])
@pytest.mark.parametrize("name", DATASETS)
def test_the_gpu_graph_can_be_defined(name: str, warp: bool, values: str) -> None:
    data = DATASETS[name]
    whole = all(chip_file.is_coded(one, values) for one in data.sensors)
    form = pipeline.Form("blocks" if whole else "blocks_apart", data, values)
    pipe = pipeline.define(lambda: (), form=form, batch_size=2, device_id=0, threads=1, prefetch=1, half=True,
                           warp=warp)
    pipe._build_graph()
    names = [operator.name.strip("_").rpartition("_")[0] for operator in pipe._ops]
    assert names.count("Inflate") == (2 if whole else 1 + len(data.sensors))
    cuts = ([pipeline.groups(data.channels)] if whole else [pipeline.groups(len(one.bands)) for one in data.sensors])
    assert names.count("WarpPerspective") == (1 + sum(map(len, cuts)) if warp else 0)
    for operator, kind in zip(pipe._ops, names):
        assert kind == "ExternalSource" or all(out.device == "gpu" for out in operator.outputs), kind


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", DATASETS)
def test_the_gpus_operators_agree_with_the_cpus(name: str, form: str, made: Any) -> None:
    data, values = made(name).dataset, chip_file.STEPS if form == "steps" else chip_file.EXACT
    for chip in made(name).chips(form)[:2]:
        how = draw(data, Augment(rotate=1, month_dropout=0), 3, 0, 0)
        images, label = by_the_gpus_operators(chip, how, True)
        batch = load([chip], [how], "cpu", warp=True)
        same(pixels(batch)[0], images, data, values)
        np.testing.assert_allclose(batch.label[0], label, rtol=1e-4, atol=1e-2)

        images, label = by_the_gpus_operators(chip, IDENTITY, False)
        batch = load([chip], [IDENTITY], "cpu", warp=False)
        np.testing.assert_allclose(pixels(batch)[0], images, atol=1e-6)
        np.testing.assert_array_equal(batch.label[0], label)


# Labels without any target, and without a number -----------------------------------------------------------------


@pytest.fixture
def blank(tmp_path: Path) -> Path:
    """TIFFs of which the first chip's label is nodata throughout, and both kinds of store."""
    make_fields(tmp_path / "tiff", DATASETS["floats"], 4, seed=3)
    first = open_index(tmp_path / "tiff").chips[0]
    assert first.label is not None
    tiff.write(first.label, np.zeros((32, 32), np.int16))
    for form in ("steps", "exact"):
        pack(tmp_path / "tiff", tmp_path / form, lossless=form == "exact", workers=1, verify=True)
    return tmp_path


@pytest.mark.parametrize("form", FORMS)
def test_a_label_without_target_is_refused_where_it_is_needed(blank: Path, form: str) -> None:
    chips = list(open_index(blank / form).chips)
    place = re.escape(str(chips[0].label))
    for backend in ("cpu", "gpu"):
        source = open_source(chips, backend=backend, need_target=True)
        source.read(chips[1], None, source.buffer())
        with pytest.raises(DataError, match=f"^{place}: every pixel of the label is nodata, so there is nothing to "
                                            f"train on; remove the chip, or set data.bad_chips: quarantine$"):
            source.read(chips[0], None, source.buffer())
    assert list(quarantine.find(blank / form, chips, "fail", workers=1)) == [chips[0].id]

    batch = load(chips[:2], [IDENTITY] * 2, "cpu", warp=False)  # as predicting asks
    assert np.isnan(batch.label[0]).all() and not np.isnan(batch.label[1]).all()


@pytest.mark.parametrize("form", FORMS)
def test_folds_and_tables_know_what_is_no_target(blank: Path, form: str) -> None:
    chips = list(open_index(blank / form).chips)
    means = mean_label(chips)
    assert means[chips[0].id] == -np.inf
    for chip in chips[1:]:
        label = read_label(chip)
        assert 0 < np.isnan(label).sum() < label.size
        assert means[chip.id] == pytest.approx(label[label > 0].mean(), rel=1e-6)
        view = open_chip(blank / form, chip.id)
        smallest, largest = (f"{end:.4g}" for end in (label[label > 0].min(), label[label > 0].max()))
        assert view.table().splitlines()[-1].startswith(f"cover, %: {smallest} … ")
        assert view.table().splitlines()[-1].endswith(f" … {largest}") and smallest != "0"
        np.testing.assert_array_equal(view.to_xarray()["cover"], label)
    assert open_chip(blank / form, chips[0].id).table().splitlines()[-1] == "cover, %: –"


def test_a_store_keeps_labels_as_they_are_and_tells_of_the_target(blank: Path) -> None:
    for chip, plain in zip(open_index(blank / "steps").chips, open_index(blank / "tiff").chips):
        assert chip.packed is not None and plain.label is not None
        head, stored = chip_file.read_head(chip.packed), np.empty((32, 32), np.int16)
        tiff.read_into(plain.label, stored)
        data = chip.packed.read_bytes()[head.places[0]:]
        ends = np.cumsum(head.label_sizes)
        planes = [lz4.block.decompress(data[end - size:end], uncompressed_size=32 * 32)
                  for size, end in zip(head.label_sizes, ends)]
        kept = np.stack([np.frombuffer(plane, np.uint8) for plane in planes], 1).copy().view("<f4")
        np.testing.assert_array_equal(kept.reshape(32, 32), stored)
        seen = stored[stored != 0].astype(float)
        assert head.label == ({"min": seen.min(), "max": seen.max(), "mean": seen.mean(), "std": seen.std()}
                              if seen.size else dict.fromkeys(("min", "max", "mean", "std")))


def test_nan_in_a_labels_file_is_an_error_where_nodata_is_described_too(tmp_path: Path) -> None:
    make_fields(tmp_path / "tiff", DATASETS["mixed"], 1, seed=3)
    chip = open_index(tmp_path / "tiff").chips[0]
    assert chip.label is not None
    label = np.full((32, 32), -9999.9, np.float32)
    for wrong in (np.nan, np.inf):
        label[1, 1] = wrong
        tiff.write(chip.label, label)
        with pytest.raises(DataError, match=f"{re.escape(str(chip.label))}: the label holds NaN or infinity"):
            open_source([chip]).stack(chip)
        with pytest.raises(DataError, match=f"{chip.label.name}: holds NaN or infinity"):
            pack(tmp_path / "tiff", tmp_path / "store", workers=1)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name, data in DATASETS.items() if data.target.nodata is not None])
def test_labels_with_holes_are_the_same_on_a_gpu(name: str, form: str, made: Any) -> None:
    data, chips = made(name).dataset, made(name).chips(form)[:2]
    turns = [IDENTITY._replace(matrix=dihedral(data.tile, *turn, np.eye(3))) for turn in np.ndindex(2, 4)]
    draws = [*turns, *(draw(data, Augment(rotate=1, month_dropout=0), 3, 0, p) for p in range(4))]
    for how in draws:
        ours, theirs = (load(chips, [how] * 2, backend, warp=True).label.cpu() for backend in ("cpu", "gpu"))
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-2)


# Values at the ends of what a dtype holds --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_codes_hold_every_integer(dtype: str) -> None:
    one = Sensor.model_validate(sensor("a", 1, 0, 100, dtype=dtype, nodata=np.iinfo(dtype).min))
    limits = np.iinfo(dtype)
    values = np.arange(limits.min, limits.max + 1).astype(one.values)
    found = chip_file.codes(values, one)
    assert len(set(found.tolist())) == len(values)
    np.testing.assert_array_equal(chip_file.decoded(found, one), values)


def test_labels_of_integers_are_floats(made: Any) -> None:
    import tifffile

    for form in FORMS:
        for chip, plain in zip(made("integers").chips(form), made("integers").chips("tiff")):
            if plain.label is not None:
                found, stored = read_label(chip), tifffile.imread(plain.label)
                assert stored.dtype == np.uint16 and found.dtype == np.float32
                np.testing.assert_array_equal(found, np.where(stored == 65_535, np.nan, stored))


def test_a_made_folder_is_completed_and_never_mixed(tmp_path: Path) -> None:
    data = load_dataset(ROOT / "configs" / "datasets" / "grassland.yaml").model_copy(update={"tile": 32})
    out = tmp_path / "made"
    make_fields(out, data, 1, 0)
    first = {path: path.read_bytes() for path in out.rglob("*.tif")}
    make_fields(out, data, 2, 0, test_chips=1)
    index = open_index(out)
    assert [len(index.split(split)) for split in ("train", "test")] == [2, 1] and len(index.labelled()) == 3
    assert all(path.read_bytes() == was for path, was in first.items())
    for chips, seed in ((1, 0), (2, 1)):  # fewer than there are, and others
        with pytest.raises(DataError, match="holds another or a larger sample; remove it or choose another folder"):
            make_fields(out, data, chips, seed, test_chips=1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(DataError, match="is not empty and no sample"):
        make_fields(tmp_path / "notes", data, 1, 0)
    with pytest.raises(ConfigError, match="chips must be at least 1"):
        make_fields(tmp_path / "none", data, 0, 0)
