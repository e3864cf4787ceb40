"""Levers that are not decided yet, each alone against the default, at the size of the recipe.

    python benchmarks/levers.py [--levers static stem …] [--batch 16] [--packed STORE]

The default is a training step as the trainer takes it: blocks compiled for any number of months, fused AdamW, bfloat16,
`cudnn.benchmark` on; without DeepSpeed, which at stage 0 adds nothing that stays on the device.

static     a graph for each number of kept months, against one for any number
products   1×1 convolutions as matrix products, which Inductor tunes and fuses (`conv_1x1_as_mm`, `max_autotune_gemm`)
stem       images and the stem's weight padded to 16 channels
upsample   the decoder upsamples, then convolves, against convolving before it upsamples
cudnn      `cudnn.benchmark` off and on; each in a process of its own, since torch keeps the algorithm it found first
months     kept months of 16 chips together brought to a multiple of 24, against 8 chips and 12
dali       the loader alone, nothing else running: its chips/s, and how long the GPU is busy with a chip
graph      a whole step, optimizer included, as one CUDA graph (at most 8 chips: a graph keeps its memory)

Several levers are run in a process each, so that none inherits another's compiled code or its failure; a lever that
fails, or takes longer than `--limit`, leaves its error as a row.  What needs CUDA says so on a CPU; with `--smoke` it
is run there against a stand-in, to see that its code runs.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from harness import Recorder, Variant, common_options, out_path
from machine import use_device
from model_parts import CLIP, POOL, RECIPE, Batch, Setup, kept_months, make_batch, recipe_batches, train_step
from render import read
from timm.layers import conv2d_same
from torch import Tensor, nn

from engine.base.cli import main
from engine.config import Augment, Optimizer
from engine.data.batch import Request
from engine.data.biomassters import BIOMASSTERS, TILE, C
from engine.data.forms import open_source
from engine.data.index import open_index
from engine.data.loader import Loader
from engine.data.plan import draw
from engine.inference.chips import autocast
from engine.inference.cudagraphs import record
from engine.model.compilation import compile_regions
from engine.model.unet import BiomassUNet
from engine.training.losses import make_loss
from engine.training.optim import make_optimizer, parameter_groups, set_learning_rate

PRODUCTS = {"conv_1x1_as_mm": True, "max_autotune_gemm": True}  # of torch._inductor.config
COARSE = RECIPE.model_copy(update={"group": 16, "months_step": 24})
PADDED = 16  # channels: a multiple of 8, as tensor cores want them
MOST_GRAPHED = 8  # chips
NEEDS_CUDA = "needs CUDA"

Step = Callable[[Batch], object]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser, n=7)
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS))
    parser.add_argument("--batch", type=int, default=16, help="chips (default: 16)")
    parser.add_argument("--backbone", default="tf_efficientnetv2_l")
    parser.add_argument("--decoder", type=int, nargs="+", default=[384, 368, 352, 336, 320])
    parser.add_argument("--packed", type=Path, help="a packed store, for dali (default: one is made)")
    parser.add_argument("--limit", type=float, default=240, help="seconds a lever may take (default: 240)")
    parser.add_argument("--together", action="store_true", help="all in this process: sooner, if none breaks it")
    parser.add_argument("--cudnn", choices=("off", "on"), help=argparse.SUPPRESS)  # of the process of one variant
    return parser


def run(args: argparse.Namespace) -> int:
    device = use_device(args.device)
    if args.smoke:
        args.backbone, args.decoder, args.n, args.batch = "tf_mobilenetv3_small_minimal_100", [8] * 5, 1, 2
        torch.set_num_threads(1)
    cuda = device.type == "cuda"
    setup = Setup(args.backbone, tuple(args.decoder), args.batch, 64 if args.smoke else TILE,
                  "bf16" if cuda else "fp32", device)
    recorder = Recorder(out_path(args, "levers", device), "levers", device,
                        {"backbone": setup.backbone, "decoder": list(setup.decoder), "batch": setup.batch,
                         "pixels": setup.size, "precision": setup.precision, "cudnn.benchmark": args.cudnn or "on"})
    # Sizes vary little, and the trainer has it on; it does nothing on a CPU
    torch.backends.cudnn.benchmark = args.cudnn != "off"
    for lever in args.levers:
        if args.together or (len(args.levers) == 1 and lever != "cudnn") or args.cudnn:
            _alone(recorder, lever, setup, args)
        else:
            for variant in ("off", "on") if lever == "cudnn" else (None,):
                _in_a_process(recorder, lever, variant)
    return recorder.close()


def _alone(recorder: Recorder, lever: str, setup: Setup, args: argparse.Namespace) -> None:
    title = LEVERS[lever].__doc__ or lever
    if lever in CUDA_ONLY and setup.device.type != "cuda" and not args.smoke:
        recorder.absent(title, lever, NEEDS_CUDA)
        return
    try:
        LEVERS[lever](recorder, title, setup, args)
    except Exception as error:  # a row like any other; the exit status says so
        recorder.absent(title, lever, f"{type(error).__name__}: {error}".splitlines()[0], failed=True)


def _in_a_process(recorder: Recorder, lever: str, cudnn: str | None) -> None:
    """Run this script with the same words for `lever` alone, and take over its rows."""
    words = list(_without(sys.argv[1:], {"--levers", "--out"}))
    title = LEVERS[lever].__doc__ or lever
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        command = [sys.executable, __file__, *words, "--levers", lever, "--out", str(out),
                   *(("--cudnn", cudnn) if cudnn else ())]
        try:
            limit = arguments().parse_args(words).limit
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            sys.stderr.write(done.stderr)
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            why = f"exit status {done.returncode}: {said}"
        except subprocess.TimeoutExpired:
            done, why = None, f"took longer than {limit:g} s"
        rows = read(out)[1:] if out.exists() else []
    for row in rows:
        recorder.take(row, failed="error" in row and row["error"] != NEEDS_CUDA)
    if (done is None or done.returncode) and not any("error" in row for row in rows):
        recorder.absent(title, f"{lever} {cudnn}" if cudnn else lever, why, failed=True)


def _without(words: list[str], options: set[str]) -> Iterator[str]:
    """`words` without these options and their values."""
    leaving_out = False
    for word in words:
        if word.startswith("--"):
            leaving_out = word.partition("=")[0] in options
        if not leaving_out:
            yield word


# The default, and what differs from it ---------------------------------------------------------------------------


def build(setup: Setup, smoke: bool, **compiling: Any) -> BiomassUNet:
    """The model as the trainer trains it on a GPU; weights are the same for all.

    smoke: Inductor would spend minutes in a C++ compiler, so blocks are only traced, and only where `compiling` (of
    compile_regions) differs from the default.
    """
    torch.manual_seed(0)
    model = BiomassUNet(setup.backbone, setup.decoder).to(setup.device).train()
    if not smoke:
        compile_regions(model, **compiling)
    elif compiling:
        compile_regions(model, backend=_traced, **compiling)
    return model


def _traced(graph: torch.fx.GraphModule, _: list[Tensor], options: object = None) -> Callable[..., Any]:
    return graph.forward


def step_of(model: BiomassUNet, setup: Setup) -> Step:
    optimizer = make_optimizer(model, Optimizer())
    set_learning_rate(optimizer, 0.0)  # the same work, and weights that stay what they are
    return train_step(model, optimizer, setup)


def usual_batch(setup: Setup) -> Batch:
    """A batch of the recipe with a usual number of kept months."""
    return make_batch(setup, recipe_batches(setup, 1)[0])


def shapes(setup: Setup, augment: Augment) -> int:
    """Different numbers of kept months among POOL batches."""
    return len({int(kept_months(setup, number, augment).sum()) for number in range(POOL)})


def against(recorder: Recorder, title: str, setup: Setup, args: argparse.Namespace,
            steps: dict[str, tuple[Step, Batch]]) -> None:
    """Measure steps side by side; the first is the default.  Notes what the first call of each cost."""
    def first(step: Step, batch: Batch) -> float:
        start = time.perf_counter()
        with contextlib.suppress(Exception):  # it comes again as the variant's row
            step(batch)
            if setup.device.type == "cuda":
                torch.cuda.synchronize(setup.device)
        return time.perf_counter() - start

    recorder.note(f"{title}: first step, s", **{name: first(step, batch) for name, (step, batch) in steps.items()})
    variants = [Variant(name, _always(step, batch), work={"chips": len(batch.label)})
                for name, (step, batch) in steps.items()]
    recorder.group(title, variants, n=args.n, warmup=2)


def _always(step: Step, batch: Batch) -> Callable[[int], None]:
    def repeat(_: int) -> None:
        step(batch)

    return repeat


# Levers ----------------------------------------------------------------------------------------------------------


def static(recorder: Recorder, title: str, setup: Setup, args: argparse.Namespace) -> None:
    """static shapes"""
    batch = usual_batch(setup)
    recorder.note(f"{title}: numbers of kept months that the recipe's batches have", shapes=shapes(setup, RECIPE))
    against(recorder, title, setup, args,
            {"any number of months": (step_of(build(setup, args.smoke), setup), batch),
             "one graph a number": (step_of(build(setup, args.smoke, any_number=False), setup), batch)})


def products(recorder: Recorder, title: str, setup: Setup, args: argparse.Namespace) -> None:
    """1×1 convolutions as matrix products"""
    with torch._inductor.config.patch(PRODUCTS):  # says which option this torch does not know
        pass
    batch = usual_batch(setup)
    against(recorder, title, setup, args,
            {"convolutions": (step_of(build(setup, args.smoke), setup), batch),
             "products": (step_of(build(setup, args.smoke, options=PRODUCTS), setup), batch)})


class PaddedStem(nn.Conv2d):
    """timm's first convolution on images of PADDED channels, the last of them zero: the same map."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.pad(self.weight, (0, 0, 0, 0, 0, x.shape[1] - self.weight.shape[1]))
        return conv2d_same(x, weight, self.bias, cast(Any, self.stride), (0, 0), cast(Any, self.dilation))


