"""What one rank cannot do, dies of or hangs in: said by name on all, who leave within seconds."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from engine import trainer
from engine.base.distributed import StopFlag
from engine.base.sections import HERE
from engine.base.stopping import Asked
from engine.data.index import open_index
from engine.data.plan import Sharding, training_batches
from engine.data.selection.folds import kfold
from tests.conftest import Command
from tests.hosts import Rank, history, started, torchrun

pytestmark = pytest.mark.slow

RECIPE = """
data: {{path: {data}, overfit: true, readers: 1, prefetch: 1}}
run: {{name: run, folder: {folder}}}
model: {{backbone: tf_mobilenetv3_small_minimal_100, decoder_channels: [8, 8, 8, 8, 8], attention: reference}}
train: {{global_batch: 4, micro_batch: 1, precision: fp32, device: cpu, timeout_s: 60}}
phases: [{{epochs: 100}}]
augment: {{month_dropout: 0}}
validate: {{every: 100}}
log: {{every: 1, chips: 0}}
"""
HOST = socket.gethostname()


@pytest.fixture
def path(tmp_path: Path, sample: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(data=sample, folder=tmp_path))
    return path


def damaged(sample: Path, folder: Path, chip: int) -> tuple[Path, Path]:
    """A copy of the data of which one file is cut short, and this file."""
    shutil.copytree(sample, folder, copy_function=os.link)
    file = next((folder / "train_features").glob(f"{open_index(sample).split('train')[chip].id}_S1_*.tif"))
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-7000])
    return folder, file


def both_leave(ranks: list[Rank], seconds: float = 45) -> tuple[str, str]:
    """Their exit status is 2, the second one's within `seconds` of the first one's.  What they printed."""
    while all(rank.process.exitcode is None for rank in ranks):
        assert time.monotonic() - ranks[0].began < 300, ranks[0].text() + ranks[1].text()
        time.sleep(0.02)
    for rank in ranks:
        assert rank.wait(seconds) == 2, rank.text()
        assert "Traceback" not in rank.text()
    return ranks[0].text(), ranks[1].text()


def messages_alone() -> None:
    """No watch tells the others.  To destroy a group is the end: NCCL's would wait for ranks that do not come."""
    from engine.base.watch import Watch

    for name in ("start", "tell", "told", "heard"):
        setattr(Watch, name, lambda *_: None)
    torch.distributed.destroy_process_group = lambda *_: os._exit(9)


def test_a_bad_file_that_one_rank_finds_as_it_sets_up(path: Path, tmp_path: Path, sample: Path) -> None:
    data, file = damaged(sample, tmp_path / "data", 3)
    with started(tmp_path / "log", "train", "--config", path, "--set", "data.verify=true", variables=torchrun(2),
                 each={1: ["--set", f"data.path={data}"]},
                 before=dict.fromkeys(range(2), messages_alone)) as ranks:
        first, second = both_leave(ranks)
    assert f"train.py: {data}: 1 of " in second and file.name in second and "stopped by" not in second
    assert f"train.py: stopped by rank 1 on host {HOST}: {data}: 1 of " in first and file.name in first
    assert not (tmp_path / "run").exists()


def damaged_for_the_fourth(sample: Path, folder: Path) -> tuple[Path, Path]:
    """The second rank reads the file for the second step's second micro-batch, which the first could take."""
    items = [item for batch in training_batches(8, 0, 0, Sharding(1, 2, 2, rank=1)) for item in batch]
    return damaged(sample, folder, items[3].chip)


def test_a_bad_file_in_the_middle_of_a_step(path: Path, tmp_path: Path, sample: Path) -> None:
    data, file = damaged_for_the_fourth(sample, tmp_path / "data")
    with started(tmp_path / "log", "train", "--config", path, "--set", f"data.path={data}", variables=torchrun(2),
                 before=dict.fromkeys(range(2), messages_alone)) as ranks:
        first, second = both_leave(ranks)
    said = f"training step 2: chip {file.name.partition('_')[0]}: {file}: truncated"
    assert f"train.py: {said}" in second and "stopped by" not in second
    assert f"train.py: stopped by rank 1 on host {HOST}: {said}" in first
    assert [row["step"] for row in history(tmp_path / "run")] == [1]


def test_a_bad_file_in_a_validation(path: Path, tmp_path: Path, sample: Path) -> None:
    ids = [chip.id for chip in open_index(sample).split("train")]
    second = kfold(ids, 4, 0)[0][1]
    data, file = damaged(sample, tmp_path / "data", ids.index(second))
    with started(tmp_path / "log", "train", "--config", path, "--set", f"data.path={data}", "--set",
                 "data.overfit=false", "--set", "data.split.folds=4", "--set", "data.split.seed=0", "--set",
                 "phases=[{epochs: 1}]", variables=torchrun(2),
                 before=dict.fromkeys(range(2), messages_alone)) as ranks:
        first, other = both_leave(ranks)
    said = f"validation after step 1: chip {second}: {file}: truncated"
    assert f"train.py: {said}" in other and "chips that validate are not replaced" in other
    assert f"train.py: stopped by rank 1 on host {HOST}: {said}" in first


