"""Files that are either whole or absent: write beside, fsync, rename."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from engine.base.errors import DataError, GoneError

LONGEST = 230  # bytes of a name: disks take 255, and what is written beside has a longer one


def place(path: str) -> str:
    """`path`, where a disk can have a file of that name.  Raises ValueError: what systems say of one that cannot be
    differs from call to call."""
    if not path or "\0" in path or any(len(os.fsencode(part)) > LONGEST for part in path.split("/")):
        raise ValueError(f"no file can have the name {path[:40]!r}{'…' if len(path) > 40 else ''}: it is empty, longer "
                         f"than {LONGEST} bytes, or holds a NUL")
    return path


@contextmanager
def atomic_write(path: Path | str) -> Iterator[BinaryIO]:
    """Yield a binary handle whose content becomes `path` on success; on any error `path` stays as it was.

    The temporary file lies in the same folder (a rename must not cross file systems) and carries the process id,
    so that two writers do not meet in it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def hard_link(path: Path, others: Iterable[Path]) -> None:
    """The whole file `path` under other names too, each exchanged at once; a copy where the disk knows no links."""
    for other in others:
        beside = other.with_name(f".{other.name}.{os.getpid()}.part")
        beside.unlink(missing_ok=True)
        try:
            beside.hardlink_to(path)
        except OSError:
            shutil.copyfile(path, beside)
            fsync(beside)
        beside.replace(other)
        beside.unlink(missing_ok=True)  # which stays where both were one file already
        fsync(other.parent)


def fsync(path: Path) -> None:
    """Make a file's content, or the renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path | str, text: str) -> None:
    with atomic_write(path) as handle:
        handle.write(text.encode())


def unreadable(path: Path | str, error: OSError, remedy: str) -> DataError:
    """What to raise where `error` came of opening or reading a data file: whether the file or its whole folder is gone,
    as when a disk is no longer mounted."""
    folder = Path(path).parent
    try:
        left = any(os.scandir(folder))
    except OSError:
        left = _is_folder(folder)  # there, and only to be entered
    if not left:
        while not _is_folder(folder.parent) and folder != folder.parent:
            folder = folder.parent
        state = "is empty now" if _is_folder(folder) else "is gone, or cannot be reached"
        return GoneError(f"{folder}: the folder {state} ({path} is wanted: {error.strerror}); mount or restore it, and "
                         f"run the same command again")
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: is missing; {remedy}")
    return DataError(f"{path}: cannot be read ({error.strerror}); check its permissions and the disk, then {remedy}")


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 (Path.is_dir raises where a disk that is gone says ESTALE or EIO)


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while data := handle.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()
