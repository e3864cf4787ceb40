"""Month attention of wide features (D > 128, float32 D > 32): the D×D layer by the vendor's matrix product.

At these levels a chip has few pixels (256 and 64 of D = 224 and 640): a block of pixels per program would leave most
of the GPU idle, and the layer no longer fits on chip beside its data. So the layer runs as one matrix product over all
[N·P, D] rows, and one kernel does LayerNorm → GELU → Linear → softmax → weighted sum, with one pixel and BLOCK_T months
at a time in a program. The product's output is kept for the backward: these levels hold a tenth of the features, and
arithmetic, not memory, is what they cost. The backward is one kernel and two matrix products.

Sums over rows for the parameters' gradients are carried by as many programs as the GPU holds and summed in a fixed
order: no atomics, so the same inputs give the same bits.

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
def _normalised(hidden, at, inside, bias, D: tl.constexpr, eps):
    """LayerNorm without its affine part of the rows at `at`, and 1/σ of each row."""
    h = tl.where(inside, tl.load(hidden + at, inside, 0.0).to(tl.float32) + bias[None, :], 0.0)
    h = tl.where(inside, h - tl.sum(h, 1)[:, None] / D, 0.0)
    norm = tl.rsqrt(tl.sum(h * h, 1) / D + eps)
    return h * norm[:, None], norm


@triton.jit
def _forward_kernel(
    features, hidden, segments, b1, ln_weight, ln_bias, w2, pooled, lse, pixels, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    chip = (tl.program_id(0) // pixels).to(tl.int64)
    p = tl.program_id(0) % pixels
    d = tl.arange(0, BLOCK_D)
    inside_d = d < D
    bias = tl.load(b1 + d, inside_d, 0.0).to(tl.float32)
    scale = tl.load(ln_weight + d, inside_d, 0.0).to(tl.float32)
    shift = tl.load(ln_bias + d, inside_d, 0.0).to(tl.float32)
    out = tl.load(w2 + d, inside_d, 0.0).to(tl.float32)

    top = float("-inf")
    total = 0.0
    sums = tl.zeros([BLOCK_D], tl.float32)
    first = tl.load(segments + chip).to(tl.int64)
    last = tl.load(segments + chip + 1).to(tl.int64)
    for start in range(first, last, BLOCK_T):
        image = start + tl.arange(0, BLOCK_T)
        at = (image * pixels + p)[:, None] * D + d[None, :]
        inside = (image < last)[:, None] & inside_d[None, :]
        x = tl.load(features + at, inside, 0.0).to(tl.float32)
        n, _ = _normalised(hidden, at, inside, bias, D, eps)
        logit = tl.sum(gelu(n * scale[None, :] + shift[None, :], EXACT) * out[None, :], 1)
        logit = tl.where(image < last, logit, float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, 0))
        keep = tl.exp(top - new_top)
        share = tl.exp(logit - new_top)
        total = total * keep + tl.sum(share, 0)
        sums = sums * keep + tl.sum(share[:, None] * x, 0)
        top = new_top

    some = total > 0.0  # a chip without months: zeros
    total = tl.where(some, total, 1.0)
    at_pixel = chip * pixels + p
    tl.store(pooled + at_pixel * D + d, (sums * (1.0 / total)).to(pooled.dtype.element_ty), inside_d)
    tl.store(lse + at_pixel, tl.where(some, top + tl.log(total), 0.0))


@triton.jit
def _backward_kernel(
    grad, features, hidden, segments, pooled, lse, b1, ln_weight, ln_bias, w2, grad_features, grad_hidden,
    partials, images, chips, pixels, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of `hidden` and starts the features' gradient with share · grad."""
    dtype = features.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    inside_d = d < D
    bias = tl.load(b1 + d, inside_d, 0.0).to(tl.float32)
    scale = tl.load(ln_weight + d, inside_d, 0.0).to(tl.float32)
    shift = tl.load(ln_bias + d, inside_d, 0.0).to(tl.float32)
    out = tl.load(w2 + d, inside_d, 0.0).to(tl.float32)
    slope_scale = out * scale

    # sums over rows wait until the end: one addition an element here, where a reduction would cost several
    d_bias = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    d_scale = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    d_shift = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    d_out = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for job in range(tl.program_id(0), (chips + 1) * pixels, tl.num_programs(0)):
        chip = tl.cast(job, tl.int64) // pixels  # `chips` itself stands for the images after the last segment
        p = job % pixels
        at_pixel = tl.minimum(chip, chips - 1) * pixels + p
        g = tl.load(grad + at_pixel * D + d, inside_d, 0.0).to(tl.float32)
        mean = tl.sum(g * tl.load(pooled + at_pixel * D + d, inside_d, 0.0), 0)
        log_total = tl.load(lse + at_pixel)
        first = tl.load(segments + chip).to(tl.int64)
        last = tl.load(segments + tl.minimum(chip + 1, chips)).to(tl.int64)

        for start in range(first, last, BLOCK_T):
            image = start + tl.arange(0, BLOCK_T)
            at = (image * pixels + p)[:, None] * D + d[None, :]
            inside = (image < last)[:, None] & inside_d[None, :]
            x = tl.load(features + at, inside, 0.0).to(tl.float32)
            n, norm = _normalised(hidden, at, inside, bias, D, eps)
            y, slope = gelu_and_slope(n * scale[None, :] + shift[None, :], EXACT)
            share = tl.exp(tl.sum(y * out[None, :], 1) - log_total)
            share = tl.where(image < last, share, 0.0)
            # a month alone weighs 1 whatever the layer says: rounding must not give that a gradient
            d_logit = tl.where(last - first > 1, share * (tl.sum(g[None, :] * x, 1) - mean), 0.0)
            du = d_logit[:, None] * slope  # short of the factor `out`
            dn = du * slope_scale[None, :]
            dh = norm[:, None] * (dn - (tl.sum(dn, 1)[:, None] + n * tl.sum(dn * n, 1)[:, None]) / D)
            dh = tl.where(inside, dh, 0.0)
            d_out += d_logit[:, None] * y
            d_shift += du
            d_scale += du * n
            d_bias += dh
            tl.store(grad_hidden + at, dh.to(dtype), inside)
            tl.store(grad_features + at, (share[:, None] * g[None, :]).to(dtype), inside)

        for image in range(last, tl.where(chip < chips, last, images)):
            at_row = (image * pixels + p) * D + d
            tl.store(grad_hidden + at_row, tl.zeros([BLOCK_D], dtype), inside_d)
            tl.store(grad_features + at_row, tl.zeros([BLOCK_D], dtype), inside_d)

    mine = partials + tl.program_id(0).to(tl.int64) * (4 * D)
    tl.store(mine + d, tl.sum(d_bias, 0), inside_d)
    tl.store(mine + D + d, tl.sum(d_scale, 0) * out, inside_d)
    tl.store(mine + 2 * D + d, tl.sum(d_shift, 0) * out, inside_d)
    tl.store(mine + 3 * D + d, tl.sum(d_out, 0), inside_d)


