"""Mutations that know a binary format, so that what looks right at first is wrong further in: TIFF tags, the heads of
packed chips and of safetensors with lengths and checksums made right again, pickles in the zips of torch.save.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from random import Random
from typing import Any

import torch

from engine.model.tensors import CHECKSUM, _checksum
from tests.faults.mutate import BYTES, POISON, Made, Mutation, _alter, flip

# TIFF --------------------------------------------------------------------------------------------------------------

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # of a field type's values, bytes


def entries(data: bytes) -> list[tuple[int, int, int, int, int]]:
    """(place, tag, field type, number, value or offset) of the first directory of a little-endian classic TIFF."""
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    places = range(start + 2, start + 2 + 12 * count, 12)
    return [(place, *struct.unpack_from("<HHII", data, place)) for place in places]


def tiff_entry(data: bytes, rng: Random) -> Made:
    """One field of one tag."""
    place, tag, field, number, value = rng.choice(entries(data))
    wrong = [0, 1, 2, 3, 5, 7, 8, 16, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, len(data), len(data) - 1]
    what = rng.choice(["tag", "type", "number", "value", "value"])
    if what == "tag":
        tag = rng.choice([0, 254, 256, 257, 258, 259, 262, 273, 277, 278, 279, 317, 322, 325, 339, 33550, 65535])
    elif what == "type":
        field = rng.choice([0, 1, 2, 3, 4, 5, 7, 11, 12, 13, 16, 99, 65535])
    elif what == "number":
        number = rng.choice([*wrong, number + 1, number - 1 & 0xFFFFFFFF])
    else:
        value = rng.choice([*wrong, value + 1 & 0xFFFFFFFF, value - 1 & 0xFFFFFFFF, value ^ 1 << rng.randrange(32)])
    new = bytearray(data)
    struct.pack_into("<HHII", new, place, tag, field, number, value)
    return f"{what} of the entry of tag {entries(data)[(place - entries(data)[0][0]) // 12][1]}", bytes(new)


def tiff_array(data: bytes, rng: Random) -> Made:
    """One number among a tag's that stand outside of the directory: an offset, a size, a place on Earth."""
    outside = [(tag, field, number, value) for _, tag, field, number, value in entries(data)
               if number * _SIZES.get(field, 1) > 4]
    if not outside:
        return tiff_entry(data, rng)
    tag, field, number, start = rng.choice(outside)
    size = _SIZES.get(field, 1)
    place = start + size * rng.randrange(number)
    new = bytearray(data)
    new[place:place + size] = rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size),
                                          (int.from_bytes(data[place:place + size], "little") + 1
                                           & (1 << 8 * size) - 1).to_bytes(size, "little")])
    return f"a value of tag {tag}", bytes(new)


def tiff_head(data: bytes, rng: Random) -> Made:
    new = bytearray(data)
    what = rng.choice(["order", "magic", "directory", "count", "big"])
    (start,) = struct.unpack_from("<I", data, 4)
    if what == "order":
        new[:4] = b"MM\0*"
    elif what == "magic":
        new[2] = rng.choice([0, 41, 43])
    elif what == "big":
        new[:8] = b"II+\0\x08\0\0\0"
    elif what == "directory":
        struct.pack_into("<I", new, 4, rng.choice([0, 4, 9, len(data) - 1, len(data), 0xFFFFFFFF]))
    else:
        struct.pack_into("<H", new, start, rng.choice([0, 1, 0xFFFF, len(entries(data)) - 1, len(entries(data)) + 1]))
    return f"{what} of the header", bytes(new)


def tiff_header_bit(data: bytes, rng: Random) -> Made:
    return flip(data, rng, (0, min(len(data), entries(data)[-1][0] + 12)))


TIFF: list[Mutation] = [tiff_entry] * 6 + [tiff_array] * 4 + [tiff_head] * 2 + [tiff_header_bit] * 3 + BYTES[::2]


# Safetensors, of weights and of packed chips -----------------------------------------------------------------------


def _apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8:8 + length]), data[8 + length:]


def _joined(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":"), default=repr).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + rest


