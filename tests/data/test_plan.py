"""The plan: pure functions of (seed, epoch, position), the same at any world size."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.base.errors import ConfigError
from engine.config import Augment
from engine.data.biomassters import BIOMASSTERS, TILE, T
from engine.data.plan import (
    Sharding,
    deal,
    dihedral,
    draw,
    evaluation_batches,
    kept_months,
    order,
    rotation,
    training_batches,
)

Step = list[tuple[int, int]]


def steps(n: int, world: int, accumulate: int, micro: int, epoch: int, start: int = 0) -> list[Step]:
    """What all ranks together feed into each optimizer step: sorted (position, chip)."""
    ranks = [list(training_batches(n, 7, epoch, Sharding(micro, accumulate, world, rank), start))
             for rank in range(world)]
    result = []
    for step in range(len(ranks[0]) // accumulate):
        batches = [batch for r in ranks for batch in r[step * accumulate:(step + 1) * accumulate]]
        result.append(sorted((item.position, item.chip) for item in itertools.chain(*batches)))
    return result


@settings(deadline=None, max_examples=30)
@given(st.integers(8, 60), st.integers(0, 5),
       st.sampled_from([(1, 8, 1), (2, 4, 1), (2, 2, 2), (4, 1, 2), (8, 1, 1), (1, 1, 8)]))
def test_global_batches_do_not_depend_on_the_layout(n: int, epoch: int, layout: tuple[int, int, int]) -> None:
    assert steps(n, *layout, epoch) == steps(n, 1, 1, 8, epoch)


@pytest.mark.parametrize("layout", [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_micro_batches_of_one_size_do_not_depend_on_the_ranks(layout: tuple[int, int]) -> None:
    """BatchNorm sees the same chips together, and gradients are of the same groups."""
    world, accumulate = layout
    augment = Augment()
    ranks = [list(training_batches(64, 7, 3, Sharding(2, accumulate, world, rank), augment=augment, months=T))
             for rank in range(world)]
    found = [ranks[j % world][step * accumulate + j // world] for step in range(4) for j in range(8)]
    assert found == list(training_batches(64, 7, 3, Sharding(2, 8, 1, 0), augment=augment, months=T))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 8), st.integers(1, 8), st.randoms(use_true_random=False))
def test_dealing_gives_every_chip_to_one_hand_and_about_equal_sums(hands: int, each: int, random: Random) -> None:
    months = [random.randint(1, 12) for _ in range(hands * each)]
    dealt = deal(months, hands)
    assert sorted(itertools.chain(*dealt)) == list(range(len(months)))
    assert all(len(hand) == each and hand == sorted(hand) for hand in dealt)
    sums = [sum(months[i] for i in hand) for hand in dealt]
    assert max(sums) - min(sums) <= max(months) - min(months)  # of the snake: never more than the largest difference


def test_ranks_wait_less_for_the_one_with_most_months() -> None:
    """Slowest over mean, over 200 steps of the recipe's plan: what dealing is for."""
    def waits(micro: int, dealt: bool) -> float:
        ratios = []
        for step in range(200):
            kept = [kept_months(Augment(), T, 0, 1, 8 * micro * step + k) for k in range(8 * micro)]
            hands = deal(kept, 8) if dealt else np.arange(8 * micro).reshape(8, micro).tolist()
            sums = [sum(kept[i] for i in hand) for hand in hands]
            ratios.append(max(sums) / np.mean(sums))
        return float(np.mean(ratios))

    assert waits(16, False) > 1.08 and waits(16, True) < 1.012
    assert waits(2, False) > 1.16 and waits(2, True) < 1.12


def test_an_epoch_is_a_permutation_cut_into_batches() -> None:
    seen = [chip for step in steps(50, 2, 1, 3, 4) for _, chip in step]
    assert len(seen) == 48 and len(set(seen)) == 48
    assert sorted(order(50, 7, 4)) == list(range(50))
    assert not np.array_equal(order(50, 7, 4), order(50, 7, 5))
    assert not np.array_equal(order(50, 7, 4), order(50, 8, 4))


def test_resume_goes_on_where_the_epoch_stood() -> None:
    assert steps(40, 2, 2, 2, 1, start=3) == steps(40, 2, 2, 2, 1)[3:]


def test_a_batch_larger_than_the_data_is_refused_with_the_keys_to_change() -> None:
    with pytest.raises(ConfigError, match=r"16 chips but only 9 train; lower train.global_batch"):
        list(training_batches(9, 0, 0, Sharding(8, 2)))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5))
def test_evaluation_sees_every_chip_once_and_pads_with_invalid_ones(n: int, world: int, micro: int) -> None:
    ranks = [list(evaluation_batches(n, Sharding(micro, 1, world, rank))) for rank in range(world)]
    assert len({len(r) for r in ranks}) == 1, "ranks must take equally many batches"
    items = [item for r in ranks for batch in r for item in batch]
    assert all(len(batch) == micro for r in ranks for batch in r)
    assert sorted(item.chip for item in items if item.valid) == list(range(n))
    assert len(items) - n < world * micro


