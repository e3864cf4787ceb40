"""Made-up boreal forest as the two satellites see it: the forward model behind `launch/prepare.py sample`.

`engine.data.made.sample` writes what this module draws.  A stand is a pure function of (seed, chip number), and
every file of a chip has a random stream of its own, so no file depends on which others are made.

What is drawn, and on what ground:

- Biomass.  Stands of about 2.5 ha (cells of a jittered lattice with wavy borders) whose biomass is gamma
  distributed, times the fertility of the chip, a smooth fertility field and a rough texture (power-law random
  fields), with lakes and open land of biomass 0.  Tuned to the challenge's labels: mean 63 t/ha, 99.9th
  percentile 426.
- Sentinel-1: the water cloud model (Attema & Ulaby 1978, Radio Sci. 13:357), in the form used for boreal
  growing stock (Santoro et al. 2011, Remote Sens. Environ. 115:490): power = ground·e^(−βB) +
  canopy·(1 − e^(−βB)), which saturates.  Ground and canopy per month are the means of the real chip 0060c0a5
  over its pixels with 0 and with 100–200 t/ha: frozen ground is darker in VH.  Soil moisture varies in space
  and per pass; speckle is gamma noise (Goodman 1976, J. Opt. Soc. Am. 66:1145).
- Sentinel-2: linear mixing of ground, conifers, broadleaves and water (Settle & Drake 1993, Int. J. Remote
  Sens. 14:1159) with canopy cover 1 − e^(−κB) and a canopy that its own shadows darken as it grows (Li &
  Strahler 1985, IEEE TGRS 23:705).  Ground and conifer spectra are means of the same real chip (0 and
  200–300 t/ha; June green, April brown, February snow); the broadleaf and water spectra are plausible values.
  Understory makes stands brighter or darker without a change in biomass.
- Seasons: greenness and snow per month; snow lasts longer in chips that lie further north.
- Clouds brighten all bands and raise CLP; now and then CLP is noise, 255.
- Label = B·e^(σn − σ²/2) with n normal per pixel, which no band sees, and rare outliers from a truncated
  Pareto distribution.  So E[label | stand] and its variance are known: `label_moments`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from engine.data.biomassters import S1, S2, TILE


@dataclass(frozen=True)
class Parameters:
    """Numbers of the forward model; written into sample.json."""

    forest_biomass: float = 76.0  # t/ha, mean of forest before the fields
    stand_shape: float = 3.0  # of the gamma distribution of stands
    chip_spread: float = 0.25  # log standard deviation of fertility between chips
    fertility_spread: float = 0.15  # of the smooth field
    texture_spread: float = 0.15  # of the rough field
    water_share: float = 0.08  # mean over chips
    open_share: float = 0.13
    s1_beta: float = 0.01  # ha/t
    s1_looks: float = 20.0  # equivalent looks; 5 × 5 windows of the real chip: median 22–37
    s1_moisture: float = 0.6  # dB
    s2_kappa: float = 1 / 60  # ha/t; the real chip's B11 in June falls with 1/45–1/60
    s2_shadow: float = 0.3  # of the canopy's brightness
    s2_shadow_biomass: float = 200.0  # t/ha
    s2_understory: float = 0.05  # log standard deviation between stands
    s2_noise: float = 0.03  # relative, per pixel and band
    clp_noise: float = 0.02  # share of files with a swath of 255; unknown, chosen
    label_noise: float = 0.15  # σ
    outlier_rate: float = 2e-5  # per pixel
    outlier_low: float = 426.0  # t/ha, the real 99.9th percentile
    outlier_high: float = 12900.0  # t/ha, the real maximum


P = Parameters()

# Per month, September first.  dB, means of chip 0060c0a5, ascending: [VV, VH] × [12].
S1_GROUND = np.array([[-12.2, -11.6, -11.5, -13.5, -12.7, -12.4, -14.8, -12.1, -11.8, -12.6, -13.0, -12.2],
                      [-18.4, -17.8, -17.7, -20.7, -20.4, -21.1, -22.5, -19.2, -18.5, -19.0, -19.2, -18.5]])
S1_CANOPY = np.array([[-9.8, -9.7, -10.1, -10.9, -10.5, -10.9, -10.7, -10.2, -9.5, -9.1, -9.5, -9.7],
                      [-15.4, -15.2, -15.7, -16.8, -16.9, -18.0, -16.5, -15.6, -15.0, -14.7, -14.9, -15.2]])
S1_CALIBRATION = 0.2  # dB, standard deviation between passes
S1_WATER, S1_ICE = np.array([-19.0, -27.0]), np.array([-15.0, -24.0])  # plausible values
GREEN = np.array([0.7, 0.35, 0.1, 0.0, 0.0, 0.0, 0.0, 0.05, 0.6, 1.0, 1.0, 0.95])
SNOW = np.array([0.0, 0.02, 0.2, 0.6, 0.85, 0.95, 0.8, 0.15, 0.0, 0.0, 0.0, 0.0])
CLOUDY = np.array([0.1, 0.2, 0.4, 0.6, 0.3, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05, 0.15])  # of images; chosen
CLOUDED = 0.05, 0.7  # of such an image
# Spectra in units of 1e-4 reflectance: [brown, green, snow-covered] × [B2 … B12].
GROUND = np.array([[661, 853, 1159, 1404, 1682, 1843, 2111, 2093, 2708, 2059],
                   [468, 736, 576, 1139, 2812, 3362, 3566, 3576, 1922, 1156],
                   [6888, 6022, 6253, 6450, 6397, 6198, 6647, 6038, 537, 580]], np.float32)
CONIFER = np.array([[163, 246, 224, 492, 1093, 1285, 1476, 1445, 892, 517],
                    [205, 317, 191, 511, 1663, 2025, 2141, 2180, 967, 457],
                    [1402, 1192, 1297, 1635, 2129, 2277, 2475, 2400, 279, 252]], np.float32)
BROADLEAF = np.array([[300, 400, 480, 750, 1100, 1250, 1420, 1450, 1500, 900],
                      [230, 420, 220, 680, 2300, 2850, 3050, 3100, 1250, 550],
                      [2200, 1900, 2000, 2300, 2800, 2900, 3100, 2950, 350, 320]], np.float32)
WATER = np.array([[260, 230, 150, 130, 110, 110, 100, 100, 60, 40],
                  [260, 230, 150, 130, 110, 110, 100, 100, 60, 40], GROUND[2].tolist()], np.float32)
CLOUD = np.array([7200, 6900, 6800, 6900, 6900, 6900, 7000, 6700, 3600, 2700], np.float32)


class Stand(NamedTuple):
    """The state of a place that decides what the bands show; all maps are [H, W] float32."""

    biomass: np.ndarray  # t/ha: the mean of the label
    water: np.ndarray  # 0 or 1
    conifer: np.ndarray  # share of conifers in the canopy, 0 … 1
    understory: np.ndarray  # factor on the reflectance
    moisture: np.ndarray  # standard normal field
    north: float  # 0 … 1


def generator(*key: int) -> np.random.Generator:
    """The counter-based random stream of a key: non-negative integers, the seed first."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@lru_cache(maxsize=8)
