"""TIFF files of the challenge: read at the speed of the disk, written byte for byte as the originals are.

The hot path of the TIFF data source is `read_into`: the headers of the challenge's files differ only
between the three kinds, so a header is parsed once and remembered, and a file costs one open, one read that
lands the pixels in their place, and one close.  Any other valid TIFF (compressed, tiled, by planes) goes
through tifffile.  What a file claims is checked before a byte is believed: a header that contradicts itself,
the file's size or the wanted array is a DataError.  Flipped bits in the pixels cannot be seen here; that is
what checksums are for (engine.data.tiff.checksum).

Format: TIFF 6.0 (Adobe, 1992), classic 32-bit offsets.  The layout that `encode` writes was read off the real
files: the directory at byte 8, then the arrays of tags 258, 279, 273, 338 and 339, then the pixels, in strips
of 8 KiB or one row, which is GDAL's default.
"""

from __future__ import annotations

import io
import lzma
import math
import os
import stat
import struct
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.base.errors import DataError
from engine.base.files import atomic_write, unreadable

REMEDY = "download it again, or let `launch/prepare.py verify` list every damaged file"

WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, SAMPLES, ROWS_PER_STRIP, STRIP_COUNTS, PLANAR = 273, 277, 278, 279, 284
TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_COUNTS = 322, 323, 324, 325
EXTRA_SAMPLES, SAMPLE_FORMAT = 338, 339
_READ = {WIDTH, LENGTH, BITS, COMPRESSION, FILL_ORDER, STRIP_OFFSETS, SAMPLES, ROWS_PER_STRIP, STRIP_COUNTS,
         PLANAR, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_COUNTS, SAMPLE_FORMAT}
_INTEGERS = {1: "u1", 3: "u2", 4: "u4"}  # TIFF field types BYTE, SHORT, LONG
_KINDS = {1: "u", 2: "i", 3: "f"}  # values of SampleFormat
_OUTSIDE = (BITS, STRIP_COUNTS, STRIP_OFFSETS, EXTRA_SAMPLES, SAMPLE_FORMAT)  # as they follow the directory
_STRIP_BYTES = 8192
_LONGEST_HEADER = 1 << 16  # bytes read and remembered as one header
_LARGEST_TILE = 2048  # pixels a side


class Layout(NamedTuple):
    """Where the pixels of one file lie and what they are."""

    offset: int | None  # of the first pixel byte; None: not one plain run of bytes, tifffile must decode
    shape: tuple[int, ...]  # (H, W) or (H, W, bands)
    dtype: np.dtype[Any]  # with the file's byte order


def read_into(path: Path | str, out: np.ndarray) -> None:
    """Read the first image of `path` into `out`, a writable C-contiguous array [H, W] or [H, W, bands]; to a TIFF one
    band is either.

    Safe from many threads, and releases the GIL while it reads.  Raises DataError, naming the file, where it
    is missing, unreadable, no TIFF, truncated, inconsistent, or of another shape or dtype than `out` (the
    byte order may differ); what `out` then holds is undefined.
    """
    if not (out.flags.c_contiguous and out.flags.writeable):
        raise ValueError("read_into needs a writable C-contiguous array")
    out = _flat(out)
    try:
        # O_NONBLOCK: opening a named pipe must fail below, not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise unreadable(path, error, REMEDY) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DataError("is not a regular file")
        if not _read_plain(descriptor, status.st_size, out):
            _read_any(descriptor, status.st_size, out)
    except DataError as error:
        raise DataError(f"{path}: {error}; {REMEDY}") from None
    except OSError as error:
        raise unreadable(path, error, REMEDY) from None
    finally:
        os.close(descriptor)


def _read_plain(descriptor: int, size: int, out: np.ndarray) -> bool:
    """Read header and pixels in one call, guessing that the pixels end the file; False where they do not."""
    lead = size - out.nbytes
    if not 8 <= lead <= _LONGEST_HEADER:
        return False
    header, pixels = bytearray(lead), out.reshape(-1).view(np.uint8).data
    done = os.preadv(descriptor, [header, pixels], 0)
    while lead <= done < size:
        more = os.preadv(descriptor, [pixels[done - lead :]], done)
        if more == 0:
            return False
        done += more
    if done != size:
        return False
    try:
        return strip_layout(bytes(header), size) == Layout(lead, out.shape, out.dtype)
    except DataError:
        return False  # the header may go on behind the guess; the slow way says what is wrong


def _read_any(descriptor: int, size: int, out: np.ndarray) -> None:
    """Read any valid TIFF the slow way, or raise DataError (without the path) for what is wrong with it."""
    if size > 16 * out.nbytes + (1 << 26):
        raise DataError(f"{size} bytes, far more than an image of {out.nbytes} bytes needs")
    with os.fdopen(os.dup(descriptor), "rb") as handle:
        handle.seek(0)
        data = handle.read()
    decode_into(data, out)


