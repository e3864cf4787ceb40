"""The month attention's Triton kernels: natively on a GPU, in Triton's interpreter on a CPU.

Triton decides when a kernel is declared whether it is interpreted, so the interpreter needs a process of its own that
has TRITON_INTERPRET=1 from the start: `test_in_the_interpreter` runs this very file there.
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments of a Triton kernel have no Python types)

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels.month_attention import resolve
from tests.kernels.test_month_attention import CASES, ROOT, TOLERANCE, Case, assert_close, attend, make, run, truth

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from kernels.month_attention.triton_math import gelu_and_slope  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALVES = (torch.bfloat16, torch.float16)
if INTERPRETED:  # which rounds to bfloat16 by cutting off
    TOLERANCE = {**TOLERANCE, torch.bfloat16: 2 * TOLERANCE[torch.bfloat16]}
native = pytest.mark.gpu


def either(test: Any) -> Any:
    return test if INTERPRETED else native(test)


@triton.jit
def _count(out, n):
    for i in range(tl.program_id(0), n):
        tl.store(out + i, i)


def _prepare_interpreter() -> None:
    """Skips where Triton's interpreter is broken, and mends its bfloat16 dot, which multiplies the bits as integers."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    try:
        _count[(1,)](torch.zeros(2), 2)
    except Exception as error:  # Triton 3.6 with NumPy 2.4 and later
        pytest.skip(f"Triton {triton.__version__}'s interpreter fails a loop: {error}", allow_module_level=True)
    plain = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


if INTERPRETED:
    _prepare_interpreter()


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run natively here")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    if broken := re.search(r"SKIPPED.*(Triton \S+ interpreter fails.*)", result.stdout):
        pytest.skip(broken[1])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 25  # type: ignore[index]


