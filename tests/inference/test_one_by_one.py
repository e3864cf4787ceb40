"""Samples run one by one give the same bytes whatever is beside them, and what the model gives."""

from __future__ import annotations

import torch

from engine.inference.one_by_one import OneByOne
from tests.scenes import DATASET, model


def test_neither_batch_nor_threads_change_a_sample() -> None:
    plain = model()
    torch.manual_seed(3)
    images = torch.rand(5, DATASET.months, DATASET.channels, 64, 64)
    dropped = torch.zeros(5, DATASET.months, dtype=torch.bool)
    dropped[1, 1:] = dropped[3, 2:] = True
    one, three = OneByOne(plain, 1), OneByOne(plain, 3)
    whole = one(images, dropped)
    assert torch.equal(three(images, dropped), whole)
    assert torch.equal(torch.cat([three(images[:2], dropped[:2]), one(images[2:], dropped[2:])]), whole)
    with torch.inference_mode():
        assert torch.allclose(plain(images, dropped), whole, rtol=1e-4, atol=1e-2)


def test_autocast_reaches_the_threads() -> None:
    seen = []

    def forward(images: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        seen.append((torch.mm(images[0, 0, 0], images[0, 0, 0]).dtype, torch.is_inference_mode_enabled()))
        return images[:, 0, :1]

    run = OneByOne(forward, 2)
    images, dropped = torch.ones(2, 1, 1, 4, 4), torch.zeros(2, 1, dtype=torch.bool)
    run(images, dropped)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(images, dropped)
    with torch.autocast("cpu", dtype=torch.float16):
        run(images, dropped)
    assert seen == [(dtype, True) for dtype in (torch.float32, torch.bfloat16, torch.float16) for _ in range(2)]


def test_threads_have_no_threads_of_their_own() -> None:
    before, seen = torch.get_num_threads(), []

    def forward(images: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return images

    torch.set_num_threads(2)
    try:
        OneByOne(forward, 2)(torch.ones(2, 1), torch.zeros(2, 1))
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1]
