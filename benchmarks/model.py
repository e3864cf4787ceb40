"""The whole model: what each lever gains, from the plain eager baseline upwards, and what a month costs.

    python benchmarks/model.py [--device cpu|gpu] [--backbone NAME --decoder 48 40 32 24 16] [--batch 8] [--parts …]

training   the ladder: each rung has the levers of those before it.  A step is forward, loss, backward, clipping and
           AdamW, on batches with the recipe's month dropout (`engine.data.plan`); the same batches for all rungs.
           The peak memory is that of a batch that keeps all months, which a run must be able to take.
inference  the same for prediction, all months kept.
stages     encoder, month attention and decoder alone: plain against all levers, all months kept.
months     the cost of T = 1, 2, 4, 8, 12 months and its slope, beside the encoder's convolutions alone: what a month
           costs above them is overhead.

On a GPU the plain model runs in bfloat16 autocast over float32 weights, as does ours.  FLOP/s count the arithmetic of
the model's definition for the months that are kept (the backward twice the forward), whatever a rung really computes.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from harness import Recorder, Variant, common_options, line_through, out_path, spread
from machine import ceilings, use_device
from model_parts import Batch, Flop, Setup, convolutions, make_batch, recipe_batches, stages, train_step
from plain_model import PlainUNet, plain_decoder, plain_norms
from torch import nn

from engine.base.cli import main
from engine.base.errors import ConfigError
from engine.config import Optimizer
from engine.data.biomassters import TILE, T
from engine.inference.chips import autocast
from engine.inference.cudagraphs import Graphed
from engine.inference.fold import optimize_for_inference
from engine.model.compilation import checkpoint_regions, compile_regions
from engine.model.unet import BiomassUNet
from engine.training.optim import make_optimizer, parameter_groups, set_learning_rate
from kernels.month_attention import resolve

PARTS = ("training", "inference", "stages", "months")
RUNGS = ("plain", "channels_last", "fused AdamW", "kept months only", "fused attention", "lean norms",
         "lean decoder", "activations again", "compiled regions", "recomputed blocks")
INFERENCE = ("plain", "channels_last", "fused attention", "lean decoder", "compiled regions")  # others change nothing
ENDS = ("plain", "compiled regions")  # the baseline, and all levers but those that trade time for memory
MONTHS = (1, 2, 4, 8, 12)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Models = dict[str, BiomassUNet]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser, n=7)
    parser.add_argument("--backbone", help="(default: tf_efficientnetv2_b0 on a CPU, the real one on a GPU)")
    parser.add_argument("--decoder", type=int, nargs="+", help="widths (default: to match the backbone)")
    parser.add_argument("--batch", type=int, help="chips (default: 1 on a CPU, 8 on a GPU)")
    parser.add_argument("--size", type=int, default=TILE, help="pixels a side")
    parser.add_argument("--precision", choices=DTYPES, help="(default: fp32 on a CPU, bf16 on a GPU)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, help="of the ladder in training (default: all)")
    return parser


def run(args: argparse.Namespace) -> int:
    device = use_device(args.device)
    cuda = device.type == "cuda"
    if args.smoke:
        args.backbone, args.decoder = "tf_mobilenetv3_small_minimal_100", [8] * 5
        args.n, args.batch, args.size = 1, 1, 64
        torch.set_num_threads(1)
    backbone = args.backbone or ("tf_efficientnetv2_l" if cuda else "tf_efficientnetv2_b0")
    decoder = tuple(args.decoder or ((384, 368, 352, 336, 320) if "v2_l" in backbone else (48, 40, 32, 24, 16)))
    if args.size % 32 or args.size < 32:
        raise ConfigError(f"--size {args.size}: give a multiple of 32")
    precision = args.precision or ("bf16" if cuda else "fp32")
    setup = Setup(backbone, decoder, args.batch or (8 if cuda else 1), args.size, precision, device)
    flop = Flop.of(setup)
    recorder = Recorder(
        out_path(args, "model", device), "model", device,
        {"backbone": backbone, "decoder": list(decoder), "batch": setup.batch, "pixels": setup.size,
         "precision": "bf16 autocast, fp32 weights" if precision == "bf16" else precision,
         "layout": "channels_last (plain NCHW)", "month attention": resolve("auto", device),
         "cudnn.benchmark": torch.backends.cudnn.benchmark},
        ceilings(device, DTYPES[precision], small=args.smoke))
    recorder.note("arithmetic forward", **{"GFLOP a month, encoder": flop.encoder / 1e9, "attention":
                                           flop.attention / 1e9, "GFLOP a chip, decoder": flop.decoder / 1e9})
    if args.smoke:  # it spends minutes in a C++ compiler
        torch.compiler.set_stance("force_eager")
    needed = {"training": args.rungs or RUNGS, "inference": INFERENCE, "stages": ENDS,
              "months": (*ENDS, "channels_last")}
    models = {rung: build(rung, setup) for rung in RUNGS
              if any(rung in needed[part] for part in args.parts)}
    for part in args.parts:
        PARTS_RUN[part](recorder, models, setup, flop, args)
    return recorder.close()


def build(rung: str, setup: Setup) -> BiomassUNet:
    """The model with the levers of `rung` and of all before it.  Weights are the same for all."""
    def has(lever: str) -> bool:
        return RUNGS.index(lever) <= RUNGS.index(rung)

    torch.manual_seed(0)
    if not has("kept months only"):
        layout = torch.channels_last if has("channels_last") else torch.contiguous_format
        return PlainUNet(setup.backbone, setup.decoder, memory_format=layout).to(setup.device)
    model = BiomassUNet(setup.backbone, setup.decoder)
    for level in cast(Any, model.attn):
        level.implementation = resolve("auto", setup.device) if has("fused attention") else "reference"
    if not has("lean norms"):
        plain_norms(model)
    if not has("lean decoder"):
        plain_decoder(model)
    model.to(setup.device)
    model.keep_less = has("activations again")
    if has("compiled regions"):
        compile_regions(model)
    if has("recomputed blocks"):
        checkpoint_regions(model)
    return model


def training(recorder: Recorder, models: Models, setup: Setup, flop: Flop, args: argparse.Namespace) -> None:
    warmup = 3
    batches = [make_batch(setup, number) for number in recipe_batches(setup, min(args.n, 8))]
    full = make_batch(setup, None)

    def batch(i: int) -> Batch:
        return full if i < warmup else batches[i % len(batches)]  # memory is measured while warming up

    kept = sum(int((~batch(warmup + i).dropped).sum()) for i in range(args.n)) / args.n
    recorder.note("training batches", **{"kept months of a chip, mean": kept / setup.batch})
    variants = []
    for rung in args.rungs or RUNGS:
        model = models[rung]
        step = train_step(model.train(), _optimizer(model, RUNGS.index(rung) >= RUNGS.index("fused AdamW")), setup)
        if rung == "compiled regions":
            start = time.perf_counter()
            with contextlib.suppress(Exception):  # it comes again as this rung's row
                step(full)
            if setup.device.type == "cuda":
                torch.cuda.synchronize(setup.device)
            recorder.note("first training step, compiled regions", s=time.perf_counter() - start)
        variants.append(Variant(rung, _on_batches(step, batch), resident=_resident(model, training=True),
                                work={"chips": setup.batch, "flop": 3 * flop.chips(setup.batch, kept)}))
    recorder.group("training step", variants, n=args.n, warmup=warmup)


def _on_batches(step: Callable[[Batch], None], batch: Callable[[int], Batch]) -> Callable[[int], None]:
    return lambda i: step(batch(i))


def _optimizer(model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """The recipe's AdamW; torch's own choice of an implementation where not fused."""
    recipe = Optimizer()
    optimizer = make_optimizer(model, recipe) if fused else \
        torch.optim.AdamW(parameter_groups(model, recipe.weight_decay))
    set_learning_rate(optimizer, 0.0)  # the same work, and weights that stay what they are
    return optimizer


def _resident(model: nn.Module, training: bool) -> int:
    """Bytes of weights and statistics, and of AdamW's two moments."""
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return weights + (2 * sum(p.nbytes for p in model.parameters() if p.requires_grad) if training else 0)