def _tile(d: int) -> dict[str, int]:
    """Tile and warps: 16 elements a thread, so that the backward's sums stay in registers."""
    block_d = triton.next_power_of_2(d)
    block_t = max(1, min(4, 8192 // block_d))
    return {"BLOCK_D": block_d, "BLOCK_T": block_t, "num_warps": max(1, min(16, block_t * block_d // 512))}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[N, D, H, W] channels_last as its [N·H·W, D] rows, without a copy."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def forward(
    x: torch.Tensor, segments: torch.Tensor, layer: tuple[torch.Tensor, ...], eps: float,
    pooled: torch.Tensor, lse: torch.Tensor, hidden: torch.Tensor,
) -> None:  # fmt: skip
    """Fills pooled [B, D, H, W], lse [B, H, W] and hidden (like x: the first layer's output without its bias)."""
    _, d, height, width = x.shape
    w1, *vectors = layer
    torch.mm(_rows(x), w1.to(x.dtype).t(), out=_rows(hidden))
    _forward_kernel[(lse.numel(),)](
        x, hidden, segments, *vectors, pooled, lse, height * width, eps,
        D=d, EXACT=x.dtype == torch.float32, enable_fp_fusion=True, **_tile(d),
    )  # fmt: skip


def backward(
    grad: torch.Tensor, x: torch.Tensor, segments: torch.Tensor, pooled: torch.Tensor, lse: torch.Tensor,
    hidden: torch.Tensor, layer: tuple[torch.Tensor, ...], eps: float, grad_x: torch.Tensor, programs: int,
) -> torch.Tensor:  # fmt: skip
    """Fills grad_x [N, D, H, W]; returns the layer's gradients [D·D + 4·D] (w1, b1, ln_weight, ln_bias, w2) in float32.

    `programs` is the number of multiprocessors to fill.
    """
    images, d, height, width = x.shape
    w1, *vectors = layer
    chips = lse.shape[0]
    programs = min((chips + 1) * height * width, programs * 4)
    partials = torch.empty(programs, 4 * d, dtype=torch.float32, device=x.device)
    grad_hidden = torch.empty_like(hidden)
    _backward_kernel[(programs,)](
        grad, x, hidden, segments, pooled, lse, *vectors, grad_x, grad_hidden, partials,
        images, chips, height * width, eps,
        D=d, EXACT=x.dtype == torch.float32, enable_fp_fusion=True, **_tile(d),
    )  # fmt: skip
    _rows(grad_x).addmm_(_rows(grad_hidden), w1.to(x.dtype))
    grads = torch.empty(d * d + 4 * d, dtype=torch.float32, device=x.device)
    _product_float32(_rows(grad_hidden).t(), _rows(x), out=grads[: d * d].view(d, d))
    torch.sum(partials, 0, out=grads[d * d :])
    return grads


def _product_float32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a @ b in float32, without rounding the sum of many rows to half precision."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)
