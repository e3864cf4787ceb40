"""Two hosts, made of network namespaces, on which each launcher starts one run.  Each host finds its own name at
127.0.1.1, as Debian installs it, and the other's at the cable between them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, environment, free_port
from tests.hosts import Host, history, listening, started, two_hosts

pytestmark = pytest.mark.slow

RECIPE = """
data: {{path: {data}, overfit: true, readers: 1}}
run: {{name: run, folder: {folder}}}
model: {{backbone: tf_mobilenetv3_small_minimal_100, decoder_channels: [8, 8, 8, 8, 8], attention: reference}}
train: {{global_batch: 4, micro_batch: 1, precision: fp32, device: cpu, timeout_s: 60}}
phases: [{{epochs: 1}}]
log: {{every: 1, chips: 0}}
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    try:
        with two_hosts() as made:
            yield made
    except OSError as error:
        pytest.skip(f"network namespaces cannot be made here ({error}); run as root, with iproute2 and CAP_SYS_ADMIN")


@pytest.fixture
def path(tmp_path: Path, sample: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(data=sample, folder=tmp_path))
    return path


def srun() -> list[dict[str, str]]:
    """What Slurm tells two tasks on two nodes; where rank 0 listens is for them to find out."""
    step = str(free_port())
    return [{"SLURM_PROCID": str(i), "SLURM_NODEID": str(i), "SLURM_LOCALID": "0", "SLURM_NTASKS": "2",
             "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "alder,birch",
             "SLURM_JOB_ID": "1", "SLURM_STEP_ID": step} for i in range(2)]


def trained(folder: Path) -> list[float]:
    rows = history(folder / "run")
    assert [row["step"] for row in rows] == [1, 2]  # one run, and each step once
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def losses(hosts: tuple[Host, Host], tmp_path_factory: pytest.TempPathFactory, sample: Path) -> list[float]:
    """Of the run that something like srun starts."""
    folder = tmp_path_factory.mktemp("srun")
    (folder / "recipe.yaml").write_text(RECIPE.format(data=sample, folder=folder))
    with started(folder / "log", "train", "--config", folder / "recipe.yaml", variables=srun(),
                 hosts=list(hosts)) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text() + ranks[1].text()
    return trained(folder)


def test_srun(losses: list[float]) -> None:
    assert np.isfinite(losses).all()


def on_both(hosts: tuple[Host, Host], *commands: list[object]) -> list[tuple[int, str]]:
    processes = [subprocess.Popen(host.words(*command), cwd=ROOT, env=environment(traced=False), text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                 for host, command in zip(hosts, commands)]
    try:
        texts = [process.communicate(timeout=600)[0] for process in processes]
        return [(process.returncode, text) for process, text in zip(processes, texts)]
    finally:
        for process in processes:
            process.kill()


def hostfile(folder: Path) -> Path:
    path = folder / "hostfile"
    path.write_text("alder slots=1\nbirch slots=1\n")
    return path


def test_torchrun(hosts: tuple[Host, Host], path: Path, tmp_path: Path, losses: list[float]) -> None:
    port = free_port()
    results = on_both(hosts, *([sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1,
                                "--node_rank", node, "--master_addr", "alder", "--master_port", port,
                                "launch/train.py", "--config", path] for node in range(2)))
    assert [code for code, _ in results] == [0, 0], results
    np.testing.assert_allclose(trained(tmp_path), losses, rtol=1e-5)


def test_deepspeed_without_ssh(hosts: tuple[Host, Host], path: Path, tmp_path: Path, losses: list[float]) -> None:
    port = free_port()
    results = on_both(hosts, *(["deepspeed", "--hostfile", hostfile(tmp_path), "--no_ssh", "--node_rank", node,
                                "--master_addr", "alder", "--master_port", port, "launch/train.py", "--config", path]
                               for node in range(2)))
    assert [code for code, _ in results] == [0, 0], results
    np.testing.assert_allclose(trained(tmp_path), losses, rtol=1e-5)


PDSH = """#!{python}
# A stand-in for pdsh -S: the command on each host, and the largest of their exit statuses
import subprocess, sys
hosts = sys.argv[sys.argv.index("-w") + 1].split(",")
words = sys.argv[sys.argv.index("-w") + 2:]
spaces = {spaces}
running = [subprocess.Popen([*spaces[host], "sh", "-c", " ".join(words).replace("%n", str(n))])
           for n, host in enumerate(hosts)]
sys.exit(max(process.wait() for process in running))
"""


def test_deepspeed_with_ssh_and_its_exit_status(hosts: tuple[Host, Host], path: Path, tmp_path: Path,
                                                 losses: list[float]) -> None:
    """`deepspeed --hostfile` on the first host, with programs in the place of pdsh and ssh; stopped after a while."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "pdsh").write_text(PDSH.format(python=sys.executable, spaces={h.name: h.words() for h in hosts}))
    (tools / "ssh").write_text(f"#!/bin/sh\necho {hosts[0].address}\n")  # of `ssh alder hostname -I`
    for tool in tools.iterdir():
        tool.chmod(0o755)
    env, log = environment(traced=False), tmp_path / "log.txt"
    with log.open("w") as out:
        launcher = subprocess.Popen(
            ["deepspeed", "--hostfile", hostfile(tmp_path), "--master_port", str(free_port()), "launch/train.py",
             "--config", path, "--set", "phases=[{epochs: 100}]", "--set", "validate.every=100"],
            cwd=ROOT, stdout=out, stderr=out, env={**env, "PATH": f"{tools}:{env['PATH']}"})
    end = time.monotonic() + 400
    while len(history(tmp_path / "run")) < 2:
        assert launcher.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    first = int((tmp_path / "run" / ".lock").read_text().split()[1])
    os.kill(first, signal.SIGTERM)
    assert launcher.wait(200) == 143, log.read_text()
    assert log.read_text().count("with everything saved") == 2
    np.testing.assert_allclose([row["loss"] for row in history(tmp_path / "run")[:2]], losses, rtol=1e-5)


def test_a_host_whose_power_fails(hosts: tuple[Host, Host], path: Path, tmp_path: Path) -> None:
    """Nothing more comes from it, not even the end of its connections.  Before that, what listens does so on the cable:
    rank 0 knows its address there."""
    variables = [{**own, "MASTER_ADDR": hosts[0].address} for own in srun()]
    with started(tmp_path / "log", "train", "--config", path, "--set", "phases=[{epochs: 100}]", "--set",
                 "validate.every=100", "--set", "train.timeout_s=10", variables=variables,
                 hosts=list(hosts)) as (first, second):
        first.until(lambda: bool(history(tmp_path / "run")))
        assert [listening(rank.process.pid) for rank in (first, second)] == [{host.address} for host in hosts]
        try:
            hosts[0].cable("down")
            first.signal(signal.SIGKILL)
            assert second.wait(55) == 2
        finally:
            hosts[0].cable("up")
        assert "stopped by rank 0 on host alder, which has not answered for" in second.text()
