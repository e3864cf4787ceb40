"""One packed chip as a file: a safetensors container that holds LZ4 blocks.  docs/packed-format.md is its description.

A block inflates to tile × tile bytes: one byte-plane of one band of one image.  Blocks lie end to end, the label's
first, then those of images that stand for all steps, then step by step, so that the kept steps of a chip can be read
without the others.  A step without a file takes no blocks, and neither does a band that is nodata everywhere.
Everything before the blocks (the head) is covered by one CRC-32, each section of blocks by one each, and the head says
how long the file is: no bit can flip, and no byte be lost, unseen.  What the values are, the head says too: it holds
the description of the data set.

Values are stored as 16-bit codes, or, where a sensor has floats and nothing of them is to be lost, as float32.

`engine.data.store.pack` writes these files for a whole tree, `engine.data.store.source` reads them for the loader.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lz4.block
import numpy as np

from engine.base.errors import DataError
from engine.base.files import unreadable
from engine.base.texts import parse_json
from engine.data.dataset import LABEL_DTYPE, Dataset, Sensor, parse_dataset

FORMAT, VERSION = "biomass-chip", 2
SUFFIX = ".safetensors"
LABEL_PLANES = LABEL_DTYPE.itemsize
LEVEL = 9  # of LZ4-HC: 12 takes three times as long for 2 % less (docs/packed-format.md)
MANIFEST, CHIPS = "manifest.json", "chips"  # of a store: the file that is written last, the folder of the packed files
REMEDY = "pack the chip again (`launch/prepare.py pack` with the file removed) or copy it from where it is whole"
STEPS, EXACT = "steps", "exact"  # how floats are stored: in whole steps of `packed_step`, or as they are

LABEL, STATIC, FIRST_STEP = 0, 1, 2  # sections of blocks, in their order
_LONGEST_HEADER = 1 << 20
_FIRST_READ = 1 << 14  # bytes; holds the head of nearly every chip
_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("u1"), "U32": np.dtype("<u4")}


class Planes(NamedTuple):
    """The byte-planes of a data set's images, in the order of the model's channels: bands, low bytes first."""

    sensor: np.ndarray  # [n] int64: of each plane, which sensor
    band: np.ndarray  # [n] int64: and channel
    byte: np.ndarray  # [n] int64: and byte of the value
    static: np.ndarray  # [n] bool
    bytes: tuple[int, ...]  # of each sensor, that a value takes


@functools.lru_cache(maxsize=64)
def planes_of(dataset: Dataset, values: str) -> Planes:
    """How images are stored where floats are kept as `values` (STEPS or EXACT)."""
    rows, sizes, channel = [], [], 0
    for number, sensor in enumerate(dataset.sensors):
        size = 2 if is_coded(sensor, values) else 4
        sizes.append(size)
        for _ in sensor.bands:
            rows += [(number, channel, byte, sensor.static) for byte in range(size)]
            channel += 1
    table = np.array(rows, np.int64).reshape(-1, 4)
    return Planes(table[:, 0], table[:, 1], table[:, 2], table[:, 3].astype(bool), tuple(sizes))


def is_coded(sensor: Sensor, values: str) -> bool:
    """Whether `sensor` is stored in 16-bit codes."""
    return sensor.coded and not (values == EXACT and sensor.dtype == "float32")


class Head(NamedTuple):
    """What a packed file says before its blocks."""

    chip: str
    split: str
    dataset: Dataset
    values: str  # STEPS or EXACT
    sources: dict[str, tuple[int, int]]  # file name -> (size, POSIX cksum) of the TIFFs it was made from
    label: dict[str, float | None] | None  # min, max, mean, std of the label, in the target's unit; None for no target
    months: np.ndarray  # [sensors, T] bool: there was a file
    nodata: np.ndarray  # [T, C] uint8: 0 no pixel of the band is nodata, 1 some are, 2 all (then without blocks)
    sizes: np.ndarray  # [T, planes] uint32: bytes of each block, 0 for none; those of static sensors in all rows alike
    label_sizes: np.ndarray  # [LABEL_PLANES] uint32
    crc: np.ndarray  # [T + 3] uint32: sections, head
    places: tuple[int, ...]  # [T + 3] where each section begins, and the file ends

    @property
    def planes(self) -> Planes:
        return planes_of(self.dataset, self.values)

    @property
    def start(self) -> int:
        """Of the first block."""
        return self.places[0]

    @property
    def end(self) -> int:
        """Of the file."""
        return self.places[-1]

    def section(self, number: int) -> tuple[int, int]:
        """(first byte, size) of a section: LABEL, STATIC, or FIRST_STEP + t."""
        return self.places[number], self.places[number + 1] - self.places[number]


class Arrays(NamedTuple):
    """A chip's content, all steps; where `Head.months` has no file, the values are ignored."""

    images: tuple[np.ndarray, ...]  # of each sensor [T, tile, tile, bands] as in its files; [1, …] where it is static
    label: np.ndarray | None  # [tile, tile] float32


