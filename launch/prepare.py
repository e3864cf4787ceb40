"""Prepare data:  python launch/prepare.py sample|verify|splits …

  sample   make data in the original layout, to try things out
  verify   compare every file with its published size and checksum
  splits   publish folds as a JSON file for data.split.path
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.cli import main


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    sample = commands.add_parser("sample", help="make data in the original layout")
    sample.add_argument("--out", required=True, type=Path)
    sample.add_argument("--chips", required=True, type=int, help="labelled chips")
    sample.add_argument("--test-chips", type=int, default=0, help="chips without label (default: 0)")
    sample.add_argument("--seed", type=int, default=0)
    sample.set_defaults(run=run_sample)

    verify = commands.add_parser("verify", help="compare files with the metadata CSVs")
    verify.add_argument("--data", required=True, type=Path)
    verify.add_argument("--workers", type=int, default=4)
    verify.set_defaults(run=run_verify)

    splits = commands.add_parser("splits", help="publish folds")
    splits.add_argument("--data", required=True, type=Path)
    splits.add_argument("--out", required=True, type=Path, help="a .json file")
    splits.add_argument("--scheme", choices=("kfold", "stratified"), default="stratified")
    splits.add_argument("--folds", type=int, default=10)
    splits.add_argument("--seed", type=int, default=314159)
    splits.set_defaults(run=run_splits)
    return parser


def run_sample(args: argparse.Namespace) -> int:
    from engine.data.sample import make_sample
    from engine.errors import ConfigError
    from engine.progress import Progress

    if args.chips < 1 or args.test_chips < 0:
        raise ConfigError(f"--chips {args.chips} --test-chips {args.test_chips}: give at least one chip")
    with Progress("making chips", args.chips + args.test_chips, "chip") as progress:
        made = make_sample(args.out, args.chips, args.seed, test_chips=args.test_chips,
                           progress=lambda done, _: progress.advance(done - progress.done))
    best, mean = (made[key]["all"]["per_chip"] for key in ("rmse_floor", "rmse_of_mean"))
    print(f"{args.chips + args.test_chips} chips in {args.out}; RMSE of the best predictor {best:.1f} t/ha, "
          f"of the mean {mean:.1f} (mean over chips)")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    from engine.data.index import read_metadata, verify
    from engine.errors import DataError
    from engine.progress import Progress

    if not args.data.is_dir():
        raise DataError(f"{args.data}: no such folder")
    files = list(read_metadata(args.data))
    if not files:
        raise DataError(f"{args.data}: no features_metadata.csv or train_agbm_metadata.csv to compare with; "
                        f"put the challenge's CSVs there")
    with Progress("verifying", len(files), "file") as progress:
        problems = verify(files, args.workers, progress.advance)
    for problem in problems:
        print(f"{problem.path}: {problem.what}", file=sys.stderr)
    if problems:
        raise DataError(f"{len(problems)} of {len(files)} files in {args.data} differ from what was published; "
                        f"download them again")
    print(f"{len(files)} files are as published")
    return 0


def run_splits(args: argparse.Namespace) -> int:
    from engine.data.index import open_index
    from engine.errors import DataError
    from engine.selection import mean_biomass
    from engine.splits import kfold, save_folds, stratified

    chips = [chip for chip in open_index(args.data).split("train") if chip.label is not None]
    if not chips:
        raise DataError(f"{args.data}: no labelled chips to split")
    ids = [chip.id for chip in chips]
    if args.scheme == "kfold":
        folds = kfold(ids, args.folds, args.seed)
    else:
        missing = {chip.id: [not have for have in chip.months[1]] for chip in chips}
        folds = stratified(ids, missing, mean_biomass(chips), args.folds, args.seed)
    save_folds(args.out, folds, {"scheme": args.scheme, "folds": args.folds, "seed": args.seed, "chips": len(ids)})
    print(f"{len(folds)} folds of {len(folds[-1])}–{len(folds[0])} chips in {args.out}")
    return 0


if __name__ == "__main__":
    parser = arguments()
    main(parser, lambda args: args.run(args))