def _spectrum(slope: float, side: int) -> np.ndarray:
    """Amplitudes ∝ frequency^(−slope/2) that give a field of variance 1: [side, side // 2 + 1]."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf  # no mean
    amplitude = frequency ** (-slope / 2)
    twice = np.full(side // 2 + 1, 2.0)  # the half of the plane that rfft leaves out
    twice[[0, -1]] = 1.0
    return (amplitude * side / math.sqrt((amplitude**2 * twice).sum())).astype(np.float32)


def field(rng: np.random.Generator, slope: float, side: int = TILE) -> np.ndarray:
    """A periodic Gaussian field, mean 0, variance 1, power ∝ frequency^(−slope): [side, side] float32."""
    white = rng.standard_normal((side, side), dtype=np.float32)
    return np.fft.irfft2(np.fft.rfft2(white) * _spectrum(slope, side)).astype(np.float32)


def _stands(rng: np.random.Generator, cells: int = 16) -> np.ndarray:
    """The number of each pixel's stand, [TILE, TILE] below cells²: Voronoi cells of a jittered lattice."""
    size = TILE / cells
    centres = rng.random((cells, cells, 2), dtype=np.float32)
    rows, columns = np.mgrid[0:TILE, 0:TILE].astype(np.float32)
    rows, columns = (axis / size + 0.35 * field(rng, 3.0) for axis in (rows, columns))
    return nearest(rows, columns, centres.reshape(-1, 2), lambda i, j: (i % cells) * cells + j % cells)


