"""Train a recipe:  deepspeed launch/train.py --config configs/biomassters.yaml [--set a.b=c …] [--dry-run]

Run it again, with the same command, to go on after an interruption.  Take a step again that a run has dumped because it
was not finite:  python launch/train.py --replay runs/NAME/dump/step-N
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from engine.base.cli import main


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="a recipe, such as configs/biomassters.yaml")
    what.add_argument("--replay", metavar="DUMP", type=Path,
                      help="take the step that a run has left in RUN/dump again, and say where it goes wrong")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a key of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="print and check what would be done")
    parser.add_argument("--profile", metavar="steps=A:B", help="profile these steps into the run's folder")
    parser.add_argument("--max-time", metavar="3h50m",
                        help="save and stop after so long, with exit status 143: for queues that end jobs")
    parser.add_argument("--restart", action="store_true", help="delete the run of this name and begin again")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def run(args: argparse.Namespace) -> int:
    from engine.base.distributed import join, own_device, rank
    from engine.base.stopping import ASKED, parse_time
    from engine.config import load_config

    if args.replay:
        from engine.training.dump import replay

        for line in replay(args.replay, own_device("auto", 0, 1)):
            print(line, flush=True)
        return 0
    config = load_config(args.config, args.set)
    if args.dry_run:
        if "WORLD_SIZE" in os.environ:  # whatever number of ranks it is asked about
            os.environ.setdefault("RANK", "0")
            os.environ.setdefault("LOCAL_RANK", "0")
        from engine.training.dryrun import describe

        if rank() == 0:
            print(describe(config))
        return 0
    ASKED.listen(parse_time(args.max_time) if args.max_time else None)
    train = config.train
    device = join(train.device, train.timeout_s, train.hang_s.model_dump())  # DeepSpeed, imported, picks its device too
    from engine.run.profile import Profile, parse_window
    from engine.trainer import Trainer

    window = parse_window(args.profile) if args.profile else None
    Trainer(config, device, Profile(window, config.run_folder), args.restart).run()
    return 0


if __name__ == "__main__":
    main(arguments(), run)
