"""A valid file in, a malformed one out, by a seed: bytes of any file, and the structure of texts (YAML, JSON, CSV).

Those of TIFFs, packed chips, weights and pickles are in `tests.faults.formats`.  A mutation returns what it did, in
words, and the new content; the same `random.Random` gives the same.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import yaml

Made = tuple[str, bytes]
Mutation = Callable[[bytes, Random], Made]


# Bytes -------------------------------------------------------------------------------------------------------------


def flip(data: bytes, rng: Random, within: tuple[int, int] | None = None) -> Made:
    """One bit."""
    first, end = within or (0, len(data))
    bit = rng.randrange(8 * first, 8 * end)
    new = bytearray(data)
    new[bit // 8] ^= 1 << bit % 8
    return f"bit {bit} flipped", bytes(new)


def truncate(data: bytes, rng: Random) -> Made:
    end = rng.choice([0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, rng.randrange(len(data))])
    return f"cut at byte {end}", data[:end]


def zero(data: bytes, rng: Random) -> Made:
    start, end = _stretch(data, rng)
    return f"bytes {start} to {end} zeroed", data[:start] + bytes(end - start) + data[end:]


def insert(data: bytes, rng: Random) -> Made:
    place, extra = rng.randrange(len(data) + 1), rng.randbytes(rng.choice([1, 2, 8, 300]))
    return f"{len(extra)} bytes put in at {place}", data[:place] + extra + data[place:]


def duplicate(data: bytes, rng: Random) -> Made:
    start, end = _stretch(data, rng)
    return f"bytes {start} to {end} twice", data[:end] + data[start:]


def swap(data: bytes, rng: Random) -> Made:
    size = min(rng.choice([1, 4, 64]), len(data) // 4)
    a, b = sorted(rng.sample(range(0, max(2, len(data) - size), size), 2))
    return (f"{size} bytes at {a} and {b} exchanged",
            data[:a] + data[b:b + size] + data[a + size:b] + data[a:a + size] + data[b + size:])


def append(data: bytes, rng: Random) -> Made:
    return "bytes behind the end", data + rng.randbytes(rng.choice([1, 16, 4096]))


def foreign(data: bytes, rng: Random) -> Made:
    """Something else altogether."""
    content = rng.choice([b"", b"\0", b"{}", b"[]", b"null", b"II*\0", b"MM\0*\0\0\0\x08", b"PK\3\4", b"\x80\2K\1.",
                          b"\x1f\x8b\x08\0", b"\xff\xfe", b"<html>404</html>", bytes(4096), rng.randbytes(4096),
                          b"\xff" * 64, b'{"a":' * 5000, b"\x10" + bytes(7) + b'{"__metadata__":'])
    return f"replaced by {content[:20]!r} ({len(content)} bytes)", content


BYTES: list[Mutation] = [flip, flip, flip, truncate, truncate, zero, insert, duplicate, swap, append, foreign]


def _stretch(data: bytes, rng: Random) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice([1, 4, 16, 512, 4096]))


# Trees of values, as YAML and JSON hold them -----------------------------------------------------------------------

Place = tuple[Any, ...]  # keys and numbers, from the root


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


POISON: list[Any] = [
    None, True, False, 0, -1, 1, 0.5, -0.0, 1e-300, 1e300, 2**31, 2**63, 2**64, 10**30, 10**400, math.inf, -math.inf,
    math.nan, "", " ", "x", "1", "1e400", "nan", "yes", "x" * 5000, "a\0b", "../x", "/etc/passwd", "\u202e", "é", [],
    {}, [[]], [None], [1, 2, 3], ["x"] * 100, {"x": 1}, {"": None}, {"1": {"2": {}}}, _nested(50), _nested(150)]


def places(tree: Any, at: Place = ()) -> Iterator[Place]:
    """Of all values but the root."""
    for key, value in (tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()):
        yield (*at, key)
        yield from places(value, (*at, key))


def _alter(tree: Any, rng: Random) -> str:
    """Change one thing in `tree`, in place; what."""
    place = rng.choice(list(places(tree)))
    *above, last = place
    holder = tree
    for key in above:
        holder = holder[key]
    name, value = ".".join(map(str, place)), holder[last]
    what = rng.choice(["poison", "poison", "poison", "drop", "rename", "type", "number", "twice", "wrap"])
    if what == "drop":
        del holder[last]
        return f"{name} dropped"
    if what == "rename" and isinstance(holder, dict):
        new = rng.choice([f"{last}x", str(last).upper(), "", "é", 7, None, "x" * 300])
        holder[new] = holder.pop(last)
        return f"{name} renamed {str(new)[:9]!r}"
    if what == "twice" and isinstance(holder, list):
        holder.insert(last, copy.deepcopy(value))
        return f"{name} twice"
    if what == "type":
        new: Any = (str(value) if isinstance(value, (bool, int, float)) else
                    rng.choice([len(value), [value], value.encode()]) if isinstance(value, str) else
                    dict(enumerate(value)) if isinstance(value, list) else list(value or ()))
    elif what == "number" and isinstance(value, (int, float)):
        new = rng.choice([bool(value), float(value), value + 0.5, -value - 1, value * 10**20, value * 10**310
                          if isinstance(value, int) else value * 1e308, float("nan"), f"{value}"])
    elif what == "wrap":
        new = rng.choice([[value], {last: value}, [value, value]])
    else:
        new = copy.deepcopy(rng.choice(POISON))
    holder[last] = new
    return f"{name} set to {str(new)[:40]!r}"


def yaml_tree(data: bytes, rng: Random) -> Made:
    tree = yaml.safe_load(data)
    what = _alter(tree, rng)
    return what, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()


def json_tree(data: bytes, rng: Random) -> Made:
    tree = json.loads(data)
    what = _alter(tree, rng)
    return what, json.dumps(tree, default=repr).encode()  # NaN and Infinity as Python writes them


# Texts -------------------------------------------------------------------------------------------------------------


def lines(data: bytes, rng: Random) -> Made:
    rows = data.splitlines(keepends=True)
    at, other = rng.randrange(len(rows)), rng.randrange(len(rows))
    what = rng.choice(["drop", "twice", "exchange", "cut", "indent"])
    if what == "drop":
        del rows[at]
    elif what == "twice":
        rows.insert(at, rows[at])
    elif what == "exchange":
        rows[at], rows[other] = rows[other], rows[at]
    elif what == "cut":
        rows[at] = rows[at][:rng.randrange(len(rows[at]))] + b"\n"
    else:
        rows[at] = rng.choice([b" ", b"   ", b"\t", b"- "]) + rows[at]
    return f"line {at + 1}: {what}", b"".join(rows)


def encoding(data: bytes, rng: Random) -> Made:
    """Another encoding of the same text, or a text with what is no UTF-8."""
    name = rng.choice(["utf-16", "utf-32", "utf-8-sig", "cp1252", "latin-1", "nul", "ebcdic"])
    text = data.decode()
    if name == "nul":
        place = rng.randrange(len(data))
        return "a NUL", data[:place] + b"\0" + data[place:]
    if name in ("cp1252", "latin-1"):
        return name, (text + "# \xe9\xdf\n").encode(name)
    return name, text.encode("cp500" if name == "ebcdic" else name)


def yaml_text(data: bytes, rng: Random) -> Made:
    """What YAML can say and nobody should."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    text = rng.choice([bomb, "me: &me {me: *me}\n", "me: &me [*me]\n", "deep: " + "[" * 3000 + "]" * 3000 + "\n",
                       "deep: " + "{a: " * 3000 + "}" * 3000 + "\n", "? [a, b]\n: c\n", "? {a: b}\n: c\n",
                       "!!python/object/apply:os.system ['touch executed']\n", "x: !!python/name:os.system\n",
                       "x: !unknown 1\n", "%YAML 9.9\n---\n", "--- 1\n--- 2\n", "x: *nowhere\n", "<<: 5\n", "<<: [1]\n",
                       f"{'k' * 2000}: 1\n", "x: !!omap [a]\n", "\x85", "\x07"])
    first = rng.random() < 0.5
    return f"with {text[:40]!r}", text.encode() + data if first else data.rstrip() + b"\n" + text.encode()


