"""How fast chips come out of the data path: the loader people write, our TIFF path and our packed path, side by side.

    python benchmarks/loader.py [--data TIFFTREE] [--device cpu|gpu] [--threads 1 2] [--cold]

One repeat reads all chips once, in batches, into a consumer that throws them away; pipelines start empty and are
drained, so nothing prepared before the clock is counted.  All loaders get the same chips with the same draws of
`engine.data.plan`, and the same cores: with `--threads t` the process and its workers may run on t cores only.
Bytes are those a loader has to read from its files.  `wait share`: the part of the time that a consumer which takes
`--step-ms` a batch stands waiting, from the second batch on; the step sleeps, so it leaves the cores (and the GPU)
to the loader.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from harness import Recorder, Variant, common_options, out_path
from machine import use_device

from engine.base.cli import main
from engine.base.errors import ConfigError, DataError
from engine.config import Augment
from engine.data.batch import Request
from engine.data.biomassters import BIOMASSTERS, SENSORS, T
from engine.data.forms import open_source
from engine.data.index import Chip, is_store, open_index
from engine.data.loader import Loader
from engine.data.made.sample import make_sample
from engine.data.plan import IDENTITY, draw
from engine.data.source import present_months
from engine.data.store import chip_file
from engine.data.store.pack import pack

MODES: dict[str, Augment | None] = {"full augmentation": Augment(), "without rotation": Augment(rotate=0.0),
                                    "without augmentation": None}
DISTINCT = 64  # chips of a made sample, at most
TARGET = 110.0  # chips/s: the recipe's 1,100 epochs in a day, were each of all 8,689 chips


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser, n=5)
    parser.add_argument("--data", type=Path, help="a TIFF tree (default: a made sample)")
    parser.add_argument("--packed", type=Path, help="the tree of --data packed (default: packed for the occasion)")
    parser.add_argument("--chips", type=int,
                        help=f"chips a repeat (default: {DISTINCT}, or 2 batches a core if that is more); where the "
                             "data has fewer, they are repeated")
    parser.add_argument("--batch", type=int, default=8, help="chips a batch (default: 8)")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of cores (default: all)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"),
                        help="of our batches (default: what training uses there, fp32 on a CPU, bf16 on a GPU)")
    parser.add_argument("--cold", action="store_true", help="read from disk: drop the files from the page cache first")
    parser.add_argument("--step-ms", type=float,
                        help=f"simulated step of a batch (default: what {TARGET:.0f} chips/s leave; 0: none)")
    return parser


def run(args: argparse.Namespace) -> int:
    device = use_device(args.device)
    cores = sorted(os.sched_getaffinity(0))
    if args.smoke:
        args.chips, args.batch, args.n = 2, 1, 1
    counts = args.threads or [len(cores)]
    args.chips = args.chips or max(-(-DISTINCT // args.batch), 2 * max(counts)) * args.batch
    if max(counts) > len(cores) or min(counts) < 1 or args.chips % args.batch or args.chips < args.batch:
        raise ConfigError(f"--threads {counts} --chips {args.chips} --batch {args.batch}: this machine has "
                          f"{len(cores)} cores, and chips must fill whole batches")
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    step = (args.batch / TARGET if args.step_ms is None else args.step_ms / 1e3)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        tiffs, packed = data(args.data, args.packed, args.chips, Path(folder))
        settings = {"data": str(args.data or "sample"), "chips": len({chip.id for chip in tiffs}),
                    "chips a repeat": args.chips, "batch": args.batch, "cache": "cold" if args.cold else "warm",
                    "precision": f"{precision} (plain fp32)", "layout": "channels_last (plain NCHW)"}
        recorder = Recorder(out_path(args, "loader", device), "loader", device, settings)
        options = {"wall": True, "memory": False}  # most of the plain loader's memory is its workers'
        for threads in counts:
            os.sched_setaffinity(0, cores[:threads])
            torch.set_num_threads(threads)
            for mode in args.modes:
                bench = Bench(tiffs, packed, MODES[mode], args.batch, threads, device, precision, args.cold)
                recorder.group(mode, bench.variants(0.0), n=args.n, x=("cores", threads), **options)
                if step and mode == args.modes[0]:
                    recorder.group(f"{mode}, a step of {step * 1e3:.0f} ms", bench.variants(step), n=args.n,
                                   x=("cores", threads), **options)
                bench.close()
        os.sched_setaffinity(0, cores)
        return recorder.close()


def data(tree: Path | None, packed: Path | None, count: int, folder: Path) -> tuple[list[Chip], list[Chip]]:
    """`count` chips as TIFFs and the same ones packed; what is not given is made in `folder`."""
    if tree is None:
        make_sample(folder / "sample", min(count, DISTINCT), seed=1)
        tree = folder / "sample"
    if is_store(tree):
        raise DataError(f"{tree}: is a packed store; --data takes the TIFF tree, --packed the store")
    chips = open_index(tree).chips[:count]
    if packed is None:
        packed = folder / "store"
        for chip in chips:  # only these are packed
            for path in files(chip):
                link = folder / "tiffs" / ("train_agbm" if path == chip.label else f"{chip.split}_features") / path.name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
        pack(folder / "tiffs", packed, workers=len(os.sched_getaffinity(0)))
    stored = open_index(packed).by_id()
    absent = [chip.id for chip in chips if chip.id not in stored or stored[chip.id].packed is None]
    if absent:
        raise DataError(f"{packed}: holds no packed chip {absent[0]} of {tree}; pack the tree again")
    both = itertools.islice(itertools.cycle((chip, stored[chip.id]) for chip in chips), count)
    tiffs, others = zip(*both)
    return list(tiffs), list(others)


def files(chip: Chip) -> list[Path]:
    """What the chip consists of."""
    if chip.packed is not None:
        return [chip.packed]
    features = [chip.path(s, t) for s in range(len(SENSORS)) for t in range(T) if chip.months[s][t]]
    return features + ([chip.label] if chip.label else [])


def bytes_to_read(request: Request) -> int:
    """By our loaders: the kept months and the label."""
    chip, months = request.chip, present_months(request.chip, request.draw.keep)
    if chip.packed is not None:
        head = chip_file.read_head(chip.packed)
        sections = [chip_file.LABEL, chip_file.STATIC, *(chip_file.FIRST_STEP + t for t in months)]
        return sum(head.section(number)[1] for number in sections)
    paths = [chip.path(s, t) for s in range(len(SENSORS)) for t in months if chip.months[s][t]]
    return sum(path.stat().st_size for path in paths + ([chip.label] if chip.label else []))


class Bench:
    """The three loaders of one mode, kept over repeats."""

    def __init__(self, tiffs: list[Chip], packed: list[Chip], augment: Augment | None, batch: int, threads: int,
                 device: torch.device, precision: str, cold: bool):
        from plain_loader import PlainLoader

        def requests(chips: list[Chip]) -> list[Request]:
            return [Request(chip, draw(BIOMASSTERS, augment, 0, 0, position) if augment else IDENTITY)
                    for position, chip in enumerate(chips)]

        backend = "gpu" if device.type == "cuda" else "cpu"
        self._plain = PlainLoader(requests(tiffs), batch, threads, device)
        self._batch, self._chips = batch, len(tiffs)
        self._loaders: dict[str, tuple[Callable[[], Iterable[object]], list[Chip], float]] = {
            "plain": (self._plain.batches, tiffs, float(sum(p.stat().st_size for chip in tiffs for p in files(chip))))}
        for name, chips in (("TIFF", tiffs), ("packed", packed)):
            asked = requests(chips)
            loader = Loader(open_source(chips, backend=backend), batch_size=batch, device=device, backend=backend,
                            precision=precision, warp=augment is not None, readers=threads, threads=threads)
            self._loaders[name] = (self._of(loader, asked), chips, float(sum(map(bytes_to_read, asked))))
        self._cold = cold

    def _of(self, loader: Loader, asked: list[Request]) -> Callable[[], Iterable[object]]:
        return lambda: loader.batches(asked[k:k + self._batch] for k in range(0, len(asked), self._batch))

    def variants(self, step: float) -> list[Variant]:
        return [Variant(name, _consumer(batches, step), prepare=_evictor(chips) if self._cold else None,
                        work={"chips": self._chips, "bytes": size})
                for name, (batches, chips, size) in self._loaders.items()]

    def close(self) -> None:
        self._plain.close()
        self._loaders.clear()


def _consumer(batches: Callable[[], Iterable[object]], step: float) -> Callable[[int], dict[str, float] | None]:
    """Takes all batches, `step` seconds each."""
    def consume(_: int) -> dict[str, float] | None:
        iterator: Iterator[object] = iter(batches())
        begin = 0.0
        for number in itertools.count():
            if next(iterator, None) is None:
                break
            if number == 0:
                begin = time.perf_counter()
            if step:
                time.sleep(step)
        total = time.perf_counter() - begin
        return {"wait share": 1 - number * step / total} if step else None

    return consume


def _evictor(chips: list[Chip]) -> Callable[[int], None]:
    def evict(_: int) -> None:
        for path in {path for chip in chips for path in files(chip)}:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # dirty pages stay
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    return evict


if __name__ == "__main__":
    try:
        import cv2  # noqa: F401
    except ModuleNotFoundError:
        raise SystemExit("benchmarks/loader.py compares with a loader built on OpenCV: pip install "
                         "-c constraints.txt opencv-python-headless (or -e '.[bench]')") from None
    main(arguments(), run)