def _alter_header(header: dict[str, Any], rng: Random) -> str:
    """One thing about one tensor, or one of the notes."""
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.sample(names, 2)
    what = rng.choice(["dtype", "shape", "offsets", "exchange", "drop", "rename", "note", "note", "tree"])
    if what == "dtype":
        header[name]["dtype"] = rng.choice(["F64", "F32", "F16", "BF16", "I32", "U32", "I64", "U8", "F8", "", 7])
    elif what == "shape":
        shape = header[name]["shape"]
        header[name]["shape"] = rng.choice([shape[::-1], [*shape, 1], shape[1:], [-1], [2**62, 2**62], [0], [*shape, 0],
                                            [10**30], [float(n) for n in shape], "x", [True] * len(shape)])
    elif what == "offsets":
        first, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = rng.choice([
            [end, first], [first + 1, end + 1], [first, end + 4], [-1, end], [0, 0], [first, 2**63], [first, 2**64],
            [first], [first, end, end], None, [10**30, 10**30], [str(first), end]])
    elif what == "exchange":
        header[name]["data_offsets"], header[other]["data_offsets"] = (header[other]["data_offsets"],
                                                                       header[name]["data_offsets"])
    elif what == "drop":
        del header[name]
    elif what == "rename":
        header[f"{name}x"] = header.pop(name)
    elif what == "note":
        notes = header.setdefault("__metadata__", {"x": "y"})
        key = rng.choice(list(notes))
        inner = rng.choice(["text", "text", "drop", "json", "json", "notes"])
        if inner == "drop":
            del notes[key]
        elif inner == "notes":
            header["__metadata__"] = rng.choice([None, [], {}, "x", {"a": 1}, {"a": None}, {"a": {"b": "c"}}])
        elif inner == "json" and notes[key][:1] in ("{", "["):
            tree = json.loads(notes[key])
            did = _alter(tree, rng)
            notes[key] = json.dumps(tree, default=repr)
            return f"note {key}: {did}"
        else:
            notes[key] = rng.choice(["", "x", "{}", "[]", "null", "{", "[" * 100_000, "NaN", "1e400", "0", "é", "a\0b",
                                     f"{notes[key]}x", "x" * 100_000])
        return f"note {key}: {inner}"
    else:
        return _alter(header, rng)
    return f"{what} of {name}"


def header(data: bytes, rng: Random) -> Made:
    head, rest = _apart(data)
    what = _alter_header(head, rng)
    return what, _joined(head, rest)


def header_length(data: bytes, rng: Random) -> Made:
    (length,) = struct.unpack_from("<Q", data)
    new = rng.choice([0, 1, length - 1, length + 1, length + 8, len(data), len(data) - 8, 2**31, 2**63, 2**64 - 1])
    return f"length {new} of the header", struct.pack("<Q", new) + data[8:]


def header_text(data: bytes, rng: Random) -> Made:
    """A bit of the header, or a text in it that is no JSON; its length right."""
    (length,) = struct.unpack_from("<Q", data)
    text = data[8:8 + length]
    if rng.random() < 0.5:
        return flip(data, rng, (8, 8 + length))
    new = rng.choice([b"{}", b"[]", b"null", text[:-9], b"[" * 50_000, text.replace(b":", b"=", 1), text + text,
                      b"\xff" * 16, text.replace(b"[", b"[[", 1), text.rstrip(b" }") + b',"x":{}}', b"7",
                      b'{"x":{"dtype":"F32"}}'])
    return f"header {new[:20]!r}", struct.pack("<Q", len(new)) + new + data[8 + length:]


def header_unsealed(data: bytes, rng: Random) -> Made:
    """As `header`, of a file without a checksum, as others write them."""
    head, rest = _apart(data)
    del head["__metadata__"][CHECKSUM]
    what = _alter_header(head, rng)
    return f"{what}, without a checksum", _joined(head, rest)


def header_sealed(data: bytes, rng: Random) -> Made:
    """As `header`, with a checksum that is right."""
    head, rest = _apart(data)
    what = _alter_header(head, rng)
    if isinstance(head.get("__metadata__"), dict):
        head["__metadata__"][CHECKSUM] = _checksum(json.loads(_joined(head, b"")[8:]), [rest])
    return f"{what}, sealed again", _joined(head, rest)


WEIGHTS: list[Mutation] = [header_unsealed, header_sealed] * 5 + [header, header_length, header_length] + \
    [header_text] * 3 + BYTES


