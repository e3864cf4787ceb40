"""A made-up data set in the exact layout of the challenge, behind `launch/prepare.py sample`.

The demo trains on it and tests read it.  Forest and satellites are those of `engine.data.made.forest`; this module
decides which images exist, and writes the TIFF tree, the two metadata CSVs with true sizes and checksums, links to them
by the names that other libraries want, and `sample.json`: seed, version, parameters, and what the best predictor
reaches.

Every chip is a pure function of (seed, chip number): more chips extend a set, in any order and on any number of
threads.  The bytes repeat on one machine with one numpy (elsewhere the last bits of floats may differ).  Chips
are made anew when a run is repeated and only what differs from the disk is written, so an interrupted or damaged
set completes.

Which Sentinel-2 months exist is drawn from the patterns of the challenge's own metadata (features_metadata.csv,
8,689 training and 2,773 test chips, of which these six and four patterns are all).  The metadata does not tell
which Sentinel-1 orbits are blank; those rates are chosen.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.base.errors import ConfigError, DataError
from engine.base.texts import read_json
from engine.data.biomassters import AGBM_IGNORE_ABOVE, BIOMASSTERS, MONTHS, S1_NODATA, SENSORS, T
from engine.data.made import forest
from engine.data.metadata import FEATURE_CSVS_ELSEWHERE, same_content
from engine.data.tiff.checksum import posix_cksum
from engine.data.tiff.tiff import encode, write_bytes

VERSION = 1  # of what is drawn; raise it with every change of the bytes
NOTE = "sample.json"
FEATURES_CSV = "features_metadata.csv"

# How many chips have which months of Sentinel-2, September first.
S2_PATTERNS = {
    "train": {"111011111111": 3991, "000000111111": 1311, "111111111111": 1251, "111001111111": 879,
              "110001111111": 739, "000000011111": 518},
    "test": {"111011111111": 1577, "111111111111": 539, "111001111111": 344, "110001111111": 313},
}  # fmt: skip
S1_ORBIT_NEVER = 0.04  # share of chips that lack one orbit in all months
S1_ORBIT_MISSING = 0.10  # share of months that lack one orbit in other chips; never both

FEATURE_COLUMNS = ("filename", "chip_id", "satellite", "split", "month", "size", "cksum", "s3path_us",
                   "s3path_eu", "s3path_as", "corresponding_agbm")  # fmt: skip
LABEL_COLUMNS = ("filename", "chip_id", "size", "cksum", "s3path_us", "s3path_eu", "s3path_as")
FIRST_TEST = 1 << 31  # chip number of the first test chip, so that more training chips do not move it


class Plan(NamedTuple):
    """What exists of one chip."""

    s2: np.ndarray  # [T] bool: the month has a Sentinel-2 file
    s1: np.ndarray  # [T, 2] bool: the month has the ascending, the descending orbit


class Made(NamedTuple):
    """One chip on disk: its CSV rows, and what the scores need of its label."""

    features: list[dict[str, Any]]
    label: dict[str, Any] | None  # of a training chip
    scores: dict[str, np.ndarray]  # per way of counting: pixels, sum, sum of squares, the best squared error


def chip_id(seed: int, number: int) -> str:
    """8 hex characters; different numbers never share one (each step below permutes the 32-bit integers)."""
    x = (number + int(np.random.SeedSequence(seed).generate_state(1)[0])) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # the finaliser of MurmurHash3
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return f"{x:08x}"


def plan_chip(seed: int, number: int, split: str) -> Plan:
    """Which months and orbits chip `number` of `split` ("train" or "test") has."""
    rng = forest.generator(seed, number, 4)
    patterns, counts = zip(*S2_PATTERNS[split].items())
    pattern = patterns[rng.choice(len(patterns), p=np.array(counts) / sum(counts))]
    orbit = rng.integers(0, 2, T)
    lost = rng.random(T) < S1_ORBIT_MISSING
    if rng.random() < S1_ORBIT_NEVER:
        orbit[:], lost[:] = orbit[0], True
    s1 = np.ones((T, 2), bool)
    s1[lost, orbit[lost]] = False
    return Plan(np.array([month == "1" for month in pattern]), s1)


def make_sample(
    out: Path | str,
    chips: int,
    seed: int,
    test_chips: int = 0,
    *,
    test_labels: bool = True,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write `chips` training and `test_chips` test chips under `out`, and return the content of sample.json.

    `test_labels`: the test chips have labels too, in test_agbm/, where those of the challenge were published after it.
    No CSV lists them, and none of the numbers in sample.json counts them.
    `progress(done, total)` is called after every chip.  A folder that holds a smaller set of the same seed is
    completed.  Raises ConfigError for impossible counts and DataError for a folder that holds anything else or
    cannot be written.
    """
    out = Path(out)
    if chips < 1 or test_chips < 0 or seed < 0:
        raise ConfigError(f"chips {chips}, test chips {test_chips}, seed {seed}: chips must be at least 1, the "
                          "others at least 0")
    note: dict[str, Any] = {"version": VERSION, "seed": seed, "chips": chips, "test_chips": test_chips}
    _claim(out, note)
    jobs = [("train", n) for n in range(chips)] + [("test", FIRST_TEST + n) for n in range(test_chips)]
    pool = ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 8))
    try:
        futures = [pool.submit(_make_chip, out, seed, number, split, labelled=split == "train" or test_labels)
                   for split, number in jobs]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            if progress is not None:
                progress(done, len(jobs))
    finally:
        pool.shutdown(cancel_futures=True)
    made = [future.result() for future in futures]
    _write_csv(out / FEATURES_CSV, FEATURE_COLUMNS, (row for chip in made for row in chip.features))
    for name in FEATURE_CSVS_ELSEWHERE:
        _link(out, name)
    _write_csv(out / "train_agbm_metadata.csv", LABEL_COLUMNS, (chip.label for chip in made if chip.label))
    parameters = asdict(forest.P) | {"s1_orbit_never": S1_ORBIT_NEVER, "s1_orbit_missing": S1_ORBIT_MISSING}
    note |= {"complete": True, **_summary(made[:chips]), "parameters": parameters}
    _write_note(out, note)
    return note


