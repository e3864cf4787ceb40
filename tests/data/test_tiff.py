"""engine.data.tiff.tiff: the real files byte for byte, other valid TIFFs through tifffile, and no garbage."""

from __future__ import annotations

import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.base.errors import DataError
from engine.data.biomassters import AGBM_DTYPE, S1, S1_SHAPE, S2, S2_SHAPE, TILE
from engine.data.tiff import tiff
from tests.conftest import SHARED

REAL = SHARED / "biomassters"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="the real chips (../shared/data) are not here")
# shape, dtype, rows per strip, first pixel byte, file size
KINDS = {
    "S1": (S1_SHAPE, S1.values, 2, 948, 1_049_524),
    "S2": (S2_SHAPE, S2.values, 1, 1758, 1_443_550),
    "agbm": ((TILE, TILE), AGBM_DTYPE, 8, 338, 262_482),
}


def noise(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
    rng, dtype = np.random.default_rng(seed), np.dtype(dtype)
    if dtype.kind == "f":
        return rng.normal(-10, 5, shape).astype(dtype)
    return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def read(path: Path, like: np.ndarray) -> np.ndarray:
    out = np.full_like(like, 77)
    tiff.read_into(path, out)
    return out


def real_files() -> list[Path]:
    return sorted(REAL.glob("*/*.tif"))


@needs_real
def test_real_files_come_back_byte_for_byte(tmp_path: Path) -> None:
    files = real_files()
    assert len(files) == 28
    for file in files:
        truth = tifffile.imread(file)
        assert np.array_equal(read(file, truth), truth)
        tiff.write(tmp_path / "copy.tif", truth)
        assert (tmp_path / "copy.tif").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_layout_of_the_challenge(kind: str) -> None:
    shape, dtype, rows, offset, size = KINDS[kind]
    data = tiff.encode(noise(shape, dtype))
    assert data == tiff.encode(noise(shape, dtype), rows_per_strip=rows)
    assert len(data) == size
    assert tiff.strip_layout(data[:offset], size) == tiff.Layout(offset, shape, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_originals_take_the_fast_way(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the slow way was taken")

    monkeypatch.setattr(tiff, "_read_any", never)
    tiff.strip_layout.cache_clear()
    for n in range(5):
        array = noise(*KINDS[kind][:2], seed=n)
        tiff.write(tmp_path / f"{n}.tif", array)
        assert np.array_equal(read(tmp_path / f"{n}.tif", array), array)
    assert tiff.strip_layout.cache_info().misses == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(height=st.integers(1, 40), width=st.integers(1, 40), bands=st.sampled_from([None, 1, 2, 3, 11]),
       dtype=st.sampled_from(["<f4", "<u2", "|u1", "<i2", "<f8", ">f4"]), rows=st.sampled_from([None, 1, 3, 64]))
def test_round_trip(tmp_path: Path, height: int, width: int, bands: int | None, dtype: str,
                    rows: int | None) -> None:
    array = noise((height, width) if bands is None else (height, width, bands), dtype)
    tiff.write(tmp_path / "a.tif", array, rows)
    if bands == 1:  # a file of one band is a map, and read as either
        assert np.array_equal(read(tmp_path / "a.tif", array), array)
        array = array[..., 0]
    assert np.array_equal(read(tmp_path / "a.tif", array), array)
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif").reshape(array.shape), array)


OTHERS: dict[str, dict[str, Any]] = {
    "big endian": {"byteorder": ">"},
    "one strip": {"rowsperstrip": 48},
    "deflate": {"compression": "zlib"},
    "deflate, predictor": {"compression": "zlib", "predictor": 2},
    "tiles": {"tile": (32, 16)},
    "tiles, deflate": {"tile": (32, 16), "compression": "zlib"},
    "planes": {"planarconfig": "separate"},
    "planes, deflate": {"planarconfig": "separate", "compression": "zlib", "rowsperstrip": 7},
    "planes, tiles": {"planarconfig": "separate", "tile": (16, 16)},
}


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in OTHERS for shape in ((48, 40), (48, 40, 3))
                                             if len(shape) == 3 or "planes" not in name])
def test_other_valid_tiffs(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    array, options = noise(shape, "u2"), OTHERS[name]
    planes = options.get("planarconfig") == "separate"
    data = np.moveaxis(array, -1, 0) if planes else array
    options = {"planarconfig": "contig" if len(shape) == 3 else None} | options
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="minisblack", metadata=None, **options)
    assert np.array_equal(read(tmp_path / "a.tif", array), array)


def test_strips_out_of_order(tmp_path: Path) -> None:
    array = noise((16, 256), "<f4")
    data = bytearray(tiff.encode(array))
    strip = 8 * 256 * 4
    first = len(data) - 2 * strip
    place = data.index(struct.pack("<II", first, first + strip))
    data[place : place + 8] = struct.pack("<II", first + strip, first)
    data[first:] = data[first + strip :] + data[first : first + strip]
    (tmp_path / "a.tif").write_bytes(data)
    assert tiff.strip_layout(bytes(data), len(data)).offset is None
    assert np.array_equal(read(tmp_path / "a.tif", array), array)


def test_bytes_after_the_pixels_are_ignored(tmp_path: Path) -> None:
    array = noise((32, 32, 4), "<f4")
    (tmp_path / "a.tif").write_bytes(tiff.encode(array) + b"more" * 50)
    assert np.array_equal(read(tmp_path / "a.tif", array), array)


def right_or_refused(path: Path, data: bytes, truth: np.ndarray) -> bool:
    """Whether the file was refused; the test fails where it was neither refused nor read exactly."""
    path.write_bytes(data)
    out = np.empty_like(truth)
    try:
        tiff.read_into(path, out)
    except DataError as error:
        assert str(error).startswith(f"{path}: ") and "verify" in str(error)
        return True
    assert out.tobytes() == truth.tobytes()
    return False


# Small images in the three layouts: many strips with arrays outside the directory, and one band.
SMALL = [((12, 8, 4), "<f4", 2), ((10, 8, 11), "<u2", 1), ((32, 8), "<f4", 8)]


@pytest.mark.parametrize(("shape", "dtype", "rows"), SMALL)
def test_every_flipped_header_bit(shape: tuple[int, ...], dtype: str, rows: int, tmp_path: Path) -> None:
    truth = noise(shape, dtype)
    good = tiff.encode(truth, rows)
    header, refused = len(good) - truth.nbytes, 0
    for bit in range(8 * header):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        refused += right_or_refused(tmp_path / "a.tif", bytes(data), truth)
    # What may pass are bits without meaning for the pixels, such as those of PhotometricInterpretation.
    assert refused > 0.6 * 8 * header


@pytest.mark.parametrize(("shape", "dtype", "rows"), SMALL)
def test_every_truncation(shape: tuple[int, ...], dtype: str, rows: int, tmp_path: Path) -> None:
    truth = noise(shape, dtype)
    good = tiff.encode(truth, rows)
    for size in range(len(good)):
        assert right_or_refused(tmp_path / "a.tif", good[:size], truth), f"accepted {size} of {len(good)} bytes"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(range(len(SMALL))), seed=st.integers(0, 2**32 - 1), edits=st.integers(1, 12))