def resealed(data: bytes, rng: Random) -> Made:
    """A packed chip of which one thing in the head is another, and the head's checksum is right."""
    head, rest = _apart(data)
    end = head["crc32"]["data_offsets"][1]
    tables, blocks = bytearray(rest[:end]), rest[end:]
    if rng.random() < 0.6:
        what = _alter_header(head, rng)
    else:
        name = rng.choice(["months", "nodata", "sizes", "label", "crc32"])
        first, last = head[name]["data_offsets"]
        place = rng.randrange(first, last)
        tables[place] = rng.choice([0, 1, 2, 255, tables[place] ^ 1 << rng.randrange(8)])
        what = f"a value of {name}"
    new = _joined(head, bytes(tables))
    return f"{what}, sealed again", new[:-4] + struct.pack("<I", zlib.crc32(new[:-4])) + blocks


def section_swap(data: bytes, rng: Random) -> Made:
    """Two stretches of blocks exchanged; nothing in the head says so but checksums."""
    head, rest = _apart(data)
    start = len(data) - len(rest) + head["blocks"]["data_offsets"][0]
    a, b = sorted(rng.sample(range(start, len(data) - 64, 64), 2))
    new = data[:a] + data[b:b + 64] + data[a + 64:b] + data[a:a + 64] + data[b + 64:]
    return f"64 bytes of blocks at {a} and {b}", new


PACKED: list[Mutation] = [resealed] * 14 + [section_swap] + [header] * 3 + [header_length] + [header_text] * 2 + BYTES


# torch.save ----------------------------------------------------------------------------------------------------------


def zip_records(data: bytes, rng: Random) -> Made:
    """One record of the zip, with checksums that are right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    what = rng.choice(["drop", "cut", "pickle", "pickle", "pickle", "compress", "second", "foreign", "order"])
    name = rng.choice([name for name in records if "/data/" in name])
    method = zipfile.ZIP_STORED
    if what == "drop":
        name = rng.choice([name, pickled])
        del records[name]
    elif what == "cut":
        records[name] = records[name][:-rng.randrange(1, 9)]
    elif what == "pickle":
        name = pickled
        did, records[name] = rng.choice(BYTES)(records[name], rng)
        what = f"pickle: {did}"
    elif what == "compress":
        method = zipfile.ZIP_DEFLATED
    elif what == "second":
        records["other/data.pkl"] = records[pickled]
    elif what == "order":
        records[pickled.replace("data.pkl", "byteorder")] = rng.choice([b"big", b"", b"\xff"])
    else:
        name = pickled
        records[name] = rng.choice([b"", b".", b"N.", b"(l.", b"\x80\x02}.", b"\x80\xff.", pickle.dumps(POISON),
                                    pickle.dumps({"state_dict": {}}), pickle.dumps({"state_dict": 1}),
                                    b"I1\n" * 100_000, b"(" * 100_000,
                                    b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for key, content in records.items():
            archive.writestr(key, content)
    return f"{what} of {name}", out.getvalue()


def saved_again(data: bytes, rng: Random) -> Made:
    """A state dict that torch.save wrote, of other things."""
    saved = torch.load(io.BytesIO(data), weights_only=False)
    state = saved["state_dict"]
    name = rng.choice(list(state))
    tensor = state[name]
    what = rng.choice(["drop", "shape", "dtype", "rename", "object", "sparse", "quantized", "meta", "nest", "empty",
                       "list", "keys", "complex", "args"])
    if what == "drop":
        del state[name]
    elif what == "rename":
        state[f"{name}x"] = state.pop(name)
    elif what in ("list", "empty", "keys", "nest", "args"):
        saved = {"list": list(state.values()), "empty": {}, "keys": {"state_dict": dict(enumerate(state.values()))},
                 "nest": {"state_dict": {"state_dict": state}},
                 "args": {**saved, "args": rng.choice([None, [], {"backbone": 5}, {"backbone": "no_such"}, "x"])}}[what]
    else:
        state[name] = {"shape": lambda: tensor[None], "dtype": lambda: tensor.to(torch.int32), "object": lambda: object,
                       "sparse": lambda: torch.eye(3).to_sparse(), "meta": lambda: tensor.to("meta"),
                       "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
                       "complex": lambda: tensor.to(torch.complex64)}[what]()
    out = io.BytesIO()
    torch.save(saved, out)
    return f"{what} of {name}", out.getvalue()


TORCH: list[Mutation] = [zip_records] * 8 + [saved_again] * 6 + BYTES
