"""Month attention by itself: plain PyTorch against the implementations of `kernels.month_attention`.

    python benchmarks/attention.py [--device cpu|gpu] [--batch 8] [--implementations reference compile triton]

The five levels of tf_efficientnetv2_l at 256 × 256 pixels, T = 12 months kept, forward and forward + backward, by
level and all five together.  `plain` is the attention as people write it (benchmarks/plain_model.py; on a GPU under
bfloat16 autocast).

Rates count what the operation needs at least.  Bytes: forward reads the features and writes the pooled map; backward
reads features and the pooled map's gradient and writes the features' gradient.  Arithmetic: the D × D layer, once in
the forward and twice in the backward; recomputing it counts as nothing.  `of floor` is the time over the larger of
bytes / measured copy rate and arithmetic / measured matrix rate: 1 is what the machine can do.  Inputs rotate among
sets that together exceed the caches; on a GPU, launches are hidden behind earlier work (`harness.measure`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from harness import Recorder, Variant, common_options, out_path
from machine import ceilings, use_device
from plain_model import PlainMonthAttention
from torch import Tensor

from engine.base.cli import main
from engine.inference.chips import autocast
from engine.model.unet import MonthAttention
from kernels.month_attention import IMPLEMENTATIONS, resolve

LEVELS = ((32, 128), (64, 64), (96, 32), (224, 16), (640, 8))  # (channels D, side of the map H) of each level
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ROTATE = 1 << 28  # bytes of input that no cache holds
_MOST_SETS = 16


class Inputs(NamedTuple):
    features: Tensor  # [N, D, H, H], channels_last
    grad: Tensor  # [B, D, H, H], of the pooled map, channels_last


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser, n=9)
    parser.add_argument("--batch", type=int, help="chips (default: 1 on a CPU, 8 on a GPU)")
    parser.add_argument("--months", type=int, default=12)
    parser.add_argument("--precision", choices=DTYPES, help="of the features (default: fp32 on a CPU, bf16 on a GPU)")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS[1:],
                        help="(default: all that run on the device)")
    return parser


def run(args: argparse.Namespace) -> int:
    device = use_device(args.device)
    cuda = device.type == "cuda"
    precision = args.precision or ("bf16" if cuda else "fp32")
    batch = args.batch or (8 if cuda else 1)
    levels: tuple[tuple[int, int], ...] = ((8, 16), (16, 8)) if args.smoke else LEVELS
    if args.smoke:
        args.n, batch = 1, 1
        torch.set_num_threads(1)
    names = args.implementations or [name for name in IMPLEMENTATIONS[1:] if _runs(name, device)]
    limits = ceilings(device, DTYPES[precision], small=args.smoke)
    recorder = Recorder(out_path(args, "attention", device), "attention", device,
                        {"batch": batch, "months": args.months, "precision": precision, "layout": "channels_last"},
                        limits)
    torch.manual_seed(0)
    cases = [Case(d, h, batch, args.months, DTYPES[precision], device) for d, h in levels]
    for backward in (False, True):
        title = "forward + backward" if backward else "forward"
        for group in [*([case] for case in cases), cases]:
            name = f"D {group[0].d}, H {group[0].h}" if len(group) == 1 else "all levels"
            variants = [Variant(kind, _pass(group, kind, backward, precision), calls=10 if cuda else 1,
                                work={"bytes": sum(case.bytes(backward) for case in group),
                                      "flop": sum(case.flop(backward) for case in group)})
                        for kind in ["plain", *names]]
            floor = sum(case.floor(backward, limits) for case in group)
            recorder.group(f"{title}, {name}", variants, n=args.n, warmup=3, device_only=True, floor=floor)
    return recorder.close()


def _runs(name: str, device: torch.device) -> bool:
    try:
        resolve(name, device)
    except RuntimeError:
        return False
    # The interpreter computes, but its time says nothing
    return name != "triton" or device.type == "cuda"


class Case:
    """One level: its inputs, and what the operation needs at least."""

    def __init__(self, d: int, h: int, batch: int, months: int, dtype: torch.dtype, device: torch.device):
        self.d, self.h, self.batch, self.images = d, h, batch, batch * months
        size = self.images * d * h * h * dtype.itemsize
        self.sets = [Inputs(*(torch.randn(n, d, h, h, device=device, dtype=dtype)
                              .contiguous(memory_format=torch.channels_last) for n in (self.images, batch)))
                     for _ in range(min(_MOST_SETS, 1 + _ROTATE // size))]
        self.segments = torch.arange(0, self.images + 1, months, dtype=torch.int32, device=device)
        self.dropped = torch.zeros(batch, months, dtype=torch.bool, device=device)
        self.plain = PlainMonthAttention(d).to(device)
        self.ours = MonthAttention(d).to(device)
        self.ours.load_state_dict(self.plain.state_dict())

    def bytes(self, backward: bool) -> float:
        one = self.d * self.h**2 * self.sets[0].features.element_size()
        return one * (self.images + self.batch + (2 * self.images + self.batch if backward else 0))

    def flop(self, backward: bool) -> float:
        return 2 * self.d**2 * self.h**2 * self.images * (3 if backward else 1)

    def floor(self, backward: bool, limits: dict[str, float]) -> float:
        """Seconds."""
        return max(self.bytes(backward) / limits["copy_bytes_per_s"], self.flop(backward) / limits["matmul_flop_per_s"])

    def forward(self, kind: str, features: Tensor, precision: str) -> Tensor:
        if kind == "plain":
            with autocast(features.device, precision):
                return self.plain(features, self.dropped)
        self.ours.implementation = kind
        return self.ours(features, self.segments)


def _pass(cases: list[Case], kind: str, backward: bool, precision: str) -> Callable[[int], None]:
    turn = 0

    def run(_: int) -> None:
        nonlocal turn
        turn += 1
        for case in cases:
            inputs = case.sets[turn % len(case.sets)]
            if not backward:
                with torch.inference_mode():
                    case.forward(kind, inputs.features, precision)
                continue
            features = inputs.features.detach().requires_grad_()
            pooled = case.forward(kind, features, precision)
            module = case.plain if kind == "plain" else case.ours
            torch.autograd.grad(pooled, [features, *module.parameters()], inputs.grad)

    return run


if __name__ == "__main__":
    main(arguments(), run)
