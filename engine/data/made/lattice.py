"""Randomness that knows no border: every value is a pure function of a key and a place on the plane, so that any part
of a landscape can be drawn by itself and fits its neighbours.

Values at whole places are hashes of (key, row, column); smooth fields are sums of octaves of such values, interpolated
by cubic B-splines.  A block is BLOCK × BLOCK pixels, and block (i, j) begins at pixel (i · BLOCK, j · BLOCK).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from engine.data.made.forest import generator

BLOCK = 256
ENTRIES = 1 << 16  # of a table
_ROW, _COLUMN = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03)  # odd, their bits half ones


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014, OOPSLA): every bit of `x`, uint64, decides about all others."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=4096)
def _key(key: tuple[int, ...]) -> np.ndarray:
    return np.random.SeedSequence(key).generate_state(1, np.uint64)


def hashed(key: tuple[int, ...], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Uniform uint64 [rows, columns] of the places where whole `rows` and `columns`, both 1-d, cross."""
    down = _mix(_key(key) + rows.astype(np.int64).view(np.uint64) * _ROW)
    return _mix(down[:, None] + columns.astype(np.int64).view(np.uint64) * _COLUMN)


def uniform(key: tuple[int, ...], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """0 … 1 without 1, [rows, columns] float32."""
    return (hashed(key, rows, columns) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def table(draw: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:
    """A distribution as its ENTRIES quantiles, ascending float32: `drawn` looks them up."""
    return np.sort(draw(generator(0)).astype(np.float32))


def drawn(quantiles: np.ndarray, key: tuple[int, ...], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Values of a distribution given by its `table`, [rows, columns] float32."""
    return quantiles[hashed(key, rows, columns) >> np.uint64(48)]


@lru_cache(maxsize=1)
def normal() -> np.ndarray:
    """The table of the standard normal distribution."""
    values = table(lambda rng: rng.standard_normal(ENTRIES))
    return (values - values.mean()) / values.std()


@lru_cache(maxsize=256)
def _spline(spacing: int, phase: int) -> np.ndarray:
    """[BLOCK, n] float32: what n points of a lattice are worth in each pixel, the first of which lies `phase` pixels
    behind a point.  Of unit length: a field has the same variance everywhere, on the points and between."""
    steps = (np.arange(BLOCK) + phase) / spacing
    t = steps % 1
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], 1)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    first = np.floor(steps).astype(int)
    matrix = np.zeros((BLOCK, int(first[-1]) + 4), np.float32)
    for neighbour in range(4):
        matrix[np.arange(BLOCK), first + neighbour] = weights[:, neighbour]
    return matrix


def field(key: tuple[int, ...], slope: float, longest: int, shortest: int, block: tuple[int, int]) -> np.ndarray:
    """A Gaussian field in a block, mean 0, variance 1, power ∝ frequency^(−slope), [BLOCK, BLOCK] float32.

    Its octaves are lattices of `longest` to `shortest` pixels between points, powers of 2: waves of about 4 times that.
    At 1 every pixel is by itself.
    """
    octaves = [1 << power for power in range(shortest.bit_length() - 1, longest.bit_length())]
    variances = [float(spacing) ** (slope - 2) for spacing in octaves]
    total = np.zeros((BLOCK, BLOCK), np.float32)
    for spacing, variance in zip(octaves, variances):
        own = (*key, spacing)
        # Lattices begin anywhere, so that their points do not meet on the blocks' borders
        top, left = (at * BLOCK + int(offset) % spacing for at, offset in zip(block, _key(own).view(np.uint32)))
        spread = np.float32(math.sqrt(variance / sum(variances)))
        if spacing == 1:
            total += spread * drawn(normal(), own, np.arange(top, top + BLOCK), np.arange(left, left + BLOCK))
            continue
        down, right = _spline(spacing, top % spacing), _spline(spacing, left % spacing)
        points = drawn(normal(), own, top // spacing - 1 + np.arange(down.shape[1]),
                       left // spacing - 1 + np.arange(right.shape[1]))
        total += spread * (down @ points @ right.T)
    return total
