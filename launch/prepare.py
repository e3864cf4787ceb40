"""Prepare data:  python launch/prepare.py sample|sample-scene|download|verify|pack|cut|inspect|splits …

  sample   make data in the original layout, to try things out
  sample-scene  make a georeferenced scene of any size, for maps
  download fetch the challenge's files from its public S3 buckets
  verify   compare every file with its published size and checksum, or a packed store with its own
  pack     store chips compressed, one file each, for training at full speed
  cut      make chips of a scene and a raster of its target, with folds of whole blocks of land
  inspect  show a chip of either form, or a scene
  splits   publish folds as a JSON file for data.split.path
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from engine.base.cli import main

DATASET = "description of a tree that has no dataset.yaml of its own: built-in, or a .yaml file"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    sample = commands.add_parser("sample", help="make data in the original layout")
    sample.add_argument("--out", required=True, type=Path)
    sample.add_argument("--chips", required=True, type=int, help="training chips")
    sample.add_argument("--test-chips", type=int, default=0,
                        help="chips of the test split, with labels in test_agbm/ (default: 0)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--dataset", default="biomassters", help="its description: built-in, or a .yaml file")
    sample.set_defaults(run=run_sample)

    scene = commands.add_parser("sample-scene", help="make a georeferenced scene of any size, for maps")
    scene.add_argument("--out", required=True, type=Path, help="its folder: scene.yaml, rasters/, target.tif")
    scene.add_argument("--size", type=int, default=1024, help="pixels a side (default: 1024)")
    scene.add_argument("--seed", type=int, default=0)
    scene.add_argument("--dataset", default="biomassters", help="its description: built-in, or a .yaml file")
    scene.set_defaults(run=run_sample_scene)

    verify = commands.add_parser("verify", help="compare files with the metadata CSVs, or a store with itself")
    verify.add_argument("--data", required=True, type=Path)
    verify.add_argument("--workers", type=int, default=4)
    verify.add_argument("--dataset", default="biomassters", help=DATASET)
    verify.set_defaults(run=run_verify)

    download = commands.add_parser("download", help="fetch the challenge's files from its public S3 buckets")
    place = download.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=Path, help="folder of the TIFF tree")
    place.add_argument("--into-store", type=Path, metavar="STORE", help="pack every chip as it arrives, keep no TIFFs")
    download.add_argument("--lossless", action="store_true", help="with --into-store: as for pack")
    download.add_argument("--metadata", type=Path, help="folder of the challenge's two CSVs (default: --out)")
    download.add_argument("--region", choices=("us", "eu", "as"), default="us",
                          help="the bucket; the nearest is the fastest (default: us, which every CSV has)")
    download.add_argument("--split", choices=("train", "test", "all"), default="all")
    download.add_argument("--chips", help="only so many, or those in this text file, one id a line")
    download.add_argument("--workers", type=int, default=16, help="files at a time (default: 16)")
    download.add_argument("--retries", type=int, default=8, help="of one file, over about a minute (default: 8)")
    download.add_argument("--endpoint-url", help="another server that speaks S3 and holds the same buckets")
    download.set_defaults(run=run_download)

    pack = commands.add_parser("pack", help="make a packed store of a TIFF tree, or finish one")
    pack.add_argument("--data", required=True, type=Path, help="the TIFF tree")
    pack.add_argument("--out", required=True, type=Path, help="folder of the store")
    pack.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="chips at a time (default: one a core)")
    pack.add_argument("--lossless", action="store_true", help="floats as they are, not in steps (Sentinel-1's 0.01 dB)")
    pack.add_argument("--verify", action="store_true", help="read every packed chip back and compare it with its TIFFs")
    pack.add_argument("--dataset", default="biomassters", help=DATASET)
    pack.set_defaults(run=run_pack)

    cut = commands.add_parser("cut", help="make chips of a scene and a raster of its target")
    cut.add_argument("--scene", required=True, type=Path, help="its YAML file, or a folder of rasters")
    cut.add_argument("--target", required=True, type=Path, help="a raster of one band; warped where it lies otherwise")
    cut.add_argument("--out", required=True, type=Path, help="folder of the chips")
    cut.add_argument("--store", action="store_true", help="packed chips instead of TIFFs")
    cut.add_argument("--lossless", action="store_true", help="with --store: as for pack")
    cut.add_argument("--stride", type=int, metavar="PIXELS", help="from a chip to the next (default: a chip's side)")
    cut.add_argument("--block", type=float, metavar="METRES",
                     help="side of the blocks that go to one fold as a whole (default: two chips)")
    cut.add_argument("--folds", type=int, default=4)
    cut.add_argument("--min-valid", type=float, default=0.5, metavar="SHARE",
                     help="of a chip's pixels that have a target, and of those that have any image (default: 0.5)")
    cut.add_argument("--balance", type=int, metavar="CHIPS",
                     help="at most so many in each tenth of the range of their mean targets (default: all)")
    cut.add_argument("--seed", type=int, default=0)
    cut.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8),
                     help="threads (default: one a core, at most 8)")
    cut.add_argument("--dataset", default="biomassters", help="description of a scene that names none")
    cut.set_defaults(run=run_cut)

    inspect = commands.add_parser("inspect", help="show a chip of a TIFF tree or a store, or a scene")
    what = inspect.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="the TIFF tree, or the store")
    what.add_argument("--scene", type=Path, help="a scene's YAML file, or a folder of rasters")
    inspect.add_argument("--chip", help="with --data: its id")
    inspect.add_argument("--out", type=Path, help="also draw it into this .png file")
    inspect.add_argument("--dataset", default="biomassters", help=DATASET)
    inspect.set_defaults(run=run_inspect)

    splits = commands.add_parser("splits", help="publish folds")
    splits.add_argument("--data", required=True, type=Path)
    splits.add_argument("--out", required=True, type=Path, help="a .json file")
    splits.add_argument("--scheme", choices=("kfold", "stratified"), default="stratified")
    splits.add_argument("--folds", type=int, default=10)
    splits.add_argument("--seed", type=int, default=314159)
    splits.add_argument("--dataset", default="biomassters", help=DATASET)
    splits.set_defaults(run=run_splits)
    return parser


def run_sample(args: argparse.Namespace) -> int:
    from engine.base.errors import ConfigError
    from engine.base.progress import Progress
    from engine.data.dataset import load_dataset
    from engine.data.made.fields import make_fields
    from engine.data.made.sample import make_sample

    if args.chips < 1 or args.test_chips < 0:
        raise ConfigError(f"--chips {args.chips} --test-chips {args.test_chips}: give at least one chip")
    dataset = load_dataset(args.dataset)
    if dataset != load_dataset("biomassters"):
        with Progress("making chips", args.chips + args.test_chips, "chip") as progress:
            made = make_fields(args.out, dataset, args.chips, args.seed, test_chips=args.test_chips,
                               progress=lambda done, _: progress.advance(done - progress.done))
        print(f"{args.chips + args.test_chips} chips of {dataset.name!r} in {args.out}; RMSE of the mean "
              f"{made['rmse_of_mean']:.3g} {dataset.target.unit} (mean over chips)")
        return 0
    with Progress("making chips", args.chips + args.test_chips, "chip") as progress:
        made = make_sample(args.out, args.chips, args.seed, test_chips=args.test_chips,
                           progress=lambda done, _: progress.advance(done - progress.done))
    best, mean = (made[key]["all"]["per_chip"] for key in ("rmse_floor", "rmse_of_mean"))
    print(f"{args.chips + args.test_chips} chips in {args.out}; RMSE of the best predictor {best:.1f} t/ha, "
          f"of the mean {mean:.1f} (mean over chips)")
    return 0


def run_sample_scene(args: argparse.Namespace) -> int:
    from engine.base.progress import Progress
    from engine.data.dataset import load_dataset
    from engine.data.made.scene import make_scene

    dataset = load_dataset(args.dataset)
    with Progress("making the scene", 0, "tile") as progress:
        def advance(done: int, total: int) -> None:
            progress.total = total
            progress.advance(done - progress.done)

        made = make_scene(args.out, dataset, args.size, args.seed, progress=advance)
    print(f"{args.size} × {args.size} pixels of {dataset.name!r} in {args.out / 'scene.yaml'}, the target in "
          f"{args.out / 'target.tif'}: {made['rasters']} rasters, {made['bytes'] / 1e9:.3f} GB")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    from engine.base.errors import DataError
    from engine.base.progress import Progress
    from engine.data.dataset import load_dataset
    from engine.data.index import dataset_at, is_store
    from engine.data.metadata import read_metadata, verify

    if not args.data.is_dir():
        raise DataError(f"{args.data}: no such folder")
    if is_store(args.data):
        return verify_packed(args)
    files = list(read_metadata(args.data, dataset_at(args.data, load_dataset(args.dataset)).folders))
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
    unchecked = sum(file.cksum is None for file in files)
    print(f"{len(files)} files are as published" + unpublished(unchecked))
    return 0


def unpublished(files: int) -> str:
    return f"; {files} have no published checksum, at most their length was compared" if files else ""


def run_download(args: argparse.Namespace) -> int:
    from engine.base.errors import ConfigError, DataError
    from engine.base.made import alone
    from engine.base.progress import Progress
    from engine.data.fetch import download, s3

    if args.workers < 1 or args.retries < 0:
        raise ConfigError(f"--workers {args.workers} --retries {args.retries}: at least 1 and 0")
    if args.lossless and args.out:
        raise ConfigError("--lossless is for --into-store; TIFFs always arrive as they are")
    if args.into_store and not args.metadata:
        raise ConfigError("--into-store needs --metadata, the folder of the challenge's CSVs")
    metadata, folder = args.metadata or args.out, args.out or args.into_store
    files = download.select(metadata, args.region, args.split, args.chips)
    client = s3.connect(args.workers, args.endpoint_url)
    place = download.Tree(folder, metadata) if args.out else download.Store(folder, args.lossless)
    with alone(folder):
        place.sweep()
        with Progress("checking what is there", len(files), "file") as progress:
            todo = place.missing(files, args.workers, progress.advance)
        download.check_space(folder, place.room(todo))
        total, left = (sum(file.expected for file in some) for some in (files, todo))
        with Progress("downloading", total // 10**6, "megabyte", done=(total - left) // 10**6) as progress:
            problems = s3.fetch_all(client, todo, place.deliver(todo), workers=args.workers, retries=args.retries,
                                    progress=download.megabytes(progress, total - left))
        for problem in problems:
            print(f"{problem.path}: {problem.what}", file=sys.stderr)
        if problems:
            raise DataError(f"{folder}: {len(problems)} files are not as published (listed above)"
                            f"{', stopped there' if len(problems) >= s3.MOST_PROBLEMS else ''}; run the same command "
                            f"again, try another --region, or leave their chips out with --chips FILE")
        place.finish()
    unchecked = sum(file.cksum is None for file in files)
    print(f"{len(files)} files in {folder} are as published, {len(todo)} of them new{unpublished(unchecked)}")
    return 0


def verify_packed(args: argparse.Namespace) -> int:
    from engine.base.errors import DataError
    from engine.base.progress import Progress
    from engine.data.index import open_index
    from engine.data.store.pack import verify_store

    with Progress("verifying", len(open_index(args.data)), "chip") as progress:
        problems = verify_store(args.data, args.workers, progress.advance)
    for problem in problems:
        print(f"{problem.path}: {problem.what}", file=sys.stderr)
    if problems:
        raise DataError(f"{len(problems)} of {progress.done} chips in {args.data} are damaged (listed above)")
    print(f"{progress.done} chips are as they were packed")
    return 0


def run_pack(args: argparse.Namespace) -> int:
    from engine.base.progress import Progress
    from engine.data.dataset import load_dataset
    from engine.data.index import open_index
    from engine.data.store.pack import pack

    dataset = load_dataset(args.dataset)
    with Progress("packing", len(open_index(args.data, dataset)), "chip") as progress:
        made = pack(args.data, args.out, dataset=dataset, lossless=args.lossless, workers=args.workers,
                    verify=args.verify, progress=progress.advance)
    print(f"{made['chips']} chips in {args.out}, {made['new']} of them new: {made['bytes'] / 1e9:.3f} GB, "
          f"{made['bytes'] / made['tiff_bytes']:.3f} of the TIFFs"
          + ("; every one was compared with them" if args.verify else ""))
    return 0


def run_cut(args: argparse.Namespace) -> int:
    from engine.base.errors import ConfigError
    from engine.base.progress import Progress
    from engine.data.dataset import load_dataset
    from engine.data.scene.blocks import Options
    from engine.data.scene.cut import SPLIT, cut
    from engine.data.scene.scene import open_scene
    from engine.data.store import chip_file
    from engine.inference import pictures
    from engine.inference.landscape.picture import folds_figure

    if args.lossless and not args.store:
        raise ConfigError("--lossless is for --store; TIFFs always are as the rasters")
    scene = open_scene(args.scene, load_dataset(args.dataset))
    tile, metres = scene.dataset.tile, scene.grid.pixel_metres[0]
    form = chip_file.EXACT if args.lossless else chip_file.STEPS if args.store else "tiff"
    stride = tile if args.stride is None else args.stride
    block = 2 * tile * metres if args.block is None else args.block
    options = Options(stride, block, args.folds, args.min_valid, args.balance, args.seed, form)
    with Progress("cutting", 0, "chip") as progress:
        def advance(done: int, total: int) -> None:
            progress.total = total
            progress.advance(done - progress.done)

        made = cut(scene, args.target, args.out, options, workers=args.workers, progress=advance)
    pictures.save(folds_figure(args.target, scene.dataset.target, scene.grid, made["chips"], tile),
                  args.out / "folds.png")
    left = ", ".join(f"{made[key]} {text}" for key, text in (
        ("without_target", "with too little target"), ("without_images", "with too little of an image"),
        ("over_balance", "over --balance")) if made[key])
    print(f"{len(made['chips'])} chips of {made['places']} in {args.out}{f'; left out: {left}' if left else ''}\n"
          f"{args.folds} folds of whole blocks in {args.out / SPLIT}, drawn in {args.out / 'folds.png'}")
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    from engine.base.errors import ConfigError
    from engine.data.chip_view import open_chip
    from engine.data.dataset import load_dataset
    from engine.inference import pictures

    if args.scene is not None:
        return inspect_scene(args)
    if args.chip is None:
        raise ConfigError("--data: say which chip, --chip ID")
    view = open_chip(args.data, args.chip, load_dataset(args.dataset))
    print(view.table())
    if args.out is not None:
        pictures.save(pictures.months_figure(f"chip {args.chip}", view.stack, view.chip.label is not None), args.out)
        print(f"\npicture in {args.out}")
    return 0


def inspect_scene(args: argparse.Namespace) -> int:
    from engine.base.errors import ConfigError
    from engine.data.dataset import load_dataset
    from engine.data.scene.scene import open_scene
    from engine.data.scene.view import SceneView
    from engine.inference import pictures

    if args.chip is not None:
        raise ConfigError("--chip goes with --data: a scene has none")
    view = SceneView(open_scene(args.scene, load_dataset(args.dataset)))
    print(view.table())
    if args.out is not None:
        pictures.save(pictures.months_figure(f"scene {args.scene}", view.stack, labelled=False), args.out)
        print(f"\npicture in {args.out}")
    return 0


def run_splits(args: argparse.Namespace) -> int:
    from engine.base.errors import DataError
    from engine.data.dataset import load_dataset
    from engine.data.index import open_index
    from engine.data.selection.chips import mean_label, missing_images
    from engine.data.selection.folds import kfold, save_folds, stratified

    index = open_index(args.data, load_dataset(args.dataset))
    chips = [chip for chip in index.split("train") if chip.label is not None]
    if not chips:
        raise DataError(f"{args.data}: no labelled chips to split")
    ids = [chip.id for chip in chips]
    if args.scheme == "kfold":
        folds = kfold(ids, args.folds, args.seed)
    else:
        folds = stratified(ids, missing_images(chips), mean_label(chips), args.folds, args.seed)
    save_folds(args.out, folds, {"scheme": args.scheme, "folds": args.folds, "seed": args.seed, "chips": len(ids)})
    print(f"{len(folds)} folds of {len(folds[-1])}–{len(folds[0])} chips in {args.out}")
    return 0


if __name__ == "__main__":
    parser = arguments()
    main(parser, lambda args: args.run(args))
