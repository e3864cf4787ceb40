"""Month attention of narrow features (D ≤ 128, float32 D ≤ 32): one kernel a direction, the D×D layer kept on chip.

A program owns a block of pixels of one chip and walks over the chip's months: it loads a month's features once, runs
Linear → LayerNorm → GELU → Linear on them and folds them into a running softmax (as flash attention does), so features
are read once and only the pooled map is written. The backward walks the same months again, recomputes the layer and
writes the features' gradient once; its programs are as many as the GPU holds at a time, each carries its own sums for
the parameters' gradients and writes them once, and a sum over programs follows: no atomics, so the same inputs give
the same bits.

LayerNorm's mean is not computed: the rows of the first layer are centred over its outputs when a program loads them,
which makes the mean of its output exactly zero and leaves only the mean square.

Legend: N images, B chips, P = H·W pixels, D channels. Features are channels_last, so memory is [N, P, D].
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments of a Triton kernel have no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.month_attention.triton_math import gelu, gelu_and_slope


@triton.jit
def _load_layer(w1, b1, ln_weight, ln_bias, w2, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The first layer as [in, out], centred over its outputs, and the vectors [out]; zero beyond D."""
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    square = inside[:, None] & inside[None, :]
    weight = tl.load(w1 + d[None, :] * D + d[:, None], square, 0.0).to(tl.float32)
    weight = tl.where(square, weight - tl.sum(weight, 1)[:, None] / D, 0.0)
    bias = tl.load(b1 + d, inside, 0.0).to(tl.float32)
    bias = tl.where(inside, bias - tl.sum(bias, 0) / D, 0.0)
    scale = tl.load(ln_weight + d, inside, 0.0).to(tl.float32)
    shift = tl.load(ln_bias + d, inside, 0.0).to(tl.float32)
    out = tl.load(w2 + d, inside, 0.0).to(tl.float32)
    return weight, bias, scale, shift, out


@triton.jit
def _forward_kernel(
    features, segments, w1, b1, ln_weight, ln_bias, w2, pooled, lse, pixels, blocks, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    chip = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    tile = p[:, None] * D + d[None, :]
    inside = (p < pixels)[:, None] & (d < D)[None, :]
    weight, bias, scale, shift, out = _load_layer(w1, b1, ln_weight, ln_bias, w2, D, BLOCK_D)
    weight = weight.to(features.dtype.element_ty)

    top = tl.full([BLOCK_P], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_P], tl.float32)
    sums = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    first = tl.load(segments + chip).to(tl.int64)
    last = tl.load(segments + chip + 1).to(tl.int64)
    for image in range(first, last):
        x = tl.load(features + image * pixels * D + tile, inside, 0.0)
        h = tl.dot(x, weight, input_precision="ieee") + bias[None, :]
        norm = tl.rsqrt(tl.sum(h * h, 1) / D + eps)
        u = h * norm[:, None] * scale[None, :] + shift[None, :]
        logit = tl.sum(gelu(u, EXACT) * out[None, :], 1)
        new_top = tl.maximum(top, logit)
        keep = tl.exp(top - new_top)
        share = tl.exp(logit - new_top)
        total = total * keep + share
        sums = sums * keep[:, None] + share[:, None] * x
        top = new_top

    some = total > 0.0  # a chip without months: zeros
    total = tl.where(some, total, 1.0)
    result = sums * (1.0 / total)[:, None]
    tl.store(pooled + chip * pixels * D + tile, result.to(pooled.dtype.element_ty), inside)
    tl.store(lse + chip * pixels + p, tl.where(some, top + tl.log(total), 0.0), p < pixels)


