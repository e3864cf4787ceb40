"""The packed file of one chip: what goes in comes out, and nothing else ever does."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.base.errors import DataError
from engine.data.biomassters import BIOMASSTERS, S1, S1_NODATA, S1_SHAPE, S2_SHAPE, TILE, T
from engine.data.index import Chip
from engine.data.source import Stack
from engine.data.store import chip_file
from engine.data.store.source import PackedSource

FORMS = [chip_file.STEPS, chip_file.EXACT]


def chip_arrays(months: np.ndarray, seed: int = 0, label: bool = True) -> chip_file.Arrays:
    """Noise where there are months, little enough that LZ4 has work to do."""
    rng = np.random.default_rng(seed)
    s1 = np.full((T, *S1_SHAPE), S1_NODATA, np.float32)
    s2 = np.zeros((T, *S2_SHAPE), np.uint16)
    for t in range(T):
        if months[0, t]:
            s1[t] = rng.normal(-12, 3, (TILE, TILE, 1)).astype(np.float32)
        if months[1, t]:
            s2[t] = rng.integers(0, 3000, (TILE, TILE, 1))
    return chip_file.Arrays((s1, s2), rng.gamma(2, 30, (TILE, TILE)).astype(np.float32) if label else None)


def some_months(*s1: int, s2: tuple[int, ...] = ()) -> np.ndarray:
    months = np.zeros((2, T), bool)
    months[0, list(s1)], months[1, list(s2)] = True, True
    return months


def write(folder: Path, arrays: chip_file.Arrays, months: np.ndarray, form: str) -> Chip:
    path = folder / f"a{chip_file.SUFFIX}"
    path.write_bytes(chip_file.encode("a", "train", BIOMASSTERS, arrays, months, form, {"a_S1_00.tif": (5, 7)}))
    there = tuple(tuple(bool(x) for x in row) for row in months)
    return Chip("a", "train", BIOMASSTERS, there, folder, path if arrays.label is not None else None, path)


def read(chip: Chip) -> Stack:
    assert chip.packed is not None
    return PackedSource(chip.packed, "mask").stack(chip)


EXTREMES = {
    chip_file.STEPS: [-327.67, 327.67, -25.0, 0.0, -0.004, 29.996, S1_NODATA],
    chip_file.EXACT: [np.finfo(np.float32).max, -np.finfo(np.float32).max, 1e-45, -0.0, 327.68, -9998.999, S1_NODATA],
}


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), form=st.sampled_from(FORMS))
def test_round_trip(tmp_path: Path, data: st.DataObject, form: str) -> None:
    months = np.array(data.draw(st.lists(st.sampled_from([(0, 0), (1, 0), (0, 1), (1, 1)]), min_size=T, max_size=T)
                                .filter(lambda rows: 0 < sum(map(any, rows)) <= 4))).T.astype(bool)
    arrays = chip_arrays(months, data.draw(st.integers(0, 9)), data.draw(st.booleans()))
    for t in np.flatnonzero(months[0]):
        for orbit in data.draw(st.sets(st.sampled_from([0, 2]))):
            arrays.images[0][t, ..., orbit:orbit + 2] = S1_NODATA
        row = data.draw(st.integers(0, TILE - 1))
        arrays.images[0][t, row, :7, data.draw(st.integers(0, 3))] = EXTREMES[form]
    arrays.images[1][months[1], 3:5, 7] = data.draw(st.sampled_from([0, 255, 256, 65535]))
    chip = write(tmp_path, arrays, months, form)
    got = read(chip)
    kept = np.flatnonzero(months.any(0))
    assert got.months.tolist() == kept.tolist()
    s1 = arrays.images[0][kept]
    if form == chip_file.EXACT:
        np.testing.assert_array_equal(got.images[0].view(np.uint32), s1.view(np.uint32))
    else:
        np.testing.assert_array_equal(got.images[0] == S1_NODATA, s1 == S1_NODATA)
        half = 0.005 + np.spacing(np.abs(s1)) / 2  # a float32 near the value
        assert (np.abs(got.images[0].astype(np.float64) - s1) <= half).all()
    np.testing.assert_array_equal(got.images[1], arrays.images[1][kept])
    np.testing.assert_array_equal(got.label[..., 0], 0 if arrays.label is None else arrays.label)
    head = chip_file.verify_file(tmp_path / f"a{chip_file.SUFFIX}")
    assert not head.sizes[~months.any(0)].any()
    whole = (arrays.images[0] == S1_NODATA).all((1, 2)) & months[0][:, None]
    assert not head.sizes[:, :head.planes.bytes[0] * 4].reshape(T, 4, -1)[whole].any()


def test_codes_know_the_ends_of_their_reach() -> None:
    ends = np.array([-327.67, 327.67], np.float32)
    assert chip_file.codes(ends, S1).tolist() == [1, 65535]
    for beyond in (-327.68, 327.68, np.nan, np.inf, -9998.0):
        with pytest.raises(DataError, match="--lossless"):
            chip_file.codes(np.array([0, beyond], np.float32), S1)
    np.testing.assert_array_equal(chip_file.codes(S1.zero, S1), S1.code_low)


@pytest.mark.parametrize("form", FORMS)
def test_nan_is_never_packed(form: str) -> None:
    months = some_months(0)
    arrays = chip_arrays(months)
    arrays.images[0][0, 9, 9, 3] = np.nan
    with pytest.raises(DataError, match="holds NaN"):
        chip_file.encode("a", "train", BIOMASSTERS, arrays, months, form, {})


def test_it_is_a_safetensors_file(tmp_path: Path) -> None:
    from safetensors import safe_open

    months = some_months(2, s2=(2, 5))
    chip = write(tmp_path, chip_arrays(months), months, chip_file.STEPS)
    with safe_open(chip.packed, "np") as file:
        assert file.metadata()["format"] == chip_file.FORMAT and json.loads(file.metadata()["sources"]) == {
            "a_S1_00.tif": [5, 7]}
        np.testing.assert_array_equal(file.get_tensor("months"), months)
        total = file.get_tensor("sizes").sum() + file.get_tensor("label").sum()
        assert file.get_tensor("sizes").shape == (T, 30) and len(file.get_tensor("blocks")) == total


class Whole(bytes):
    def __repr__(self) -> str:
        return f"{len(self)} bytes"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Chip, Whole]:
    months = some_months(0, 3, s2=(3,))
    chip = write(tmp_path_factory.mktemp("chip"), chip_arrays(months), months, chip_file.STEPS)
    assert chip.packed is not None
    return chip, Whole(chip.packed.read_bytes())


def damaged(chip: Chip, data: bytes) -> None:
    """Neither `verify` nor a reader takes it, and the error names the file."""
    assert chip.packed is not None
    chip.packed.write_bytes(data)
    for look in (lambda: chip_file.verify_file(chip.packed), lambda: read(chip)):  # type: ignore[arg-type]
        with pytest.raises(DataError, match=r"a\.safetensors: "):
            look()


def test_every_flipped_bit_is_seen(whole: tuple[Chip, Whole]) -> None:
    chip, data = whole
    rng = np.random.default_rng(1)
    head = chip_file.verify_file(chip.packed).start  # type: ignore[arg-type]
    places = [*rng.integers(0, 64, 20), *rng.integers(0, head, 150), *rng.integers(head, len(data), 60), len(data) - 1]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        damaged(chip, bytes(changed))


def test_every_truncation_is_seen(whole: tuple[Chip, Whole]) -> None:
    chip, data = whole
    rng = np.random.default_rng(2)
    for size in [0, 1, 7, 8, 9, len(data) - 1, *rng.integers(8, len(data), 40)]:
        damaged(chip, data[:size])
    damaged(chip, data + b"\0")


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_foreign_headers_are_refused_not_crashed_on(whole: tuple[Chip, Whole], data: st.DataObject) -> None:
    """A header with any value changed, and a checksum that fits it: what another program might have written."""
    chip, good = whole
    (length,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8:8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    key = data.draw(st.sampled_from(sorted(header[name])))
    odd = st.one_of(st.none(), st.integers(-2**70, 2**70), st.text(max_size=5), st.lists(st.integers(-9, 2**40)),
                    st.dictionaries(st.text(max_size=2), st.integers()))
    value = data.draw(odd)
    if header[name][key] == value or (name, key) in (("__metadata__", free) for free in ("label", "split")):
        return  # these two may hold anything
    end = header["crc32"]["data_offsets"][1]
    header[name][key] = value
    text = json.dumps(header).encode()
    tables = good[8 + length:]
    body = struct.pack("<Q", len(text)) + text + tables[:end - 4]
    damaged(chip, body + struct.pack("<I", zlib.crc32(body)) + tables[end:])
