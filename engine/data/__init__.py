"""The data path: `open_chip` is the door for people who only want to look."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.data.view import ChipView


def open_chip(root: Path | str, chip: str) -> ChipView:
    """All of a chip of a TIFF tree or a packed store, as NumPy arrays; `.to_xarray()` with names and units.

    Raises DataError where there is no such chip, or it is damaged.
    """
    from engine.data.view import open_chip

    return open_chip(root, chip)
