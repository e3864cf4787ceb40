"""What a folder's content is made of, kept in it: work that was cut off goes on only where that is the same."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.base.errors import DataError
from engine.base.files import write_text
from engine.base.texts import read_json

FILE = "made.json"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make `folder`, and hold it against other processes that write there.  Raises DataError where one does, or it
    cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror}); choose another place") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process writes here; wait for it, or choose another place") from None
        except OSError:
            pass  # a network file system that cannot lock a folder
        yield
    finally:
        os.close(handle)


def claim(folder: Path, about: Mapping[str, Any], remedy: str) -> bool:
    """Write `about` (what JSON knows) into the folder, or compare it with what stands there: whether it did.

    Raises DataError naming what differs, and `remedy`; or where the folder cannot be written.
    """
    path, wanted = folder / FILE, json.loads(json.dumps(about))
    try:
        found = read_json(path)
    except FileNotFoundError:
        try:
            write_text(path, json.dumps(wanted, indent=1) + "\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); {remedy}") from None
        return False
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from None
    changed = list(differences(found, wanted))
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise DataError(f"{folder}: what is done there was made otherwise ({'; '.join(changed[:3])}{more}); {remedy}")
    return True


def differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """What differs between two values of JSON, as text."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            yield from differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif old != new:
        shown = [_short(value) for value in (new, old)]
        yield f"{at} {shown[0]} instead of {shown[1]}" if max(map(len, shown)) < 80 else f"{at} changed"


def _short(value: Any) -> str:
    """Of a checksum the first characters are enough."""
    return (value[:12] if len(value) == 64 else value) if isinstance(value, str) else json.dumps(value)
