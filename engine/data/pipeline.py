"""The DALI pipeline: stored arrays in, normalised and augmented stacks out.  One definition for CPU and GPU.

(The packed form in steps of 0.01 dB comes through here on a GPU only: on a CPU `engine.data.store.cpu_batches` is
faster.)

Everything stays pixel-interleaved ([…, H, W, C]), as the files are and as channels_last convolutions want it.  Each
frame is a kept month; the dropped ones are never read, inflated, warped or scaled, and appear only as the zeros that
fill a chip up to T frames.

A chip's stored form decides how the graph begins (`Form`); from there on it is one: a bilinear warp with reflected
border in the files' integers (floats of a TIFF are float32), in groups of at most 4 bands because DALI's warp takes no
more, then scaling, filling up and conversion in one operator.  One matrix a chip carries flip, quarter turns and
rotation.  The CPU warps only chips whose matrix is no flip or quarter turn; those were turned while they were read.
On the GPU the packed form arrives compressed: blocks are inflated there, and the planes of a pixel's bytes and bands
are interleaved by a single transpose of bytes.

`engine.data.reference` is the same function in NumPy, and the tests hold this one to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali.fn as fn
from nvidia.dali import Pipeline, pipeline_def
from nvidia.dali.types import Constant, DALIDataType, DALIInterpType

from engine.base.errors import ConfigError
from engine.data.dataset import LABEL_DTYPE, NO_TARGET, Dataset, Sensor
from engine.data.store.chip_file import EXACT, is_coded, planes_of

MOST_BLOCKS = 65_535  # that DALI 2.4 inflates at once: what fills them up is a grid of one row, a column a block
_CODE = np.dtype("<u2")


class Form(NamedTuple):
    """A stored form of a data set's chips, whose source gives what `layouts` says.

    "stack": an array a sensor, float32 or codes of the TIFFs' integers, and the label.  "blocks": bytes, then offsets
    and sizes of the blocks of all bands, in codes, and of the label.  "blocks_apart": the same with a table for each
    sensor, where floats are stored as they are.
    """

    name: str
    dataset: Dataset
    values: str  # of `engine.data.store.chip_file`

    @property
    def gpu_only(self) -> bool:
        return self.name != "stack"

    @property
    def layouts(self) -> tuple[str, ...]:
        sensors = len(self.dataset.sensors)
        return {"stack": ("FHWC",) * sensors + ("HWC",), "blocks": ("",) * 5,
                "blocks_apart": ("",) * (3 + 2 * sensors)}[self.name]

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is warped and scaled together, in the order of channels."""
        if self.name == "blocks":
            return (_part(self.dataset.sensors, (True,) * len(self.dataset.sensors)),)
        return tuple(_part((sensor,), (is_coded(sensor, EXACT if self.name == "stack" else self.values),))
                     for sensor in self.dataset.sensors)

    @property
    def blocks(self) -> int:
        """Of a chip, that are inflated at once on a GPU."""
        if not self.gpu_only:
            return 0
        counts = np.bincount(planes_of(self.dataset, self.values).sensor)
        return self.dataset.months * int(counts.sum() if self.name == "blocks" else counts.max())


class Part(NamedTuple):
    """Bands that are side by side in one array of `dtype`, with a value a band of each of the others."""

    dtype: np.dtype[Any]
    low: np.ndarray  # what becomes 0
    span: np.ndarray  # what is divided by then
    mark: np.ndarray | None  # in blocks, what becomes `marked`: nodata, which scales to 0
    marked: np.ndarray

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        return groups(len(self.low))


def _part(sensors: tuple[Sensor, ...], coded: tuple[bool, ...]) -> Part:
    low = np.concatenate([s.code_low if code else s.zero for s, code in zip(sensors, coded)])
    span = np.concatenate([s.code_span if code else s.span for s, code in zip(sensors, coded)])
    mark: list[float] = []
    marked: list[float] = []
    for sensor, code in zip(sensors, coded):
        nodata = sensor.code_nodata if code else sensor.nodata
        bands = len(sensor.bands)
        # A band without nodata has 0 become 0
        mark += [0 if nodata is None else nodata] * bands
        marked += [0] * bands if nodata is None else (sensor.code_low if code else sensor.zero).tolist()
    some = any(sensor.nodata is not None for sensor in sensors)
    dtype = _CODE if coded[0] else sensors[0].values
    return Part(dtype, low, span, np.array(mark, dtype) if some else None, np.array(marked, dtype))