def pad_stem(model: BiomassUNet) -> BiomassUNet:
    """Have `model` take images of PADDED channels."""
    model.encoder.model.conv_stem.__class__ = PaddedStem
    model.in_channels = PADDED  # type: ignore[assignment]
    return model


def pad_images(batch: Batch) -> Batch:
    images = F.pad(batch.images.permute(0, 1, 3, 4, 2), (0, PADDED - C))  # stays channels_last
    return batch._replace(images=images.permute(0, 1, 4, 2, 3))


def stem(recorder: Recorder, title: str, setup: Setup, args: argparse.Namespace) -> None:
    """the stem's channels"""
    batch = usual_batch(setup)
    against(recorder, title, setup, args,
            {f"{C}": (step_of(build(setup, args.smoke), setup), batch),
             f"{PADDED}": (step_of(pad_stem(build(setup, args.smoke)), setup), pad_images(batch))})


def upsample(recorder: Recorder, title: str, setup: Setup, args: argparse.Namespace) -> None:
    """upsample_conv"""
    batch, plain = usual_batch(setup), build(setup, args.smoke)
    plain.upsample_conv = False
    against(recorder, title, setup, args, {"on": (step_of(build(setup, args.smoke), setup), batch),
                                           "off": (step_of(plain, setup), batch)})


