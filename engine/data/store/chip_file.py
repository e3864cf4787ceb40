"""One packed chip as a file: a safetensors container that holds LZ4 blocks.  docs/packed-format.md is its description.

A block inflates to 64 KiB: one byte-plane of one band-month.  Blocks lie end to end, the label's first, then month by
month, so that the kept months of a chip can be read without the others.  A month without a file takes no blocks, and
neither does a Sentinel-1 band in which a month has no value at all.  Everything before the blocks (the head) is
covered by one CRC-32, the label's blocks and each month's by one each, and the head says how long the file is: no bit
can flip, and no byte be lost, unseen.

`engine.data.store.pack` writes these files for a whole tree, `engine.data.store.source` reads them for the loader.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lz4.block
import numpy as np

from engine.base.errors import DataError
from engine.data.dataset import AGBM_DTYPE, S1, S1_NODATA, S2, SENSORS, TILE, T

FORMAT, VERSION = "biomass-chip", 1
SUFFIX = ".safetensors"
PLANE = TILE * TILE  # bytes of an inflated block
LABEL_PLANES = AGBM_DTYPE.itemsize
LEVEL = 9  # of LZ4-HC: 12 takes three times as long for 2 % less (docs/packed-format.md)
MANIFEST, CHIPS = "manifest.json", "chips"  # of a store: the file that is written last, the folder of the packed files
REMEDY = "pack the chip again (`launch/prepare.py pack` with the file removed) or copy it from where it is whole"

# Sentinel-1 in whole steps of 0.01 dB: code 0 is nodata, CODE_ZERO is 0 dB
CODE_STEP, CODE_ZERO, CODE_NODATA = 0.01, 32768, 0
CODE_LOW = np.rint(S1.low / CODE_STEP).astype(np.int64) + CODE_ZERO  # [4]: the codes of `S1.low`, exact
CODES_LOW = np.concatenate([CODE_LOW, S2.low])  # [C]: of all bands as they lie in codes, what becomes 0 when scaled,
CODES_SPAN = np.concatenate([(S1.high - S1.low) / CODE_STEP, S2.high - S2.low])  # and what is divided by then
STEPS, EXACT = "0.01 dB", "float32"  # how Sentinel-1 is stored

_LABEL_SECTION, _HEAD_CRC = 0, T + 1  # places in the table of checksums; 1..T are the months
_LARGEST_BLOCK = PLANE + PLANE // 255 + 16  # LZ4_compressBound
_LONGEST_HEADER = 1 << 20
_FIRST_READ = 1 << 14  # bytes; holds the head of nearly every chip
_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("u1"), "U32": np.dtype("<u4")}


class Head(NamedTuple):
    """What a packed file says before its blocks."""

    chip: str
    split: str
    s1: str  # STEPS or EXACT
    sources: dict[str, tuple[int, int]]  # file name -> (size, POSIX cksum) of the TIFFs it was made from
    label: dict[str, float] | None  # min, max, mean, std of the label, t/ha
    months: np.ndarray  # [len(SENSORS), T] bool: there was a file
    nodata: np.ndarray  # [T, 4] uint8: 0 no pixel of the band is nodata, 1 some are, 2 all (then without blocks)
    sizes: np.ndarray  # [T, planes] uint32: bytes of each block, 0 for none; Sentinel-1 first, low bytes first
    label_sizes: np.ndarray  # [LABEL_PLANES] uint32
    crc: np.ndarray  # [T + 2] uint32: label, months, head
    start: int  # of the first block
    end: int  # of the file

    @property
    def s1_planes(self) -> int:
        return s1_planes(self.s1)

    @property
    def offsets(self) -> np.ndarray:
        """[T, planes] int64: where each block begins in the file."""
        ends = np.cumsum(self.sizes, dtype=np.int64).reshape(self.sizes.shape)
        return self.start + int(self.label_sizes.sum()) + ends - self.sizes

    def section(self, number: int) -> tuple[int, int]:
        """(first byte, size) of a section: 0 the label, 1 + t month t."""
        label = int(self.label_sizes.sum())
        if number == _LABEL_SECTION:
            return self.start, label
        month = number - 1
        return self.start + label + int(self.sizes[:month].sum()), int(self.sizes[month].sum())


class Arrays(NamedTuple):
    """A chip's content, all twelve months; where `Head.months` has no file, the values are ignored."""

    s1: np.ndarray  # [T, H, W, 4] float32, dB, S1_NODATA where there is nothing
    s2: np.ndarray  # [T, H, W, 11] uint16
    label: np.ndarray | None  # [H, W] float32, t/ha


