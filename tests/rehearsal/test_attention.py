"""Of the month attention on a GPU, what a machine without one can tell: which implementation runs, and the product that
its tensor cores alone can do."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.month_attention import resolve
from kernels.month_attention.triton_rows import _product_float32
from tests.rehearsal.state import CUDA


def test_triton_runs_on_a_gpu_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("auto", "triton"):
        assert resolve(name, CUDA) == "triton"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    assert resolve("auto", CUDA) == "reference"
    with pytest.raises(RuntimeError, match="needs the package triton: install it, or choose 'auto'"):
        resolve("triton", CUDA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_of_many_rows_is_asked_for_in_float32(dtype: torch.dtype) -> None:
    """By tensors that are on CUDA and have no values; torch looks at shapes and dtypes as it does there."""
    with FakeTensorMode():
        rows, others = (torch.empty(100, width, dtype=dtype, device=CUDA) for width in (7, 3))
        out = torch.empty(7, 3, device=CUDA)
        _product_float32(rows.t(), others, out)
        assert out.dtype == torch.float32
        if dtype != torch.float32:
            with pytest.raises(RuntimeError, match="Expected out tensor to have dtype"):
                torch.mm(rows.t(), others, out=out)
