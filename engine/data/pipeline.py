"""The DALI pipeline: stored arrays in, normalised and augmented stacks out.  One definition for CPU and GPU.

(The packed form in steps of 0.01 dB comes through here on a GPU only: on a CPU `engine.data.store.cpu_batches` is
faster.)

Everything stays pixel-interleaved ([…, H, W, C]), as the files are and as channels_last convolutions want it.  Each
frame is a kept month; the dropped ones are never read, inflated, warped or scaled, and appear only as the zeros that
fill a chip up to T frames.

A chip's stored form decides how the graph begins (`FORMS`); from there on it is one: a bilinear warp with reflected
border in the files' integers (Sentinel-1 of a TIFF is float32), in groups of 4 bands because DALI's warp takes no
more, then scaling, filling up and conversion in one operator.  One matrix a chip carries flip, quarter turns and
rotation.  The CPU warps only chips whose matrix is no flip or quarter turn; those were turned while they were read.
On the GPU the packed form arrives compressed: blocks are inflated there, and the planes of a pixel's bytes and bands
are interleaved by a single transpose of bytes.

`engine.data.reference` is the same function in NumPy, and the tests hold this one to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali.fn as fn
from nvidia.dali import Pipeline, pipeline_def
from nvidia.dali.types import Constant, DALIDataType, DALIInterpType

from engine.base.errors import ConfigError
from engine.data.dataset import AGBM_DTYPE, S1, S1_NODATA, S2, SENSORS, TILE, C, T
from engine.data.store.chip_file import CODE_NODATA, CODES_LOW, CODES_SPAN, PLANE

_GROUPS = ((0, 4), (4, 8), (8, 12), (12, 15))  # of all bands
_S2_GROUPS = ((0, 4), (4, 8), (8, 11))  # of Sentinel-2's alone


class Form(NamedTuple):
    """A stored form: the layouts of the arrays that its source gives, and how many blocks a chip has at most where
    they are inflated on a GPU."""

    layouts: tuple[str, ...]
    blocks: int = 0

    @property
    def gpu_only(self) -> bool:
        return self.blocks > 0


FORMS = {
    # s1 float32 dB and s2 uint16 as in the TIFFs, label
    "stack": Form(("FHWC", "FHWC", "HWC")),
    # bytes, then offsets and sizes of the blocks of: all bands, label
    "blocks": Form(("",) * 5, blocks=T * C * S2.dtype.itemsize),
    # the same, of: s1 in float32, s2, label
    "blocks_float": Form(("",) * 7, blocks=T * max(len(s.bands) * s.dtype.itemsize for s in SENSORS)),
}
MOST_BLOCKS = 65_535  # that DALI 2.4 inflates at once: what fills them up is a grid of one row, a column a block


Feed = Callable[[], tuple[list[np.ndarray], ...]]


def build(feed: Feed, *, form: str, batch_size: int, device_id: int | None,
          threads: int, prefetch: int, half: bool, warp: bool) -> Pipeline:
    """A built pipeline with outputs images [B, T, H, W, C] (float16 if `half`, else float32) and label [B, H, W].

    `feed()` returns per batch lists of `batch_size` arrays each, those of `form` (a key of FORMS) and, with `warp`,
    the matrices of `engine.data.plan.Draw` and, on the CPU, whether each is to be applied; it raises StopIteration at
    the end.
    `device_id` None runs on the CPU.
    """
    pipe = define(feed, form=form, batch_size=batch_size, device_id=device_id, threads=threads, prefetch=prefetch,
                  half=half, warp=warp)
    pipe.build()
    return pipe


def define(feed: Feed, *, form: str, batch_size: int, device_id: int | None,
           threads: int, prefetch: int, half: bool, warp: bool) -> Pipeline:
    """The pipeline before it is built, which a machine without a GPU can do for one.

    Raises ConfigError for a batch of more blocks than DALI inflates at once.
    """
    gpu = device_id is not None
    blocks = FORMS[form].blocks
    if blocks * batch_size > MOST_BLOCKS:
        raise ConfigError(f"a batch of {batch_size} packed chips has {blocks * batch_size:,} blocks, and DALI inflates "
                          f"at most {MOST_BLOCKS:,} at once on a GPU: give at most {MOST_BLOCKS // blocks} chips "
                          f"(train.micro_batch, validate.micro_batch, --batch)")
    if FORMS[form].gpu_only and not gpu:
        raise ValueError(f"form {form!r} is inflated on a GPU")
    return _graph(feed, form, gpu, warp, DALIDataType.FLOAT16 if half else DALIDataType.FLOAT,
                  batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=prefetch)


@pipeline_def(enable_conditionals=True)
def _graph(feed: Any, form: str, gpu: bool, warp: bool, dtype: DALIDataType) -> tuple[Any, Any]:
    count = len(FORMS[form].layouts)
    extra = 0 if not warp else 1 if gpu else 2
    layouts = [*FORMS[form].layouts, *[""] * extra]
    inputs = fn.external_source(source=feed, num_outputs=len(layouts), batch=True, no_copy=True, layout=layouts)
    stored = list(inputs[:count])
    # Python's True and False where all chips of the graph go one way
    matrix, needed = (inputs[count], True if gpu else inputs[count + 1]) if warp else (None, False)
    if FORMS[form].gpu_only:
        stored = _inflate(form, stored[0].gpu(), stored[1:])
    elif gpu:
        stored = [array.gpu() for array in stored]
    return finish(form, stored, matrix, needed, dtype)


def finish(form: str, stored: list[Any], matrix: Any, needed: Any, dtype: DALIDataType) -> tuple[Any, Any]:
    """Images [T, H, W, C] and label [H, W] of a chip from [bands, label] or [s1, s2, label]."""
    label = _augment(stored[-1], None, matrix, needed)
    if form == "blocks":
        images = _scale(_augment(stored[0], _GROUPS, matrix, needed), _CODES, dtype)
    else:
        s1 = _scale(_augment(stored[0], None, matrix, needed), _S1, dtype)
        s2 = _scale(_augment(stored[1], _S2_GROUPS, matrix, needed), _S2, dtype)
        images = fn.cat(s1, s2, axis=3)
    return images, fn.squeeze(label, axes=[2])


def _augment(frames: Any, cuts: tuple[tuple[int, int], ...] | None, matrix: Any, needed: Any) -> Any:
    """`frames`, warped where `needed`: all bands at once, or the groups that `cuts` make of them side by side."""
    if needed:  # noqa: SIM108 (a statement, because DALI's conditionals rewrite only those)
        result = _warp(frames, cuts, matrix)
    else:
        result = frames
    return result


def _warp(frames: Any, cuts: tuple[tuple[int, int], ...] | None, matrix: Any) -> Any:
    groups = [fn.slice(frames, start=first, end=last, axes=[3]) for first, last in cuts] if cuts else [frames]
    warped = [fn.experimental.warp_perspective(group, matrix=matrix, interp_type=DALIInterpType.INTERP_LINEAR,
                                               border_mode="reflect_101", pixel_origin="corner") for group in groups]
    return fn.cat(*warped, axis=3) if len(warped) > 1 else warped[0]


class _Range(NamedTuple):
    """What becomes 0, and what is divided by then, for each band."""

    low: np.ndarray
    span: np.ndarray


_S1, _S2 = _Range(S1.low, S1.high - S1.low), _Range(S2.low, S2.high - S2.low)
_CODES = _Range(CODES_LOW, CODES_SPAN)


def _scale(frames: Any, bands: _Range, dtype: DALIDataType) -> Any:
    """[K, H, W, bands] → [T, H, W, bands], (x − low) / span in `dtype`; zeros after the K-th frame."""
    return fn.crop_mirror_normalize(
        fn.reinterpret(frames, layout="DHWC"), output_layout="DHWC", dtype=dtype, mean=bands.low.tolist(),
        std=bands.span.tolist(), crop_d=T, crop_h=TILE, crop_w=TILE, crop_pos_z=0.0, out_of_bounds_policy="pad",
        fill_values=[0.0] * len(bands.low))


def _inflate(form: str, data: Any, tables: list[Any]) -> list[Any]:
    """On the device: [bands, label] or [s1, s2, label] from the bytes of a file and the places of its blocks."""

    def planes(index: int) -> Any:
        offsets, sizes = tables[2 * index:2 * index + 2]
        return fn.decoders.inflate(data, chunk_offsets=offsets, chunk_sizes=sizes, shape=[PLANE],
                                   dtype=DALIDataType.UINT8)

    return assemble(form, [planes(index) for index in range(len(tables) // 2)])


def assemble(form: str, planes: list[Any]) -> list[Any]:
    """[bands, label] or [s1, s2, label] from their inflated planes, [blocks, PLANE] each."""
    label = fn.squeeze(interleave(planes[-1], 1, AGBM_DTYPE), axes=[0])
    if form == "blocks":
        return [with_nodata(interleave(planes[0], C, S2.dtype), _CODES.low, CODE_NODATA, S2.dtype), label]
    s1 = interleave(planes[0], len(S1.bands), S1.dtype)
    return [with_nodata(s1, S1.low, S1_NODATA, S1.dtype), interleave(planes[1], len(S2.bands), S2.dtype), label]


def interleave(planes: Any, bands: int, dtype: np.dtype) -> Any:
    """Byte-planes [K × bands × bytes, PLANE] → values [K, H, W, bands] of `dtype`, by one transpose of bytes."""
    split = fn.reshape(planes, shape=[-1, bands, dtype.itemsize, PLANE])
    pixels = fn.transpose(split, perm=[0, 3, 1, 2], transpose_layout=False)
    return fn.reinterpret(pixels, shape=[-1, TILE, TILE, bands], dtype=_DALI[dtype], layout="FHWC")


def with_nodata(values: Any, low: np.ndarray, nodata: float, dtype: np.dtype) -> Any:
    """`nodata` replaced by each band's `low`, which scales to 0."""
    mark, row = Constant(nodata, dtype=_DALI[dtype]), Constant(low.astype(dtype), device=values.device)
    return values * (values != mark) + row * (values == mark)


_DALI = {S1.dtype: DALIDataType.FLOAT, S2.dtype: DALIDataType.UINT16}
