"""The packed form on the CPU: every thread decodes, warps and scales a chip straight into its place in the batch.

DALI's CPU operators would carry each value through memory five times (merge, warp, join, scale, batch);
kernels/packed_chip does it in one pass, so on a CPU this form does not go through DALI.  TIFFs do, and on a GPU all.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import lz4.block
import numpy as np
import torch

from engine.base.errors import DataError, DeviceError
from engine.data.batch import Produced, Request
from engine.data.dataset import AGBM_DTYPE, S2, TILE, C, T
from engine.data.plan import IDENTITY
from engine.data.store.chip_file import CODES_LOW, CODES_SPAN, PLANE, REMEDY
from engine.data.store.source import PackedSource
from kernels import packed_chip

_FILL, _LOW, _SCALE = CODES_LOW.astype(np.uint16), CODES_LOW.astype(np.float32), (1 / CODES_SPAN).astype(np.float32)


class Direct:
    """Produces batches of `batch_size` chips on `threads` threads, `ahead` batches before the consumer asks.

    Raises DeviceError where the kernel cannot be built.
    """

    def __init__(self, source: PackedSource, batch_size: int, *, threads: int, ahead: int, warp: bool,
                 page_locked: bool):
        try:
            packed_chip.images(), packed_chip.label(), _inflate()
        except (RuntimeError, OSError, AttributeError) as error:
            remedy = "" if "KERNELS_CPU" in str(error) else "install a C++ compiler (GCC 12 or newer, or clang), or "
            raise DeviceError(f"a packed store on the CPU (data.backend cpu): {error}; {remedy}set data.path to the "
                              f"TIFFs") from None
        self._source, self._batch_size, self._threads = source, batch_size, threads
        self._ahead, self._warp = ahead, warp
        self._slabs = _Slabs(page_locked)

    def batches(self, requests: Iterable[list[Request]]) -> Iterator[Produced]:
        """Raises DataError from the reading of a chip."""
        asked = iter(requests)
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        pending: deque[_Pending] = deque()
        try:
            while True:
                while len(pending) <= self._ahead and (batch := next(asked, None)) is not None:
                    pending.append(self._begin(pool, batch))
                if not pending:
                    return
                yield pending.popleft().finished()  # no name for it here: its memory is the consumer's to let go
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, batch: list[Request]) -> _Pending:
        shape = self._batch_size, T, TILE, TILE, C
        images, label = self._slabs.tensor(shape), self._slabs.tensor((self._batch_size, TILE, TILE))
        kept = [pool.submit(self._decode, request, images[b], label[b]) for b, request in enumerate(batch)]
        return _Pending(batch, kept, images, label)

    def _decode(self, request: Request, images: torch.Tensor, label: torch.Tensor) -> int:
        """How many months the chip keeps."""
        scratch = _scratch()
        draw = request.draw
        stored = self._source.stored(request.chip, draw.keep, scratch.file)
        matrix = np.ascontiguousarray(draw.matrix if self._warp else IDENTITY.matrix, np.float32)
        base = stored.data.ctypes.data
        blocks = (base + stored.starts).astype(np.uint64)
        sizes = np.ascontiguousarray(stored.sizes, np.uint32)
        bad = packed_chip.images()(
            blocks.ctypes.data, sizes.ctypes.data, len(stored.months), T, C, TILE, _FILL.ctypes.data, _LOW.ctypes.data,
            _SCALE.ctypes.data, matrix.ctypes.data, _inflate(), scratch.planes.ctypes.data, scratch.tile.ctypes.data,
            images.data_ptr())
        if stored.label_sizes.any():
            label_sizes = np.ascontiguousarray(stored.label_sizes, np.uint32)
            bad = max(bad, packed_chip.label()(
                base, label_sizes.ctypes.data, TILE, matrix.ctypes.data, _inflate(), scratch.planes.ctypes.data,
                scratch.tile.ctypes.data, label.data_ptr()))
        else:
            ctypes.memset(label.data_ptr(), 0, label.nbytes)  # torch would call its own threads
        if bad >= 0:
            raise DataError(f"{request.chip.packed}: is damaged (a block does not inflate); {REMEDY}")
        return len(stored.months)


class _Pending(NamedTuple):
    """A batch that threads work on."""

    requests: list[Request]
    kept: list[Future[int]]
    images: torch.Tensor
    label: torch.Tensor

    def finished(self) -> Produced:
        return Produced(self.requests, [future.result() for future in self.kept], self.images, self.label)


class _Slabs:
    """Host memory for batches, used again when nobody holds a batch's tensors any more: fresh pages of this size cost
    as much as filling them.  Kept as long as the loader, so that a short epoch (a validation) finds them too.

    `page_locked`: for copies to a GPU that do not wait.  torch's own allocator of such memory would round a batch of
    755 MB up to 1 GiB.
    """

    def __init__(self, page_locked: bool) -> None:
        self._page_locked = page_locked
        self._free: dict[int, list[np.ndarray]] = {}

    def tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Uninitialised float32."""
        size = int(np.prod(shape))
        free = self._free.setdefault(size, [])
        slab = free.pop() if free else _locked(size) if self._page_locked else np.empty(size, np.float32)
        lease = slab[:]  # an object of its own, which lives as long as the tensor's storage
        weakref.finalize(lease, free.append, slab).atexit = False
        return torch.from_numpy(lease).view(shape)


def _locked(size: int) -> np.ndarray:
    """[size] float32 on pages of their own, which CUDA keeps in place as long as the array lives."""
    slab = np.frombuffer(mmap.mmap(-1, size * 4), np.float32)
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(slab.ctypes.data, slab.nbytes, 0))
    weakref.finalize(slab, runtime.cudaHostUnregister, slab.ctypes.data).atexit = False
    return slab


class _Scratch(NamedTuple):
    """A thread's own."""

    file: list[np.ndarray]  # what is read of a file; grows
    planes: np.ndarray
    tile: np.ndarray


_THREAD = threading.local()


def _scratch() -> _Scratch:
    if not hasattr(_THREAD, "scratch"):
        _THREAD.scratch = _Scratch([], np.empty(C * S2.dtype.itemsize * PLANE, np.uint8),
                                   np.empty(PLANE * packed_chip.LANES, np.uint16))
    scratch: _Scratch = _THREAD.scratch
    return scratch


@functools.cache
def _inflate() -> int:
    """The address of LZ4_decompress_safe, in the library that the lz4 package brings or is linked to."""
    library = ctypes.CDLL(lz4.block._block.__file__)
    address = ctypes.cast(library.LZ4_decompress_safe, ctypes.c_void_p).value
    assert address is not None
    return address


assert AGBM_DTYPE.itemsize <= C * S2.dtype.itemsize  # the label shares the scratch
