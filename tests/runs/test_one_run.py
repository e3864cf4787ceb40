"""Several ranks are one run: the losses of one, whoever started them, killed and resumed by any number."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.base.errors import ConfigError
from engine.data.plan import Sharding
from engine.trainer import State, Trainer
from engine.training import checkpoint
from tests.hosts import Rank, history, started, torchrun

pytestmark = pytest.mark.slow

# Four steps, of which the second and the fourth end an epoch
RECIPE = """
data: {{path: {data}, overfit: true, readers: 2}}
run: {{name: run, folder: {folder}}}
model: {{backbone: tf_mobilenetv3_small_minimal_100, decoder_channels: [8, 8, 8, 8, 8], attention: reference}}
train: {{global_batch: 4, micro_batch: 1, precision: fp32, device: cpu}}
phases: [{{epochs: 2, lr: 0.003}}]
validate: {{every: 2}}
checkpoint: {{every_steps: 1, keep: 9}}
log: {{every: 1, chips: 1}}
"""


def recipe(folder: Path, data: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(data=data, folder=folder))
    return path


def srun(world: int) -> list[dict[str, str]]:
    return [{"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r), "SLURM_NTASKS": str(world),
             "SLURM_JOB_ID": str(os.getpid())} for r in range(world)]


def mpirun(world: int) -> list[dict[str, str]]:
    return [{"OMPI_COMM_WORLD_RANK": str(r), "OMPI_COMM_WORLD_LOCAL_RANK": str(r), "OMPI_COMM_WORLD_SIZE": str(world),
             "OMPI_COMM_WORLD_LOCAL_SIZE": str(world), "PMIX_NAMESPACE": f"prterun-{os.getpid()}@1"}
            for r in range(world)]


def succeed(ranks: list[Rank]) -> str:
    for rank in ranks:
        assert rank.wait() == 0, rank.text()
    return "".join(rank.text() for rank in ranks)


def losses(run: Path) -> list[float]:
    rows = history(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]  # one run, and each step once
    return [row["loss"] for row in rows]


def keep_buffers() -> None:
    """Each rank leaves the running statistics that it has when a checkpoint is written, and how often they were
    averaged until then."""
    from engine import trainer
    from engine.training import checkpoint

    average, save, averaged = trainer.average_statistics, checkpoint.Checkpoints.save, [0]

    def counted(model):  # type: ignore[no-untyped-def]
        averaged[0] += 1
        average(model)

    def saved(self, engine, step, state, *more):  # type: ignore[no-untyped-def]
        torch.save((averaged[0], dict(engine.module.named_buffers())),
                   self.folder.parent / f"buffers-{step}-{os.environ['RANK']}.pt")
        save(self, engine, step, state, *more)

    trainer.average_statistics, checkpoint.Checkpoints.save = counted, saved  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(folder: Path, sample: Path) -> Path:
    """The uninterrupted run of one process."""
    with started(folder / "log", "train", "--config", recipe(folder / "one", sample), variables=[{}]) as ranks:
        assert "a step: 4 chips = micro-batches of 1 × 4 accumulated × 1 rank\n" in succeed(ranks)
    return folder / "one" / "run"


@pytest.fixture(scope="module")
def two(folder: Path, sample: Path) -> Path:
    """The same run by two ranks that something like srun started."""
    with started(folder / "log", "train", "--config", recipe(folder / "two", sample), variables=srun(2),
                 before={0: keep_buffers, 1: keep_buffers}) as ranks:
        assert "a step: 4 chips = micro-batches of 1 × 2 accumulated × 2 ranks\n" in succeed(ranks)
    return folder / "two" / "run"


def test_two_ranks_of_srun_have_the_losses_of_one(one: Path, two: Path) -> None:
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-4)
    ours, theirs = (load_file(run / "weights" / "last.safetensors") for run in (two, one))
    for name, value in theirs.items():
        if "running" not in name and value.is_floating_point():
            torch.testing.assert_close(ours[name], value, rtol=0.02, atol=5e-3, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("running_mean", "running_var"):  # of the first layer, where weights that differ a little tell least
        a, b = (weights[f"encoder.model.bn1.{name}"] for weights in (ours, theirs))
        assert float((a - b).norm() / b.norm()) < 0.05  # they forget as much a chip
    assert history(two, "validation")[0]["rmse_per_chip"] == pytest.approx(
        history(one, "validation")[0]["rmse_per_chip"], rel=0.02)  # by running statistics that are near, not equal


def test_running_statistics_are_the_same_on_both_ranks_and_in_what_is_saved(two: Path) -> None:
    for step, averages in {1: 1, 3: 2, 4: 4}.items():  # to save alone; the fourth's first is to validate
        (times, first), (again, second) = (torch.load(two / f"buffers-{step}-{rank}.pt", weights_only=True)
                                           for rank in range(2))
        assert times == again == averages
        assert sum(name.endswith("running_var") for name in first) > 20
        for name, value in first.items():
            assert torch.equal(value, second[name]), (step, name)
    saved = load_file(two / "weights" / "last.safetensors")
    for name, value in first.items():
        assert torch.equal(value, saved[name]), name


def test_weights_are_one_file_under_all_their_names_and_whole(one: Path) -> None:
    files = [one / "weights" / f"{name}.safetensors" for name in ("last", "best", "main-last", "main-best")]
    assert len({path.stat().st_ino for path in files}) == 1 and files[0].stat().st_nlink == 4
    assert load_file(files[0]).keys() == load_file(files[3]).keys()
    assert not [path for path in (one / "weights").iterdir() if path not in files]


def test_four_ranks_have_the_losses_of_one(one: Path, folder: Path, sample: Path) -> None:
    with started(folder / "log", "train", "--config", recipe(folder / "four", sample), "--set", "data.cache_gb=0.25",
                 variables=torchrun(4)) as ranks:
        said = succeed(ranks)
    assert "a step: 4 chips = micro-batches of 1 × 1 accumulated × 4 ranks\n" in said
    assert "data.cache_gb: 0.25 GB for each rank, 1 GB on a host of 4\n" in said
    np.testing.assert_allclose(losses(folder / "four" / "run"), losses(one), rtol=1e-4)


def test_zero_3_with_everything_partitioned_has_the_losses_of_stage_0(one: Path, folder: Path, sample: Path) -> None:
    """By two ranks that something like Open MPI's mpirun started."""
    options = ["--set", "train.zero_stage=3", "--set", "checkpoint.every_steps=null", "--set",
               "deepspeed.zero_optimization={stage3_param_persistence_threshold: 0}"]
    with started(folder / "log", "train", "--config", recipe(folder / "zero", sample), *options,
                 variables=mpirun(2)) as ranks:
        succeed(ranks)
    np.testing.assert_allclose(losses(folder / "zero" / "run"), losses(one), rtol=1e-4)


