"""Month attention in plain PyTorch: the truth in tests, the baseline in benchmarks, the last resort elsewhere.

For chip b with images n in segments[b] ≤ n < segments[b + 1], at every pixel:

    logit_n  = w2 · GELU(LayerNorm(w1 x_n + b1)) + b2
    pooled_b = Σ_n softmax_n(logit) x_n

Legend: N images (months of all chips, chip after chip), B chips, D channels, H × W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def month_attention_reference(
    x: torch.Tensor, segments: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, ln_weight: torch.Tensor,
    ln_bias: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor, eps: float = 1e-5,
) -> torch.Tensor:  # fmt: skip
    """Pools x [N, D, H, W] over each chip's months to [B, D, H, W] in x's dtype, channels_last.

    Computes in the wider of x's and w1's dtype, whatever autocast says. Segments are never read by the host.
    """
    chips = segments.shape[0] - 1
    dtype = torch.promote_types(x.dtype, w1.dtype)
    with torch.autocast(x.device.type, enabled=False):
        rows = x.permute(0, 2, 3, 1).to(dtype)
        w1, b1, ln_weight, ln_bias, w2, b2 = (p.to(dtype) for p in (w1, b1, ln_weight, ln_bias, w2, b2))
        hidden = F.gelu(F.layer_norm(F.linear(rows, w1, b1), (x.shape[1],), ln_weight, ln_bias, eps))
        logits = F.linear(hidden, w2, b2)[..., 0]  # [N, H, W]

        # images after the last segment fall into a chip of their own, which is left out
        chip = torch.searchsorted(segments[1:], torch.arange(x.shape[0], device=x.device), right=True)
        at = chip[:, None, None].expand_as(logits)
        none = logits.new_zeros(chips + 1, *logits.shape[1:])
        top = torch.full_like(none, float("-inf")).scatter_reduce(0, at, logits.detach(), "amax")
        share = torch.exp(logits - top[chip])
        share = share / none.index_add(0, chip, share)[chip]
        pooled = rows.new_zeros(chips + 1, *rows.shape[1:]).index_add(0, chip, share[..., None] * rows)
        return pooled[:chips].to(x.dtype).permute(0, 3, 1, 2)
