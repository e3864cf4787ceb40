"""What the commands share: a user's error becomes one message and a non-zero exit; a bug keeps its traceback."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable

from engine.errors import EngineError

STOPPED = 143  # as a shell reports SIGTERM: the work is not done


def main(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Before torch is imported: threads that wait by spinning take the cores from those that read and augment
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parser.parse_args()
    try:
        code = run(args)
    except EngineError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr, flush=True)
        code = STOPPED if type(error).__name__ == "Stopped" else 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.stdout.flush()
    sys.exit(code)