def _claim(out: Path, note: dict[str, Any]) -> None:
    """Mark `out` as a sample in the making, or refuse a folder that holds something else."""
    path = out / NOTE
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is not a folder; choose another one for the sample")
    if path.exists():
        try:
            found = read_json(path)
            same = all(found[key] == note[key] for key in ("version", "seed"))
            fits = all(found[key] <= note[key] for key in ("chips", "test_chips"))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise DataError(f"{path}: cannot be read ({error}); remove {out} or choose another folder") from None
        if not (same and fits):
            made = ", ".join(f"{key} {found.get(key)}" for key in note)
            raise DataError(f"{out}: holds another sample ({made}); remove it or choose another folder")
    elif out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty and no sample; choose another folder")
    for other in (out / name for name in FEATURE_CSVS_ELSEWHERE):
        if not _is_ours(other):
            raise DataError(f"{other}: is not the link to {FEATURES_CSV}, nor its copy, that a sample has under this "
                            f"name; move it away")
    for part in out.glob("**/.*.part"):  # left by a run that was killed
        part.unlink()
    _write_note(out, note | {"complete": False})


def _make_chip(out: Path, seed: int, number: int, split: str, labelled: bool) -> Made:
    """Make one chip and bring its files on the disk to it."""
    chip, plan, stand = chip_id(seed, number), plan_chip(seed, number, split), forest.draw_stand(seed, number)
    shares = forest.mixing(stand)
    rows = []
    label_name = BIOMASSTERS.label_name(chip)
    for number_of, sensor in enumerate(SENSORS):
        for month in range(T):
            if sensor.name == "S1":
                image = forest.draw_s1(seed, number, month, stand)
                image[..., np.repeat(~plan.s1[month], 2)] = S1_NODATA
            elif plan.s2[month]:
                image = forest.draw_s2(seed, number, month, stand, shares)
            else:
                continue
            name = BIOMASSTERS.feature_name(chip, number_of, month)
            file = _put(out, f"{split}_features", name, image)
            rows.append({"filename": name, "chip_id": chip, "satellite": sensor.name, "split": split,
                         "month": MONTHS[month], **file, "corresponding_agbm": label_name})
    if not labelled:
        return Made(rows, None, {})
    label = forest.draw_label(seed, number, stand)
    file = _put(out, f"{split}_agbm", label_name, label)
    if split == "test":
        return Made(rows, None, {})
    scores = {key: _score(stand.biomass, label, below) for key, below in _ways().items()}
    return Made(rows, {"filename": label_name, "chip_id": chip, **file}, scores)