def test_random_damage(tmp_path: Path, kind: int, seed: int, edits: int) -> None:
    shape, dtype, rows = SMALL[kind]
    truth = noise(shape, dtype)
    data, rng = bytearray(tiff.encode(truth, rows)), np.random.default_rng(seed)
    header = len(data) - truth.nbytes
    for place in rng.integers(0, header, edits):
        data[place] = rng.choice([0, 1, 2, 8, 32, 255, int(rng.integers(256))])
    right_or_refused(tmp_path / "a.tif", bytes(data), truth)


@pytest.mark.parametrize("compression", [5, 7, 8, 32773, 34925, 50000])
def test_pixels_that_no_decoder_takes(compression: int, tmp_path: Path) -> None:
    truth = noise((12, 8, 4), "<f4")
    data = retag(tiff.encode(truth), tiff.COMPRESSION, tiff.COMPRESSION, compression)
    assert right_or_refused(tmp_path / "a.tif", data, truth)


@pytest.mark.parametrize(("tag", "value"), [(tiff.WIDTH, 2**32 - 1), (tiff.LENGTH, 2**32 - 1),
                                            (tiff.SAMPLES, 2**16 - 1), (tiff.ROWS_PER_STRIP, 0)])
def test_absurd_numbers_do_not_fill_memory(tag: int, value: int, tmp_path: Path) -> None:
    truth = noise((32, 8, 2), "<f4")
    data = bytearray(tiff.encode(truth, 8))
    place = next(10 + 12 * n for n in range(12) if struct.unpack_from("<H", data, 10 + 12 * n)[0] == tag)
    struct.pack_into("<HII", data, place + 2, 4, 1, value)
    assert right_or_refused(tmp_path / "a.tif", bytes(data), truth)


def retag(data: bytes, old: int, new: int, value: int) -> bytes:
    """`data` with the directory entry of `old` made a `new` of one SHORT `value`."""
    changed = bytearray(data)
    place = next(10 + 12 * n for n in range(12) if struct.unpack_from("<H", data, 10 + 12 * n)[0] == old)
    struct.pack_into("<HHIHH", changed, place, new, 3, 1, value, 0)
    return bytes(changed)