def codes(values: np.ndarray, sensor: Sensor) -> np.ndarray:
    """Values of `sensor` → uint16 codes.  Raises DataError for floats that have none."""
    if sensor.dtype != "float32":
        return (values.astype(np.int32) + sensor.code_zero).astype(np.uint16)
    assert sensor.packed_step is not None
    step, zero = sensor.packed_step, sensor.code_zero
    nodata = values == np.float32(sensor.nodata) if sensor.nodata is not None else np.zeros(values.shape, bool)
    found = np.rint(np.where(nodata, 0, values).astype(np.float64) / step) + zero
    if not (found.min() > 0 and found.max() < 1 << 16):  # NaN fails too
        unit = f" {sensor.unit}" if sensor.unit else ""
        raise DataError(f"holds NaN or values beyond ±{(zero - 1) * step:.2f}{unit}, which steps of {step:g}{unit} do "
                        f"not reach; download the file again, or pack with --lossless")
    return np.where(nodata, 0, found).astype(np.uint16)


def decoded(found: np.ndarray, sensor: Sensor) -> np.ndarray:
    """The inverse of `codes`, to half a step: in the dtype of the sensor's files."""
    if sensor.packed_step is None:
        return (found.astype(np.int32) - sensor.code_zero).astype(sensor.values)
    values = ((found.astype(np.int32) - sensor.code_zero) / (1 / sensor.packed_step)).astype(np.float32)
    if sensor.nodata is not None:
        nodata = np.float32(sensor.nodata)
        values[values == nodata] = np.nextafter(nodata, np.float32(np.inf))  # what was rounded to it was seen
        values[found == sensor.code_nodata] = nodata
    return values


# Writing -------------------------------------------------------------------------------------------------------


def encode(chip: str, split: str, dataset: Dataset, arrays: Arrays, months: np.ndarray, values: str,
           sources: Mapping[str, tuple[int, int]]) -> bytes:
    """The packed file of a chip.  The same input gives the same bytes.

    `months` [sensors, T] bool says which files exist.  Raises DataError (without naming a file) for NaN, and for floats
    out of the reach of `values` STEPS.
    """
    planes = planes_of(dataset, values)
    sizes = np.zeros((dataset.months, len(planes.band)), "<u4")
    nodata = np.zeros((dataset.months, dataset.channels), np.uint8)
    sections: list[bytes] = [b"", b""]
    for t in range(dataset.months):
        section: list[bytes] = []
        for number, sensor in enumerate(dataset.sensors):
            if sensor.static and t:
                continue
            there, at = bool(months[number, t]), np.flatnonzero(planes.sensor == number)
            marks, blocks = _image(arrays.images[number][0 if sensor.static else t] if there else None, dataset, sensor,
                                   values)
            rows = slice(None) if sensor.static else t
            nodata[rows, np.unique(planes.band[at])] = marks
            sizes[rows, at] = [len(block) for block in blocks]
            if sensor.static:
                sections[STATIC] += b"".join(blocks)
            else:
                section += blocks
        sections.append(b"".join(section))
    label = _planes(_finite(arrays.label)) if arrays.label is not None else [b""] * LABEL_PLANES
    sections[LABEL] = b"".join(label)
    tables = {
        "months": months.astype(np.uint8),
        "nodata": nodata,
        "sizes": sizes,
        "label": np.array([len(block) for block in label], "<u4"),
        "crc32": np.array([*(zlib.crc32(section) for section in sections), 0], "<u4"),
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "chip": chip, "split": split, "values": values,
                "dataset": _json(dataset.dump()),
                "sources": _json({name: list(sources[name]) for name in sorted(sources)}),
                "label": _json(_statistics(arrays.label, dataset.target.nodata))}
    head = _header(metadata, tables, sum(map(len, sections)))
    head += b"".join(table.tobytes() for table in tables.values())[:-4]
    return head + struct.pack("<I", zlib.crc32(head)) + b"".join(sections)


