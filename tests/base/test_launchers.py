"""What each launcher's variables say: pure functions of the environment, so that 16 ranks are tested in one process."""

from __future__ import annotations

import pytest

from engine.base.errors import ConfigError
from engine.base.launchers import Place, first_host, place

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a",
            "MASTER_PORT": "29400"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2",
             "MASTER_ADDR": "a", "MASTER_PORT": "29400"}
OMPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-a-17@1", "PMIX_RANK": "5", "MASTER_ADDR": "a",
        "MASTER_PORT": "29400"}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4", "MASTER_ADDR": "a",
         "MASTER_PORT": "29400"}
SRUN = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_NODELIST": "gpu[03-04]"}
# As sbatch leaves them to its script, in which people start torchrun or deepspeed
BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "77",
         "SLURM_TASKS_PER_NODE": "1", "SLURM_JOB_NODELIST": "gpu[03-04]"}


@pytest.mark.parametrize("launcher", [TORCHRUN, DEEPSPEED, OMPI, HYDRA])
def test_launchers_that_say_it_all(launcher: dict[str, str]) -> None:
    assert place(launcher) == Place(5, 8, 1, 4, "a", 29400)


def test_one_host_is_what_a_launcher_says() -> None:
    """Or rank 0 would listen where no other host can reach it."""
    assert place({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}).one_host and not place(TORCHRUN).one_host
    silent = {key: value for key, value in TORCHRUN.items() if key != "LOCAL_WORLD_SIZE"}
    assert place(silent)[:4] == (5, 8, 1, 8) and not place(silent).one_host


def test_srun_alone_says_where_to_meet() -> None:
    found = place(SRUN)
    assert found[:5] == (5, 8, 1, 4, "gpu03") and 20_000 <= found.port < 32_000
    assert place({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}).port == found.port
    assert place({**SRUN, "SLURM_JOB_ID": "78"}).port != found.port != place({**SRUN, "SLURM_STEP_ID": "1"}).port


def test_srun_on_unequal_nodes() -> None:
    uneven = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NUM_TASKS": "7", "SLURM_NTASKS": "7"}
    assert [place({**uneven, "SLURM_NODEID": str(node), "SLURM_LOCALID": "0"}).local_world for node in range(4)] == \
        [2, 2, 2, 1]
    with pytest.raises(ConfigError, match="1 of 1 on its host, which cannot be"):
        place({**uneven, "SLURM_NODEID": "3"})


def test_the_least_that_a_stand_in_for_srun_or_mpirun_sets_is_enough_on_one_host() -> None:
    slurm = [place({"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r), "SLURM_NTASKS": "2", "SLURM_JOB_ID": "9"})
             for r in range(2)]
    mpi = [place({"OMPI_COMM_WORLD_RANK": str(r), "OMPI_COMM_WORLD_LOCAL_RANK": str(r), "OMPI_COMM_WORLD_SIZE": "2",
                  "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}) for r in range(2)]
    for first, second in (slurm, mpi):
        assert first[:5] == (0, 2, 0, 2, "127.0.0.1") and second == first._replace(rank=1, local_rank=1)


@pytest.mark.parametrize("inner", [TORCHRUN, DEEPSPEED, OMPI])
@pytest.mark.parametrize("outer", [SRUN, BATCH, {**BATCH, "SLURM_NTASKS": "8"}])
def test_the_launcher_nearest_to_the_process_counts(inner: dict[str, str], outer: dict[str, str]) -> None:
    assert place({**outer, **inner})[:4] == (5, 8, 1, 4)


def test_pmi_of_srun_and_pmi_of_mpirun_in_a_job() -> None:
    assert place({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8", "PMI_FD": "9"}) == place(SRUN)
    # On one node of a job Hydra forks by itself, and all its ranks have the batch script's SLURM_PROCID
    ranks = [place({**BATCH, "SLURM_NTASKS": "2", "SLURM_NPROCS": "2", "PMI_RANK": str(r), "PMI_SIZE": "2",
                    "MPI_LOCALRANKID": str(r), "MPI_LOCALNRANKS": "2"}) for r in range(2)]
    assert ranks[1] == ranks[0]._replace(rank=1, local_rank=1) and ranks[0].rank == 0


def test_without_a_launcher_a_process_is_alone() -> None:
    alone = Place(0, 1, 0, 1, "127.0.0.1", 0)
    assert place({}) == place({"WORLD_SIZE": "1"}) == alone
    assert place({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8"}) == alone  # salloc's shell
    assert place(BATCH) == alone
    assert place({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}) == \
        Place(0, 1, 0, 1, "h", 29500)


@pytest.mark.parametrize(("variables", "expected"), [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but nothing says which rank"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is 4"),
    ({"RANK": "1"}, "WORLD_SIZE is not set"),
    ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "LOCAL_RANK is not set"),
    ({"RANK": "1", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "rank 1 of 1, 0 of 1 on its host, which cannot be"),
    ({"SLURM_PROCID": "1", "SLURM_NTASKS": "1", "SLURM_LOCALID": "1"}, "rank 1 of 1"),
    ({**TORCHRUN, "RANK": "8"}, "rank 8 of 8"),
    ({**TORCHRUN, "RANK": "-1"}, "rank -1 of 8"),
    ({**TORCHRUN, "LOCAL_RANK": "4"}, "4 of 4 on its host"),
    ({**TORCHRUN, "LOCAL_WORLD_SIZE": "16"}, "1 of 16 on its host"),
    ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
    ({**TORCHRUN, "LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE is 'x', not a number"),
    ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT is 'http', not a number"),
    ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000; give a port from 1 to 65535"),
    ({**SRUN, "SLURM_STEP_NUM_TASKS": "", "SLURM_NTASKS": "8x"}, "SLURM_NTASKS is '8x'"),
    ({k: v for k, v in OMPI.items() if k != "MASTER_ADDR"}, "8 ranks over several hosts, but does not say where"),
    ({k: v for k, v in HYDRA.items() if k != "MASTER_PORT"}, "set MASTER_PORT"),
    ({**SRUN, "SLURM_STEP_NODELIST": "[,"}, r"the node list '\[,' names no host"),
])
def test_what_does_not_say_enough_is_refused(variables: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        place(variables)


@pytest.mark.parametrize(("nodes", "first"), [
    ("login1", "login1"), ("a,b", "a"), ("gpu[03-05,09],login1", "gpu03"), ("node-[7,9]", "node-7"),
    ("n[1-2]-ib", "n1-ib"), ("r[1-2]n[3-4]", "r1n3"), ("rack[0-1]gpu[00,03-07]-ib,x", "rack0gpu00-ib"),
])
def test_the_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