# Killed in the middle of an epoch ---------------------------------------------------------------------------------


def die_before_the_fourth_step() -> None:
    from engine.training.update.step import Step

    take = Step.take

    def fatal(self, number, batches):  # type: ignore[no-untyped-def]
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, number, batches)

    Step.take = fatal  # type: ignore[method-assign]


def see_no_checkpoint() -> None:
    from engine.training import checkpoint

    checkpoint.find = lambda folder: None


@pytest.fixture(scope="module")
def killed(folder: Path, sample: Path) -> Iterator[Path]:
    """The folder of the run by two ranks, of which the second was killed in the second epoch's second step."""
    with started(folder / "log", "train", "--config", recipe(folder / "killed", sample), variables=torchrun(2),
                 before={1: die_before_the_fourth_step}) as (first, second):
        assert second.wait() == -signal.SIGKILL
        assert first.wait(100) == 2
        assert "stopped by rank 1 on host " in first.text() and "which has not been heard of for" in first.text()
        assert "Traceback" not in first.text()
    yield folder / "killed"


def test_one_rank_goes_on_at_another_stage_where_two_were_killed(one: Path, killed: Path, folder: Path,
                                                                 sample: Path) -> None:
    assert len(history(killed / "run")) == 3
    path = recipe(folder / "alone", sample)
    shutil.copytree(killed / "run", folder / "alone" / "run")
    with started(folder / "log", "train", "--config", path, "--set", "train.global_batch=2", variables=[{}]) as ranks:
        assert ranks[0].wait() == 2 and "another recipe (train.global_batch changed)" in ranks[0].text()
    with started(folder / "log", "train", "--config", path, "--set", "train.zero_stage=3", variables=[{}]) as ranks:
        assert "resumed from" in succeed(ranks)
    np.testing.assert_allclose(losses(folder / "alone" / "run"), losses(one), rtol=1e-4)