@triton.jit
def _gelu_kernel(u, y, slope, n, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value, derivative = gelu_and_slope(tl.load(u + at, at < n, 0.0), EXACT)
    tl.store(y + at, value, at < n)
    tl.store(slope + at, derivative, at < n)


@either
@pytest.mark.parametrize(("exact", "tolerance"), [(True, 2e-7), (False, 1e-6)])
def test_gelu(exact: bool, tolerance: float) -> None:
    u = torch.linspace(-40, 40, 16001, device=DEVICE)
    y, slope = torch.empty_like(u), torch.empty_like(u)
    _gelu_kernel[(triton.cdiv(u.numel(), 1024),)](u, y, slope, u.numel(), BLOCK=1024, EXACT=exact)
    wide = u.double().requires_grad_()
    expected = F.gelu(wide)
    (expected_slope,) = torch.autograd.grad(expected.sum(), wide)
    assert ((y - expected).abs() / expected.abs().clamp_min(1)).max() < tolerance
    assert (slope - expected_slope).abs().max() < tolerance


def on_device(case: Case, dtype: torch.dtype) -> tuple[Any, ...]:
    x, segments, layer, grad = make(case, dtype)
    return x.to(DEVICE), segments.to(DEVICE), [p.float().to(DEVICE) for p in layer], grad.to(DEVICE)


# natively all; the slow interpreter takes every case in float32 and in one of the halves, in turn
COMBINATIONS = [
    (name, dtype)
    for i, name in enumerate(CASES)
    for dtype in ([torch.float32, HALVES[i % 2]] if INTERPRETED else [torch.float32, *HALVES])
]


@either
@pytest.mark.parametrize(("name", "dtype"), COMBINATIONS, ids=str)
def test_kernels_are_the_reference(name: str, dtype: torch.dtype) -> None:
    inputs = on_device(CASES[name], dtype)
    got = run("triton", *inputs)
    assert got[0].dtype == got[1].dtype == dtype
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert_close(got, truth(*inputs), TOLERANCE[dtype])


@either
def test_narrow_widths_between_powers_of_two() -> None:
    for d in (5, 16, 17, 61, 64, 96, 127, 128):
        inputs = on_device(Case((0, 2, 3), 3, d, 3, 7), torch.float16)
        assert_close(run("triton", *inputs), truth(*inputs), TOLERANCE[torch.float16])


@either
@pytest.mark.parametrize("d", [16, 130])
def test_images_after_the_last_segment_do_not_matter(d: int) -> None:
    x, segments, layer, grad = on_device(Case((0, 2, 5), 7, d, 3, 3), torch.float32)
    expected = run("triton", x, segments, layer, grad)
    x[5:] = 1e4
    got = run("triton", x, segments, layer, grad)
    assert got[1][5:].abs().max() == 0
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@either
def test_confident_softmax_stays_finite() -> None:
    x, segments, layer, grad = on_device(Case((0, 7), 7, 16, 5, 5), torch.float32)
    layer[4] = layer[4] * 300
    got = run("triton", x, segments, layer, grad)
    assert all(torch.isfinite(t).all() for t in got)
    expected = truth(x, segments, layer, grad)[0]
    assert (got[0].cpu() - expected).norm() <= 1e-4 * expected.norm()


@either
@pytest.mark.parametrize("d", [16, 130])
def test_opcheck(d: int) -> None:
    x, segments, layer, grad = on_device(Case((0, 2, 5), 6, d, 2, 2), torch.float32)
    inputs = [t.requires_grad_() for t in (x, *layer)]
    operators = torch.ops.kernels
    arguments = (inputs[0], segments, *inputs[1:], 1e-5, "triton")
    torch.library.opcheck(operators.month_attention.default, arguments)
    plain = [t.detach() for t in inputs]
    saved = operators.month_attention(plain[0], segments, *plain[1:], 1e-5, "triton")
    backward = (grad, plain[0], segments, *saved, *plain[1:6], 1e-5, "triton")
    torch.library.opcheck(operators.month_attention_backward.default, backward)


@either
def test_float64_is_refused() -> None:
    x, segments, layer, _ = on_device(CASES["prime"], torch.float32)
    with pytest.raises(ValueError, match="no float64"):
        attend("triton", x.double(), segments, layer)


# the five levels of a 256-pixel chip, as (D, H): twelve months, one chip with fewer
REAL = [(32, 128), (64, 64), (96, 32), (224, 16), (640, 8)]


@native
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("d", "size"), REAL)
def test_real_sizes(d: int, size: int, dtype: torch.dtype) -> None:
    inputs = on_device(Case((0, 12, 19), 19, d, size, size), dtype)
    got = run("triton", *inputs)
    again = run("triton", *inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, again))  # no atomics: the same bits
    x, segments, layer, grad = inputs
    expected = run("reference", x.double(), segments, [p.double() for p in layer], grad.double())
    assert_close(got, [t.cpu() for t in expected], TOLERANCE[dtype])


@native
@pytest.mark.parametrize(("d", "size"), REAL)
def test_no_synchronisation(d: int, size: int) -> None:
    inputs = on_device(Case((0, 3, 5), 5, d, size, size), torch.bfloat16)
    run("triton", *inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run("triton", *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@native
def test_torch_compile_on_the_gpu() -> None:
    assert resolve("auto", "cuda") == "triton"

    def model(x: torch.Tensor, segments: torch.Tensor, layer: list[torch.Tensor]) -> torch.Tensor:
        return attend("auto", x * 2, segments, layer).relu()

    compiled = torch.compile(model, fullgraph=True)
    for d in (32, 224):
        for last in (7, 9, 12):
            x, segments, layer, grad = on_device(Case((0, 3, last), last, d, 8, 8), torch.float32)
            results = []
            for f in (model, compiled):
                inputs = [t.detach().clone().requires_grad_() for t in (x, *layer)]
                out = f(inputs[0], segments, inputs[1:])
                results.append([out, *torch.autograd.grad(out, inputs, grad)])
            for a, b in zip(*results):
                torch.testing.assert_close(a, b)


@native
def test_autocast_on_the_gpu() -> None:
    x, segments, layer, _ = on_device(Case((0, 3, 5), 5, 224, 8, 8), torch.float32)
    expected = attend("triton", x, segments, layer)
    with torch.autocast("cuda", torch.bfloat16):
        got = attend("triton", x, segments, layer)
    assert torch.equal(got, expected)
