"""YAML and JSON from outside: plain values, or a ValueError in one line.  All of the engine reads them here.

No tag of YAML makes an object of Python's.  An alias repeats what it names and takes no room in the file, so that a
kilobyte can mean a billion values, or one that holds itself: values are counted before any is made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

LARGEST_YAML, LARGEST_JSON = 1 << 24, 1 << 28  # bytes of a file
MOST_VALUES = 1_000_000  # of a YAML text, with those that aliases repeat


def read_yaml(path: Path | str) -> Any:
    """Raises OSError, and ValueError as `parse_yaml` does."""
    return parse_yaml(_read(path, LARGEST_YAML))


def read_json(path: Path | str) -> Any:
    """Raises OSError, and ValueError as `parse_json` does."""
    return parse_json(_read(path, LARGEST_JSON))


def parse_yaml(text: str) -> Any:
    """Raises ValueError: no YAML, a tag other than of plain values, a key twice, or more than MOST_VALUES."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MOST_VALUES:
            raise ValueError(f"its aliases mean more than {MOST_VALUES:,} values")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("is nested too deep") from None
    except Exception as error:  # of `!!bool x` PyYAML says KeyError, of `!!int ''` IndexError
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError where it is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deep") from None


def _read(path: Path | str, most: int) -> str:
    with Path(path).open("rb") as handle:
        data = handle.read(most + 1)
    if len(data) > most:
        raise ValueError(f"is larger than {most >> 20} MB")
    return data.decode()


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = -1
        if isinstance(node, yaml.MappingNode):
            _distinct([key for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    if known[id(node)] < 0:
        raise ValueError("an alias stands in what it names")
    return known[id(node)]


def _distinct(keys: list[yaml.ScalarNode]) -> None:
    """PyYAML would take the last, in silence."""
    seen = set()
    for key in keys:
        if (key.tag, key.value) in seen:
            raise ValueError(f"line {key.start_mark.line + 1}: {key.value[:80]!r} is given twice; leave one out")
        seen.add((key.tag, key.value))