def cudnn(recorder: Recorder, title: str, setup: Setup, args: argparse.Namespace) -> None:
    """cudnn.benchmark"""
    against(recorder, title, setup, args,
            {args.cudnn: (step_of(build(setup, args.smoke), setup), usual_batch(setup))})


def months(recorder: Recorder, title: str, setup: Setup, args: argparse.Namespace) -> None:
    """kept months"""
    torch.backends.cudnn.benchmark = False  # fewer shapes save its time; what is asked here is whether steps differ
    step, any_batch = step_of(build(setup, args.smoke), setup), make_batch(setup, None)
    rounds = min(args.n, 6)  # whose shapes are warmed up first

    def batches(augment: Augment) -> list[Batch]:
        kept = [kept_months(setup, number, augment) for number in recipe_batches(setup, rounds, augment)]
        return [any_batch._replace(dropped=torch.arange(any_batch.dropped.shape[1]) >= k[:, None]) for k in kept]

    def repeats(of: list[Batch]) -> Callable[[int], None]:
        def repeat(i: int) -> None:
            step(of[i % len(of)])

        return repeat

    augments = {"default": RECIPE, "24 of 16 chips": COARSE}
    recorder.note(f"{title}: numbers of them among {POOL} batches",
                  **{name: float(shapes(setup, augment)) for name, augment in augments.items()})
    variants = [Variant(name, repeats(batches(augment)), work={"chips": setup.batch})
                for name, augment in augments.items()]
    recorder.group(title, variants, n=max(args.n, rounds), warmup=max(2, rounds))


