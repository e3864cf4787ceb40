"""What it takes to open the index of the whole challenge: seconds, and the memory of a process that does nothing else.

    python benchmarks/index.py [--metadata ../shared/data] [--against OTHER_CHECKOUT]

Files are empty, as an index never reads them; their names come from the challenge's own metadata, whose CSVs are
written in full (sizes and checksums are made up).  Every repeat is a process of its own, and what is timed in it is
`open_index` alone, without Python's start and imports; the peak is of all the process.  `then files` is the first use
of `Index.files`, which verify, pack and a check for bad chips need and training does not.  The names have just been
made: they lie in the page cache, and a first look at a cold disk takes longer.

`--against`: another checkout (`git worktree add ../before COMMIT`), the baseline, whose repeats are taken in turns with
ours.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from harness import Recorder, Timing, Variant, common_options, out_path, result

from engine.base.cli import main
from engine.base.errors import DataError
from engine.data.biomassters import AGBM_DTYPE, BIOMASSTERS, SENSORS, TILE
from engine.data.index import Chip, open_index
from engine.data.made.sample import FEATURE_COLUMNS, LABEL_COLUMNS
from engine.data.metadata import read_metadata
from engine.data.store.chip_file import CHIPS, LEVEL, MANIFEST, STEPS, SUFFIX, VERSION
from engine.data.store.pack import FORMAT

HERE = Path(__file__).resolve().parents[1]
LABEL_BYTES = TILE * TILE * AGBM_DTYPE.itemsize
SMOKE = 500  # files

_OPEN = """
import json, sys, time
from engine.data.index import open_index
start = time.perf_counter()
index = open_index(sys.argv[1])
opened = time.perf_counter()
# Not ru_maxrss, which goes on from the process that started this one
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
asked = time.perf_counter()
files = len(index.files)
print(json.dumps({"seconds": opened - start, "then files, s": time.perf_counter() - asked, "peak": peak,
                  "chips": len(index), "files": files}))