def inference(recorder: Recorder, models: Models, setup: Setup, flop: Flop, args: argparse.Namespace) -> None:
    batch = make_batch(setup, None)
    of: dict[str, nn.Module | Graphed] = {rung: models[rung].eval() for rung in INFERENCE}
    precision = cast(Any, setup.precision)
    of["BatchNorm folded"] = optimize_for_inference(models["lean decoder"], precision)
    folded = optimize_for_inference(models["lean decoder"], precision)
    compile_regions(folded)
    of["folded and compiled"] = folded
    if setup.device.type == "cuda":
        of["folded, compiled, CUDA graphs"] = Graphed(folded)
    work = {"chips": setup.batch, "flop": flop.chips(setup.batch, setup.batch * T)}
    variants = [Variant(name, _forward(model, batch, setup), work=work,
                        resident=_resident(folded if isinstance(model, Graphed) else model, training=False))
                for name, model in of.items()]
    recorder.group("inference", variants, n=args.n, warmup=3)


def _forward(model: nn.Module | Graphed, batch: Batch, setup: Setup) -> Callable[[int], None]:
    images = batch.plain_images if isinstance(model, PlainUNet) else batch.images

    def forward(_: int) -> None:
        with torch.inference_mode(), autocast(setup.device, setup.precision):
            model(images, batch.dropped)

    return forward


