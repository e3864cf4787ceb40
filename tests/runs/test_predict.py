"""Whole predictions: killed and gone on with, and two ranks of which one is slow to write, or dies."""

from __future__ import annotations

import functools
import os
import random
import resource
import shutil
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from engine.model.unet import BiomassUNet
from engine.model.weights import save_weights
from tests.hosts import Rank, started, torchrun

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = BiomassUNet("tf_mobilenetv3_small_minimal_100", [8, 8, 8, 8, 8])
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path, model, model.config())
    return path


def write_slowly() -> None:
    from engine.data.tiff import tiff

    write = tiff.write_map

    def slow(*args: object) -> None:
        time.sleep(1)
        write(*args)  # type: ignore[arg-type]

    tiff.write_map = slow


def die_in_the_middle() -> None:
    from engine.data.tiff import tiff

    write, written = tiff.write_map, [0]

    def fatal(*args: object) -> None:
        written[0] += 1
        if written[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args)  # type: ignore[arg-type]

    tiff.write_map = fatal


def test_maps_are_read_when_all_are_written(weights: Path, sample: Path, tmp_path: Path) -> None:
    """One chip at a time: the slow rank's last batch is then no padding, and is written when rank 0 could read."""
    out = tmp_path / "maps"
    with started(tmp_path / "log", "predict", "--weights", weights, "--data", sample, "--out", out, "--split", "all",
                 "--device", "cpu", "--batch", 1, variables=torchrun(2), before={1: write_slowly}) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text() + ranks[1].text()
    assert len(list(out.glob("*_agbm.tif"))) == 10 == len(list((out / "pictures").glob("*.png")))
    assert (out / "scatter.png").exists() and (out / "metrics.json").exists()


def test_a_rank_that_dies_is_named(weights: Path, sample: Path, tmp_path: Path) -> None:
    out = tmp_path / "maps"
    with started(tmp_path / "log", "predict", "--weights", weights, "--data", sample, "--out", out, "--split", "all",
                 "--device", "cpu", "--batch", 1, variables=torchrun(2), before={1: die_in_the_middle}) as ranks:
        assert ranks[1].wait() == -signal.SIGKILL
        assert ranks[0].wait(60) == 2
        assert "predict.py: stopped by rank 1 on host " in ranks[0].text() and "Traceback" not in ranks[0].text()
    assert not (out / "metrics.json").exists()


# One that is killed goes on ------------------------------------------------------------------------------------------


@contextmanager
def predicting(weights: Path, sample: Path, out: Path, *more: object, ranks: int = 1,
               before: Callable[[], None] | None = None) -> Iterator[list[Rank]]:
    """All ten chips in batches of three; labels for eight of them.  `before`: what the last rank does first."""
    with started(out.parent / f"log-{out.name}", "predict", "--weights", weights, "--data", sample, "--out", out,
                 "--split", "all", "--device", "cpu", "--batch", 3, "--pictures", 1, *more,
                 variables=torchrun(ranks) if ranks > 1 else [{}],
                 before={ranks - 1: before} if before is not None else None) as running:
        yield running


def die_at(moment: int) -> None:
    """When files are made safe for the nth time: before a file has its name, or after."""
    from engine.base import files

    fsync, calls = os.fsync, [0]

    def fatal(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    files.os = type("os", (), {**vars(os), "fsync": staticmethod(fatal)})  # type: ignore[attr-defined]


def content(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(weights: Path, sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The maps of a run that nothing has disturbed."""
    out = tmp_path_factory.mktemp("whole") / "maps"
    with predicting(weights, sample, out, "--submission", out.parent / "s.tar") as [rank]:
        assert rank.wait() == 0, rank.text()
        assert "10 maps in" in rank.text() and f"2 of them, all test chips, in {out.parent / 's.tar'}" in rank.text()
        assert "goes on" not in rank.text()
    return out


def test_what_was_killed_goes_on_to_the_same_bytes(whole: Path, weights: Path, sample: Path, tmp_path: Path) -> None:
    """Killed twice, at moments by chance; then it is done by two ranks."""
    out, killed = tmp_path / "maps", []
    for _ in range(2):
        left = 10 - len(list(out.glob("*.tif")))
        killed.append(random.SystemRandom().randint(1, 2 * left))  # twice a file, and those of made.json
        with predicting(weights, sample, out, before=functools.partial(die_at, killed[-1])) as [rank]:
            assert rank.wait() == -signal.SIGKILL, (killed, rank.text())
    assert not (out / "metrics.json").exists()
    with predicting(weights, sample, out, ranks=2) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], (killed, ranks[0].text())
    assert content(out) == content(whole), killed


def test_only_what_is_not_whole_is_made_again(whole: Path, weights: Path, sample: Path, tmp_path: Path) -> None:
    """A map cut off by a power failure, in the second of four batches; the archive, of all maps, is the same."""
    out = tmp_path / "maps"
    shutil.copytree(whole, out)
    (out / "metrics.json").unlink()
    maps = sorted(out.glob("*.tif"))
    os.truncate(maps[4], 1000)
    was = {path: path.stat().st_ino for path in maps}
    with predicting(weights, sample, out, "--submission", tmp_path / "s.tar") as [rank]:
        assert rank.wait() == 0, rank.text()
        assert f"{out}: goes on" in rank.text() and "predicting: 10/10 chips" in rank.text()
    assert [number for number, path in enumerate(maps) if path.stat().st_ino != was[path]] == [3, 4, 5]
    assert content(out) == content(whole)
    assert (tmp_path / "s.tar").read_bytes() == (whole.parent / "s.tar").read_bytes()
    with tarfile.open(tmp_path / "s.tar") as archive:
        assert len(archive.getnames()) == 2


def test_maps_of_other_options_are_not_mixed(whole: Path, weights: Path, sample: Path) -> None:
    before = content(whole)
    with predicting(weights, sample, whole, "--tta", "id,t", ranks=2) as ranks:
        assert {rank.wait() for rank in ranks} == {2}
        assert (f'{whole}: holds maps that were made otherwise: tta ["id", "t"] instead of ["id"]; give another --out, '
                f'or remove the folder') in ranks[0].text() and "Traceback" not in ranks[0].text()
    assert content(whole) == before


def little_room() -> None:
    """No file of 256 KiB may be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def test_a_disk_without_room_is_told_and_gone_on_with(whole: Path, weights: Path, sample: Path, tmp_path: Path) -> None:
    out = tmp_path / "maps"
    with predicting(weights, sample, out, before=little_room) as [rank]:
        assert rank.wait() == 2
        assert "_agbm.tif: cannot be written (File too large); make room" in rank.text()
        assert "Traceback" not in rank.text()
    assert [path.name for path in out.iterdir()] == ["made.json"]
    with predicting(weights, sample, out) as [rank]:
        assert rank.wait() == 0, rank.text()
    assert content(out) == content(whole)