def test_all_go_on_from_where_rank_0_does(one: Path, killed: Path, folder: Path, sample: Path) -> None:
    """Which is the newest that is whole; and at another ZeRO stage."""
    path, run = recipe(folder / "together", sample), folder / "together" / "run"
    shutil.copytree(killed / "run", run)
    newest, older = sorted((run / "checkpoints").iterdir(), reverse=True)[:2]
    (newest / checkpoint.OPTIMIZER).write_bytes(b"")
    with started(folder / "log", "train", "--config", path, "--set", "train.timeout_s=60", "--set",
                 "train.zero_stage=2", variables=torchrun(2), before={1: see_no_checkpoint}) as ranks:
        assert f"resumed from {older}" in succeed(ranks)
        assert f"WARNING: {newest} is damaged (optimizer.safetensors has 0 bytes" in ranks[0].text()
    assert (newest.with_name(f"{newest.name}.damaged") / checkpoint.NOTE).exists()
    np.testing.assert_allclose(losses(run), losses(one), rtol=1e-4)


def test_a_state_of_another_global_batch_is_refused(tmp_path: Path) -> None:
    """Even where the recipe in the run's folder does not tell."""
    state = asdict(State(epoch=1, chips=4, step=3, global_batch=4))
    checkpoint.write(tmp_path, 3, {}, {"state": state}, keep=1)
    begin: Any = Trainer._where_to_begin
    saved = SimpleNamespace(folder=tmp_path)
    assert begin(SimpleNamespace(checkpoints=saved, sharding=Sharding(1, 2, 2)))[1].chips == 4
    with pytest.raises(ConfigError, match=r"step-00000003 was written with steps of 4 chips, .* says 2: .* twice"):
        begin(SimpleNamespace(checkpoints=saved, sharding=Sharding(1, 1, 2)))


# What cannot be one run -------------------------------------------------------------------------------------------


def wait_less_for_the_disk() -> None:
    from engine.run import folder

    folder.LATE = 1.0


def test_hosts_without_a_shared_disk_do_not_train(tmp_path: Path, sample: Path) -> None:
    """Each works in a folder of its own, and `run.folder` is relative."""
    path = recipe(tmp_path / "recipe", sample)
    hosts = [tmp_path / name for name in "ab"]
    for host in hosts:
        host.mkdir()
    with started(tmp_path / "log", "train", "--config", path, "--set", "run.folder=runs", variables=torchrun(2),
                 cwd=hosts, before=dict.fromkeys(range(2), wait_less_for_the_disk)) as ranks:
        assert [rank.wait() for rank in ranks] == [2, 2]
        for host, rank in zip(hosts, ranks):
            assert f"run.folder: {host}/runs/run is not shared by all hosts: 1 ranks" in rank.text()
    assert not history(hosts[0] / "runs" / "run") and not (hosts[1] / "runs").exists()


def test_a_second_process_in_the_folder_of_a_run_is_refused(tmp_path: Path, sample: Path) -> None:
    from engine.run.folder import _lock

    path = recipe(tmp_path / "taken", sample)
    with _lock(tmp_path / "taken" / "run"), started(tmp_path / "log", "train", "--config", path,
                                                    variables=[{}]) as ranks:
        assert ranks[0].wait() == 2
        assert f"process {os.getpid()} on host {os.uname().nodename} trains in it" in ranks[0].text()
    assert not history(tmp_path / "taken" / "run")
