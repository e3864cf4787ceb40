"""Ranks of one run as processes that a test starts itself, and hosts for them made of network namespaces.

They are forked from a server that has imported the engine once, so that a run of two costs its steps and not ten
seconds a rank; `forked` starts a command of one process so, too.
"""

from __future__ import annotations

import ctypes
import functools
import ipaddress
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tests.conftest import ROOT, environment, free_port

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI", "MPI_", "GLOO_", "TORCHELASTIC_")


class Host(NamedTuple):
    """A network namespace `space`, in which programs find `name` as their host's, and this name at 127.0.1.1, as Debian
    installs it."""

    name: str
    space: str
    address: str

    def enter(self) -> None:
        """Move this process, which must have one thread, to the host."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path(f"/var/run/netns/{self.space}").open() as space:
            hosts = f"/etc/netns/{self.space}/hosts".encode()
            if (libc.setns(space.fileno(), 0x40000000)  # CLONE_NEWNET
                    or libc.unshare(0x04000000 | 0x00020000)  # CLONE_NEWUTS, CLONE_NEWNS
                    or libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None)  # MS_REC, MS_PRIVATE
                    or libc.mount(hosts, b"/etc/hosts", None, 0x1000, None)):  # MS_BIND
                raise OSError(ctypes.get_errno(), f"cannot enter {self.space}")
        socket.sethostname(self.name)

    def words(self, *command: object) -> list[str]:
        """The command line that runs `command` there."""
        return ["ip", "netns", "exec", self.space, "unshare", "--uts", "sh", "-c",
                f'hostname {self.name}; exec "$0" "$@"', *map(str, command)]

    def cable(self, state: str) -> None:
        """"down": nothing arrives any more, and nobody is told, as when its power fails."""
        subprocess.run(["ip", "-n", self.space, "link", "set", "cable0", state], check=True)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts and a cable between them.  Raises OSError where this machine does not let us make them."""
    tag = os.getpid()
    hosts = Host("alder", f"alder{tag}", "10.77.0.1"), Host("birch", f"birch{tag}", "10.77.0.2")

    def ip(*words: object) -> None:
        done = subprocess.run(["ip", *map(str, words)], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"ip {' '.join(map(str, words))}: {done.stderr.strip()}")

    try:
        for host, other in zip(hosts, reversed(hosts)):
            ip("netns", "add", host.space)
            names = Path("/etc/netns") / host.space / "hosts"
            names.parent.mkdir(parents=True)
            names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{other.address} {other.name}\n")
        ip("link", "add", "cable0", "netns", hosts[0].space, "type", "veth", "peer", "name", "cable0", "netns",
           hosts[1].space)
        for host in hosts:
            ip("-n", host.space, "address", "add", f"{host.address}/24", "dev", "cable0")
            for device in ("lo", "cable0"):
                ip("-n", host.space, "link", "set", device, "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.space], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / host.space, ignore_errors=True)


class Rank:
    """A process that runs launch/`script`.py; `text()` is what it has printed, out and error together."""

    def __init__(self, process: Any, log: Path):
        self.process, self.log, self.began = process, log, time.monotonic()

    def text(self) -> str:
        return self.log.read_text()

    def wait(self, seconds: float = 300) -> int:
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s:\n{self.text()}"
        return self.process.exitcode

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def until(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        """Wait for something that this rank brings about."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.exitcode is None and time.monotonic() < end, self.text()
            time.sleep(0.02)


@functools.cache
def forks() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["engine.trainer", "engine.inference.predictor", "torch.utils.tensorboard.writer",
                                    "setuptools"])  # which DeepSpeed asks for as it starts
    with mock.patch.dict(os.environ, environment(), clear=True):
        multiprocessing.forkserver.ensure_running()
    return context


def _be(script: str, args: list[str], variables: Mapping[str, str], cwd: Path, logs: tuple[Path, Path],
        host: Host | None, before: Callable[[], None] | None) -> None:
    for number, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    if host is not None:
        host.enter()
    for key in [key for key in os.environ if key.startswith(LAUNCHERS)]:
        del os.environ[key]
    os.environ.update(variables)
    os.chdir(cwd)
    if before is not None:
        before()
    sys.argv = [str(ROOT / "launch" / f"{script}.py"), *args]
    runpy.run_path(sys.argv[0], run_name="__main__")


@contextmanager
def started(log: Path, script: str, *args: object, variables: list[dict[str, str]], cwd: list[Path] | None = None,
            hosts: list[Host] | None = None, before: dict[int, Callable[[], None]] | None = None,
            each: dict[int, list[object]] | None = None, errors: Path | None = None) -> Iterator[list[Rank]]:
    """As many processes as there are `variables`, each with its own; killed at the end where they still run.

    log: a folder.  each: further arguments of some.  before: what some do first (a function of a module).
    errors: a file for what they print as errors; None: beside the rest.
    """
    log.mkdir(parents=True, exist_ok=True)
    ranks = []
    try:
        for i, own in enumerate(variables):
            path = log / f"{len(list(log.iterdir()))}.txt"
            path.touch()
            words = [str(word) for word in (*args, *(each or {}).get(i, []))]
            process = forks().Process(target=_be, args=(
                script, words, own, cwd[i] if cwd else ROOT, (path, errors or path), hosts[i] if hosts else None,
                (before or {}).get(i)))
            process.start()
            ranks.append(Rank(process, path))
        yield ranks
    finally:
        for rank in ranks:
            if rank.process.exitcode is None:
                rank.signal(signal.SIGKILL)
                rank.process.join()


def forked(script: str, *args: object, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """What launch/`script`.py printed and its exit status, as `subprocess.run` gives them."""
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "errors"
        with started(Path(folder) / "log", script, *args, variables=[{}], errors=errors) as [rank]:
            code = rank.wait(timeout)
            return subprocess.CompletedProcess([script, *args], code, rank.text(), errors.read_text())


def torchrun(world: int, hosts: int = 1, address: str = "127.0.0.1") -> list[dict[str, str]]:
    """What torchrun tells each of `world` ranks on that many hosts."""
    port, local = str(free_port()), world // hosts
    return [{"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank % local),
             "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": address, "MASTER_PORT": port} for rank in range(world)]


def listening(process: int) -> set[str]:
    """The addresses at which a process takes connections, on whichever host it is: proc(5), net/tcp."""
    own = {str(one.readlink()) for one in Path(f"/proc/{process}/fd").iterdir() if one.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:  # LISTEN
                words = re.findall("." * 8, fields[1].split(":")[0])
                found.add(str(ipaddress.ip_address(b"".join(bytes.fromhex(word)[::-1] for word in words))))
    return found


def history(run: Path, kind: str = "step") -> list[dict[str, float]]:
    path = run / "history.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["kind"] == kind]