def _image(image: np.ndarray | None, dataset: Dataset, sensor: Sensor, values: str) -> tuple[np.ndarray, list[bytes]]:
    """`Head.nodata` [bands] and blocks of an image [tile, tile, bands], or of none."""
    coded = is_coded(sensor, values)
    size = 2 if coded else sensor.values.itemsize
    if image is None:
        return np.full(len(sensor.bands), 2, np.uint8), [b""] * (size * len(sensor.bands))
    marks = _nodata(image, sensor)
    stored = codes(image, sensor) if coded else _finite(image)
    blocks: list[bytes] = []
    for band in range(len(sensor.bands)):
        blocks += [b""] * size if marks[band] == 2 else _planes(stored[..., band])
    return marks, blocks


def _nodata(image: np.ndarray, sensor: Sensor) -> np.ndarray:
    """[bands] uint8: no, some or all pixels of each band of [H, W, bands] are nodata."""
    if sensor.nodata is None:
        return np.zeros(len(sensor.bands), np.uint8)
    mask = image == image.dtype.type(sensor.nodata)
    return mask.any((0, 1)).astype(np.uint8) + mask.all((0, 1))


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise DataError("holds NaN or infinity; download the file again or remove the chip")
    return values


def _planes(values: np.ndarray) -> list[bytes]:
    """[H, W] → the LZ4 block of each byte-plane, the lowest byte first."""
    planes = np.ascontiguousarray(values).view(np.uint8).reshape(values.size, -1).T
    return [lz4.block.compress(plane.tobytes(), mode="high_compression", compression=LEVEL, store_size=False)
            for plane in planes]


def _statistics(label: np.ndarray | None, nodata: float | None) -> dict[str, float | None] | None:
    """Of what is not nodata."""
    if label is None:
        return None
    if nodata is not None:
        label = label[label != np.float32(nodata)]
        if not label.size:
            return dict.fromkeys(("min", "max", "mean", "std"))
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
    except OSError as error:
        raise unreadable(path, error, REMEDY) from None


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
        most = 8 + length + _tables(data[8:8 + length])
        if len(data) < most:
            data = os.pread(descriptor, most, 0)
        return _parse(data, length, size)
    except DataError as error:
        raise DataError(f"{path}: {error}; {REMEDY}") from None
    except OSError as error:
        raise unreadable(path, error, REMEDY) from None


def _tables(header: bytes) -> int:
    """Bytes between the header and the blocks, where it says so: what is read ahead and not trusted."""
    match = re.search(rb'"crc32":\{"dtype":"U32","shape":\[\d+\],"data_offsets":\[\d+,(\d{1,9})\]', header)
    return min(int(match[1]), _LONGEST_HEADER) if match else 0


def _parse(data: bytes, length: int, size: int) -> Head:
    try:
        header = parse_json(data[8:8 + length])
        metadata = header["__metadata__"]
        found, version = metadata["format"], metadata["version"]
    except (ValueError, KeyError, TypeError):
        raise DataError("is damaged, or no packed chip (its header cannot be read)") from None
    if found == FORMAT and version != str(VERSION):
        raise DataError(f"is of format version {version}, this program reads {VERSION}; take the program that wrote "
                        f"it, or pack the TIFFs anew")
    start = 8 + length
    try:
        _, end = header["crc32"]["data_offsets"]
        if header["blocks"]["data_offsets"][0] != end:
            raise DataError("is damaged (its tables do not meet)")
        head_end = start + end
        (expected,) = struct.unpack("<I", data[head_end - 4:head_end])
        if zlib.crc32(data[:head_end - 4]) != expected:
            raise DataError("is damaged (the checksum of its head differs)")
        # From here on the bytes are those that were written; what follows catches other programs' files.
        if not all(isinstance(value, str) for value in metadata.values()):
            raise DataError("is no packed chip (its metadata are not texts)")
        dataset, values = _dataset(metadata["dataset"]), metadata["values"]
        tables = {name: _table(data, start, header[name]) for name in ("months", "nodata", "sizes", "label", "crc32")}
        steps, planes = dataset.months, len(planes_of(dataset, values).band)
        shapes = {"months": (len(dataset.sensors), steps), "nodata": (steps, dataset.channels),
                  "label": (LABEL_PLANES,), "sizes": (steps, planes), "crc32": (steps + 3,)}
        if found != FORMAT or values not in (STEPS, EXACT) or any(
                tables[name].shape != shape for name, shape in shapes.items()):
            raise DataError(f"is no packed chip (format {found!r})")
        static = planes_of(dataset, values).static
        if (tables["sizes"][:, static] != tables["sizes"][0, static]).any():  # the kernel goes where they say
            raise DataError("is no packed chip (static images differ from step to step)")
        sections = [tables["label"].sum(), tables["sizes"][0, static].sum(), *tables["sizes"][:, ~static].sum(1)]
        places = tuple(itertools.accumulate(map(int, sections), initial=head_end))
        blocks = places[-1] - head_end
        if header != parse_json(_header(metadata, tables, blocks)[8:]):
            raise DataError("is no packed chip (its tables lie elsewhere)")
        sources = {name: (int(n), int(cksum)) for name, (n, cksum) in parse_json(metadata["sources"]).items()}
        head = Head(metadata["chip"], metadata["split"], dataset, values, sources, parse_json(metadata["label"]),
                    tables["months"].astype(bool), tables["nodata"], tables["sizes"], tables["label"],
                    tables["crc32"], places)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, struct.error):
        raise DataError("is damaged, or no packed chip (its header does not fit its tables)") from None
    plane = dataset.tile ** 2
    if max(head.sizes.max(), head.label_sizes.max()) > plane + plane // 255 + 16:  # LZ4_compressBound
        raise DataError("is damaged (a block is larger than any can be)")
    if head.end != size:
        raise DataError(f"is truncated or has grown: {size} bytes, {head.end} were written")
    return head