@triton.jit
def _backward_kernel(
    grad, features, segments, pooled, lse, w1, b1, ln_weight, ln_bias, w2, grad_features, partials,
    images, chips, pixels, blocks, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    dtype = features.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    weight, bias, scale, shift, out = _load_layer(w1, b1, ln_weight, ln_bias, w2, D, BLOCK_D)
    back = tl.trans(weight).to(dtype)
    weight = weight.to(dtype)
    slope_scale = out * scale

    # sums over rows wait until the end: one addition an element here, where a reduction would cost six
    d_weight = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)  # [out, in]
    d_bias = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    d_scale = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    d_shift = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    d_out = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for job in range(tl.program_id(0), (chips + 1) * blocks, tl.num_programs(0)):
        chip = tl.cast(job, tl.int64) // blocks  # `chips` itself stands for the images after the last segment
        p = job % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
        tile = p[:, None] * D + d[None, :]
        inside = (p < pixels)[:, None] & (d < D)[None, :]
        at = tl.minimum(chip, chips - 1) * pixels
        g = tl.load(grad + at * D + tile, inside, 0.0)
        mean = tl.sum(g.to(tl.float32) * tl.load(pooled + at * D + tile, inside, 0.0), 1)
        log_total = tl.load(lse + at + p, p < pixels, 0.0)
        first = tl.load(segments + chip).to(tl.int64)
        last = tl.load(segments + tl.minimum(chip + 1, chips)).to(tl.int64)

        for image in range(first, last):
            at_image = image * pixels * D
            x = tl.load(features + at_image + tile, inside, 0.0)
            h = tl.dot(x, weight, input_precision="ieee") + bias[None, :]
            norm = tl.rsqrt(tl.sum(h * h, 1) / D + eps)
            n = h * norm[:, None]
            y, slope = gelu_and_slope(n * scale[None, :] + shift[None, :], EXACT)
            share = tl.exp(tl.sum(y * out[None, :], 1) - log_total)
            # a month alone weighs 1 whatever the layer says: rounding must not give that a gradient
            d_logit = tl.where(last - first > 1, share * (tl.sum(g.to(tl.float32) * x, 1) - mean), 0.0)
            du = d_logit[:, None] * slope  # short of the factor `out`
            dn = du * slope_scale[None, :]
            dh = norm[:, None] * (dn - n * (tl.sum(dn * n, 1) / D)[:, None])
            d_out += d_logit[:, None] * y
            d_shift += du
            d_scale += du * n
            d_bias += dh
            narrow = dh.to(dtype)
            d_weight = tl.dot(tl.trans(narrow), x, d_weight, input_precision="ieee")
            dx = tl.dot(narrow, back, input_precision="ieee") + share[:, None] * g.to(tl.float32)
            tl.store(grad_features + at_image + tile, dx.to(dtype), inside)

        for image in range(last, tl.where(chip < chips, last, images)):
            at_image = image * pixels * D
            tl.store(grad_features + at_image + tile, tl.zeros([BLOCK_P, BLOCK_D], dtype), inside)

    # the way back through the centring is the same centring; being linear, each program's own sums can take it
    inside_d = d < D
    d_weight -= tl.sum(d_weight, 0)[None, :] / D
    bias_sum = tl.sum(d_bias, 0)
    bias_sum -= tl.sum(bias_sum, 0) / D
    mine = partials + tl.program_id(0).to(tl.int64) * (D * D + 4 * D)
    tl.store(mine + d[:, None] * D + d[None, :], d_weight, inside_d[:, None] & inside_d[None, :])
    tl.store(mine + D * D + d, bias_sum, inside_d)
    tl.store(mine + D * D + D + d, tl.sum(d_scale, 0) * out, inside_d)
    tl.store(mine + D * D + 2 * D + d, tl.sum(d_shift, 0) * out, inside_d)
    tl.store(mine + D * D + 3 * D + d, tl.sum(d_out, 0), inside_d)


# Tiles by BLOCK_D: pixels, warps, and for the backward programs per multiprocessor. From the compiler's report for
# sm_90 (registers, no spills in the loops): 16 to 32 elements of the tile a thread.
_FORWARD = {16: (64, 4), 32: (64, 4), 64: (64, 4), 128: (32, 4)}
_BACKWARD = {16: (64, 4, 2), 32: (64, 4, 2), 64: (32, 4, 2), 128: (32, 8, 1)}
_OPTIONS = {"num_stages": 3, "enable_fp_fusion": True}


def forward(
    x: torch.Tensor, segments: torch.Tensor, layer: tuple[torch.Tensor, ...], eps: float,
    pooled: torch.Tensor, lse: torch.Tensor,
) -> None:  # fmt: skip
    """Fills pooled [B, D, H, W] and lse [B, H, W] from x [N, D, H, W], all channels_last, and segments [B + 1]."""
    _, d, height, width = x.shape
    block_d = max(16, triton.next_power_of_2(d))
    exact = x.dtype == torch.float32
    block_p, warps = _BACKWARD[block_d][:2] if exact else _FORWARD[block_d]
    blocks = triton.cdiv(height * width, block_p)
    chips = lse.shape[0]
    _forward_kernel[(chips * blocks,)](
        x, segments, *layer, pooled, lse, height * width, blocks, eps,
        D=d, BLOCK_D=block_d, BLOCK_P=block_p, EXACT=exact, num_warps=warps, **_OPTIONS,
    )  # fmt: skip


def backward(
    grad: torch.Tensor, x: torch.Tensor, segments: torch.Tensor, pooled: torch.Tensor, lse: torch.Tensor,
    layer: tuple[torch.Tensor, ...], eps: float, grad_x: torch.Tensor, programs: int,
) -> torch.Tensor:  # fmt: skip
    """Fills grad_x [N, D, H, W]; returns the layer's gradients [D·D + 4·D] (w1, b1, ln_weight, ln_bias, w2) in float32.

    `programs` is the number of multiprocessors to fill.
    """
    images, d, height, width = x.shape
    chips = lse.shape[0]
    block_d = max(16, triton.next_power_of_2(d))
    block_p, warps, resident = _BACKWARD[block_d]
    blocks = triton.cdiv(height * width, block_p)
    programs = min((chips + 1) * blocks, programs * resident)
    partials = torch.empty(programs, d * d + 4 * d, dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        grad, x, segments, pooled, lse, *layer, grad_x, partials, images, chips, height * width, blocks, eps,
        D=d, BLOCK_D=block_d, BLOCK_P=block_p, EXACT=x.dtype == torch.float32, num_warps=warps, **_OPTIONS,
    )  # fmt: skip
    return partials.sum(0)
