"""Predict maps:  python launch/predict.py --weights runs/demo --data DIR --out OUT
               python launch/predict.py --weights runs/demo --scene S.yaml --out map.tif

Writes a map for each chip, by the name of its label (OUT/{chip}_agbm.tif), float32 in the target's unit, and pictures;
where labels exist also metrics.json and a scatter.  The same command again goes on where it was killed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.base.cli import main


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--weights", type=Path,
                       help="a run folder, a .safetensors file, or the winner's model_last.pth or modelo_best.pth")
    which.add_argument("--ensemble", type=Path, nargs="+", metavar="WEIGHTS",
                       help="with --scene: the mean of several, in one pass over the data")
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--data", type=Path, help="chips: a folder with test_features/ or train_features/")
    of.add_argument("--scene", type=Path, help="a landscape: a scene's YAML file, or a folder of rasters")
    parser.add_argument("--out", required=True, type=Path, help="a folder; with --scene the map, a .tif file")
    parser.add_argument("--split", default="auto", choices=("auto", "train", "test", "all", "validation"),
                        help="validation: what the run in --weights held out; auto: test chips, or all (default)")
    parser.add_argument("--tta", default="id",
                        help="flips and turns to average over, of id,h,v,hv,t,r90,r270,a; d4: all (default: id)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu"))
    parser.add_argument("--batch", type=int,
                        help="chips, or windows, at once (default: 4, on a CPU at least one a core)")
    parser.add_argument("--pictures", type=int, default=16, help="panels for the first N chips (default: 16)")
    parser.add_argument("--submission", type=Path, metavar="OUT.tar",
                        help="also write the challenge's archive: the checked maps of all test chips")
    parser.add_argument("--nodata-months", default="fail", choices=("fail", "mask"),
                        help="months whose files hold no value: an error (default), or left out")
    parser.add_argument("--backbone", help="timm name, where the weights do not tell it")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the model's blocks: minutes at first, for thousands of chips on a GPU")
    parser.add_argument("--cuda-graphs", action="store_true",
                        help="launch each batch as one CUDA graph: for small batches on a GPU")
    scene = parser.add_argument_group("with --scene")
    scene.add_argument("--overlap", type=int,
                       help="pixels that neighbouring windows share, even (default: a quarter of a window)")
    scene.add_argument("--spread", action="store_true",
                       help="a second band: the standard deviation over the views of --tta and of --ensemble")
    scene.add_argument("--zones", type=Path, metavar="ZONES.geojson", help="polygons to add up one by one")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


ONLY = {"data": ("split", "pictures", "nodata_months", "cuda_graphs"),
        "scene": ("ensemble", "overlap", "spread", "zones")}  # arguments that mean nothing with the other


def run(args: argparse.Namespace) -> int:
    from engine.base.errors import ConfigError

    parser = arguments()
    other = "scene" if args.data is not None else "data"
    given = [f"--{name.replace('_', '-')}" for name in ONLY[other] if getattr(args, name) != parser.get_default(name)]
    if given or (args.batch is not None and args.batch < 1):
        raise ConfigError(f"{', '.join(given)}: go with --{other}; leave them out" if given else
                          f"--batch {args.batch}: at least 1")
    return run_chips(args) if args.data is not None else run_scene(args)


def run_scene(args: argparse.Namespace) -> int:
    from engine.base.distributed import join, rank
    from engine.inference.chips import chosen_views
    from engine.inference.landscape.area import summary
    from engine.inference.landscape.mapper import Options, predict_scene

    options = Options(chosen_views(args.tta.split(",")), args.precision, args.overlap, args.spread, args.batch,
                      args.backbone, args.compile)
    device = join(args.device)
    found = predict_scene(args.ensemble or [args.weights], args.scene, args.out, options, device=device,
                          zones=args.zones)
    if rank() == 0:
        print(f"{args.out}: {summary(found)}")
        for zone in found.get("zones", []):
            print(f"  {zone['name']}: {summary(zone)}")
    return 0


def run_chips(args: argparse.Namespace) -> int:
    from engine.base.distributed import join, rank
    from engine.inference.chips import chosen_views
    from engine.inference.predictor import choose_chips, predict
    from engine.inference.submission import submission

    tta = chosen_views(args.tta.split(","))
    device = join(args.device)
    chips = choose_chips(args.data, args.split, args.weights)
    archive = submission(args.submission, args.data, chips) if args.submission else None
    metrics = predict(args.weights, chips, args.out, device=device, precision=args.precision, tta=tta,
                      batch_size=args.batch, n_pictures=args.pictures, nodata_months=args.nodata_months,
                      backbone=args.backbone, compile=args.compile, cuda_graphs=args.cuda_graphs)
    if rank() == 0:
        print(f"{len(chips)} maps in {args.out}")
        if archive is not None:
            archive.write(args.out)
            print(f"{len(archive.chips)} of them, all test chips, in {archive.path}")
        for name, value in metrics.items():
            print(f"  {name:14} {value:.4g}")
    return 0


if __name__ == "__main__":
    main(arguments(), run)