def s1_planes(s1: str) -> int:
    """Bytes a Sentinel-1 value takes."""
    return {STEPS: 2, EXACT: 4}[s1]


def s1_codes(db: np.ndarray) -> np.ndarray:
    """dB float32 (S1_NODATA for nothing) → uint16 codes.  Raises DataError for values that have none."""
    nodata = db == S1_NODATA
    steps = np.rint(np.where(nodata, 0, db).astype(np.float64) / CODE_STEP) + CODE_ZERO
    if not (steps.min() > CODE_NODATA and steps.max() < 1 << 16):  # NaN fails too
        limit = (CODE_ZERO - 1) * CODE_STEP
        raise DataError(f"holds NaN or values beyond ±{limit:.2f} dB, which steps of {CODE_STEP} dB do not reach; "
                        f"download the file again, or pack with --lossless")
    return np.where(nodata, CODE_NODATA, steps).astype(np.uint16)


def s1_db(codes: np.ndarray) -> np.ndarray:
    """The inverse of `s1_codes`, to half a step: float32 dB, S1_NODATA for nothing."""
    db = ((codes.astype(np.int32) - CODE_ZERO) / (1 / CODE_STEP)).astype(np.float32)
    db[codes == CODE_NODATA] = S1_NODATA
    return db


# Writing -------------------------------------------------------------------------------------------------------


def encode(chip: str, split: str, arrays: Arrays, months: np.ndarray, s1: str,
           sources: Mapping[str, tuple[int, int]]) -> bytes:
    """The packed file of a chip.  The same input gives the same bytes.

    `months` [len(SENSORS), T] bool says which files exist.  Raises DataError (without naming a file) for NaN, and
    for Sentinel-1 values out of the reach of `s1` STEPS.
    """
    planes = s1_planes(s1)
    sizes = np.zeros((T, planes * len(S1.bands) + 2 * len(S2.bands)), "<u4")
    nodata = np.zeros((T, len(S1.bands)), np.uint8)
    sections: list[bytes] = []
    for t in range(T):
        blocks: list[bytes] = []
        if months[0, t]:
            nodata[t] = _nodata(arrays.s1[t])
            values = s1_codes(arrays.s1[t]) if s1 == STEPS else _finite(arrays.s1[t])
            for band in range(len(S1.bands)):
                blocks += [b""] * planes if nodata[t, band] == 2 else _planes(values[..., band])
        else:
            nodata[t] = 2
            blocks += [b""] * (planes * len(S1.bands))
        for band in range(len(S2.bands)):
            blocks += _planes(arrays.s2[t, ..., band]) if months[1, t] else [b""] * 2
        sizes[t] = [len(block) for block in blocks]
        sections.append(b"".join(blocks))
    label = _planes(_finite(arrays.label)) if arrays.label is not None else [b""] * LABEL_PLANES
    sections.insert(_LABEL_SECTION, b"".join(label))
    tables = {
        "months": months.astype(np.uint8),
        "nodata": nodata,
        "sizes": sizes,
        "label": np.array([len(block) for block in label], "<u4"),
        "crc32": np.array([*(zlib.crc32(section) for section in sections), 0], "<u4"),
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "chip": chip, "split": split, "s1": s1,
                "sources": _json({name: list(sources[name]) for name in sorted(sources)}),
                "label": _json(_statistics(arrays.label))}
    head = _header(metadata, tables, sum(map(len, sections)))
    head += b"".join(table.tobytes() for table in tables.values())[:-4]
    return head + struct.pack("<I", zlib.crc32(head)) + b"".join(sections)