@functools.lru_cache(maxsize=8)
def _dataset(text: str) -> Dataset:
    return parse_dataset(parse_json(text), "its description")


def _table(data: bytes, start: int, entry: Mapping[str, Any]) -> np.ndarray:
    first, end = entry["data_offsets"]
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    if not 0 <= first <= end or math.prod(shape) * dtype.itemsize != end - first:
        raise ValueError("a table's size")
    return np.frombuffer(data, dtype, math.prod(shape), start + first).reshape(shape)


def read_section(descriptor: int, head: Head, number: int, path: Path | str, check: bool) -> memoryview:
    """The blocks of a section, see `Head.section`; `check` compares them with their checksum."""
    data = memoryview(bytearray(head.section(number)[1]))
    read_into(descriptor, head, number, data, path, check)
    return data


def read_into(descriptor: int, head: Head, number: int, out: memoryview, path: Path | str, check: bool) -> None:
    """As `read_section`, into `out`, which has the section's size."""
    try:
        read = os.preadv(descriptor, [out], head.section(number)[0]) if len(out) else 0
    except OSError as error:
        raise unreadable(path, error, REMEDY) from None
    if read != len(out):
        raise DataError(f"{path}: is truncated; {REMEDY}")
    if check:
        check_section(out, head, number, path)


def check_section(data: bytes | memoryview, head: Head, number: int, path: Path | str) -> None:
    """Raises DataError where a section differs from what was written."""
    if zlib.crc32(data) != head.crc[number]:
        what = {LABEL: "label", STATIC: "static images"}.get(number, f"month {number - FIRST_STEP:02d}")
        raise DataError(f"{path}: is damaged (the checksum of its {what} differs); {REMEDY}")


def inflate(block: bytes | memoryview, size: int, path: Path | str) -> np.ndarray:
    """[size] uint8.  Releases the GIL.  Raises DataError for a block that is none."""
    try:
        plane = lz4.block.decompress(block, uncompressed_size=size)
    except lz4.block.LZ4BlockError:
        plane = b""
    if len(plane) != size:
        raise DataError(f"{path}: is damaged (a block does not inflate); {REMEDY}")
    return np.frombuffer(plane, np.uint8)


def verify_file(path: Path | str) -> Head:
    """Check every byte of a packed file.  Raises DataError."""
    descriptor = open_file(path)
    try:
        head = head_of(descriptor, path)
        if head.chip != Path(path).name.removesuffix(SUFFIX):
            raise DataError(f"{path}: holds chip {head.chip}; {REMEDY}")
        plane, static = head.dataset.tile ** 2, head.planes.static
        for number in range(FIRST_STEP + head.dataset.months):
            data = memoryview(read_section(descriptor, head, number, path, check=True))
            sizes = (head.label_sizes if number == LABEL else head.sizes[0, static] if number == STATIC
                     else head.sizes[number - FIRST_STEP, ~static])
            for size in sizes[sizes > 0].tolist():
                inflate(data[:size], plane, path)
                data = data[size:]
        return head
    finally:
        os.close(descriptor)
