"""What a step does where a loss or a gradient is not finite, by two processes at every ZeRO stage; and the same bits
twice."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.base.distributed import join, leave, rank, world
from engine.base.progress import Progress
from engine.config import parse_config
from engine.data.batch import Batch
from engine.data.plan import Sharding
from engine.run.log import RunLog
from engine.training.engine import make_engine
from engine.training.state import full_state
from engine.training.update.loss_scale import LossScale
from engine.training.update.step import Step, Taken, seen_in_gradient
from engine.training.window import Window
from tests.hosts import forks
from tests.training.test_reduction import two_processes


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Conv2d(5, 1, 1)

    def forward(self, images: Tensor, dropped: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(images[:, 0]))))


class Named:
    def __init__(self, name: str):
        self.id = name


def batch(number: int, turn: int) -> Batch:
    """Images of step 2 that the first rank has are NaN; labels of step 1 that the second has, in its last micro-batch,
    make an infinite loss."""
    generator = torch.Generator().manual_seed(10 * number + turn + 100 * rank())
    images = torch.randn(2, 1, 3, 8, 8, generator=generator)
    label = torch.ones(2, 6, 6)
    if number == 2 and rank() == 0:
        images[1, 0, 1, 4, 4] = torch.nan
    if number == 1 and rank() == world() - 1 and turn == 1:
        label *= torch.inf
    chips: list[Any] = [Named(f"{number}-{turn}-{rank()}")]
    return Batch(images, torch.zeros(2, 1, dtype=torch.bool), label, torch.zeros(2), torch.ones(2), chips)


def loss(prediction: Tensor, label: Tensor) -> Tensor:
    """Its gradient is finite where the label is not."""
    return (prediction[:, 0] - 1).square().mean() + label.mean()


def made(stage: int, deterministic: bool = False, precision: str = "fp32") -> tuple[Any, Step]:
    recipe = {"data": {"path": "/none"}, "optimizer": {"lr": 0.01},
              "train": {"zero_stage": stage, "precision": precision, "global_batch": 4 * world(), "micro_batch": 2,
                        "deterministic": deterministic}}
    config, sharding = parse_config(recipe, "a test"), Sharding(2, 2, world(), rank())
    torch.manual_seed(0)
    model: Any = Model()
    engine, reducer = make_engine(model, config, sharding, torch.device("cpu"), lambda text: None)
    return engine, Step(engine, reducer, loss, config, sharding, LossScale(8.0), lambda months: nullcontext())


def take(step: Step, number: int) -> Taken:
    return step.take(number, (batch(number, turn) for turn in range(2)))


def kept(engine: Any) -> dict[str, Tensor]:
    """Weights as far as they are here, and this rank's own statistics; not the number of batches, which changes
    nothing.
    """
    state = {name: value.clone() for name, value in full_state(engine).items() if "tracked" not in name}
    return {**state, **{name: b.clone() for name, b in engine.module.named_buffers() if "running" in name}}


def steps_of_which_two_are_bad(process: int, folder: Path) -> None:
    for stage in (0, 1, 2, 3):
        engine, step = made(stage)
        begun = kept(engine)
        first = take(step, 0)
        good = kept(engine)
        assert any(not torch.equal(good[name], begun[name]) for name in good)
        for number in (1, 2):
            bad = take(step, number)
            assert not torch.isfinite(torch.as_tensor(bad.norm)), (stage, number)
            assert all(torch.equal(value, good[name]) for name, value in kept(engine).items()), (stage, number)
            assert bad.chips == [f"{number}-{turn}-{process}" for turn in range(2)]
            if number == 1:
                assert torch.isfinite(bad.loss) == (process == 0)  # the others learn it by the gradient
        last = take(step, 3)
        after = kept(engine)
        assert any(not torch.equal(after[name], good[name]) for name in good)
        assert all(value.isfinite().all() for value in after.values())
        if process == 0:
            (folder / f"{stage}.json").write_text(json.dumps([float(first.loss), float(last.loss), float(last.norm)]))
        engine.destroy()


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(tmp_path: Path) -> None:
    two_processes(steps_of_which_two_are_bad, tmp_path)
    said = torch.tensor([json.loads((tmp_path / f"{stage}.json").read_text()) for stage in range(4)])
    torch.testing.assert_close(said, said[:1].expand(4, 3), rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_is_seen_in_the_gradient() -> None:
    for value, seen in ((1.0, False), (torch.inf, True), (torch.nan, True)):
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        seen_in_gradient(x.sum() + value).backward()
        assert bool(x.grad.isnan().all()) == seen and bool(x.grad.isnan().any()) == seen  # type: ignore[union-attr]


class Line(RunLog):
    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []

    def steps(self, *_: Any) -> None: ...

    def scalars(self, *_: Any, **__: Any) -> None: ...

    def note(self, *about: Any) -> None:
        self.lines.append(about)


class Waiting:
    wait = 0.0


def test_the_log_names_the_chips_and_counts_what_was_skipped_in_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    log, nan = Line(), float("nan")
    window = Window(log, Waiting(), Progress("x", 20, "step"), 1)  # type: ignore[arg-type]

    def flush(step: int, *norms: float) -> int:
        for number, norm in enumerate(norms, step - len(norms) + 1):
            window.add(Taken(torch.tensor(nan if norm == 0 else 1.0), norm, [f"chip{number}"]), 0.1)
        return window.flush(step, 2)

    assert flush(3, 1.0, nan, 1.0) == 1 and window.skipped_in_a_row == 0
    assert log.lines == [("not_finite", 2, {"chips": ["chip2"]})]
    said = capsys.readouterr().err
    assert "1 of the last 3 updates were skipped" in said and "(3 so far); the last was step 2, of chips chip2" in said
    assert flush(7, nan, 1.0, nan, 0.0) == 3 and window.skipped_in_a_row == 2  # of the last, the loss alone
    assert [line[1] for line in log.lines] == [2, 4, 6, 7]
    assert flush(9, nan, nan) == 2 and window.skipped_in_a_row == 4
    assert flush(10, 1.0) == 0 and window.skipped_in_a_row == 0 and not flush(10)


def fp16_down_to_1() -> None:
    """As a scale of 1 from the start: the optimizer is not told of an old one."""
    squares = []
    for scale in (1.0, 2.0):
        engine, step = made(0, precision="fp16")
        for number, value in enumerate((scale, 1.0)):
            step._scale.value = value
            take(step, 3 * number)
            assert step.loss_scale == value
        squares.append(engine.optimizer.state[engine.module.head.weight]["exp_avg_sq"].clone())
        engine.destroy()
    torch.testing.assert_close(*squares, rtol=0.01, atol=0)


def twice() -> None:
    join("cpu")
    fp16_down_to_1()
    torch.set_num_threads(2)
    runs = []
    for _ in range(2):
        engine, step = made(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        take(step, 0), take(step, 3)
        runs.append(kept(engine))
        with pytest.raises(RuntimeError, match="deterministic"):  # of what has no other way
            torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), accumulate=False)
        engine.destroy()
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    made(0)[0].destroy()
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    leave()


@pytest.mark.slow
def test_the_same_bits_twice_and_a_loss_scale_that_comes_down_to_1() -> None:
    process = forks().Process(target=twice)
    process.start()
    process.join(120)
    assert process.exitcode == 0
