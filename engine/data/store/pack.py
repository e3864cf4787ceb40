"""A TIFF tree in, a packed store out: `launch/prepare.py pack`.

A store is a folder: `chips/{id}.safetensors` (engine.data.store.chip_file), one file a chip, and `manifest.json`,
written last.  A chip's file appears whole or not at all, and holds the same bytes whoever wrote it and when, so a pack
that was stopped, killed or ran out of disk goes on where it was, and ends in the same store.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.base.errors import ConfigError, DataError
from engine.base.files import atomic_write, write_text
from engine.data.dataset import LABEL_DTYPE, Dataset
from engine.data.index import Chip, Index, is_store, open_index, read_manifest
from engine.data.metadata import Problem, Published
from engine.data.store import chip_file
from engine.data.store.source import PackedSource
from engine.data.tiff import tiff
from engine.data.tiff.checksum import posix_cksum
from engine.data.tiff.source import TiffSource

FORMAT = "biomass-store"
# Of the TIFFs' bytes, at most: real chips take 0.39 and 0.57, the made ones, which are noisier, 0.47 and 0.67
SHARE = {chip_file.STEPS: 0.5, chip_file.EXACT: 0.7}


def pack(tree: Path, out: Path, *, dataset: Dataset | None = None, lossless: bool = False, workers: int = 4,
         verify: bool = False, progress: Callable[[int], None] | None = None) -> dict[str, int]:
    """Pack the TIFF tree `tree` (of `dataset`, as for `open_index`) into the store `out`, or finish what an earlier
    call began.

    `lossless` keeps floats as they are; else those of sensors with a `packed_step` (Sentinel-1's 0.01 dB) are stored in
    such steps.  Integers and labels are always kept exactly.  `verify` reads every packed chip back and compares it
    with its TIFFs, old ones too.  `progress` is called with 1 after each chip.  Returns {"chips", "new", "bytes",
    "tiff_bytes"}.

    Raises DataError where a TIFF is damaged or differs from its published checksum, where `out` is a store of other
    settings or version, and where the disk is full; what is packed by then stays, and is valid.
    """
    if is_store(tree):
        raise DataError(f"{tree}: is a packed store already; --data takes the TIFF tree")
    values = chip_file.EXACT if lossless else chip_file.STEPS
    index = open_index(tree, dataset)
    check_settings(out, index.dataset, values)
    published = {file.path: file for file in index.files}
    folder = out / chip_file.CHIPS
    sweep(folder)
    (out / chip_file.MANIFEST).unlink(missing_ok=True)  # from here on the store is unfinished

    def one(chip: Chip) -> tuple[int, int, int]:
        path = folder / f"{chip.id}{chip_file.SUFFIX}"
        head, new = _packed_before(path, chip, values), False
        if head is None:
            files = {file.name: _read(file, published.get(file)) for file in chip.files}
            write_chip(path, encode_chip(chip.id, chip.split, index.dataset, files, values))
            head, new = chip_file.read_head(path), True
        if verify:
            _compare(path, chip)
        return int(new), head.end, sum(size for size, _ in head.sources.values())

    done = _parallel(one, index, workers, progress)
    write_manifest(out, index.dataset, values)
    new, size, tiff_size = (sum(column) for column in zip(*done))
    return {"chips": len(done), "new": new, "bytes": size, "tiff_bytes": tiff_size}


def encode_chip(chip: str, split: str, dataset: Dataset, files: Mapping[str, bytes],
                values: str = chip_file.STEPS) -> bytes:
    """The packed file of a chip whose TIFFs are `files`, name → content; `values` is chip_file.STEPS or EXACT.

    Raises DataError, naming the file, for a TIFF that is damaged, of another shape or dtype, or holds NaN.
    """
    months, images = np.zeros((len(dataset.sensors), dataset.months), bool), []
    targets: dict[str, np.ndarray] = {}
    for number, sensor in enumerate(dataset.sensors):
        steps = 1 if sensor.static else dataset.months
        images.append(np.zeros((steps, *dataset.shape(sensor)), sensor.values))
        for t in range(steps):
            name = dataset.feature_name(chip, number, t)
            targets[name] = images[number][t]
            months[number, slice(None) if sensor.static else t] = name in files
    label_name = dataset.label_name(chip)
    targets[label_name] = label = np.empty((dataset.tile, dataset.tile), dataset.target.dtype)
    for name, data in files.items():
        try:
            tiff.decode_into(data, targets[name])
            if targets[name].dtype.kind == "f" and not np.isfinite(targets[name]).all():
                raise DataError("holds NaN or infinity")
        except DataError as error:
            raise DataError(f"{name}: {error}; {tiff.REMEDY}") from None
    sources = {name: (len(data), posix_cksum(data)) for name, data in files.items()}
    arrays = chip_file.Arrays(tuple(images), label.astype(LABEL_DTYPE, copy=False) if label_name in files else None)
    try:
        return chip_file.encode(chip, split, dataset, arrays, months, values, sources)
    except DataError as error:
        raise DataError(f"chip {chip}: {error}") from None


def verify_store(root: Path, workers: int = 4, progress: Callable[[int], None] | None = None) -> list[Problem]:
    """Check every byte of a store, and its manifest against it.  `progress` is called with 1 after each chip."""
    index = open_index(root)
    said = {entry["id"]: entry for entry in read_manifest(root)["chips"]}

    def one(chip: Chip) -> Problem | None:
        assert chip.packed is not None
        try:
            head = chip_file.verify_file(chip.packed)
        except DataError as error:
            return Problem(chip.packed, str(error).removeprefix(f"{chip.packed}: "))
        if _entry(head) != said[chip.id]:
            return Problem(chip.packed, f"is not the file that {chip_file.MANIFEST} tells of; {chip_file.REMEDY}")
        return None

    return [problem for problem in _parallel(one, index, workers, progress) if problem is not None]


def _parallel(one: Callable[[Chip], Any], index: Index, workers: int,
              progress: Callable[[int], None] | None) -> list[Any]:
    """`one(chip)` for every chip, in the order of the index; the first error stops those that have not begun."""
    if workers < 1:
        raise ConfigError(f"--workers {workers}: at least 1")
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pack")
    try:
        futures: list[Future[Any]] = [pool.submit(one, chip) for chip in index.chips]
        for future in as_completed(futures):
            future.result()
            if progress:
                progress(1)
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def check_settings(out: Path, dataset: Dataset, values: str) -> None:
    """Raises DataError where `out` holds anything but chips of `dataset`, packed like this."""
    if out.exists() and not is_store(out) and any(out.iterdir()):
        raise DataError(f"{out}: holds something else than a packed store; give --out a new or empty folder")
    for path in _packed(out):
        head = chip_file.read_head(path)
        if head.values != values:
            flag = {chip_file.EXACT: "with --lossless", chip_file.STEPS: "without --lossless"}
            raise DataError(f"{out}: was packed {flag[head.values]}, now it is asked for {flag[values]}; go on as "
                            f"before, or give --out another folder")
        if not head.dataset.alike(dataset):
            raise DataError(f"{out}: holds chips of data set {head.dataset.name!r} as it was described then, not as "
                            f"{dataset.name!r} is described now; give --out another folder")


def sweep(folder: Path) -> None:
    """Remove what killed packs left half-written."""
    for part in folder.glob(f".*{chip_file.SUFFIX}.*.part"):
        process = part.name.split(".")[-2]
        if process.isdigit() and not _alive(int(process)):
            part.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # its number came back to us
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


_LARGEST = 1 << 28  # bytes of a TIFF, which is held in memory


def _read(path: Path, published: Published | None) -> bytes:
    """A TIFF, compared with what was published of it."""
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(f"{path}: {path.stat().st_size} bytes, far more than an image needs; {tiff.REMEDY}")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {tiff.REMEDY}") from None
    if published is not None:
        if published.size not in (None, len(data)):
            raise DataError(f"{path}: {len(data)} bytes, published {published.size}; {tiff.REMEDY}")
        if published.cksum is not None and published.cksum != (found := posix_cksum(data)):
            raise DataError(f"{path}: cksum {found}, published {published.cksum}; {tiff.REMEDY}")
    return data


def _packed_before(path: Path, chip: Chip, values: str) -> chip_file.Head | None:
    """The head of a chip that an earlier call packed from the same TIFFs, None where there is none."""
    if not path.exists():
        return None
    head = chip_file.read_head(path)
    sizes = {file.name: file.stat().st_size for file in chip.files}
    same = {name: size for name, (size, _) in head.sources.items()} == sizes
    return head if same and head.values == values and head.split == chip.split else None


def write_chip(path: Path, data: bytes) -> None:
    try:
        with atomic_write(path) as handle:
            handle.write(data)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise DataError(f"{path}: cannot be written ({'the disk is full' if full else error.strerror}); the chips that "
                        f"are packed stay valid: make room and run the same command again") from None


def _entry(head: chip_file.Head) -> dict[str, Any]:
    """What the manifest says of a chip, all of it from the chip's own head.  `sources` stay there: some 23 a chip, they
    were six sevenths of the manifest and most of the time that an index took."""
    months = {sensor.name: "".join("01"[int(month)] for month in row)
              for sensor, row in zip(head.dataset.sensors, head.months)}
    return {"id": head.chip, "split": head.split, "months": months, "label": head.label, "bytes": head.end,
            "crc32": int(head.crc[-1])}


def write_manifest(out: Path, dataset: Dataset, values: str) -> None:
    """The manifest of all chips in `out`, one line a chip, so that tools for text can look at it.  It makes the store
    one that can be trained on.  Raises DataError where it cannot be written."""
    lines = ",\n".join(json.dumps(_entry(chip_file.read_head(path))) for path in _packed(out))
    settings = {"values": values, "lz4_level": chip_file.LEVEL}
    text = (f'{{"format": {json.dumps(FORMAT)}, "version": {chip_file.VERSION}, "settings": {json.dumps(settings)},\n'
            f'"dataset": {json.dumps(dataset.dump())},\n"chips": [\n{lines}\n]}}\n')
    try:
        write_text(out / chip_file.MANIFEST, text)
    except OSError as error:
        raise DataError(f"{out / chip_file.MANIFEST}: cannot be written ({error.strerror}); make room and run the same "
                        f"command again") from None


def _packed(out: Path) -> list[Path]:
    return sorted((out / chip_file.CHIPS).glob(f"[!.]*{chip_file.SUFFIX}"))


def _compare(path: Path, chip: Chip) -> None:
    """Every byte of a packed chip against its TIFFs.  Raises DataError."""
    chip_file.verify_file(path)
    packed = replace(chip, folder=path.parent, label=chip.label and path, packed=path)
    dataset = chip.dataset
    old, new = TiffSource(dataset, "mask").stack(chip), PackedSource(path, "mask").stack(packed)
    steps = chip_file.read_head(path).values == chip_file.STEPS
    pairs = [("label", old.label, new.label), ("months", old.months, new.months)]
    for sensor, was, now in zip(dataset.sensors, old.images, new.images):
        if steps and sensor.packed_step is not None:
            in_steps = chip_file.decoded(chip_file.codes(was, sensor), sensor)
            half = sensor.packed_step / 2 + np.spacing(np.abs(was))  # a float32 near the value
            if (np.abs(in_steps.astype(np.float64) - was) > half).any():
                raise DataError(f"{path}: {sensor.name} of chip {chip.id} does not fit steps of "
                                f"{sensor.packed_step:g} {sensor.unit}; pack with --lossless")
            was = in_steps
        pairs.append((sensor.name, was, now))
    for what, was, now in pairs:
        if not np.array_equal(was, now, equal_nan=what == "label"):
            raise DataError(f"{path}: its {what} differs from the TIFFs of chip {chip.id}; remove the file and pack "
                            f"again")
