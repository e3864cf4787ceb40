"""The packed form on the CPU: every thread decodes, warps and scales a chip straight into its place in the batch.

DALI's CPU operators would carry each value through memory five times (merge, warp, join, scale, batch);
kernels/packed_chip does it in one pass, so on a CPU this form does not go through DALI.  TIFFs do, and on a GPU all.
"""

from __future__ import annotations

import ctypes
import functools
import math
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
from engine.data.batch import Produced, Request, read_for
from engine.data.dataset import Dataset
from engine.data.plan import IDENTITY
from engine.data.store.chip_file import LABEL_PLANES, REMEDY
from engine.data.store.source import PackedSource
from kernels import packed_chip


class _Codes:
    """What the codes of a data set mean, for each of its C bands."""

    def __init__(self, dataset: Dataset):
        sensors = dataset.sensors
        nodata = [sensor.code_nodata for sensor in sensors]
        # A code, what it counts as, and what a band counts as that is not stored; without nodata, 0 counts as 0
        self.meaning = np.concatenate([
            np.stack([np.full(len(s.bands), code or 0), np.zeros(len(s.bands)) if code is None else s.code_low,
                      s.code_low], 1) for s, code in zip(sensors, nodata)]).astype(np.uint16)
        self.low = np.concatenate([sensor.code_low for sensor in sensors]).astype(np.float32)
        target = dataset.target
        self.no_target = math.nan if target.nodata is None else target.nodata  # NaN equals nothing
        self.scale = (1 / np.concatenate([sensor.code_span for sensor in sensors])).astype(np.float32)


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
        self._codes = _Codes(source.dataset)
        self._ahead, self._warp = ahead, warp
        self._slabs = _Slabs(page_locked)

    def batches(self, requests: Iterable[list[Request]]) -> Iterator[Produced]:
        """Raises BadChip."""
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
        data = self._source.dataset
        images = self._slabs.tensor((self._batch_size, data.months, data.tile, data.tile, data.channels))
        label = self._slabs.tensor((self._batch_size, data.tile, data.tile))
        kept = [pool.submit(read_for, request, self._decode, request, images[b], label[b])
                for b, request in enumerate(batch)]
        return _Pending(batch, kept, images, label)

    def _decode(self, request: Request, images: torch.Tensor, label: torch.Tensor) -> int:
        """How many months the chip keeps."""
        data, codes = self._source.dataset, self._codes
        scratch = _scratch(min(data.channels, packed_chip.LANES), data.tile ** 2)
        draw = request.draw
        stored = self._source.stored(request.chip, draw.keep, scratch.file)
        matrix = np.ascontiguousarray(draw.matrix if self._warp else IDENTITY.matrix, np.float32)
        base = stored.data.ctypes.data
        blocks = (base + stored.offsets[:, ::2]).astype(np.uint64)  # of a value's two planes, the first
        sizes = np.ascontiguousarray(stored.sizes, np.uint32)
        bad = packed_chip.images()(
            blocks.ctypes.data, sizes.ctypes.data, len(stored.months), data.months, data.channels, data.tile,
            codes.meaning.ctypes.data, codes.low.ctypes.data, codes.scale.ctypes.data, matrix.ctypes.data, _inflate(),
            scratch.planes.ctypes.data, scratch.tile.ctypes.data, images.data_ptr())
        if stored.label_sizes.any():
            label_sizes = np.ascontiguousarray(stored.label_sizes, np.uint32)
            bad = max(bad, packed_chip.label()(
                base, label_sizes.ctypes.data, data.tile, codes.no_target, matrix.ctypes.data, _inflate(),
                scratch.planes.ctypes.data, scratch.tile.ctypes.data, label.data_ptr()))
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


def _scratch(bands: int, pixels: int) -> _Scratch:
    size = max(2 * bands, LABEL_PLANES) * pixels  # the label shares it
    scratch: _Scratch | None = getattr(_THREAD, "scratch", None)
    if scratch is None or scratch.planes.size < size or scratch.tile.size < pixels * packed_chip.LANES:
        scratch = _Scratch([], np.empty(size, np.uint8), np.empty(pixels * packed_chip.LANES, np.uint16))
        _THREAD.scratch = scratch
    return scratch


@functools.cache
def _inflate() -> int:
    """The address of LZ4_decompress_safe, in the library that the lz4 package brings or is linked to."""
    library = ctypes.CDLL(lz4.block._block.__file__)
    address = ctypes.cast(library.LZ4_decompress_safe, ctypes.c_void_p).value
    assert address is not None
    return address
