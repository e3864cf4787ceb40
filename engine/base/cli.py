"""What the commands share: a user's error becomes one message and a non-zero exit; a bug keeps its traceback."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.base.errors import ConfigError, EngineError
from engine.base.files import place

STOPPED = 143  # as a shell reports SIGTERM: the work is not done
CLOSED = 141  # as SIGPIPE: who read what is printed has enough, as `head` has


def main(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Before torch is imported: threads that wait by spinning take the cores from those that read and augment
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parser.parse_args()
    try:
        for name, value in vars(args).items():
            _can_be(name, value)
        code = run(args)
        _ranks("leave")
    except EngineError as error:
        code = STOPPED if type(error).__name__ == "Stopped" else 2
        _say(f"{parser.prog}: {error}")
        _ranks("leave") if code == STOPPED else _ranks("abandon", error)
    except BrokenPipeError as error:
        code = CLOSED
        _ranks("abandon", error)
    except KeyboardInterrupt as error:
        code = 130
        _say(f"{parser.prog}: interrupted")
        _ranks("abandon", error)
    except Exception as error:
        code = 1
        reason = _ranks("abandon", error)
        if reason is not None:  # this rank only noticed
            code = 2
            _say(f"{parser.prog}: stopped by {reason}")
        else:
            traceback.print_exc()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = CLOSED
    if code == CLOSED:  # or Python would try once more, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.stderr.flush()
    if code and code != STOPPED and _ranks("alone") is False:
        os._exit(code)  # what Python ends by itself would wait for ranks that have left
    sys.exit(code)


def _can_be(name: str, value: object) -> None:
    """Raises ConfigError for a path that no disk can have."""
    for path in value if isinstance(value, list) else [value]:
        if isinstance(path, Path):
            try:
                place(str(path))
            except ValueError as error:
                raise ConfigError(f"--{name.replace('_', '-')}: {error}") from None


def _say(text: str) -> None:
    """In one write: under `python -u`, as launchers start ranks, print takes two, and two ranks share a line."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _ranks(call: str, *args: object) -> Any:
    """A function of `engine.base.distributed`, where this process has anything to do with other ranks."""
    distributed = sys.modules.get("engine.base.distributed")
    return getattr(distributed, call)(*args) if distributed is not None else None