def decode_into(data: bytes, out: np.ndarray) -> None:
    """As `read_into`, of a file that is already in memory; the errors do not name it."""
    layout, out = _parse(data, len(data)), _flat(out)
    found, wanted = layout.dtype.newbyteorder("="), out.dtype.newbyteorder("=")
    if layout.shape != out.shape or found != wanted:
        raise DataError(f"holds {_words(layout.shape, found)}, where {_words(out.shape, wanted)} is wanted")
    if layout.offset is None:
        _check_inflated(data)
        out[...] = _decode(data, layout)
    else:
        out[...] = np.frombuffer(data, layout.dtype, out.size, layout.offset).reshape(out.shape)


def _flat(out: np.ndarray) -> np.ndarray:
    """As [H, W] where there is one band, as layouts have it."""
    return out[..., 0] if out.ndim == 3 and out.shape[2] == 1 else out


def _words(shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    return f"{' × '.join(map(str, shape))} {dtype}"


def _check_inflated(data: bytes) -> None:
    """Raises DataError where a piece inflates to more than its pixels: a thousandfold, it could take all memory."""
    tags, _, _ = _directory(data, len(data))
    kinds: dict[int, Any] = {8: zlib.decompressobj, 32946: zlib.decompressobj, 34925: lzma.LZMADecompressor}
    start = kinds.get(_one(tags, COMPRESSION, 1))
    if start is None:
        return  # at most 128-fold
    bands, bits = _one(tags, SAMPLES, 1), int(tags[BITS][0])
    pixels = (_one(tags, TILE_WIDTH) * _one(tags, TILE_LENGTH) if TILE_WIDTH in tags else
              _one(tags, WIDTH) * min(_one(tags, ROWS_PER_STRIP, _one(tags, LENGTH)), _one(tags, LENGTH)))
    most = pixels * bands * bits // 8
    tiled = TILE_WIDTH in tags
    for offset, count in zip(tags[TILE_OFFSETS if tiled else STRIP_OFFSETS].tolist(),
                             tags[TILE_COUNTS if tiled else STRIP_COUNTS].tolist()):
        try:
            inflated = start().decompress(data[offset:offset + count], max_length=most + 1)
        except (zlib.error, lzma.LZMAError) as error:
            raise DataError(f"cannot be decoded ({error})") from None
        if len(inflated) > most:
            raise DataError(f"damaged header (a piece inflates to more than its {most} bytes)")


def _decode(data: bytes, layout: Layout) -> np.ndarray:
    import tifffile  # here, because it is slow to import and the challenge's files never need it

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            # [planes, 1, H, W, bands per plane]
            pixels = file.pages[0].asarray(squeeze=False, maxworkers=1)
        return np.moveaxis(pixels[:, 0], 0, -2).reshape(layout.shape).astype(layout.dtype, casting="equiv")
    except Exception as error:  # a decoder of damaged bytes may raise anything
        raise DataError(f"cannot be decoded ({type(error).__name__}: {error})") from None


@lru_cache(maxsize=64)
def strip_layout(header: bytes, file_size: int) -> Layout:
    """The layout of a file of `file_size` bytes that begins with `header`.

    `header` must hold the directory and the arrays that it points to.  Raises DataError (without a path) for
    everything that is no consistent classic TIFF of 8-, 16-, 32- or 64-bit samples.
    """
    return _parse(header, file_size)


def _parse(data: bytes, file_size: int) -> Layout:
    tags, extents, order = _directory(data, file_size)
    width, length = _one(tags, WIDTH), _one(tags, LENGTH)
    bands, planar = _one(tags, SAMPLES, 1), _one(tags, PLANAR, 1)
    compression = _one(tags, COMPRESSION, 1)
    bits, kind = _alike(tags, BITS, bands, 1), _alike(tags, SAMPLE_FORMAT, bands, 1)
    if bits not in (8, 16, 32, 64) or kind not in _KINDS or (kind, bits) == (3, 8):
        raise DataError(f"samples of {bits} bits in format {kind} are not supported")
    if not 1 <= width * length * bands <= 1 << 48 or planar not in (1, 2):
        raise DataError(f"damaged header ({length} × {width} × {bands}, planar configuration {planar})")
    dtype = np.dtype(f"{order}{_KINDS[kind]}{bits // 8}")

    tiled = TILE_WIDTH in tags
    offsets = _array(tags, TILE_OFFSETS if tiled else STRIP_OFFSETS)
    counts = _array(tags, TILE_COUNTS if tiled else STRIP_COUNTS)
    planes = bands if planar == 2 else 1
    cut = _tile_pixels if tiled else _strip_pixels
    pixels = cut(tags, width, length, len(offsets) // planes)
    if not len(pixels) * planes == len(offsets) == len(counts):
        raise DataError(f"damaged header ({len(offsets)} offsets, {len(counts)} sizes of pieces)")
    full = np.tile(pixels, planes) * (bands // planes * dtype.itemsize)
    # Compressed pieces that all have their bare size are bare pixels under a damaged compression tag.
    if np.array_equal(counts, full) != (compression == 1) or counts.min() < 1:
        raise DataError(f"damaged header (pieces of a wrong size for compression {compression})")
    _check_extents(extents, offsets, counts, file_size)

    adjoining = bool(np.all(offsets[1:] == offsets[:-1] + counts[:-1]))
    plain = adjoining and not tiled and compression == planes == _one(tags, FILL_ORDER, 1) == 1
    shape = (length, width) if bands == 1 else (length, width, bands)
    return Layout(int(offsets[0]) if plain else None, shape, dtype)


def _directory(data: bytes, file_size: int) -> tuple[dict[int, np.ndarray], list[tuple[int, int]], str]:
    """Values of the tags that are read here, the (start, end) of every part of the header, the byte order."""
    extents: list[tuple[int, int]] = []

    def take(start: int, count: int) -> bytes:
        if start + count > file_size:
            raise DataError(f"truncated: {file_size} of at least {start + count} bytes")
        if start + count > len(data):
            raise DataError(f"the header needs {start + count} bytes, {len(data)} given")
        extents.append((start, start + count))
        return data[start : start + count]

    if not data:
        raise DataError("is empty")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        raise DataError(f"is not a TIFF (it begins with {data[:8]!r})")
    (start,) = struct.unpack(f"{order}I", take(0, 8)[4:])
    (count,) = struct.unpack(f"{order}H", take(start, 2))
    table = take(start + 2, 12 * count + 4)
    tags: dict[int, np.ndarray] = {}
    for tag, field, number, value in struct.iter_unpack(f"{order}HHI4s", table[:-4]):
        if tag not in _READ:
            continue
        if field not in _INTEGERS or number == 0 or tag in tags:
            raise DataError(f"damaged header (tag {tag})")
        dtype = np.dtype(order + _INTEGERS[field])
        if number * dtype.itemsize > 4:
            value = take(struct.unpack(f"{order}I", value)[0], number * dtype.itemsize)
        tags[tag] = np.frombuffer(value, dtype, number).astype(np.int64)
    return tags, extents, order


def _array(tags: dict[int, np.ndarray], tag: int) -> np.ndarray:
    if tag not in tags:
        raise DataError(f"damaged header (tag {tag} is missing)")
    return tags[tag]


def _one(tags: dict[int, np.ndarray], tag: int, default: int | None = None) -> int:
    if tag not in tags and default is not None:
        return default
    values = _array(tags, tag)
    if len(values) != 1:
        raise DataError(f"damaged header ({len(values)} values of tag {tag})")
    return int(values[0])


def _alike(tags: dict[int, np.ndarray], tag: int, bands: int, default: int) -> int:
    """The value that all bands share."""
    values = tags.get(tag, np.array([default]))
    if len(values) not in (1, bands) or np.any(values != values[0]):
        raise DataError(f"bands of different kinds (tag {tag} is {values[:16].tolist()})")
    return int(values[0])


def _strip_pixels(tags: dict[int, np.ndarray], width: int, length: int, found: int) -> np.ndarray:
    """Pixels in each of the `found` strips of a plane, [strips]."""
    rows = min(_one(tags, ROWS_PER_STRIP, length), length)
    if rows < 1 or math.ceil(length / rows) != found:
        raise DataError(f"damaged header ({found} strips of {rows} rows for {length} rows)")
    return np.minimum(length - np.arange(0, length, rows), rows) * width


def _tile_pixels(tags: dict[int, np.ndarray], width: int, length: int, found: int) -> np.ndarray:
    """Pixels in each of the `found` tiles of a plane, [tiles]."""
    across, down = _one(tags, TILE_WIDTH), _one(tags, TILE_LENGTH)
    if not (1 <= across <= _LARGEST_TILE and 1 <= down <= _LARGEST_TILE) or STRIP_OFFSETS in tags:
        raise DataError(f"tiles of {down} × {across} pixels are not supported")
    if math.ceil(width / across) * math.ceil(length / down) != found:
        raise DataError(f"damaged header ({found} tiles of {down} × {across} pixels)")
    return np.full(found, across * down)


def _check_extents(header: list[tuple[int, int]], offsets: np.ndarray, counts: np.ndarray, size: int) -> None:
    """Every part lies in the file, and none on another: a flipped bit in an offset breaks one of the two."""
    end = int((offsets + counts).max())
    if end > size:
        raise DataError(f"truncated: {size} of {end} bytes")
    starts = np.concatenate([[part[0] for part in header], offsets])
    ends = np.concatenate([[part[1] for part in header], offsets + counts])
    order = np.argsort(starts)
    if np.any(starts[order][1:] < ends[order][:-1]):
        raise DataError("damaged header (its parts overlap)")


def encode(array: np.ndarray, rows_per_strip: int | None = None) -> bytes:
    """The uncompressed TIFF of `array`, [H, W] or [H, W, bands] of integers or floats.

    Byte for byte what the challenge's files are for their shapes and dtypes.  By default a strip takes 8 KiB,
    at least one row: 2 rows of Sentinel-1, 1 of Sentinel-2, 8 of biomass.  Raises DataError where the file
    would pass 4 GiB, the reach of classic TIFF.
    """
    return _head(array, rows_per_strip) + _pixels(array).tobytes()


def _pixels(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))


def _head(array: np.ndarray, rows_per_strip: int | None) -> bytes:
    """All bytes before the pixels."""
    if array.ndim not in (2, 3) or array.size == 0 or array.dtype.kind not in _KINDS.values():
        raise ValueError(f"no TIFF for an array {array.shape} of {array.dtype}")
    length, width, *rest = array.shape
    bands, itemsize = rest[0] if rest else 1, array.dtype.itemsize
    row = width * bands * itemsize
    rows = rows_per_strip or min(length, max(1, _STRIP_BYTES // row))
    counts = [min(rows, length - top) * row for top in range(0, length, rows)]
    kind = next(number for number, letter in _KINDS.items() if letter == array.dtype.kind)
    values = {WIDTH: [width], LENGTH: [length], BITS: [8 * itemsize] * bands, COMPRESSION: [1],
              PHOTOMETRIC: [1], STRIP_OFFSETS: [], SAMPLES: [bands], ROWS_PER_STRIP: [rows],
              STRIP_COUNTS: counts, PLANAR: [1], EXTRA_SAMPLES: [0] * (bands - 1),
              SAMPLE_FORMAT: [kind] * bands}
    if bands == 1:
        del values[EXTRA_SAMPLES]
    header = _header(values)
    if len(header) + array.nbytes > 0xFFFFFFFF:
        raise DataError(f"{array.nbytes} bytes of pixels pass the 4 GiB of classic TIFF; write it in parts")
    return header


def _header(values: dict[int, list[int]]) -> bytes:
    """All bytes before the pixels, from the tags in ascending order; the strips' offsets are filled in."""
    packed = {tag: np.array(v, "<u2" if max(v, default=0) < 1 << 16 else "<u4") for tag, v in values.items()}
    counts = packed[STRIP_COUNTS].astype(np.int64)
    packed[STRIP_OFFSETS] = np.zeros(len(counts), "<u4")
    outside = [tag for tag in _OUTSIDE if tag in packed and packed[tag].nbytes > 4]
    ends = 8 + 2 + 12 * len(packed) + 4 + np.cumsum([0, *(packed[tag].nbytes for tag in outside)])
    packed[STRIP_OFFSETS] = (ends[-1] + np.cumsum(counts) - counts).astype("<u4")
    places = dict(zip(outside, ends.tolist()))
    directory = b"".join(
        struct.pack("<HHI", tag, 3 if v.itemsize == 2 else 4, len(v))
        + (struct.pack("<I", places[tag]) if tag in places else v.tobytes().ljust(4, b"\0"))
        for tag, v in packed.items()
    )
    arrays = b"".join(packed[tag].tobytes() for tag in outside)
    return struct.pack("<2sHIH", b"II", 42, 8, len(packed)) + directory + bytes(4) + arrays


def write(path: Path | str, array: np.ndarray, rows_per_strip: int | None = None) -> None:
    """Write `encode(array, rows_per_strip)` to `path`, whole or not at all, and without a copy of the pixels.

    Raises DataError, naming the file, where it cannot be written.
    """
    write_bytes(path, _head(array, rows_per_strip), _pixels(array).reshape(-1).view(np.uint8).data)


def write_bytes(path: Path | str, *parts: bytes | memoryview) -> None:
    """Write a file whole or not at all; a full disk or a read-only folder is a DataError naming the file."""
    try:
        with atomic_write(path) as handle:
            for part in parts:
                handle.write(part)
    except OSError as error:
        reason = error.strerror
        raise DataError(f"{path}: cannot be written ({reason}); make room or write elsewhere") from None


def write_map(path: Path | str, biomass: np.ndarray) -> None:
    """Write a map [H, W] as float32, in the layout of BioMassters' labels."""
    if biomass.ndim != 2:
        raise ValueError(f"a map is [H, W], not {biomass.shape}")
    write(path, biomass.astype(np.float32, copy=False))
