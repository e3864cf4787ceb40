"""Metrics: values against numpy; the same bits for any spread over ranks, batches and orders."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.base.errors import DataError
from engine.inference.metrics import ChipTable, chip_sums, halving_sum, per_chip_rmse

SIDE = 24


def chips(n: int, seed: int = 0, side: int = SIDE) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions [n,1,side,side] and labels [n,side,side], float32, in t/ha, outliers included."""
    random = np.random.default_rng(seed)
    target = random.gamma(1.2, 55.0, (n, side, side))
    target[0, 0, 0] = 12_900.0
    pred = 0.8 * target + random.normal(5, 20, target.shape)
    return torch.tensor(pred[:, None], dtype=torch.float32), torch.tensor(target, dtype=torch.float32)


def filled(pred: torch.Tensor, target: torch.Tensor, ranks: list[list[list[int]]], pad: int = 0) -> ChipTable:
    """The table after every rank saw its batches (lists of chips), each followed by `pad` padding samples."""
    tables = []
    for batches in ranks:
        table = ChipTable(len(pred))
        for batch in batches:
            seen = [*batch, *[0] * pad]  # padding repeats chip 0, with values that must not count
            valid = torch.tensor([True] * len(batch) + [False] * pad)
            noise = torch.where(valid, 0.0, math.nan)
            table.update(torch.tensor(seen), pred[seen] + noise[:, None, None, None], target[seen], valid)
        tables.append(table)
    whole = copy.copy(tables[0])
    whole.table = sum(table.table for table in tables)  # what an all-reduce does, in some order
    whole.reduce()
    return whole


def test_values() -> None:
    pred, target = chips(5)
    got = filled(pred, target, [[[0, 1, 2], [3, 4]]]).metrics()
    p, t = pred[:, 0].double().numpy(), target.double().numpy()
    error = p - t
    assert got == pytest.approx({
        "rmse_per_chip": np.mean([np.sqrt(np.mean(e ** 2)) for e in error]),
        "rmse_pooled": np.sqrt(np.mean(error ** 2)),
        "rmse_of_mean": np.mean([np.sqrt(np.mean((m - t.mean()) ** 2)) for m in t]),
        "mae": np.mean(np.abs(error)),
        "r2": 1 - np.sum(error ** 2) / np.sum((t - t.mean()) ** 2),
        "bias": np.mean(error),
        "n_chips": 5,
    }, rel=1e-13)


def test_per_chip() -> None:
    pred, target = chips(3)
    records = filled(pred, target, [[[2, 0, 1]]]).per_chip()
    error = (pred[:, 0].double() - target.double()).numpy()
    assert list(records["row"]) == [0, 1, 2]
    np.testing.assert_allclose(records["rmse"], np.sqrt((error ** 2).mean((1, 2))), rtol=1e-14)
    np.testing.assert_allclose(records["mae"], np.abs(error).mean((1, 2)), rtol=1e-14)
    np.testing.assert_allclose(records["bias"], error.mean((1, 2)), rtol=1e-12)
    np.testing.assert_allclose(records["mean_label"], target.double().mean((1, 2)), rtol=1e-14)


