"""Made-up data for any description: smooth fields that a model can learn, behind `prepare.py sample --dataset`.

Where BioMassters has a forest of its own (`engine.data.made.forest`), other data sets get the plainest thing that has
all that a description can say: a smooth target, bands that rise or fall with it, each in its own way and season, noise,
images that are missing, nodata in images and target, and static images that know a little of the target.  Every chip is
a pure function of (seed, chip number).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from engine.base.errors import ConfigError, DataError
from engine.base.files import write_text
from engine.base.texts import read_json
from engine.data.dataset import FILE, LABEL_DTYPE, Dataset, Sensor, Target
from engine.data.made.forest import field, generator
from engine.data.made.sample import FIRST_TEST, NOTE, bring, chip_id

MISSING = 0.15  # of the images
NODATA = 0.2  # of the images have a rectangle of it, of sensors that know it; all labels, of a target that does
NOISE = 0.04  # of a band's range
TOP = 30.0  # of the target, where the description does not say from where on it is ignored


def make_fields(out: Path | str, dataset: Dataset, chips: int, seed: int, test_chips: int = 0,
                progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Write `chips` training and `test_chips` test chips of `dataset` under `out`, its description and `sample.json`,
    whose content is returned: `rmse_of_mean`, what answering the mean everywhere gives, mean over training chips.

    A folder that holds a smaller set of the same seed and description is completed.  Raises ConfigError for impossible
    counts and DataError for a folder that holds anything else or cannot be written.
    """
    out = Path(out)
    if chips < 1 or test_chips < 0 or seed < 0:
        raise ConfigError(f"chips {chips}, test chips {test_chips}, seed {seed}: chips must be at least 1, the others "
                          f"at least 0")
    key = zlib.crc32(json.dumps(dataset.dump(), sort_keys=True).encode())
    note: dict[str, Any] = {"dataset": dataset.name, "description": key, "seed": seed}
    _claim(out, note, chips, test_chips)
    folders = dataset.folders
    jobs = [(n, folders.train, folders.target) for n in range(chips)]
    jobs += [(FIRST_TEST + n, folders.test, folders.test_target) for n in range(test_chips)]
    write_text(out / FILE, yaml.safe_dump(dataset.dump(), sort_keys=False, allow_unicode=True))

    def make(job: tuple[int, str, str]) -> np.ndarray:
        number, images, target = job
        chip = chip_id(seed, number)
        made = dict(draw(dataset, seed, number, chip))
        label = made.pop(dataset.label_name(chip))
        for name, image in made.items():
            bring(out / images / name, image)
        bring(out / target / dataset.label_name(chip), label)
        exact = label.astype(LABEL_DTYPE)
        dataset.target.hide_nodata(exact)
        return exact.astype(np.float64)

    labels: list[np.ndarray] = []
    with ThreadPoolExecutor(2) as pool:
        for done, label in enumerate(pool.map(make, jobs), 1):
            labels += [label] if done <= chips else []
            if progress is not None:
                progress(done, len(jobs))
    mean = float(np.nanmean(labels))
    note |= {"chips": chips, "test_chips": test_chips, "label_mean": mean,
             "rmse_of_mean": float(np.mean([np.sqrt(np.nanmean((label - mean) ** 2)) for label in labels]))}
    write_text(out / NOTE, json.dumps(note, indent=2) + "\n")
    return note


def draw(dataset: Dataset, seed: int, number: int, chip: str) -> Iterator[tuple[str, np.ndarray]]:
    """File names of a chip and their images [tile, tile, bands], and its label [tile, tile]."""
    there = share(field(generator(seed, number, 0), 3.0, dataset.tile))
    for index, sensor in enumerate(dataset.sensors):
        steps = 1 if sensor.static else dataset.months
        seen = generator(seed, number, 1, index).random(steps) >= MISSING
        seen[-1] |= not seen.any()
        for step in range(steps):
            if seen[step] or sensor.static:
                rng = generator(seed, number, 2, index, step)
                made = image(dataset, sensor, there, step, rng, _own(rng, dataset.tile))
                if sensor.nodata is not None and rng.random() < NODATA:
                    _hole(made, sensor.nodata, rng)
                yield dataset.feature_name(chip, index, step), made
    label, nodata = top(dataset.target) * there, dataset.target.nodata
    fitted = fit(label.astype(LABEL_DTYPE), np.dtype(dataset.target.dtype))
    if nodata is not None:
        fitted[fitted == nodata] = nodata + (1 if nodata <= 0 else -1)  # there is a target
        _hole(fitted, nodata, generator(seed, number, 3))
    yield dataset.label_name(chip), fitted


def _own(rng: np.random.Generator, tile: int) -> Callable[[int], np.ndarray]:
    """Fields of a chip's own."""
    return lambda _: field(rng, 3.0, tile)


def share(smooth: np.ndarray) -> np.ndarray:
    """Of the target's top, 0 … 1, by a Gaussian field."""
    return 1 / (1 + np.exp(-1.5 * smooth))


def top(target: Target) -> float:
    return 0.75 * target.ignore_above if target.ignore_above is not None else TOP


def image(dataset: Dataset, sensor: Sensor, share: np.ndarray, step: int, rng: np.random.Generator,
          smooth: Callable[[int], np.ndarray]) -> np.ndarray:
    """What `sensor` sees where the target is `share` [H, W] of its top: [H, W, bands] of its dtype, none of it nodata.

    `smooth` gives a Gaussian field [H, W] for a band: of what static images show, but for the target.
    """
    season = np.cos(2 * np.pi * step / dataset.months)
    image = np.empty((*share.shape, len(sensor.bands)), np.float32)
    for band, name in enumerate(sensor.bands):
        # How a band answers is its own, in all chips
        own = generator(zlib.crc32(f"{sensor.name} {name}".encode()))
        rate, falls, swing = own.uniform(0.5, 3.0), own.random() < 0.5, own.uniform(0.0, 0.15)
        seen = (1 - np.exp(-rate * share)) / (1 - np.exp(-rate))
        if sensor.static:
            seen = 0.4 * seen + 0.6 / (1 + np.exp(-smooth(band)))
        value = 0.15 + 0.6 * (1 - seen if falls else seen) + (0 if sensor.static else swing * season)
        value = value + NOISE * rng.standard_normal(share.shape, dtype=np.float32)
        image[..., band] = sensor.low[band] + value * sensor.span[band]
    fitted = fit(image, sensor.values)
    if sensor.nodata is not None:
        fitted[fitted == sensor.nodata] = sensor.low[0]  # nothing that was seen is nodata
    return fitted


def _hole(image: np.ndarray, nodata: float, rng: np.random.Generator) -> None:
    """A rectangle of nodata, in place."""
    tile = len(image)
    top, left = rng.integers(0, tile // 2, 2)
    image[top:top + tile // 4, left:left + tile // 3] = nodata


def fit(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    if dtype.kind == "f":
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values), limits.min, limits.max).astype(dtype)


def _claim(out: Path, note: dict[str, Any], chips: int, test_chips: int) -> None:
    """Mark `out` as a sample in the making, or refuse a folder that holds something else."""
    path = out / NOTE
    if path.is_file():
        try:
            found = read_json(path)
            same = all(found[key] == value for key, value in note.items())
            same &= found.get("chips", 0) <= chips and found.get("test_chips", 0) <= test_chips
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise DataError(f"{path}: cannot be read ({error!r}); remove {out} or choose another folder") from None
        if not same:
            raise DataError(f"{out}: holds another or a larger sample; remove it or choose another folder")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is not empty and no sample; choose another folder")
    write_text(path, json.dumps(note) + "\n")