def test_a_bad_file_in_the_middle_of_a_step_under_the_deepspeed_launcher(path: Path, tmp_path: Path, sample: Path,
                                                                         command: Command) -> None:
    """Its exit status is the launcher's, which kills the other rank a second after one has left, if need be before
    it has said why."""
    data, file = damaged_for_the_fourth(sample, tmp_path / "data")
    result = command("train", "--config", path, "--set", f"data.path={data}", ranks=2)
    assert result.returncode == 2, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("train.py: ")]
    assert said and all(file.name in line and "truncated" in line for line in said), result.stderr
    assert "Traceback" not in result.stderr


def fail_to_draw() -> None:
    from engine.inference import pictures

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "tensorboard")

    pictures.chip_figure = full  # type: ignore[assignment]


def test_what_failed_beside_training_stops_all(path: Path, tmp_path: Path) -> None:
    with started(tmp_path / "log", "train", "--config", path, "--set", "validate.every=1", "--set", "log.chips=1",
                 variables=torchrun(2), before={0: fail_to_draw}) as (first, second):
        assert first.wait() == 1 and "No space left on device: 'tensorboard'" in first.text()
        assert second.wait(45) == 2
        assert f"train.py: stopped by rank 0 on host {HOST}: OSError: " in second.text()
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))  # which would count on pictures and weights


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_named_after_the_timeout(path: Path, tmp_path: Path, frozen: int) -> None:
    with started(tmp_path / "log", "train", "--config", path, "--set", "train.timeout_s=10",
                 variables=torchrun(2)) as ranks:
        ranks[0].until(lambda: bool(history(tmp_path / "run")))
        time.sleep(1)  # both have said since then where they stand
        ranks[frozen].signal(signal.SIGSTOP)
        begin = time.monotonic()
        assert ranks[1 - frozen].wait(55) == 2
        text = ranks[1 - frozen].text()
        assert time.monotonic() - begin > 8  # and not after the 60 s of the recipe
        assert f"stopped by rank {frozen} on host {HOST}, which has not " in text and "Traceback" not in text
        assert re.search("last known in (reading|step)$", text, re.MULTILINE)


def hang(section: str) -> None:
    """The main thread stands for ever, in the second batch, step or validation, or for a disk that takes no checkpoint;
    all others live."""
    from engine.data.loader import Loader
    from engine.inference import chips
    from engine.model.unet import BiomassUNet
    from engine.training import checkpoint

    def stand(*_: object, **__: object) -> None:
        threading.Event().wait()

    def after_the_first(work: Any) -> Any:
        calls = iter([work])
        return lambda *args, **more: next(calls, stand)(*args, **more)

    end_sooner()
    place, name = {"reading": (Loader, "_batch"), "step": (BiomassUNet, "forward"), "saving": (checkpoint, "write"),
                   "validation": (chips, "predict_batch")}[section]
    setattr(place, name, after_the_first(getattr(place, name)) if section != "saving" else stand)


def end_sooner() -> None:
    from engine.base import watch

    watch.GRACE = 3.0


@pytest.mark.parametrize(("section", "world", "hanging", "more"), [
    ("reading", 2, 1, "validate.every=100"), ("step", 2, 1, "validate.every=100"),
    ("saving", 2, 0, "train.zero_stage=2"), ("validation", 1, 0, "validate.every=1")])
def test_a_rank_that_hangs_is_named_with_what_it_was_doing(path: Path, tmp_path: Path, section: str, world: int,
                                                           hanging: int, more: str) -> None:
    """Its main thread hangs, and the process lives; others wait for it in a message."""
    before = {**dict.fromkeys(range(world), end_sooner), hanging: functools.partial(hang, section)}
    with started(tmp_path / "log", "train", "--config", path, "--set", "validate.every=1", "--set", more, "--set",
                 f"train.hang_s.{section}=8", variables=torchrun(world) if world > 1 else [{}], before=before) as ranks:
        assert [rank.wait() for rank in ranks] == [2] * world
    for number, rank in enumerate(ranks):
        text = rank.text()
        assert re.search(rf"stopped by rank {hanging} on host {HOST}, which hangs in {section} for \d+ s$", text,
                         re.MULTILINE), text
        assert "Traceback" not in text
        assert (" in stand\n" in text) == ("most recent call first" in text) == (number == hanging), text


def test_each_batch_of_a_validation_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stood = []

    def predict(*_: object, each: Callable[..., None], **__: object) -> Any:
        for _batch in range(3):
            stood.append(HERE.now)
            each(mock.Mock(), mock.Mock())
        return mock.Mock()

    monkeypatch.setattr(trainer, "predict_chips", predict)
    monkeypatch.setattr(trainer, "average_statistics", mock.Mock())
    trainer.Trainer._evaluate(mock.Mock(stop=StopFlag(Asked())), None)
    assert {name for _, name in stood} == {"validation"} and len(set(stood)) == 3