def dali(recorder: Recorder, title: str, setup: Setup, args: argparse.Namespace) -> None:
    """the loader alone"""
    cuda = setup.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        store = args.packed or _made_store(Path(folder), 2 if args.smoke else 16)
        chips = open_index(store).labelled()
        backend = "gpu" if cuda else "cpu"
        loader = Loader(open_source(chips, backend=backend), batch_size=setup.batch, device=setup.device,
                        backend=backend, precision=setup.precision, warp=True, readers=8, threads=8)
        count = setup.batch * (1 if args.smoke else 12)
        asked = [Request(chips[k % len(chips)], draw(BIOMASSTERS, RECIPE, 0, 0, k)) for k in range(count)]

        def consume(_: int) -> None:
            for _batch in loader.batches(asked[k:k + setup.batch] for k in range(0, count, setup.batch)):
                pass

        recorder.group(title, [Variant("packed, full augmentation", consume, work={"chips": count})], n=args.n,
                       wall=True, memory=False)
        if cuda:
            recorder.note(f"{title}: on the GPU, ms a chip", **busy(lambda: consume(0), count))
        else:
            recorder.absent(title, "the GPU's own time", NEEDS_CUDA)


def _made_store(folder: Path, chips: int) -> Path:
    from engine.data.made.sample import make_sample
    from engine.data.store.pack import pack

    make_sample(folder / "data", chips, seed=1)
    pack(folder / "data", folder / "store", workers=8)
    return folder / "store"


def busy(call: Callable[[], None], count: int, most: int = 6) -> dict[str, float]:
    """ms a chip in which anything runs on the GPU, and of the kernels and copies that take most."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    results: Any = seen.profiler
    spans = [(event.start_ns(), event.duration_ns(), event.name()) for event in results.kineto_results.events()
             if event.device_type() == torch.autograd.DeviceType.CUDA]
    names: dict[str, float] = {}
    for _, duration, name in spans:
        names[name[:60]] = names.get(name[:60], 0.0) + duration / 1e6 / count
    top = sorted(names.items(), key=lambda item: -item[1])[:most]
    return {"busy": union([(start, start + duration) for start, duration, _ in spans]) / 1e6 / count, **dict(top)}


def union(spans: list[tuple[float, float]]) -> float:
    """The length that (start, end) cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def graph(recorder: Recorder, title: str, setup: Setup, args: argparse.Namespace) -> None:
    """a step as one CUDA graph"""
    setup = Setup(setup.backbone, setup.decoder, min(setup.batch, MOST_GRAPHED), setup.size, setup.precision,
                  setup.device)
    batch = usual_batch(setup)
    eager = graphed_step(build(setup, args.smoke), batch, setup, lambda call: call)
    if setup.device.type == "cuda":
        one = graphed_step(build(setup, args.smoke), batch, setup, _recorded)
        name = "one CUDA graph"
    else:
        one, name = eager, f"one CUDA graph (a stand-in: {NEEDS_CUDA})"
    against(recorder, title, setup, args, {
        "default": (step_of(build(setup, args.smoke), setup), batch),
        "from fixed addresses": (eager, batch), name: (one, batch)})


def _recorded(call: Callable[[], Tensor]) -> Callable[[], object]:
    return record(call, torch.cuda.graph_pool_handle())[0]


def graphed_step(model: BiomassUNet, batch: Batch, setup: Setup,
                 capture: Callable[[Callable[[], Tensor]], Callable[[], object]]) -> Step:
    """A step over fixed inputs that `capture` makes a graph of at its first call; later ones only replay it."""
    cuda = setup.device.type == "cuda"
    recipe = Optimizer()
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), lr=0.0, betas=recipe.betas,
                                  eps=recipe.eps, fused=True, capturable=cuda)
    loss_of = make_loss("per_chip_rmse", BIOMASSTERS.target)
    kept, segments = model.kept(batch.images, batch.dropped)
    months, label = kept.clone(), batch.label.clone()
    replay: Callable[[], object] | None = None

    def call() -> Tensor:
        with autocast(setup.device, setup.precision):
            prediction = model.predict(months, segments)
        loss = loss_of(prediction, label)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def step(new: Batch) -> object:
        nonlocal replay
        if replay is None:
            replay = capture(call)
        months.copy_(model.kept(new.images, new.dropped)[0])
        label.copy_(new.label)
        return replay()

    return step


LEVERS: dict[str, Callable[[Recorder, str, Setup, argparse.Namespace], None]] = {
    "cudnn": cudnn, "stem": stem, "upsample": upsample, "months": months, "dali": dali, "static": static,
    "products": products, "graph": graph}
CUDA_ONLY = ("cudnn", "graph")


if __name__ == "__main__":
    main(arguments(), run)