@st.composite
def spreads(draw: st.DrawFn) -> tuple[int, list[list[list[int]]], int]:
    """A number of chips, an order of them cut into batches and dealt to ranks, and how much padding."""
    n = draw(st.integers(1, 12))
    order = draw(st.permutations(range(n)))
    ranks: list[list[list[int]]] = [[] for _ in range(draw(st.integers(1, 5)))]
    while order:
        size = draw(st.integers(1, len(order)))
        ranks[draw(st.integers(0, len(ranks) - 1))].append(list(order[:size]))
        order = order[size:]
    return n, ranks, draw(st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(spreads())
def test_any_spread_gives_the_same_bits(spread: tuple[int, list[list[list[int]]], int]) -> None:
    n, ranks, pad = spread
    pred, target = chips(n, seed=n)
    once = filled(pred, target, [[list(range(n))]])
    other = filled(pred, target, ranks, pad)
    assert torch.equal(once.table[:-1], other.table[:-1])
    assert once.metrics() == other.metrics()


def test_threads_and_batch_size_do_not_change_the_bits() -> None:
    pred, target = chips(4, side=256)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results += [chip_sums(pred[:, 0], target), torch.cat([chip_sums(p, t[None]) for p, t in zip(pred, target)])]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_halving_sum(pixels: int, seed: int) -> None:
    x = np.random.default_rng(seed).integers(-2**40, 2**40, (2, pixels))
    assert halving_sum(torch.tensor(x, dtype=torch.float64)).tolist() == x.sum(1).tolist()  # exact in 53 bits


def test_r2_keeps_its_digits_far_from_zero() -> None:
    pred, target = chips(3)
    far = 1e7  # label² would need 15 digits for the mean alone
    target64 = target.double() + far
    pred64 = pred.double() + far
    got = filled(pred64, target64, [[[0, 1, 2]]]).metrics()["r2"]
    assert got == pytest.approx(filled(pred, target, [[[0, 1, 2]]]).metrics()["r2"], rel=1e-6)


def test_r2_of_one_value_is_not_a_number() -> None:
    got = filled(torch.ones(1, 1, 4, 4), torch.zeros(1, 4, 4), [[[0]]]).metrics()
    assert math.isnan(got["r2"])
    assert got["rmse_per_chip"] == got["mae"] == got["bias"] == 1


def test_missing_and_repeated_chips_are_errors() -> None:
    pred, target = chips(4)
    with pytest.raises(DataError, match=r"2 of 4 chips were evaluated by no rank \(rows 1, 3\)"):
        filled(pred, target, [[[0]], [[2]]])
    with pytest.raises(DataError, match=r"1 of 4 chips were evaluated more than once \(rows 2\)"):
        filled(pred, target, [[[0, 1, 2, 3]], [[2]]])
    with pytest.raises(DataError, match="more than once"):
        filled(pred, target, [[[0, 1], [1, 2, 3]]])


def test_unlabelled_chips_are_seen_but_not_scored() -> None:
    pred, target = chips(3)
    table = ChipTable(3)
    blank = target.clone()
    blank[1] = math.nan
    table.update(torch.arange(3), pred, blank, torch.ones(3, dtype=torch.bool), torch.tensor([True, False, True]))
    table.reduce()
    labelled = filled(pred[[0, 2]], target[[0, 2]], [[[0, 1]]])
    assert table.metrics() == labelled.metrics()
    assert list(table.per_chip()["row"]) == [0, 2]

    nothing = ChipTable(1)
    nothing.update(torch.arange(1), pred[:1], target[:1], torch.tensor([True]), torch.tensor([False]))
    nothing.reduce()
    with pytest.raises(DataError, match="no chip of the evaluation set has a label"):
        nothing.metrics()


def test_only_pixels_with_a_target_count() -> None:
    pred, target = chips(5)
    hole = torch.tensor(np.random.default_rng(1).random(target.shape) < 0.3)
    hole[3] = True
    pred[:, 0][hole] = math.inf  # whatever is predicted there
    got = filled(pred, target.masked_fill(hole, math.nan), [[[3, 1, 2], [0]], [[4]]])
    kept = [(p[0][~h].double().numpy(), t[~h].double().numpy()) for p, t, h in zip(pred, target, hole) if not h.all()]
    errors, everything = [p - t for p, t in kept], np.concatenate([t for _, t in kept])
    error, mean = np.concatenate(errors), everything.mean()
    assert got.metrics() == pytest.approx({
        "rmse_per_chip": np.mean([np.sqrt(np.mean(e ** 2)) for e in errors]),
        "rmse_pooled": np.sqrt(np.mean(error ** 2)),
        "rmse_of_mean": np.mean([np.sqrt(np.mean((t - mean) ** 2)) for _, t in kept]),
        "mae": np.mean(np.abs(error)),
        "r2": 1 - np.sum(error ** 2) / np.sum((everything - mean) ** 2),
        "bias": np.mean(error),
        "n_chips": 4,
    }, rel=1e-12)
    assert list(got.per_chip()["row"]) == [0, 1, 2, 4]
    np.testing.assert_allclose(got.per_chip()["mean_label"], [t.mean() for _, t in kept], rtol=1e-13)
    each = per_chip_rmse(pred[:, 0], target.masked_fill(hole, math.nan))
    np.testing.assert_allclose(each[[0, 1, 2, 4]], got.per_chip()["rmse"], rtol=0)
    assert np.isnan(each[3])

    nothing = filled(pred[:1], torch.full_like(target[:1], math.nan), [[[0]]])
    with pytest.raises(DataError, match="no chip of the evaluation set has a label with a pixel of target"):
        nothing.metrics()


def test_sums_of_whole_labels_keep_their_bits() -> None:
    """As they were before a label could have holes: no mask, no change."""
    pred, target = (x.flatten(1).double() for x in chips(4, seed=3, side=37))
    error, pixels = pred - target, torch.full((4,), 37.0 ** 2, dtype=torch.float64)
    label = halving_sum(target)
    spread = halving_sum((target - (label / pixels)[:, None]).square())
    plain = torch.stack([pixels, halving_sum(error), halving_sum(error.square()), halving_sum(error.abs()), label,
                         spread], 1)
    assert torch.equal(chip_sums(*(x.view(4, 37, 37) for x in (pred, target))), plain)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_diverged_model_gives_not_a_number_and_no_crash() -> None:
    pred, target = chips(3)
    pred[0, 0, 0, 0], pred[1, 0, 0, 0] = math.inf, -math.inf
    got = filled(pred, target, [[[0, 1, 2]]]).metrics()
    assert got["rmse_per_chip"] == math.inf
    assert math.isnan(got["bias"])


def test_reducing_twice_is_refused() -> None:
    table = filled(*chips(2), [[[0, 1]]])
    with pytest.raises(RuntimeError, match="reduced before"):
        table.reduce()


def test_shapes_do_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"target \[B,H,W\], not \[2, 4, 4\]"):
        maps = torch.zeros(2, 4, 4)
        ChipTable(2).update(torch.arange(2), maps, maps, torch.ones(2, dtype=torch.bool))