def stage_times(recorder: Recorder, models: Models, setup: Setup, flop: Flop, args: argparse.Namespace) -> None:
    months = setup.batch * T
    work = {"encoder": flop.encoder * months, "attention": flop.attention * months,
            "decoder": flop.decoder * setup.batch}
    for backward in (False, True):
        calls = {name: stages(model, setup, backward) for name, model in _pair(models).items()}
        for stage, operations in work.items():
            variants = [Variant(name, of[stage], work={"flop": operations * (3 if backward else 1)})
                        for name, of in calls.items()]
            recorder.group(f"{stage}, forward{' + backward' if backward else ''}", variants, n=args.n, warmup=3)


def month_costs(recorder: Recorder, models: Models, setup: Setup, flop: Flop, args: argparse.Namespace) -> None:
    counts = MONTHS[:2] if args.smoke else MONTHS
    for backward in (False, True):
        title = f"months, forward{' + backward' if backward else ''}"
        bare = convolutions(models["channels_last"], setup, backward)
        medians: dict[str, list[float]] = {}
        for months in counts:
            batch = make_batch(setup, None, months)
            variants = [Variant(name, _whole(model, batch, setup, backward)) for name, model in _pair(models).items()]
            variants.append(Variant("encoder's convolutions alone", _on(bare, months * setup.batch)))
            timings = recorder.group(title, variants, n=args.n, warmup=3, x=("months", months))
            for variant, timing in zip(variants, timings):
                if timing.error is None:
                    medians.setdefault(variant.name, []).append(spread(timing.seconds)["median"])
        for name, seconds in medians.items():
            if len(seconds) == len(counts):
                slope, intercept = line_through(counts, seconds)
                recorder.note(f"{title}, {name}", **{"ms a month of a chip": slope / setup.batch * 1e3,
                                                     "ms a chip beside": intercept / setup.batch * 1e3})


def _on(bare: Callable[[int], None], images: int) -> Callable[[int], None]:
    return lambda _: bare(images)


def _whole(model: BiomassUNet, batch: Batch, setup: Setup, backward: bool) -> Callable[[int], None]:
    if not backward:
        return _forward(model.eval(), batch, setup)
    images = batch.plain_images if isinstance(model, PlainUNet) else batch.images

    def run(_: int) -> None:
        model.train()
        with autocast(setup.device, setup.precision):
            total = model(images, batch.dropped).sum()
        total.backward()
        model.zero_grad(set_to_none=True)

    return run


def _pair(models: Models) -> Models:
    """The models of ENDS."""
    return {name: models[rung] for name, rung in zip(("plain", "all levers"), ENDS)}


PARTS_RUN = {"training": training, "inference": inference, "stages": stage_times, "months": month_costs}


if __name__ == "__main__":
    main(arguments(), run)
