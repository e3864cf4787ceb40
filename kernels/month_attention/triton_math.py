"""The exact GELU and its derivative for Triton kernels, on one or two special-function instructions.

GELU(u) = u·Φ(u), Φ the normal distribution function. libdevice's erf costs about 25 instructions an element, more
than all the rest of the month attention together; here the tail Φ(−t) = 2^−P(t), t ≥ 0, with a polynomial P, costs
one exp2 and a few multiply-adds. P was fitted (Lawson-weighted least squares, so near minimax) to log2 of the tail
on 0 ≤ t ≤ 6 and grows beyond, so that the tail goes to 0 for every larger t. Largest error of Φ and of GELU against
float64: 7e-7 with degree 5, 4e-8 (float32 rounding) with degree 8;
`tests/kernels/test_month_attention_triton.py` holds it.
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments of a Triton kernel have no Python types)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normal_tail(t, EXACT: tl.constexpr):
    """Φ(−t) for t ≥ 0; EXACT chooses degree 8 (float32 features) over degree 5 (half precisions)."""
    if EXACT:
        p = 2.276000259371358e-06
        p = p * t + -3.2969448511721566e-05
        p = p * t + 1.5728511789347976e-04
        p = p * t + 2.0246472558937967e-04
        p = p * t + -7.142764516174793e-03
        p = p * t + 5.2546426653862e-02
        p = p * t + 0.45919305086135864
        p = p * t + 1.1511069536209106
        p = p * t + 0.9999999403953552
    else:
        p = 5.002744728699327e-04
        p = p * t + -7.282458711415529e-03
        p = p * t + 5.234338343143463e-02
        p = p * t + 0.45941397547721863
        p = p * t + 1.1510521173477173
        p = p * t + 1.0000019073486328
    return tl.exp2(-p)


@triton.jit
def gelu(u, EXACT: tl.constexpr):
    """GELU(u) = max(u, 0) − |u|·Φ(−|u|): no choice between the two sides is needed."""
    t = tl.abs(u)
    return tl.maximum(u, 0.0) - t * normal_tail(t, EXACT)


@triton.jit
def gelu_and_slope(u, EXACT: tl.constexpr):
    """GELU(u) and its derivative Φ(u) + u·φ(u)."""
    t = tl.abs(u)
    tail = normal_tail(t, EXACT)
    density = tl.exp2(t * t * -0.7213475204444817 - 1.3257480647361592)  # φ(t) in powers of 2
    left = tail - t * density  # the slope at −t; at t it is 1 − that
    return tl.maximum(u, 0.0) - t * tail, tl.where(u > 0.0, 1.0 - left, left)