def test_draws_are_a_function_of_their_counter_alone() -> None:
    a, b = draw(BIOMASSTERS, Augment(), 3, 2, 9), draw(BIOMASSTERS, Augment(), 3, 2, 9)
    assert np.array_equal(a.matrix, b.matrix) and np.array_equal(a.keep, b.keep)
    others = [draw(BIOMASSTERS, Augment(rotate=1), *key).matrix for key in ((4, 2, 9), (3, 3, 9), (3, 2, 8))]
    assert all(not np.array_equal(draw(BIOMASSTERS, Augment(rotate=1), 3, 2, 9).matrix, other) for other in others)


def test_one_option_leaves_the_others_draws_alone() -> None:
    for position in range(50):
        with_rotation, without = (draw(BIOMASSTERS, Augment(rotate=p), 0, 0, position) for p in (1.0, 0.0))
        assert np.array_equal(with_rotation.keep, without.keep)


def test_rates_are_the_recipe_s() -> None:
    augment = Augment(months_step=1)
    draws = [draw(BIOMASSTERS, augment, 0, epoch, position) for epoch in range(4) for position in range(1000)]
    n = len(draws)
    whole = np.mean([d.keep.all() for d in draws])
    assert abs(whole - (0.5 + 0.5 * 0.7**12)) < 4 * np.sqrt(0.25 / n)
    assert abs(np.mean([d.keep.mean() for d in draws]) - 0.85) < 0.01
    assert all(d.keep.any() for d in draws)
    turned = np.mean([not np.isin(np.abs(d.matrix[:2, :2]), (0, 1)).all() for d in draws])
    assert abs(turned - 0.7) < 4 * np.sqrt(0.21 / n)
    flipped = np.mean([np.linalg.det(d.matrix[:2, :2]) < 0 for d in draws])
    assert abs(flipped - 0.5) < 4 * np.sqrt(0.25 / n)


def test_kept_months_come_in_few_numbers_at_the_same_rate() -> None:
    keep = np.array([draw(BIOMASSTERS, Augment(), 0, epoch, p).keep for epoch in range(5) for p in range(1600)])
    batches = keep.reshape(-1, 8 * T).sum(1)
    assert np.mean(np.isin(batches, (60, 72, 84, 96))) > 0.99
    assert abs(keep.mean() - 0.85) < 0.01 and np.abs(keep.mean(0) - 0.85).max() < 0.02
    assert keep.any(1).all()
    assert np.mean(keep.all(1)) > 0.5, "chips that were not to lose months keep them all"


def test_never_all_months_are_dropped() -> None:
    augment = Augment(month_dropout=1, drop_month=1, months_step=1)
    keeps = np.array([draw(BIOMASSTERS, augment, 0, 0, p).keep for p in range(400)])
    assert (keeps.sum(1) == 1).all()
    assert (keeps.sum(0) > 10).all(), "each month is sometimes the one that stays"


def test_angles_and_centres_cover_their_range() -> None:
    augment = Augment(hflip=0, rot90=False, rotate=1)
    matrices = np.array([draw(BIOMASSTERS, augment, 0, 0, p).matrix for p in range(2000)], np.float64)
    angles = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert angles.min() < -44 and angles.max() > 44 and np.abs(angles).max() <= 45
    # the fixed point of the rotation is its centre
    centres = np.array([np.linalg.solve(np.eye(2) - m[:2, :2], m[:2, 2]) for m in matrices if abs(m[1, 0]) > 0.1])
    assert np.abs(centres / TILE - 0.5).max() < 0.101 and np.abs(centres / TILE - 0.5).max() > 0.09


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_flips_and_turns_are_those_of_numpy(flip: bool, turns: int) -> None:
    image = np.random.default_rng(0).integers(0, 1000, (TILE, TILE))
    matrix = dihedral(TILE, flip, turns, np.eye(3))
    y, x = np.mgrid[:TILE, :TILE] + 0.5
    source = np.einsum("ij,jyx->iyx", matrix.astype(np.float64), np.stack([x, y, np.ones_like(x)]))
    column, row = (np.floor(source[i]).astype(int) for i in (0, 1))
    expected = np.rot90(image[:, ::-1] if flip else image, turns)
    assert np.array_equal(image[row, column], expected)


def test_rotation_by_a_right_angle_is_a_turn() -> None:
    centre = np.array([TILE / 2, TILE / 2])
    turn = rotation(-np.pi / 2, centre)
    assert np.allclose(dihedral(TILE, False, 1, np.eye(3)), turn, atol=1e-4) or np.allclose(
        dihedral(TILE, False, 3, np.eye(3)), turn, atol=1e-4)
    assert len(draw(BIOMASSTERS, Augment(), 0, 0, 0).keep) == T
