"""Which of how many processes this one is, as its launcher says: torchrun, deepspeed, srun, mpirun, or none.

A launcher that is not understood would leave every process to train alone, all in one folder: so values are made up
only where no launcher's variable is set at all.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from engine.base.errors import ConfigError


class Place(NamedTuple):
    rank: int
    world: int
    local_rank: int  # on its host
    local_world: int
    address: str  # where rank 0 listens
    port: int  # 0: any that is free, for one process alone
    one_host: bool = False  # as the launcher says; where it says nothing, ranks may lie on several


class _Launcher(NamedTuple):
    """Where a launcher writes its numbers; the first variable that is set counts."""

    name: str
    rank: tuple[str, ...]
    world: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_world: tuple[str, ...]
    job: tuple[str, ...]  # the same for all ranks of a run, and for no other run


# torchrun: https://docs.pytorch.org/docs/stable/elastic/run.html; deepspeed/launcher/launch.py; srun(1), output
# environment variables; mpirun(1) of Open MPI, and MPICH's Hydra, which Intel MPI is made from.
_LAUNCHERS = (
    _Launcher("torchrun or deepspeed", ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
              ()),
    _Launcher("mpirun (Open MPI)", ("OMPI_COMM_WORLD_RANK",), ("OMPI_COMM_WORLD_SIZE",),
              ("OMPI_COMM_WORLD_LOCAL_RANK",), ("OMPI_COMM_WORLD_LOCAL_SIZE",),
              ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")),
    _Launcher("mpirun (MPICH, Intel MPI)", ("PMI_RANK",), ("PMI_SIZE",), ("MPI_LOCALRANKID",), ("MPI_LOCALNRANKS",),
              ()),
    _Launcher("srun", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"), ("SLURM_LOCALID",),
              ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"), ("SLURM_JOB_ID",)),
)


def place(environ: Mapping[str, str]) -> Place:
    """Read off the variables of the process.  Raises ConfigError where they do not say enough, or contradict."""
    found = [launcher for launcher in _LAUNCHERS if _first(environ, launcher.rank) is not None]
    if len(found) == 2 and found[0].rank == ("PMI_RANK",) and _first(environ, found[0].local_rank) is None:
        del found[0]  # srun --mpi=pmi2 sets PMI_RANK too
    if found:
        return _read(environ, found[0])
    odd = next((key for launcher in _LAUNCHERS[:3] for key in launcher.world if key in environ), None)
    if odd is not None and environ[odd] != "1":
        raise ConfigError(f"{odd} is {environ[odd]}, but nothing says which rank this process is; start it with "
                          f"deepspeed, torchrun, srun or mpirun, or unset {odd}")
    return Place(0, 1, 0, 1, "127.0.0.1", 0)


def _read(environ: Mapping[str, str], launcher: _Launcher) -> Place:
    rank = _number(environ, launcher, launcher.rank)
    if _first(environ, launcher.world) is None and launcher.name == "srun":
        return Place(0, 1, 0, 1, "127.0.0.1", 0)  # a shell that a job's allocation gave, without tasks
    world = _number(environ, launcher, launcher.world)
    local_rank, local_world = 0, 1
    if world > 1:
        local_rank = _number(environ, launcher, launcher.local_rank)
        local_world = _local_world(environ, launcher, world)
    if not 0 <= rank < world or not 0 <= local_rank < local_world <= world:
        raise ConfigError(f"{launcher.name} calls this process rank {rank} of {world}, {local_rank} of {local_world} "
                          f"on its host, which cannot be; are variables left over from another launcher?")
    said = _first(environ, launcher.local_world) is not None
    return Place(rank, world, local_rank, local_world, _address(environ, launcher, world, local_world),
                 _port(environ, launcher, world, local_world), said and local_world == world > 1)


def _local_world(environ: Mapping[str, str], launcher: _Launcher, world: int) -> int:
    text = _first(environ, launcher.local_world)
    if text is None:
        return world
    if launcher.name != "srun":
        return _number(environ, launcher, launcher.local_world)
    # 2(x3),1: two tasks on each of three nodes, one on the fourth
    counts = [int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]
    node = int(environ.get("SLURM_NODEID", 0))
    return counts[min(node, len(counts) - 1)] if counts else world


def _address(environ: Mapping[str, str], launcher: _Launcher, world: int, local_world: int) -> str:
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"]
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if launcher.name == "srun" and nodes:
        return first_host(nodes)
    if local_world == world:
        return "127.0.0.1"
    raise ConfigError(f"{launcher.name} spreads {world} ranks over several hosts, but does not say where rank 0 is; "
                      f"set MASTER_ADDR to its host (and MASTER_PORT to a free port there)")


def _port(environ: Mapping[str, str], launcher: _Launcher, world: int, local_world: int) -> int:
    if "MASTER_PORT" in environ:
        port = _number(environ, launcher, ("MASTER_PORT",))
        if not 0 <= port < 1 << 16:
            raise ConfigError(f"MASTER_PORT is {port}; give a port from 1 to 65535 that is free on rank 0's host")
        return port
    if world == 1:
        return 0
    job = _first(environ, launcher.job)
    if job is None and local_world == world:
        job = str(os.getppid())  # what started all of them
    if job is None:
        raise ConfigError(f"{launcher.name}: set MASTER_PORT to a port that is free on the first host, the same for "
                          f"all ranks")
    step = environ.get("SLURM_STEP_ID", "")
    return 20_000 + zlib.crc32(f"{job}.{step}".encode()) % 12_000  # below the ports that Linux gives to clients


def first_host(nodes: str) -> str:
    """Of a Slurm list: `gpu[03-05,09],login1` begins with gpu03."""
    match = re.match(r"(?:[^,\[\]]|\[\w[^\]]*\])+", nodes)
    if match is None:
        raise ConfigError(f"the node list {nodes!r} names no host; set MASTER_ADDR")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def _first(environ: Mapping[str, str], keys: tuple[str, ...]) -> str | None:
    return next((environ[key] for key in keys if environ.get(key)), None)


def _number(environ: Mapping[str, str], launcher: _Launcher, keys: tuple[str, ...]) -> int:
    key = next((key for key in keys if environ.get(key)), None)
    if key is None:
        raise ConfigError(f"{launcher.name} started this process, but {' and '.join(keys)} "
                          f"{'is' if len(keys) == 1 else 'are'} not set: it cannot be told which of how many it is; "
                          f"start it with deepspeed, torchrun, srun or mpirun")
    try:
        return int(environ[key])
    except ValueError:
        raise ConfigError(f"{key} is {environ[key]!r}, not a number; {launcher.name} started this process, and sets it "
                          f"right where nothing else does") from None