"""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser, n=9)
    parser.add_argument("--metadata", type=Path, default=HERE.parent / "shared" / "data",
                        help="folder of the challenge's two CSVs (default: ../shared/data)")
    parser.add_argument("--against", type=Path, help="another checkout, the baseline")
    return parser


def run(args: argparse.Namespace) -> int:
    if not args.metadata.is_dir():
        raise DataError(f"{args.metadata}: no such folder; give --metadata, the folder of the challenge's two CSVs")
    checkouts = {"this checkout": HERE}
    if args.against is not None:
        checkouts = {f"commit {commit(args.against)}": args.against.resolve(), **checkouts}
    args.n = 1 if args.smoke else args.n
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = make_tree(folder, args.metadata, SMOKE if args.smoke else None)
        chips = open_index(folder / "tree").chips
        sources = {row["filename"]: [row["size"], row["cksum"]] for row in rows}
        make_store(folder / "store", chips, {})
        make_store(folder / "with sources", chips, sources)
        cpu = torch.device("cpu")
        recorder = Recorder(out_path(args, "index", cpu), "index", cpu, {"chips": len(chips), "files": len(rows)})
        for title, name in (("TIFF tree with its CSVs", "tree"), ("TIFF tree without CSVs", "bare"),
                            ("packed store", "store"), ("packed store, sources in its manifest", "with sources")):
            timings = {variant: Timing(peak=0) for variant in checkouts}
            for i in range(args.n + 1):
                for variant, checkout in checkouts.items():
                    seen = opened(checkout, folder / name)
                    if seen["chips"] != len(chips):
                        raise RuntimeError(f"{checkout} found {seen['chips']} chips of {len(chips)}")
                    if i > 0:  # the first is a warm-up
                        take(timings[variant], seen)
            base = next(iter(checkouts))
            for variant, timing in timings.items():
                record = result(title, Variant(variant, lambda _: None), timing, timings[base], base)
                recorder.take(record)
                print(f"{title}, {variant}: {record['time']['median']:.3f} s", flush=True)
        return recorder.close()


def commit(checkout: Path) -> str:
    return subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=checkout, capture_output=True, text=True,
                          check=True).stdout.strip()


def opened(checkout: Path, data: Path) -> dict[str, float]:
    """What a fresh process that runs `checkout` says of opening `data`."""
    done = subprocess.run([sys.executable, "-c", _OPEN, data], cwd=checkout, env={"PYTHONPATH": str(checkout)},
                          capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def take(timing: Timing, seen: Mapping[str, float]) -> None:
    timing.seconds.append(seen["seconds"])
    timing.peak = max(timing.peak or 0, int(seen["peak"]))
    if seen["files"]:
        timing.extra.setdefault("then files, s", []).append(seen["then files, s"])


def make_tree(folder: Path, metadata: Path, most: int | None) -> list[dict[str, Any]]:
    """`folder`/tree with the CSVs, `folder`/bare, the same without; the rows of both CSVs."""
    tree, bare = folder / "tree", folder / "bare"
    features, labels = [], []
    for name in ("train_features", "test_features", "train_agbm"):
        (tree / name).mkdir(parents=True)
    bare.mkdir()
    for published in islice(read_metadata(metadata), most):
        url = published.url["us"]
        place, name = url.split("/")[-2:]
        (tree / place / name).touch()
        row: dict[str, Any] = {"filename": name, "chip_id": name.split("_")[0], "cksum": zlib.crc32(name.encode())}
        row |= {f"s3path_{region}": url.replace("-us/", f"-{region}/") for region in ("us", "eu", "as")}
        if place == "train_agbm":
            labels.append(row | {"size": LABEL_BYTES})
        else:
            sensor = next(sensor for sensor in SENSORS if f"_{sensor.name}_" in name)
            features.append(row | {"size": TILE * TILE * len(sensor.bands) * sensor.values.itemsize,
                                   "satellite": sensor.name, "split": place.split("_")[0], "month": "September",
                                   "corresponding_agbm": f"{row['chip_id']}_agbm.tif"})
    for path in list(tree.iterdir()):
        (bare / path.name).symlink_to(path)
    write_csv(tree / "features_metadata.csv", FEATURE_COLUMNS, features)
    write_csv(tree / "train_agbm_metadata.csv", LABEL_COLUMNS, labels)
    return features + labels


def write_csv(path: Path, columns: tuple[str, ...], rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(rows)


def make_store(store: Path, chips: Iterable[Chip], sources: Mapping[str, list[int]]) -> None:
    """A packed store of empty files; its manifest says `sources`, as it once did, where there are any."""
    (store / CHIPS).mkdir(parents=True)
    entries = []
    for chip in chips:
        (store / CHIPS / f"{chip.id}{SUFFIX}").touch()
        months = {sensor.name: "".join("01"[month] for month in row) for sensor, row in zip(SENSORS, chip.months)}
        label = {"min": 0.0, "max": 361.25, "mean": 63.17341, "std": 71.98024} if chip.label else None
        entry: dict[str, Any] = {"id": chip.id, "split": chip.split, "months": months, "label": label,
                                 "bytes": 12_345_678, "crc32": zlib.crc32(chip.id.encode())}
        if sources:
            entry["sources"] = {path.name: sources[path.name] for path in chip.files}
        entries.append(json.dumps(entry))
    settings = json.dumps({"values": STEPS, "lz4_level": LEVEL})
    (store / MANIFEST).write_text(f'{{"format": "{FORMAT}", "version": {VERSION}, "settings": {settings},\n'
                                  f'"dataset": {json.dumps(BIOMASSTERS.dump())},\n"chips": [\n'
                                  + ",\n".join(entries) + "\n]}\n")


if __name__ == "__main__":
    main(arguments(), run)