def yaml_value(data: bytes, rng: Random) -> Made:
    """A value as only YAML can write it."""
    place = rng.choice(list(re.finditer(rb"(?<=: )[^\s{}\[\],]+", data)))
    text = rng.choice([".nan", ".inf", "-.inf", "1e400", "1.0e400", "!!float 1e999999", "9" * 5000, "0x", "0x1F",
                       "0o17", "017", "1_000", "1:30", "1:99:99", "2001-99-99", "2001-01-01", "!!int x", "!!int ''",
                       "!!bool x", "!!binary '###'", "!!binary aGVpZ2h0", "!!timestamp 2", "!!null x", "!!set {a, b}",
                       "!!str 5", "!!python/tuple [1]", '"\\uD800"', "yes", "off", "~", "=", "|\n  x", "'", '"', "*x",
                       "&x", "? x", "!!seq {}", "!!map []", "!!float x", "1e3", "٣", "5 # x", "[[[[1]]]]",
                       "{? {a: b} : c}"])
    return (f"{place[0].decode()} replaced by {text[:30]!r}",
            data[:place.start()] + text.encode() + data[place.end():])


def json_text(data: bytes, rng: Random) -> Made:
    text = rng.choice(["[" * 100_000, '{"a":' * 100_000, "NaN", "9" * 5000, "1e999", '"\\ud800"', "// x", "\0", "]",
                       "}"])
    place = rng.choice([0, len(data), rng.randrange(len(data))])
    return f"with {text[:20]!r} at {place}", data[:place] + text.encode() + data[place:]


