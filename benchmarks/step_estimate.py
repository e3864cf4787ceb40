"""Where a training step's time should go, from the shapes of the model's layers and two rates of the machine.

    python benchmarks/step_estimate.py [--device gpu] [--copy 4.3e12 --matmul 790e12]      a few seconds on any CPU

An estimate, no measurement: what a first profile is held against, part by part (docs/performance.md).  Shapes come from
the real model on torch's meta device, one month through the encoder and one chip through the decoder.  Rates: `--copy`
bytes/s (read + written) and `--matmul` flop/s in bfloat16, by default what an H200 reached (docs/performance.md); on a
GPU they are measured.  Everything else that is assumed stands in `ASSUMED` and `PASSES`, and is printed with the
result.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from harness import Recorder, common_options, out_path
from machine import ceilings, use_device
from model_parts import Setup, kept_months
from torch import Tensor, nn

from engine.base.cli import main
from engine.data.biomassters import TILE, C, T
from engine.model.decoder import DecoderBlock, ScSE, UpsampleConv2d
from engine.model.unet import BiomassUNet

H200 = {"copy_bytes_per_s": 4.3e12, "matmul_flop_per_s": 790e12}
BF16 = 2  # bytes

# Times that a map goes through memory, forward and backward together, each read and each write counting one
PASSES = {
    # statistics; normalise and activate (2) | sums of the gradient (2); the input's gradient (3)
    "BatchNorm with its activation": 8,
    # mean; gate (2) | the gate's gradient (2); the input's (2)
    "squeeze-and-excitation": 7,
    # the skip's read; the rest is BatchNorm's | the two gradients added (3)
    "residual": 4,
    # mean; the pixels' gate; both products (2) | gradients of both gates (2), of the input (2), through the gates (2)
    "scSE": 10,
    # read and write, both ways
    "upsampled and joined": 4,
}
ASSUMED = {
    "share of the matrix rate that a dense convolution reaches": 0.60,
    "share of the copy rate that fused elementwise kernels reach": 0.85,
    "share of the copy rate that depthwise convolutions reach": 0.45,
    "s between two kernels": 1.0e-6,
    "kernels a convolution means (3 passes, casts of weight and gradient)": 5.0,
    "kernels a normalisation means": 4.0,
    "bytes a parameter: AdamW 28, clipping 12, casts 12": 52.0,
    "B/s of LZ4 inflated": 100e9,
    "B/s from host to device": 50e9,
    "bytes of a packed chip": 9.2e6,  # 0.39 of the TIFFs of the two real chips, README
    "passes over a month of 16-bit values in the data path": 10.0,
}


class Work(NamedTuple):
    """What one image of a month, or one chip, asks for: forward and backward."""

    flop: float  # of dense convolutions
    convolution: float  # s of dense convolutions
    depthwise: float  # bytes
    elementwise: float  # bytes
    kernels: float
    head: float  # bytes


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser, n=1)
    parser.add_argument("--backbone", default="tf_efficientnetv2_l")
    parser.add_argument("--decoder", type=int, nargs="+", default=[384, 368, 352, 336, 320])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--copy", type=float, help="bytes/s")
    parser.add_argument("--matmul", type=float, help="flop/s")
    return parser


def run(args: argparse.Namespace) -> int:
    device = use_device(args.device)
    if args.smoke:
        args.backbone, args.decoder = "tf_mobilenetv3_small_minimal_100", [8] * 5
    measured = ceilings(device, torch.bfloat16) if device.type == "cuda" else {}
    found = {**H200, **measured}
    rates = {"copy_bytes_per_s": args.copy or found["copy_bytes_per_s"],
             "matmul_flop_per_s": args.matmul or found["matmul_flop_per_s"]}
    setup = Setup(args.backbone, tuple(args.decoder), args.batch, TILE, "bf16", torch.device("meta"))
    months = statistics.mean(int(kept_months(setup, number).sum()) for number in range(64)) / setup.batch
    recorder = Recorder(out_path(args, "step_estimate", device), "step_estimate", device,
                        {"backbone": args.backbone, "decoder": args.decoder, "batch": args.batch,
                         "kept months of a chip": round(months, 2),
                         "copy, TB/s": rates["copy_bytes_per_s"] / 1e12,
                         "matrix product, TFLOP/s": rates["matmul_flop_per_s"] / 1e12}, measured)
    parts = estimate(setup, months, rates)
    recorder.note("estimate, ms a chip", **parts, total=sum(parts.values()),
                  **{"chips/s": 1e3 / sum(parts.values())})
    recorder.note("assumed", **ASSUMED, **{f"passes: {name}": float(n) for name, n in PASSES.items()})
    return recorder.close()


def estimate(setup: Setup, months: float, rates: dict[str, float]) -> dict[str, float]:
    """ms a chip of each part of a step, at `months` kept months a chip."""
    with torch.device("meta"):
        model = BiomassUNet(setup.backbone, setup.decoder).train()
        month = torch.empty(1, C, setup.size, setup.size)
    levels: list[Tensor] = []
    encoder = count(model.encoder, rates, lambda: levels.extend(model.encoder(month)))
    decoder = count(nn.ModuleList([model.decoder, model.segmentation_head]), rates,
                    lambda: model.segmentation_head(model.decoder(levels)))
    copy = rates["copy_bytes_per_s"]
    fused = copy * ASSUMED["share of the copy rate that fused elementwise kernels reach"]
    kernels = (encoder.kernels + decoder.kernels) / setup.batch  # a step launches them once
    parameters = sum(parameter.numel() for parameter in model.parameters())
    values = T * C * setup.size**2 * BF16
    attention = sum(level.numel() for level in levels) * BF16 * (4 * months + 2)  # read; read, read again, written
    seconds = {
        "convolutions": encoder.convolution * months + decoder.convolution,
        "encoder elementwise": encoder.elementwise * months / fused,
        "depthwise": encoder.depthwise * months / (
            copy * ASSUMED["share of the copy rate that depthwise convolutions reach"]),
        "decoder elementwise": decoder.elementwise / fused,
        "head in float32": decoder.head / fused,
        "attention": attention / fused,
        "optimizer": parameters * ASSUMED["bytes a parameter: AdamW 28, clipping 12, casts 12"] / fused / setup.batch,
        "data": (ASSUMED["bytes of a packed chip"] / ASSUMED["B/s from host to device"]
                 + values / ASSUMED["B/s of LZ4 inflated"]
                 + values * ASSUMED["passes over a month of 16-bit values in the data path"] / fused),
        "gaps": kernels * ASSUMED["s between two kernels"],
    }
    return {name: 1e3 * value for name, value in seconds.items()}


def count(part: nn.Module, rates: dict[str, float], call: Callable[[], object]) -> Work:
    """Of every layer that `call` runs in `part`."""
    totals = dict.fromkeys(Work._fields, 0.0)
    matmul = rates["matmul_flop_per_s"] * ASSUMED["share of the matrix rate that a dense convolution reaches"]
    fused = rates["copy_bytes_per_s"] * ASSUMED["share of the copy rate that fused elementwise kernels reach"]

    def convolution(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        x = inputs[0]
        # Forward reads x and writes y, the weight's gradient reads both, the input's reads y's and writes x's
        moved = 3 * BF16 * (x.numel() + out.numel())
        taps = 16 / 4 if isinstance(module, UpsampleConv2d) and module.fused else module.weight[0, 0].numel()
        totals["kernels"] += ASSUMED["kernels a convolution means (3 passes, casts of weight and gradient)"]
        if module.groups == module.in_channels > 1:
            totals["depthwise"] += moved
            return
        if out.shape[1] == 1 and out.shape[2:] == x.shape[2:]:  # scSE's gate of pixels counts there; the head:
            # the float32 copy (6 bytes), read by two passes (8), its gradient written (4) and turned back (6)
            totals["head"] += 24 * x.numel() if module.kernel_size != (1, 1) else 0
            return
        flop = 3 * 2 * taps * x.shape[1] * out.numel()
        totals["flop"] += flop
        totals["convolution"] += max(flop / matmul, moved / fused)

    def maps(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(module: nn.Module, _: tuple[Tensor, ...], out: Tensor) -> None:
            totals["elementwise"] += PASSES[name] * BF16 * out.numel()
            totals["kernels"] += ASSUMED["kernels a normalisation means"]

        return add

    hooks = []
    for module in part.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(convolution))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            hooks.append(module.register_forward_hook(maps("BatchNorm with its activation")))
        elif isinstance(module, ScSE):
            hooks.append(module.register_forward_hook(maps("scSE")))
        elif isinstance(module, DecoderBlock) and module.has_skip:
            hooks.append(module.attention1.register_forward_hook(maps("upsampled and joined")))
        elif hasattr(module, "conv_expand"):
            hooks.append(module.register_forward_hook(maps("squeeze-and-excitation")))
        elif getattr(module, "has_skip", False):
            hooks.append(module.register_forward_hook(maps("residual")))
    call()
    for hook in hooks:
        hook.remove()
    return Work(**totals)


if __name__ == "__main__":
    main(arguments(), run)
