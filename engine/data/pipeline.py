"""The DALI pipeline: stored arrays in, normalised and augmented stacks out.  One definition for CPU and GPU.

Everything stays pixel-interleaved ([…, H, W, C]), as the files are and as channels_last convolutions want it: no
transpose anywhere.  Each frame is a kept month; the dropped ones are never read, warped or scaled, and appear only
as the zeros that fill a chip up to T frames.

One matrix a chip carries flip, quarter turns and rotation through a single bilinear warp with reflected border.
`engine.data.reference` is the same function in NumPy, and the tests hold this one to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
from nvidia.dali import Pipeline
from nvidia.dali.types import Constant, DALIDataType, DALIInterpType

from engine.data.bands import S1, S1_NODATA, S2, T

# DALI's warp takes at most 4 interleaved channels: Sentinel-2's 11 go in three groups
_S2_GROUPS = ((0, 4), (4, 8), (8, 11))


def build(feed: Callable[[], tuple[list[np.ndarray], ...]], *, batch_size: int, device_id: int | None, threads: int,
          prefetch: int, half: bool, warp: bool) -> Pipeline:
    """A built pipeline with outputs images [B, T, H, W, C] (float16 if `half`, else float32) and label [B, H, W].

    `feed()` returns per batch the lists (s1, s2, label, matrix) of `batch_size` arrays each, as in
    `engine.data.source.Stack` and `engine.data.plan.Draw`, and raises StopIteration at the end.  `device_id` None
    runs on the CPU.  Without `warp` the matrices are not used.
    """
    gpu = device_id is not None
    pipe = Pipeline(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=prefetch)
    with pipe:
        s1, s2, label, *matrix = fn.external_source(
            source=feed if warp else lambda: feed()[:3], num_outputs=4 if warp else 3, batch=True, no_copy=True,
            layout=["FHWC", "FHWC", "HWC", ""][:4 if warp else 3])
        if gpu:
            s1, s2, label = s1.gpu(), s2.gpu(), label.gpu()
        images, label = _transform(s1, s2, label, matrix[0] if warp else None, half)
        pipe.set_outputs(images, label)
    pipe.build()
    return pipe


def _transform(s1: Any, s2: Any, label: Any, matrix: Any | None, half: bool) -> tuple[Any, Any]:
    dtype = DALIDataType.FLOAT16 if half else DALIDataType.FLOAT
    s1 = (s1 - _row(S1.low)) * _row(1 / (S1.high - S1.low)) * (s1 != np.float32(S1_NODATA))
    if matrix is not None:
        s1, label = _warp(s1, matrix), _warp(label, matrix)
        s2 = fn.cat(*(_warp(fn.slice(s2, start=a, end=b, axes=[3]), matrix) for a, b in _S2_GROUPS), axis=3)
    s2 = s2 * _row(1 / S2.high)
    images = fn.cat(fn.cast(s1, dtype=dtype), fn.cast(s2, dtype=dtype), axis=3)
    images = fn.pad(images, axes=[0], shape=[T])
    return images, fn.squeeze(label, axes=[2])


def _row(values: np.ndarray) -> Any:
    """Per-channel constants, broadcast over [F, H, W]."""
    return Constant(values.astype(np.float32))


def _warp(frames: Any, matrix: Any) -> Any:
    return fn.experimental.warp_perspective(frames, matrix=matrix, interp_type=DALIInterpType.INTERP_LINEAR,
                                            border_mode="reflect_101", pixel_origin="corner")
