"""The POSIX `cksum` checksum, at the speed of zlib.

The metadata CSVs carry this CRC (not zlib's) for every file; `launch/prepare.py verify`, the packer and the
sample generator compute it here.

POSIX takes the polynomial 0x04C11DB7 most significant bit first, starts at 0, feeds the file's length (least
significant byte first, no leading zeros) after the file, and complements the result
(https://pubs.opengroup.org/onlinepubs/9799919799/utilities/cksum.html).  zlib's CRC-32 is the same
polynomial least significant bit first, so it equals POSIX's with the bits of every input byte and of the
result mirrored.  zlib complements its state on the way in and out: a start value of all ones is a state of 0,
and the complement on the way out is the one that POSIX asks for.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.base.errors import DataError

_MIRROR = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_CHUNK = 1 << 18  # bytes; the mirrored copy stays in the cache


def posix_cksum(data: Any) -> int:
    """CRC of `data`: bytes, or anything with a C-contiguous buffer, such as an array."""
    view = memoryview(data).cast("B")
    return _crc(bytes(view[start : start + _CHUNK]) for start in range(0, len(view), _CHUNK))[0]


def cksum_file(path: Path | str) -> tuple[int, int]:
    """(CRC, size in bytes) of a file, read in pieces: what `cksum PATH` prints.

    Raises DataError where the file is missing or cannot be read.
    """
    try:
        with Path(path).open("rb", buffering=0) as handle:
            return _crc(iter(lambda: handle.read(_CHUNK), b""))
    except FileNotFoundError:
        raise DataError(f"{path}: is missing; download it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check permissions and disk") from None


def _crc(chunks: Iterable[bytes]) -> tuple[int, int]:
    state, size = 0xFFFFFFFF, 0
    for chunk in chunks:
        state = zlib.crc32(chunk.translate(_MIRROR), state)
        size += len(chunk)
    length = size.to_bytes((size.bit_length() + 7) // 8, "little")
    state = zlib.crc32(length.translate(_MIRROR), state)
    return int(f"{state:032b}"[::-1], 2), size
