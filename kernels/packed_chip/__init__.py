"""A packed chip into its place in a batch, on a CPU: see cpu.cpp.

`images` and `label` take addresses of C-contiguous arrays, which stay the caller's.  Both release the GIL, may run on
many threads at once (each with scratch of its own), and return −1, or the number of a block that does not inflate.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

from kernels import native

LANES = 16  # values of a pixel in the scratch tile, and bands that `images` takes at once
_P, _I = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = {"packed_images": [_P, _P, _I, _I, _I, _I, _P, _P, _P, _P, _P, _P, _P, _P],
              "packed_label": [_P, _P, _I, ctypes.c_float, _P, _P, _P, _P, _P]}


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = native.load(Path(__file__).with_name("cpu.cpp"))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, _I
    return loaded


def images() -> Callable[..., int]:
    """(blocks [months, bands] addresses, sizes [months, bands, 2] uint32, months, slots, bands, side, meaning
    [bands, 3] uint16, low [bands], scale [bands], matrix [3, 3] float32, address of LZ4_decompress_safe, planes
    [min(bands, LANES), 2, side²] uint8, tile [side², LANES] uint16, out [slots, side, side, bands] float32) → −1, or
    month · 2 · bands + plane.

    out = (code − low) · scale.  `meaning`: a code, what it counts as, and what bands of which nothing is stored count
    as.  Raises RuntimeError where the kernel cannot be built.
    """
    return _library().packed_images  # type: ignore[no-any-return]


def label() -> Callable[..., int]:
    """(blocks, sizes [4] uint32, side, nodata, matrix [3, 3] float32, address of LZ4_decompress_safe, planes [4, side²]
    uint8, tile [side²] float32, out [side, side] float32) → −1, or the plane.

    What equals `nodata` becomes NaN, and so does what it is mixed into; nothing equals NaN.
    """
    return _library().packed_label  # type: ignore[no-any-return]