def _nodata(s1: np.ndarray) -> np.ndarray:
    """[4]: no, some or all pixels of each band of [H, W, 4] are nodata."""
    mask = s1 == S1_NODATA
    return mask.any((0, 1)).astype(np.uint8) + mask.all((0, 1))


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise DataError("holds NaN or infinity; download the file again or remove the chip")
    return values


def _planes(values: np.ndarray) -> list[bytes]:
    """[H, W] → the LZ4 block of each byte-plane, the lowest byte first."""
    planes = np.ascontiguousarray(values).view(np.uint8).reshape(PLANE, -1).T
    return [lz4.block.compress(plane.tobytes(), mode="high_compression", compression=LEVEL, store_size=False)
            for plane in planes]


def _statistics(label: np.ndarray | None) -> dict[str, float] | None:
    if label is None:
        return None
    return {"min": float(label.min()), "max": float(label.max()), "mean": float(label.mean(dtype=np.float64)),
            "std": float(label.std(dtype=np.float64))}


def _header(metadata: Mapping[str, str], tables: Mapping[str, np.ndarray], blocks: int) -> bytes:
    """The safetensors header: its length, then JSON padded to 8 bytes (github.com/huggingface/safetensors)."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, table in tables.items():
        header[name] = {"dtype": names[table.dtype], "shape": list(table.shape),
                        "data_offsets": [end, end := end + table.nbytes]}
    header["blocks"] = {"dtype": "U8", "shape": [blocks], "data_offsets": [end, end + blocks]}
    text = _json(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


# Reading -------------------------------------------------------------------------------------------------------


def read_head(path: Path | str) -> Head:
    """The head of a packed file, checked against its checksum and the file's size.

    Raises DataError, naming the file, where it is missing, damaged, truncated, no packed chip, or of another version.
    """
    descriptor = open_file(path)
    try:
        return head_of(descriptor, path)
    finally:
        os.close(descriptor)


def open_file(path: Path | str) -> int:
    """A descriptor to read from.  Raises DataError, naming the file."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe must fail below, not wait for a writer
    except FileNotFoundError:
        raise DataError(f"{path}: is missing; {REMEDY}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}); check its permissions") from None


def head_of(descriptor: int, path: Path | str) -> Head:
    """As `read_head`, of an open file."""
    try:
        size = os.fstat(descriptor).st_size
        data = os.pread(descriptor, _FIRST_READ, 0)
        if len(data) < 8:
            raise DataError(f"is no packed chip ({size} bytes)")
        (length,) = struct.unpack("<Q", data[:8])
        if length > _LONGEST_HEADER:
            raise DataError("is damaged, or no packed chip (its header has no end)")
        # Tables of the lossless form, the longer one
        most = 8 + length + (len(SENSORS) + len(S1.bands)) * T + 4 * (38 * T + LABEL_PLANES + T + 2)
        if len(data) < most:
            data = os.pread(descriptor, most, 0)
        return _parse(data, length, size)
    except DataError as error:
        raise DataError(f"{path}: {error}; {REMEDY}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the disk, then {REMEDY}") from None