def test_contradictions(tmp_path: Path) -> None:
    truth = noise((12, 8, 4), "<f4")
    good = tiff.encode(truth)
    mixed = bytearray(good)
    place = mixed.index(struct.pack("<4H", 32, 32, 32, 32))
    struct.pack_into("<H", mixed, place + 6, 16)
    cases = {
        retag(good, tiff.PHOTOMETRIC, tiff.BITS, 32): "damaged header .tag 258",
        retag(good, tiff.PHOTOMETRIC, tiff.TILE_WIDTH, 16): "damaged header .tag 324 is missing",
        retag(good, tiff.SAMPLE_FORMAT, tiff.SAMPLE_FORMAT, 6): "32 bits in format 6 are not supported",
        retag(good, tiff.PLANAR, tiff.PLANAR, 3): "planar configuration 3",
        bytes(mixed): "bands of different kinds .tag 258 is .32, 32, 32, 16",
    }
    for data, words in cases.items():
        (tmp_path / "a.tif").write_bytes(data)
        with pytest.raises(DataError, match=words):
            read(tmp_path / "a.tif", truth)


def test_fill_order(tmp_path: Path) -> None:
    array = noise((12, 8), "u1")
    (tmp_path / "a.tif").write_bytes(retag(tiff.encode(array), tiff.PHOTOMETRIC, tiff.FILL_ORDER, 2))
    mirrored = np.packbits(np.unpackbits(array[..., None], axis=-1)[..., ::-1], axis=-1)[..., 0]
    assert np.array_equal(read(tmp_path / "a.tif", array), mirrored)


def test_messages(tmp_path: Path) -> None:
    out = np.empty(S1_SHAPE, S1.values)
    good = tiff.encode(noise(S1_SHAPE, S1.values))
    cases = {
        b"": "is empty",
        b"<?xml version='1.0'?><Error>": "is not a TIFF",
        good[:100]: "truncated: 100 of at least",
        good[:-1]: r"truncated: 1049523 of 1049524 bytes",
        tiff.encode(noise(S2_SHAPE, S2.values)): "256 × 256 × 11 uint16, where 256 × 256 × 4 float32 is wanted",
        tiff.encode(noise(S1_SHAPE, "u2")): "256 × 256 × 4 uint16, where",
        tiff.encode(noise((128, 256, 4), S1.values)): "128 × 256 × 4 float32, where",
    }
    for n, (data, words) in enumerate(cases.items()):
        (tmp_path / f"{n}.tif").write_bytes(data)
        with pytest.raises(DataError, match=rf"{n}\.tif: .*{words}.*download it again"):
            tiff.read_into(tmp_path / f"{n}.tif", out)


def test_what_is_no_file(tmp_path: Path) -> None:
    out = np.empty(S1_SHAPE, S1.values)
    os.mkfifo(tmp_path / "pipe.tif")
    with pytest.raises(DataError, match=r"gone\.tif: is missing"):
        tiff.read_into(tmp_path / "gone.tif", out)
    for path in (tmp_path, tmp_path / "pipe.tif"):
        with pytest.raises(DataError, match="is not a regular file"):
            tiff.read_into(path, out)
    with (tmp_path / "huge.tif").open("wb") as handle:
        handle.truncate(1 << 34)  # sparse
    with pytest.raises(DataError, match="far more than"):
        tiff.read_into(tmp_path / "huge.tif", out)


def test_the_array_must_take_the_bytes() -> None:
    array = np.empty((4, 4, 2), np.float32)
    for out in (array[:, ::2], array.transpose(2, 0, 1)):
        with pytest.raises(ValueError, match="C-contiguous"):
            tiff.read_into("any.tif", out)
    array.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        tiff.read_into("any.tif", array)


def test_many_threads(tmp_path: Path) -> None:
    arrays = [noise(*KINDS[kind][:2], seed=n) for n in range(4) for kind in KINDS]
    for n, array in enumerate(arrays):
        tiff.write(tmp_path / f"{n}.tif", array)
    jobs = list(range(len(arrays))) * 8
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: np.array_equal(read(tmp_path / f"{n}.tif", arrays[n]), arrays[n]), jobs))
    assert all(found)


def test_maps(tmp_path: Path) -> None:
    biomass = noise((TILE, TILE), "<f4")
    tiff.write_map(tmp_path / "a.tif", biomass.astype(np.float64))
    assert (tmp_path / "a.tif").read_bytes() == tiff.encode(biomass)
    assert (tmp_path / "a.tif").stat().st_size == KINDS["agbm"][-1]
    wide = noise((300, 3000), "<f4")
    tiff.write_map(tmp_path / "b.tif", wide)
    assert np.array_equal(read(tmp_path / "b.tif", wide), wide)
    with pytest.raises(ValueError, match="a map is"):
        tiff.write_map(tmp_path / "c.tif", noise((4, 4, 2), "<f4"))


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=r"a\.tif: cannot be written"):
        tiff.write_map(tmp_path / "file" / "a.tif", noise((4, 4), "<f4"))
    with pytest.raises(ValueError, match="no TIFF"):
        tiff.write(tmp_path / "a.tif", np.zeros((2, 2), complex))
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]