def table(data: bytes, rng: Random) -> Made:
    """Columns, rows and cells of a CSV with a header."""
    rows = list(csv.reader(io.StringIO(data.decode())))
    at, column, other = rng.randrange(1, len(rows)), rng.randrange(len(rows[0])), rng.randrange(len(rows[0]))
    name = rows[0][column]
    what = rng.choice(["drop column", "rename column", "drop row", "row twice", "cell", "cell", "cell", "cell",
                       "exchange headers", "exchange columns", "column twice", "short row", "long row", "no header"])
    if what in ("drop column", "column twice"):
        for row in rows:
            row[column:column + 1] = [row[column]] * (2 if "twice" in what else 0)
    elif what == "rename column":
        rows[0][column] = rng.choice(["", f"{name} ", name.upper(), f"{name}s", "filename"])
    elif what == "drop row":
        del rows[at]
    elif what == "row twice":
        rows.insert(at, list(rows[at]))
    elif what == "exchange headers":
        rows[0][column], rows[0][other] = rows[0][other], rows[0][column]
    elif what == "exchange columns":
        for row in rows:
            row[column], row[other] = row[other], row[column]
    elif what == "short row":
        del rows[at][column:]
    elif what == "long row":
        rows[at][column:column] = ["x"]
    elif what == "no header":
        del rows[0]
    else:
        old = rows[at][column]
        rows[at][column] = rng.choice(["", " ", "-1", "0", "1e3", "1_000", "0x10", "9" * 30, "9" * 5000, "nan", "½",
                                       "٣", "../" + old, "/etc/passwd", old + "\0", old + "\n", old + "x", old[:-1],
                                       f" {old}", '"', "é", "x" * 200_000, f"{old}.0", f"+{old}", rows[-1][column]])
        what = f"cell {str(rows[at][column])[:20]!r}"
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return f"{what}, row {at}, column {name}", out.getvalue().encode()


YAML: list[Mutation] = [yaml_tree, yaml_value, yaml_tree] * 4 + [yaml_text] * 3 + [lines] * 2 + [encoding] + BYTES[:8:2]
JSON: list[Mutation] = [json_tree] * 8 + [json_text] * 2 + [lines] + [encoding] + BYTES[::2]
CSV: list[Mutation] = [table] * 10 + [lines] + [encoding] + BYTES[::2]