def _parse(data: bytes, length: int, size: int) -> Head:
    try:
        header = json.loads(data[8:8 + length])
        metadata = header["__metadata__"]
        found, version = metadata["format"], metadata["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError("is damaged, or no packed chip (its header cannot be read)") from None
    if found == FORMAT and version != str(VERSION):
        raise DataError(f"is of format version {version}, this program reads {VERSION}; take the program that wrote "
                        f"it, or pack the TIFFs anew")
    start = 8 + length
    try:
        first, end = header["crc32"]["data_offsets"]
        if header["blocks"]["data_offsets"][0] != end or end - first != 4 * (T + 2):
            raise DataError("is damaged (its tables do not meet)")
        head_end = start + end
        (expected,) = struct.unpack("<I", data[head_end - 4:head_end])
        if zlib.crc32(data[:head_end - 4]) != expected:
            raise DataError("is damaged (the checksum of its head differs)")
        # From here on the bytes are those that were written; what follows catches other programs' files.
        tables = {name: _table(data, start, header[name]) for name in ("months", "nodata", "sizes", "label", "crc32")}
        s1 = metadata["s1"]
        shapes = {"months": (len(SENSORS), T), "nodata": (T, len(S1.bands)), "label": (LABEL_PLANES,),
                  "sizes": (T, s1_planes(s1) * len(S1.bands) + 2 * len(S2.bands)), "crc32": (T + 2,)}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise DataError("is no packed chip (its metadata are not texts)")
        if found != FORMAT or any(tables[name].shape != shape for name, shape in shapes.items()):
            raise DataError(f"is no packed chip (format {found!r})")
        blocks = int(tables["sizes"].sum()) + int(tables["label"].sum())
        if header != json.loads(_header(metadata, tables, blocks)[8:]):
            raise DataError("is no packed chip (its tables lie elsewhere)")
        sources = {name: (int(n), int(cksum)) for name, (n, cksum) in json.loads(metadata["sources"]).items()}
        head = Head(metadata["chip"], metadata["split"], s1, sources, json.loads(metadata["label"]),
                    tables["months"].astype(bool), tables["nodata"], tables["sizes"], tables["label"],
                    tables["crc32"], head_end, head_end + blocks)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, struct.error):
        raise DataError("is damaged, or no packed chip (its header does not fit its tables)") from None
    if max(head.sizes.max(), head.label_sizes.max()) > _LARGEST_BLOCK:
        raise DataError("is damaged (a block is larger than any can be)")
    if head.end != size:
        raise DataError(f"is truncated or has grown: {size} bytes, {head.end} were written")
    return head


def _table(data: bytes, start: int, entry: Mapping[str, Any]) -> np.ndarray:
    first, end = entry["data_offsets"]
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    if not 0 <= first <= end or math.prod(shape) * dtype.itemsize != end - first:
        raise ValueError("a table's size")
    return np.frombuffer(data, dtype, math.prod(shape), start + first).reshape(shape)


def read_section(descriptor: int, head: Head, number: int, path: Path | str, check: bool) -> memoryview:
    """The blocks of a section (0 the label, 1 + t month t); `check` compares them with their checksum."""
    data = memoryview(bytearray(head.section(number)[1]))
    read_into(descriptor, head, number, data, path, check)
    return data


def read_into(descriptor: int, head: Head, number: int, out: memoryview, path: Path | str, check: bool) -> None:
    """As `read_section`, into `out`, which has the section's size."""
    try:
        read = os.preadv(descriptor, [out], head.section(number)[0]) if len(out) else 0
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the disk, then {REMEDY}") from None
    if read != len(out):
        raise DataError(f"{path}: is truncated; {REMEDY}")
    if check:
        check_section(out, head, number, path)


def check_section(data: bytes | memoryview, head: Head, number: int, path: Path | str) -> None:
    """Raises DataError where a section differs from what was written."""
    if zlib.crc32(data) != head.crc[number]:
        what = "label" if number == _LABEL_SECTION else f"month {number - 1:02d}"
        raise DataError(f"{path}: is damaged (the checksum of its {what} differs); {REMEDY}")


def inflate(block: bytes | memoryview, path: Path | str) -> np.ndarray:
    """[PLANE] uint8.  Releases the GIL.  Raises DataError for a block that is none."""
    try:
        plane = lz4.block.decompress(block, uncompressed_size=PLANE)
    except lz4.block.LZ4BlockError:
        plane = b""
    if len(plane) != PLANE:
        raise DataError(f"{path}: is damaged (a block does not inflate); {REMEDY}")
    return np.frombuffer(plane, np.uint8)


def verify_file(path: Path | str) -> Head:
    """Check every byte of a packed file.  Raises DataError."""
    descriptor = open_file(path)
    try:
        head = head_of(descriptor, path)
        if head.chip != Path(path).name.removesuffix(SUFFIX):
            raise DataError(f"{path}: holds chip {head.chip}; {REMEDY}")
        for number in range(T + 1):
            data = memoryview(read_section(descriptor, head, number, path, check=True))
            sizes = head.label_sizes if number == 0 else head.sizes[number - 1]
            for size in sizes[sizes > 0].tolist():
                inflate(data[:size], path)
                data = data[size:]
        return head
    finally:
        os.close(descriptor)
