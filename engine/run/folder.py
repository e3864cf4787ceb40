"""A run's folder belongs to one recipe: `config.yaml` in it says which, and a resume is checked against it.

Layout of a run: `config.yaml` (resolved), `data.json` (how exact the data are), `history.jsonl`, `tensorboard/`,
`checkpoints/step-N/` (to resume), `weights/{best,last}.safetensors` (to share), `profile/`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from engine.base.distributed import barrier, from_rank_0, of_all, rank, together, world
from engine.base.errors import ConfigError
from engine.base.files import write_text
from engine.base.texts import read_json, read_yaml
from engine.config import Config

log = logging.getLogger(__name__)

LOCK = ".lock"
LATE = 10.0  # seconds that a network disk may take to show a new file to other hosts

_WORDS = {"steps": "in steps (packed)", "exact": "as they are (TIFFs, packed with --lossless)"}

# What may differ between the commands that start and resume a run
_FREE = (("log",), ("checkpoint",), ("data", "readers"), ("data", "threads"), ("data", "prefetch"),
         ("data", "cache_gb"), ("data", "verify"), ("data", "path"), ("data", "backend"), ("run", "folder"),
         *(("train", key) for key in ("timeout_s", "hang_s", "not_finite", "deterministic", "zero_stage", "precision",
                                      "micro_batch")))


def claim(folder: Path, config: Config, restart: bool, data: Mapping[str, Any]) -> BinaryIO | None:
    """Make the run's folder this recipe's, and nobody else's as long as the lock that rank 0 gets is open.
    data: what may not change of its data while it lasts: `values`, how exact floats are ("steps" or "exact"), and
    `dataset`, the description.

    Raises ConfigError where another process trains in it, where it holds a run of another recipe, or one that was begun
    on data of another exactness (`data.path` itself may change, between the TIFFs and a lossless store for instance),
    where the folder cannot be written, and where not all ranks see the same one.
    """
    lock = None
    with together():
        if rank() == 0:
            if restart and folder.exists() and not (folder / "config.yaml").exists():
                raise ConfigError(f"{folder} is not a run's folder; --restart does not delete it")
            try:
                lock = _lock(folder)
                _claim(folder, config, restart, data)
            except OSError as error:
                raise ConfigError(f"{folder}: cannot be written ({error.strerror}); make room on its disk, make it "
                                  f"writable, or set run.folder") from None
    _seen_by_all(folder)
    return lock


def _lock(folder: Path) -> BinaryIO:
    folder.mkdir(parents=True, exist_ok=True)
    handle = (folder / LOCK).open("a+b")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        who = handle.read().decode(errors="replace").strip() or "another process"
        handle.close()
        raise ConfigError(f"{folder}: {who} trains in it; wait until it has ended, stop it, or give this run another "
                          f"run.name (were several processes meant to train together? start them with deepspeed, "
                          f"torchrun, srun or mpirun)") from None
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on host {socket.gethostname()}\n".encode())
    handle.flush()
    return handle


def _claim(folder: Path, config: Config, restart: bool, data: Mapping[str, Any]) -> None:
    path, about = folder / "config.yaml", folder / "data.json"
    for part in (*folder.glob(".*.part"), *folder.glob("weights/.*.part")):  # left by a run that was killed
        part.unlink()
    if restart:
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()
    if path.exists():
        try:
            before = read_yaml(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}), so nothing says whose run this is; bring it back, or "
                              f"give this one another run.name") from None
        changed = [key for key in _differences(before, config.dump()) if not any(key[:len(f)] == f for f in _FREE)]
        if changed:
            raise ConfigError(f"{folder} holds a run of another recipe ({', '.join('.'.join(k) for k in changed[:5])} "
                              f"changed); give this one another run.name, or --restart to delete that run")
        begun_on = _begun_on(about) or data
        if begun_on.get("values") != data["values"]:
            before = _WORDS.get(str(begun_on.get("values")), "otherwise")
            raise ConfigError(f"{folder} holds a run that was begun on data with floats {before}, and data.path "
                              f"{config.data.path} has them {_WORDS[data['values']]}; set it to such data, or give "
                              f"this one another run.name")
        other = [".".join(key) for key in _differences(begun_on, dict(data))]
        if other:
            raise ConfigError(f"{folder} holds a run that was begun on data of another description ({', '.join(other)} "
                              f"changed); restore the description, or give this one another run.name")
    write_text(path, yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True))
    write_text(about, json.dumps(dict(data)) + "\n")


def _seen_by_all(folder: Path) -> None:
    """Raises ConfigError where a rank does not see what rank 0 writes there."""
    name = from_rank_0(f".seen-{secrets.token_hex(8)}")
    if rank() == 0 and world() > 1:
        (folder / name).touch()
    barrier()
    end = time.monotonic() + LATE
    while world() > 1 and not (folder / name).exists() and time.monotonic() < end:
        time.sleep(0.2)
    absent = [found for found in of_all(None if world() == 1 or (folder / name).exists() else socket.gethostname())
              if found is not None]
    if rank() == 0 and world() > 1:
        (folder / name).unlink()
    if absent:
        raise ConfigError(f"run.folder: {folder.resolve()} is not shared by all hosts: {len(absent)} ranks, the first "
                          f"on host {absent[0]}, do not see what rank 0 writes there; set run.folder to a shared disk")


def _begun_on(path: Path) -> dict[str, Any] | None:
    """None where the run does not say: it was killed as it began, or the file was damaged."""
    try:
        found = read_json(path)
        if isinstance(found, dict) and "values" in found:
            return found
        why = "says nothing of it"
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        why = str(error)
    log.warning(f"{path}: is damaged ({why}): what data the run was begun on is taken to be as now")
    return None


def _differences(old: Any, new: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}, key=str):
            yield from _differences(old.get(key), new.get(key), (*at, str(key)))
    elif old != new:
        yield at