def groups(bands: int) -> tuple[tuple[int, int], ...]:
    """Cuts of `bands` into as few groups as can be of 1, 3 or 4: on a GPU the warp has kernels for these alone."""
    sizes = [4] * (bands // 4) + {0: [], 1: [1], 2: [1, 1], 3: [3]}[bands % 4]
    if bands % 4 == 2 and bands > 4:
        sizes[-3:] = [3, 3]
    ends = np.cumsum([0, *sizes]).tolist()
    return tuple(itertools.pairwise(ends))


Feed = Callable[[], tuple[list[np.ndarray], ...]]


def build(feed: Feed, *, form: Form, batch_size: int, device_id: int | None,
          threads: int, prefetch: int, half: bool, warp: bool) -> Pipeline:
    """A built pipeline with outputs images [B, T, H, W, C] (float16 if `half`, else float32) and label [B, H, W].

    `feed()` returns per batch lists of `batch_size` arrays each, those of `form` and, with `warp`,
    the matrices of `engine.data.plan.Draw` and, on the CPU, whether each is to be applied; it raises StopIteration at
    the end.
    `device_id` None runs on the CPU.
    """
    pipe = define(feed, form=form, batch_size=batch_size, device_id=device_id, threads=threads, prefetch=prefetch,
                  half=half, warp=warp)
    pipe.build()
    return pipe


def define(feed: Feed, *, form: Form, batch_size: int, device_id: int | None,
           threads: int, prefetch: int, half: bool, warp: bool) -> Pipeline:
    """The pipeline before it is built, which a machine without a GPU can do for one.

    Raises ConfigError for a batch of more blocks than DALI inflates at once.
    """
    gpu = device_id is not None
    blocks = form.blocks
    if blocks * batch_size > MOST_BLOCKS:
        raise ConfigError(f"a batch of {batch_size} packed chips has {blocks * batch_size:,} blocks, and DALI inflates "
                          f"at most {MOST_BLOCKS:,} at once on a GPU: give at most {MOST_BLOCKS // blocks} chips "
                          f"(train.micro_batch, validate.micro_batch, --batch)")
    if form.gpu_only and not gpu:
        raise ValueError(f"form {form.name!r} is inflated on a GPU")
    return _graph(feed, form, gpu, warp, DALIDataType.FLOAT16 if half else DALIDataType.FLOAT,
                  batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=prefetch)


@pipeline_def(enable_conditionals=True)
def _graph(feed: Any, form: Form, gpu: bool, warp: bool, dtype: DALIDataType) -> tuple[Any, Any]:
    count = len(form.layouts)
    extra = 0 if not warp else 1 if gpu else 2
    layouts = [*form.layouts, *[""] * extra]
    inputs = fn.external_source(source=feed, num_outputs=len(layouts), batch=True, no_copy=True, layout=layouts)
    stored = list(inputs[:count])
    # Python's True and False where all chips of the graph go one way
    matrix, needed = (inputs[count], True if gpu else inputs[count + 1]) if warp else (None, False)
    if form.gpu_only:
        stored = _inflate(form, stored[0].gpu(), stored[1:])
    elif gpu:
        stored = [array.gpu() for array in stored]
    return finish(form, stored, matrix, needed, dtype)


def finish(form: Form, stored: list[Any], matrix: Any, needed: Any, dtype: DALIDataType) -> tuple[Any, Any]:
    """Images [T, H, W, C] and label [H, W] of a chip from an array for each of `form.parts`, and the label."""
    label = _augment(stored[-1], ((0, 1),), matrix, needed)
    scaled = [_scale(_augment(frames, part.groups, matrix, needed), part, form.dataset, dtype)
              for frames, part in zip(stored, form.parts)]
    images = fn.cat(*scaled, axis=3) if len(scaled) > 1 else scaled[0]
    return images, with_nan(fn.squeeze(label, axes=[2]), form.dataset)


def _augment(frames: Any, cuts: tuple[tuple[int, int], ...], matrix: Any, needed: Any) -> Any:
    """`frames`, warped where `needed`: the groups that `cuts` make of their bands, side by side again."""
    if needed:  # noqa: SIM108 (a statement, because DALI's conditionals rewrite only those)
        result = _warp(frames, cuts, matrix)
    else:
        result = frames
    return result


def _warp(frames: Any, cuts: tuple[tuple[int, int], ...], matrix: Any) -> Any:
    groups = [fn.slice(frames, start=first, end=last, axes=[3]) for first, last in cuts] if len(cuts) > 1 else [frames]
    warped = [fn.experimental.warp_perspective(group, matrix=matrix, interp_type=DALIInterpType.INTERP_LINEAR,
                                               border_mode="reflect_101", pixel_origin="corner") for group in groups]
    return fn.cat(*warped, axis=3) if len(warped) > 1 else warped[0]


def _scale(frames: Any, part: Part, dataset: Dataset, dtype: DALIDataType) -> Any:
    """[K, H, W, bands] → [T, H, W, bands], (x − low) / span in `dtype`; zeros after the K-th frame."""
    return fn.crop_mirror_normalize(
        fn.reinterpret(frames, layout="DHWC"), output_layout="DHWC", dtype=dtype, mean=part.low.tolist(),
        std=part.span.tolist(), crop_d=dataset.months, crop_h=dataset.tile, crop_w=dataset.tile, crop_pos_z=0.0,
        out_of_bounds_policy="pad", fill_values=[0.0] * len(part.low))


def _inflate(form: Form, data: Any, tables: list[Any]) -> list[Any]:
    """On the device: what `finish` takes, from the bytes of a file and the places of its blocks."""

    def planes(index: int) -> Any:
        offsets, sizes = tables[2 * index:2 * index + 2]
        return fn.decoders.inflate(data, chunk_offsets=offsets, chunk_sizes=sizes, shape=[form.dataset.tile ** 2],
                                   dtype=DALIDataType.UINT8)

    return assemble(form, [planes(index) for index in range(len(tables) // 2)])


def assemble(form: Form, planes: list[Any]) -> list[Any]:
    """An array for each of `form.parts`, and the label, from their inflated planes [blocks, tile²]."""
    tile = form.dataset.tile
    label = with_no_target(fn.squeeze(interleave(planes[-1], 1, LABEL_DTYPE, tile), axes=[0]), form.dataset)
    bands = [with_nodata(interleave(found, len(part.low), part.dtype, tile), part)
             for found, part in zip(planes, form.parts)]
    return [*bands, label]


def interleave(planes: Any, bands: int, dtype: np.dtype, tile: int) -> Any:
    """Byte-planes [K × bands × bytes, tile²] → values [K, H, W, bands] of `dtype`, by one transpose of bytes."""
    split = fn.reshape(planes, shape=[-1, bands, dtype.itemsize, tile ** 2])
    pixels = fn.transpose(split, perm=[0, 3, 1, 2], transpose_layout=False)
    return fn.reinterpret(pixels, shape=[-1, tile, tile, bands], dtype=_DALI[dtype], layout="FHWC")


def with_nodata(values: Any, part: Part) -> Any:
    """Nodata replaced by what scales to 0."""
    if part.mark is None:
        return values
    same = bool((part.mark == part.mark[0]).all())
    mark = Constant(part.mark[0].item() if same else part.mark, dtype=_DALI[part.dtype],
                    **({} if same else {"device": values.device}))
    row = Constant(part.marked, device=values.device)
    return values * (values != mark) + row * (values == mark)


def with_no_target(label: Any, dataset: Dataset) -> Any:
    """A label as stored, with NO_TARGET for nodata."""
    if dataset.target.nodata is None:
        return label
    nodata = Constant(float(np.float32(dataset.target.nodata)), dtype=DALIDataType.FLOAT)
    return label * (label != nodata) + NO_TARGET * (label == nodata)


def with_nan(label: Any, dataset: Dataset) -> Any:
    """NaN where NO_TARGET has a weight, however small: no weight that is not 0 makes it less than 1e20."""
    if dataset.target.nodata is None:
        return label
    there = label < 1e20
    return label * there / there


_DALI = {np.dtype("<f4"): DALIDataType.FLOAT, _CODE: DALIDataType.UINT16}
