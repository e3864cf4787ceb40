"""A run's folder belongs to one recipe: `config.yaml` in it says which, and a resume is checked against it.

Layout of a run: `config.yaml` (resolved), `data.json` (how exact the data are), `history.jsonl`, `tensorboard/`,
`checkpoints/step-N/` (to resume), `weights/{best,last}.safetensors` (to share), `profile/`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from engine.config import Config
from engine.errors import ConfigError
from engine.files import write_text
from engine.parallel import rank, world

# What may differ between the commands that start and resume a run
_FREE = (("log",), ("checkpoint",), ("data", "readers"), ("data", "threads"), ("data", "prefetch"),
         ("data", "cache_gb"), ("data", "verify"), ("data", "path"), ("data", "backend"), ("run", "folder"))


def claim(folder: Path, config: Config, restart: bool, s1: str) -> None:
    """Make the run's folder this recipe's.  `s1`: how exact Sentinel-1 is in its data (`engine.data.store`).

    Raises ConfigError where it holds a run of another recipe, or one that was begun on data of another exactness:
    `data.path` itself may change, between the TIFFs and a lossless store for instance.
    """
    path, data = folder / "config.yaml", folder / "data.json"
    problem = None
    if rank() == 0:
        if restart and folder.exists():
            if not path.exists():
                problem = f"{folder} is not a run's folder; --restart does not delete it"
            else:
                shutil.rmtree(folder)
        if path.exists() and problem is None:
            old, new = yaml.safe_load(path.read_text()), config.dump()
            changed = [key for key in _differences(old, new) if not any(key[:len(f)] == f for f in _FREE)]
            if changed:
                problem = (f"{folder} holds a run of another recipe ({', '.join('.'.join(k) for k in changed[:5])} "
                           f"changed); give this one another run.name, or --restart to delete that run")
        begun_on = _begun_on(data) if path.exists() and problem is None else None
        if begun_on not in (None, s1):
            problem = (f"{folder} holds a run that was begun on Sentinel-1 as {begun_on}, and data.path "
                       f"{config.data.path} has it as {s1}; set it to such data, or give this one another run.name")
        if problem is None:
            write_text(path, yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True))
            write_text(data, json.dumps({"sentinel1": s1}) + "\n")
    holder = [problem]
    if world() > 1:
        torch.distributed.broadcast_object_list(holder, src=0)
    if holder[0]:
        raise ConfigError(holder[0])


def _begun_on(path: Path) -> str | None:
    """None where the run does not say: it was killed as it began, or the file was damaged."""
    try:
        return str(json.loads(path.read_text())["sentinel1"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _differences(old: Any, new: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), (*at, str(key)))
    elif old != new:
        yield at