def nearest(rows: np.ndarray, columns: np.ndarray, centres: np.ndarray,
            number: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """The number of the cell whose centre is nearest, [H, W] int64, for places in units of cells.

    `centres[number(i, j)]` is where in cell (i, j), 0 … 1 down and right, its centre lies.
    """
    row, column = np.floor(rows).astype(np.int64), np.floor(columns).astype(np.int64)
    least, found = np.full(rows.shape, np.inf, np.float32), np.zeros(rows.shape, np.int64)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            i, j = row + down, column + right
            one = number(i, j)
            y, x = centres[one].transpose(2, 0, 1)
            distance = (i + y - rows) ** 2 + (j + x - columns) ** 2
            found = np.where(distance < least, one, found)
            least = np.minimum(distance, least)
    return found


def draw_stand(seed: int, number: int) -> Stand:
    """The stand of chip `number`."""
    rng = generator(seed, number, 0)
    stand = _stands(rng)
    count = int(stand.max()) + 1
    fertility = P.forest_biomass * math.exp(P.chip_spread * rng.standard_normal() - P.chip_spread**2 / 2)
    age = rng.gamma(P.stand_shape, 1 / P.stand_shape, count)
    age[rng.random(count) < rng.beta(2, 2 / P.open_share - 2)] = 0.0
    smooth = P.fertility_spread * field(rng, 3.5)
    rough = P.texture_spread * field(rng, 1.5)
    land = field(rng, 3.5) > quantile(rng.beta(1, 1 / P.water_share - 1))
    biomass = fertility * age[stand] * np.exp(smooth + rough) * land
    # Broadleaves gather in some stands.
    conifer = rng.beta(2.0, 0.8, count)[stand]
    understory = np.exp(P.s2_understory * rng.standard_normal(count))[stand]
    moisture, north = field(rng, 2.0), float(rng.random())
    return Stand(biomass.astype(np.float32), (~land).astype(np.float32), conifer.astype(np.float32),
                 understory.astype(np.float32), moisture, north)


_PHI_X = np.linspace(-8, 8, 4097)
_PHI = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in _PHI_X])


def _phi(x: np.ndarray) -> np.ndarray:
    """The standard normal distribution function, to 1e-6."""
    return np.interp(x, _PHI_X, _PHI)


def quantile(probability: float) -> float:
    return float(np.interp(probability, _PHI, _PHI_X))


def draw_label(seed: int, number: int, stand: Stand) -> np.ndarray:
    """The label of the stand, t/ha, [TILE, TILE] float32."""
    return measured(generator(seed, number, 1), stand.biomass)


def measured(rng: np.random.Generator, biomass: np.ndarray) -> np.ndarray:
    """A label of this mean biomass, t/ha, float32."""
    noise = rng.standard_normal(biomass.shape)
    label = biomass * np.exp(P.label_noise * noise - P.label_noise**2 / 2)
    outlier = rng.random(biomass.shape) < P.outlier_rate
    u = rng.random(int(outlier.sum()))
    label[outlier] = P.outlier_low / np.sqrt(1 - u * (1 - (P.outlier_low / P.outlier_high) ** 2))
    return label.astype(np.float32)