def bring(path: Path, image: np.ndarray) -> bytes:
    """Make `path` the TIFF of `image`, and return its bytes; it is not touched where it is that already."""
    data = encode(image)
    if not (path.exists() and path.read_bytes() == data):
        write_bytes(path, data)
    return data


def _put(out: Path, folder: str, name: str, image: np.ndarray) -> dict[str, Any]:
    """Bring one file to `image`; the columns of its CSV row that depend on its bytes and its place."""
    data = bring(out / folder / name, image)
    bucket = "s3://drivendata-competition-biomassters-public"
    places = {f"s3path_{region}": f"{bucket}-{region}/{folder}/{name}" for region in ("us", "eu", "as")}
    return {"size": len(data), "cksum": posix_cksum(data), **places}


def _is_ours(other: Path) -> bool:
    """Whether a name of FEATURE_CSVS_ELSEWHERE is free, a link to the features' CSV, or what a copy made of that."""
    if not other.exists():
        return not other.is_symlink() or other.readlink() == Path(FEATURES_CSV)
    whole = other.with_name(FEATURES_CSV)
    return other.is_file() and whole.is_file() and same_content(other, whole)


def _link(out: Path, name: str) -> None:
    """Make `name` a relative link to the features' CSV, so that the folder can be moved; a copy where the disk knows no
    links."""
    if (out / name).exists() and (out / name).samefile(out / FEATURES_CSV):
        return
    beside = out / f".{name}.{os.getpid()}.part"
    try:
        beside.symlink_to(FEATURES_CSV)
        beside.replace(out / name)
    except OSError:
        write_bytes(out / name, (out / FEATURES_CSV).read_bytes())


def _write_csv(path: Path, columns: tuple[str, ...], rows: Iterable[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: row["filename"]))
    write_bytes(path, text.getvalue().encode())


def _write_note(out: Path, note: dict[str, Any]) -> None:
    write_bytes(out / NOTE, (json.dumps(note, indent=2) + "\n").encode())


def _ways() -> dict[str, float]:
    """The two ways of counting: as the loss does, without labels that reach AGBM_IGNORE_ABOVE, and all pixels."""
    return {f"below_{AGBM_IGNORE_ABOVE:.0f}": AGBM_IGNORE_ABOVE, "all": math.inf}


def _score(biomass: np.ndarray, label: np.ndarray, below: float) -> np.ndarray:
    kept = label[label < below].astype(np.float64)
    chance, _, variance = forest.label_moments(biomass.astype(np.float64), below)
    best = (chance * variance).sum() / chance.sum()
    return np.array([kept.size, kept.sum(), (kept**2).sum(), best * kept.size])


def _summary(chips: list[Made]) -> dict[str, Any]:
    """`rmse_floor`, `rmse_of_mean` and `label_mean` of the training chips, t/ha, for both ways of counting.

    The floor is the RMSE of E[label | stand], expected over what no band sees: no predictor is better on
    average, and one that sees only the bands is worse.  `rmse_of_mean` is that of answering `label_mean`
    everywhere.  `pooled` is over all pixels, `per_chip` the mean over chips of each chip's RMSE.
    """
    result: dict[str, Any] = {"rmse_floor": {}, "rmse_of_mean": {}, "label_mean": {}}
    for key in _ways():
        pixels, total, squares, best = np.stack([chip.scores[key] for chip in chips]).T
        mean = total.sum() / pixels.sum()
        off = squares - 2 * mean * total + mean**2 * pixels
        result["label_mean"][key] = float(mean)
        for name, error in (("rmse_floor", best), ("rmse_of_mean", off)):
            result[name][key] = {"pooled": math.sqrt(error.sum() / pixels.sum()),
                                 "per_chip": float(np.sqrt(error / pixels).mean())}
    return result
