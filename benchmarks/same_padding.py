"""TensorFlow's SAME padding at stride 2: what the separate pass over the image costs, and ways to do without.

    python benchmarks/same_padding.py [--device cpu|gpu] [--images 8]

The five strided convolutions of tf_efficientnetv2_l at 256 × 256 pixels, forward and forward + backward.  SAME pads one
row less before the image than after it, which no convolution takes as an option:

pad first      what timm does, and what we run
wider kernel   a row and a column of zeros before the kernel, and symmetric padding: the same map without the pass
symmetric      another map (half the pixels' phase is off); what the pass costs is the distance to it.  On an image and
               kernels turned by 180° it is exact, at the price of a pass that turns the image
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness import Recorder, Variant, common_options, out_path
from machine import ceilings, use_device
from timm.layers import conv2d_same
from torch import Tensor

from engine.base.cli import main


class Shape(NamedTuple):
    name: str
    inputs: int
    outputs: int
    size: int
    groups: int = 1


SHAPES = (Shape("stem", 15, 32, 256), Shape("stage 1", 32, 128, 128), Shape("stage 2", 64, 256, 64),
          Shape("stage 3, depthwise", 384, 384, 32, 384), Shape("stage 5, depthwise", 1344, 1344, 16, 1344))
KERNEL = 3


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser, n=9)
    parser.add_argument("--images", type=int, default=8, help="months at once (default: 8)")
    return parser


def pad_first(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    return conv2d_same(x, weight, None, (2, 2), (0, 0), (1, 1), groups)


def wider_kernel(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    return F.conv2d(x, F.pad(weight, (1, 0, 1, 0)), None, 2, KERNEL // 2, 1, groups)


def symmetric(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    return F.conv2d(x, weight, None, 2, KERNEL // 2, 1, groups)


WAYS = {"pad first": pad_first, "wider kernel": wider_kernel, "symmetric": symmetric}


def run(args: argparse.Namespace) -> int:
    device = use_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if args.smoke:
        args.n, args.images = 1, 1
    recorder = Recorder(out_path(args, "same_padding", device), "same_padding", device,
                        {"images": args.images, "precision": str(dtype).removeprefix("torch."),
                         "layout": "channels_last"}, ceilings(device, dtype, small=args.smoke))
    torch.manual_seed(0)
    for backward in (False, True):
        for shape in SHAPES:
            x = _random(args.images, shape.inputs, shape.size, device, dtype)
            weight = _random(shape.outputs, shape.inputs // shape.groups, KERNEL, device, dtype).requires_grad_()
            x.requires_grad_(shape.name != "stem")
            variants = [Variant(name, _pass(way, x, weight, shape.groups, backward), calls=10 if args.n > 1 else 1)
                        for name, way in WAYS.items()]
            recorder.group(f"{'forward + backward' if backward else 'forward'}, {shape.name}", variants, n=args.n,
                           warmup=3, device_only=True)
    return recorder.close()


def _random(n: int, channels: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    values = torch.randn(n, channels, size, size, device=device, dtype=dtype)
    return values.contiguous(memory_format=torch.channels_last)


def _pass(way: Callable[[Tensor, Tensor, int], Tensor], x: Tensor, weight: Tensor, groups: int,
          backward: bool) -> Callable[[int], None]:
    wanted = [tensor for tensor in (x, weight) if tensor.requires_grad]

    def call(_: int) -> None:
        with torch.set_grad_enabled(backward):
            out = way(x, weight, groups)
        if backward:
            torch.autograd.grad(out, wanted, torch.ones_like(out))

    return call


if __name__ == "__main__":
    main(arguments(), run)