def label_moments(biomass: np.ndarray, below: float = math.inf) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probability of label < `below` (t/ha) given the stand, and mean and variance of such labels.

    The mean is what the best predictor answers, the variance its squared error.  `below` is either infinite
    or at most `outlier_low`.  Moments of truncated lognormal and Pareto (power 2) distributions.
    """
    sigma = P.label_noise
    level = np.log(np.maximum(biomass, 1e-12)) - sigma**2 / 2
    edge = (math.log(below) - level) / sigma
    chance, first, second = _phi(edge), _phi(edge - sigma), _phi(edge - 2 * sigma)
    raw1, raw2 = biomass * first, biomass**2 * math.exp(sigma**2) * second
    ordinary = 1 - P.outlier_rate
    chance, raw1, raw2 = ordinary * chance, ordinary * raw1, ordinary * raw2
    if below > P.outlier_low:
        low, high = P.outlier_low, P.outlier_high
        scale = P.outlier_rate * 2 / (1 - (low / high) ** 2)
        chance = chance + P.outlier_rate
        raw1, raw2 = raw1 + scale * low * (1 - low / high), raw2 + scale * low**2 * math.log(high / low)
    mean = raw1 / np.maximum(chance, 1e-12)
    return chance, mean, np.maximum(raw2 / np.maximum(chance, 1e-12) - mean**2, 0.0)


def expected_s1(stand: Stand, month: int, moisture: float = 0.0) -> np.ndarray:
    """Mean backscatter as power, [H, W, 2] (VV, VH) float32; `moisture` in dB shifts all ground."""
    ground_db = P.s1_moisture * stand.moisture[..., None] + moisture + S1_GROUND[:, month]
    open_share = np.exp(-P.s1_beta * stand.biomass)[..., None]
    power = _power(ground_db) * open_share + _power(S1_CANOPY[:, month]) * (1 - open_share)
    water = _power(S1_ICE if snow(stand.north)[month] > 0.5 else S1_WATER)
    return np.where(stand.water[..., None] > 0, water, power).astype(np.float32)


def _power(decibel: np.ndarray | float) -> np.ndarray:
    return np.exp(np.float32(math.log(10) / 10) * np.asarray(decibel, np.float32))


def snow(north: float) -> np.ndarray:
    """Share of ground under snow per month, [12]."""
    return SNOW ** (2 ** (1 - 2 * north))


def mixing(stand: Stand) -> np.ndarray:
    """Shares of ground, conifer, broadleaf and water, [H, W, 4] float32; the rest is shadow."""
    cover = 1 - np.exp(-P.s2_kappa * stand.biomass)
    lit = cover * (1 - P.s2_shadow * (1 - np.exp(-stand.biomass / P.s2_shadow_biomass)))
    shares = ((1 - stand.water) * (1 - cover), lit * stand.conifer, lit * (1 - stand.conifer), stand.water)
    return np.stack(shares, -1)


def endmembers(north: float, month: int) -> np.ndarray:
    """Spectra of ground, conifer, broadleaf and water in a month, [4, 10] float32, 1e-4 reflectance."""
    white = snow(north)[month]
    green = GREEN[month] ** (2 ** (2 * north - 1))
    season = np.array([(1 - white) * (1 - green), (1 - white) * green, white], np.float32)
    return np.stack([season @ spectra for spectra in (GROUND, CONIFER, BROADLEAF, WATER)])


def draw_s1(seed: int, number: int, month: int, stand: Stand) -> np.ndarray:
    """A month of Sentinel-1 with both orbits, dB, [TILE, TILE, 4] float32."""
    rng = generator(seed, number, 2, month)
    passes = [one_pass(rng, month, stand, rng.normal(0, P.s1_moisture), rng.normal(0, S1_CALIBRATION))
              for _ in ("ascending", "descending")]
    return np.concatenate(passes, -1).astype(S1.values)


def one_pass(rng: np.random.Generator, month: int, stand: Stand, moisture: float, calibration: float) -> np.ndarray:
    """What one orbit sees, dB, [H, W, 2] (VV, VH) float32; `moisture` of all ground and `calibration` in dB."""
    power = expected_s1(stand, month, moisture) * _power(calibration)
    speckle = rng.standard_gamma(P.s1_looks, power.shape, dtype=np.float32) / np.float32(P.s1_looks)
    return 10 * np.log10(power * speckle)


def draw_s2(seed: int, number: int, month: int, stand: Stand, shares: np.ndarray) -> np.ndarray:
    """A month of Sentinel-2, [TILE, TILE, 11] uint16; `shares` is `mixing(stand)`, alike for all months."""
    rng = generator(seed, number, 3, month)
    image = reflected(rng, month, stand, shares, daylight(rng))
    if rng.random() < CLOUDY[month]:
        share = rng.uniform(*CLOUDED)
        cover(image, field(rng, 3.0), share)
    if rng.random() < P.clp_noise:
        top, bottom = np.sort(rng.integers(0, TILE + 1, 2))
        image[top:bottom, :, -1] = 255
    return counts(image)


def daylight(rng: np.random.Generator) -> float:
    """The factor of a whole image."""
    return math.exp(0.04 * rng.standard_normal())


def reflected(rng: np.random.Generator, month: int, stand: Stand, shares: np.ndarray, light: float) -> np.ndarray:
    """A cloudless month of Sentinel-2, [H, W, 11] float32, not yet rounded."""
    image = np.empty((*stand.biomass.shape, len(S2.bands)), np.float32)
    bands, clp = image[..., :-1], image[..., -1]
    bands[...] = rng.standard_normal(bands.shape, dtype=np.float32)
    bands *= np.float32(P.s2_noise)
    bands += 1
    bands *= shares @ endmembers(stand.north, month)
    bands *= (light * stand.understory)[..., None]
    clp[...] = rng.integers(0, 6, clp.shape, np.uint8)
    return image


def cover(image: np.ndarray, clouds: np.ndarray, share: float) -> None:
    """Draw clouds into `image`: the highest `share` of a standard normal field [H, W], denser the higher."""
    opacity = np.clip((clouds - quantile(1 - share)) / 1.5, 0, 1)
    bands = image[..., :-1]
    bands += opacity[..., None] * (CLOUD - bands)
    image[..., -1] += 95 * np.sqrt(opacity)


def counts(image: np.ndarray) -> np.ndarray:
    """`image`, which is overwritten, in whole numbers within the sensor's range: [H, W, 11] uint16."""
    return np.clip(np.rint(image, out=image), 0, np.array(S2.high, np.float32), out=image).astype(S2.values)
