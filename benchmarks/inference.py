"""From files to files: the script that people write, and our prediction from TIFFs and from a packed store.

    python benchmarks/inference.py [--data TIFFTREE] [--packed STORE] [--backbone NAME] [--device cpu|gpu]

A repeat predicts all chips and writes their maps.  Models, loaders and workers stand ready before the clock starts, as
in a run over thousands of chips; queues start empty and are drained.  No chip has a label, as in the test set.

    plain script     tifffile and DataLoader (plain_loader.py), the model as its definition is first written down
                     (plain_model.py), eager, tifffile.imwrite
    our model in it  the same with `engine.load_model`'s model as it comes
    TIFF, packed     what launch/predict.py does

A scene of --scene² pixels becomes a map: plain_scene.py with the plain model, and what launch/predict.py --scene does,
to the valid Cloud-Optimised GeoTIFF and its picture.

Then the stages for chips, each alone: reading and making batches, the model, writing; and a chip through the real model
(tf_efficientnetv2_l and its wide decoder), which reading and writing are to be held against.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import tifffile
import torch
from harness import Recorder, Variant, common_options, out_path, spread
from machine import use_device
from model_parts import Setup, make_batch
from plain_model import PlainUNet
from torch import Tensor

from engine.base.cli import main
from engine.base.distributed import share_of_host
from engine.base.errors import ConfigError, DataError
from engine.base.progress import Progress
from engine.data.batch import Request
from engine.data.biomassters import TILE, T
from engine.data.forms import open_source
from engine.data.index import Chip, open_index
from engine.data.loader import Loader
from engine.data.made.sample import make_sample
from engine.data.store.pack import pack
from engine.inference.chips import (
    Forward,
    chosen_views,
    evaluation_requests,
    predict_batch,
    predict_chips,
)
from engine.inference.fold import Precision, optimize_for_inference
from engine.inference.one_by_one import OneByOne
from engine.inference.predictor import VIEWS_AT_ONCE, Writer
from engine.model.unet import BiomassUNet

PARTS = ("end to end", "a scene", "reading and batches", "model", "writing", "the real model")
REAL = ("tf_efficientnetv2_l", (384, 368, 352, 336, 320))
DISTINCT = 64  # chips of a made sample, at most

Measured = dict[tuple[str, str], list[float]]  # (part, variant) -> seconds of its repeats


class Place(NamedTuple):
    """What all variants share."""

    out: Path  # a folder for maps
    batch: int
    tta: tuple[str, ...]
    precision: Precision
    device: torch.device
    threads: int

    @property
    def views_at_once(self) -> int:
        return VIEWS_AT_ONCE if self.device.type == "cuda" else 1


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser, n=5)
    parser.add_argument("--data", type=Path, help="a TIFF tree (default: a made sample)")
    parser.add_argument("--packed", type=Path, help="the tree of --data packed (default: packed for the occasion)")
    parser.add_argument("--chips", type=int, default=16,
                        help="chips a repeat (default: 16); where the data has fewer, they are repeated")
    parser.add_argument("--batch", type=int, help="chips (default: 4, as launch/predict.py; 16 on a GPU)")
    parser.add_argument("--scene", type=int, default=640, help="pixels a side of a made scene (default: 640)")
    parser.add_argument("--tta", default="id", help="views, as of launch/predict.py (default: id)")
    parser.add_argument("--backbone", help="(default: tf_efficientnetv2_b0 on a CPU, the real one on a GPU)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="(default: fp32 on a CPU, bf16 on a GPU)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--variants", nargs="+", help="only these of each part, as 'plain script', TIFF, packed, ours")
    return parser


def run(args: argparse.Namespace) -> int:
    device = use_device(args.device)
    cuda = device.type == "cuda"
    backbone = args.backbone or (REAL[0] if cuda else "tf_efficientnetv2_b0")
    decoder = REAL[1] if "v2_l" in backbone else (48, 40, 32, 24, 16)
    if args.smoke:
        backbone, decoder, args.n, args.chips, args.batch = "tf_mobilenetv3_small_minimal_100", (8,) * 5, 1, 3, 2
        torch.set_num_threads(1)
    batch = args.batch or (16 if cuda else 4)
    if args.chips < 1 or batch < 1:
        raise ConfigError(f"--chips {args.chips} --batch {batch}: both must be at least 1")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        place = Place(folder / "maps", batch, chosen_views(args.tta.split(",")),
                      args.precision or ("bf16" if cuda else "fp32"), device, share_of_host("auto"))
        chips = data(args.data, args.packed, args.chips, folder)
        torch.manual_seed(0)
        model = BiomassUNet(backbone, decoder).eval()
        recorder = Recorder(out_path(args, "inference", device), "inference", device, {
            "backbone": backbone, "decoder": list(decoder), "data": str(args.data or "sample"),
            "chips": len(chips["TIFF"]), "batch": batch, "views": list(place.tta), "precision": place.precision,
            "cache": "warm"})
        bench = Bench(place, chips, model)
        work = {"chips": float(len(chips["TIFF"])), "pixels": float(len(chips["TIFF"]) * TILE ** 2)}
        parts = dict(zip((PARTS[0], *PARTS[2:]), (bench.whole, bench.reading, bench.models, bench.writing)))
        measured: Measured = {}
        for part in args.parts:
            if part == "a scene":
                size = 320 if args.smoke else args.scene
                if importlib.util.find_spec("rasterio") is None:
                    recorder.absent(f"a scene of {size}² pixels", "ours", "needs rasterio: pip install -e '.[scene]'")
                else:
                    from scene_part import scene_map

                    scene_map(recorder, bench, folder, size, args.n)
            elif part in parts:
                calls = {name: call for name, call in parts[part]().items() if name in (args.variants or [name])}
                timings = recorder.group(part, [Variant(name, call, bench.clear, work=work)
                                                for name, call in calls.items()], n=args.n, wall=True,
                                         memory=False)  # much of the plain script's memory is its workers'
                measured |= {(part, name): timing.seconds for name, timing in zip(calls, timings)}
            else:
                real_model(recorder, place, (backbone, decoder) if args.smoke else REAL, args.n, args.chips, measured)
        bench.close()
        return recorder.close()


def data(tree: Path | None, packed: Path | None, count: int, folder: Path) -> dict[str, list[Chip]]:
    """The same `count` chips as TIFFs and packed; what is not given is made in `folder`."""
    if tree is None:
        make_sample(folder / "sample", 1, seed=1, test_chips=min(count, DISTINCT), test_labels=False)
        tree = folder / "sample"
    if packed is None:
        packed = folder / "store"
        pack(tree, packed, workers=len(os.sched_getaffinity(0)))
    index, stored = open_index(tree), open_index(packed).by_id()
    chips = list(itertools.islice(itertools.cycle(index.split("test") or index.chips), count))
    absent = [chip.id for chip in chips if chip.packed is not None or chip.id not in stored]
    if absent:
        raise DataError(f"--data {tree} --packed {packed}: give a TIFF tree and the same packed; chip {absent[0]} is "
                        f"not in both")
    return {"TIFF": chips, "packed": [stored[chip.id] for chip in chips]}


class Bench:
    """Models, loaders and workers, kept over repeats."""

    def __init__(self, place: Place, chips: dict[str, list[Chip]], model: BiomassUNet):
        from plain_loader import PlainLoader

        self.place, self.chips = place, chips
        self.eager = model.to(place.device)
        self.plain = PlainUNet(model.backbone, model.decoder_channels).eval().to(place.device)
        self.plain.load_state_dict(model.state_dict())
        fast = optimize_for_inference(model, place.precision)
        self.fast: Forward = fast if place.device.type == "cuda" else OneByOne(fast, place.threads)
        self.plain_loader = PlainLoader([Request(chip) for chip in chips["TIFF"]], place.batch, place.threads,
                                        place.device)
        backend = "gpu" if place.device.type == "cuda" else "cpu"
        self.loaders = {form: Loader(open_source(of, backend=backend), batch_size=place.batch, device=place.device,
                                     backend=backend, precision=place.precision, warp=False, readers=place.threads,
                                     threads=place.threads) for form, of in chips.items()}

    def clear(self, _: int) -> None:
        """Before a repeat: no maps."""
        shutil.rmtree(self.place.out, ignore_errors=True)
        self.place.out.mkdir()

    def whole(self) -> dict[str, Callable[[int], None]]:
        return {"plain script": lambda _: self._script(self.plain),
                "our model in it": lambda _: self._script(self.eager),
                **{form: self._ours(form) for form in self.chips}}

    @torch.inference_mode()
    def _script(self, model: BiomassUNet) -> None:
        place, ids = self.place, iter(chip.id for chip in self.chips["TIFF"])
        for images, dropped, _ in self.plain_loader.batches():
            for values in self.plain_maps(model, images, dropped).cpu().numpy():
                tifffile.imwrite(place.out / f"{next(ids)}_agbm.tif", values)

    def plain_maps(self, model: BiomassUNet, images: Tensor, dropped: Tensor) -> Tensor:
        """[B, H, W], one view after the other."""
        given = cast(Any, _Images(images, dropped))
        return predict_batch(model, given, self.place.tta, self.place.precision)[:, 0]

    def _ours(self, form: str) -> Callable[[int], None]:
        place, chips, loader = self.place, self.chips[form], self.loaders[form]

        def predict(_: int) -> None:
            with Progress("", len(chips), "chip", quiet=True) as progress, Writer(place.out, progress) as writer:
                predict_chips(self.fast, loader, chips, micro_batch=place.batch, tta=place.tta,
                              precision=place.precision, device=place.device, views_at_once=place.views_at_once,
                              each=writer.add)
                writer.finish()

        return predict

    def reading(self) -> dict[str, Callable[[int], None]]:
        def of(loader: Loader, chips: Sequence[Chip]) -> Callable[[int], None]:
            return lambda _: _drain(loader.batches(evaluation_requests(chips, self.place.batch)))

        return {"plain script": lambda _: _drain(self.plain_loader.batches()),
                **{form: of(loader, self.chips[form]) for form, loader in self.loaders.items()}}

    def models(self) -> dict[str, Callable[[int], None]]:
        """All batches, which lie in memory."""
        plain = [tensors[:2] for tensors in self.plain_loader.batches()]
        ours = [(batch.images, batch.dropped) for batch in
                self.loaders["TIFF"].batches(evaluation_requests(self.chips["TIFF"], self.place.batch))]

        def of(forward: Forward, batches: Sequence[Sequence[Tensor]], at_once: int) -> Callable[[int], None]:
            def predict(_: int) -> None:
                for images, dropped in batches:
                    predict_batch(forward, cast(Any, _Images(images, dropped)), self.place.tta, self.place.precision,
                                  at_once)

            return predict

        return {"plain script": of(self.plain, plain, 1), "our model in it": of(self.eager, plain, 1),
                "ours": of(self.fast, ours, self.place.views_at_once)}

    def writing(self) -> dict[str, Callable[[int], None]]:
        chips, size = self.chips["TIFF"], self.place.batch
        maps = 120 * torch.rand(size, 1, TILE, TILE)

        def plain(_: int) -> None:
            for number, chip in enumerate(chips):
                tifffile.imwrite(self.place.out / f"{chip.id}_agbm.tif", maps[number % size, 0].numpy())

        def ours(_: int) -> None:
            with Progress("", len(chips), "chip", quiet=True) as progress, Writer(self.place.out, progress) as writer:
                for first in range(0, len(chips), size):
                    some = chips[first:first + size]
                    writer.add(cast(Any, _Chips(some, torch.ones(len(some), dtype=torch.bool))), maps[:len(some)])
                writer.finish()

        return {"plain script": plain, "ours": ours}

    def close(self) -> None:
        self.plain_loader.close()
        self.loaders.clear()


class _Images(NamedTuple):
    """What predict_batch takes of an `engine.data.batch.Batch`."""

    images: Tensor
    dropped: Tensor


class _Chips(NamedTuple):
    """What a Writer takes of one."""

    chips: list[Chip]
    valid: Tensor


def _drain(batches: Iterable[object]) -> None:
    for _ in batches:
        pass


def real_model(recorder: Recorder, place: Place, real: tuple[str, tuple[int, ...]], n: int, chips: int,
               measured: Measured) -> None:
    """A chip with all months through it, and what part of that reading and writing a chip takes."""
    model = optimize_for_inference(BiomassUNet(*real).eval().to(place.device), place.precision)
    batch = make_batch(Setup(*real, 1, TILE, place.precision, place.device), None, T)

    def step(_: int) -> None:
        predict_batch(model, cast(Any, _Images(batch.images, batch.dropped)), place.tta, place.precision,
                      place.views_at_once)

    [timing] = recorder.group(PARTS[-1], [Variant("ours", step, work={"chips": 1.0, "pixels": float(TILE ** 2)})], n=n,
                              memory=False)
    writing = measured.get(("writing", "ours"))
    for (part, form), reading in measured.items():
        if part == "reading and batches" and form != "plain script" and writing and timing.seconds:
            beside = (spread(reading)["median"] + spread(writing)["median"]) / chips
            recorder.note(f"reading and writing, {form}, of the real model's step",
                          **{"%": 100 * beside / spread(timing.seconds)["median"]})


if __name__ == "__main__":
    try:
        import cv2  # noqa: F401
    except ModuleNotFoundError:
        raise SystemExit("benchmarks/inference.py compares with a loader built on OpenCV: pip install "
                         "-c constraints.txt opencv-python-headless (or -e '.[bench]')") from None
    main(arguments(), run)
