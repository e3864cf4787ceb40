"""Training, from a recipe to weights: the one place that composes the rest.  Read `Trainer.run` first.

A run is a list of phases; a phase is a cosine of the learning rate from the weights of the phase before; an epoch
is a pass over the training chips in the plan's order.  State to resume from is (phase, epoch, chips), model
and optimizer; everything random follows from those integers.  Ranks act together: what one cannot do, none does.
In a steady step the host never waits for the device (at ZeRO stage 0; DeepSpeed's other stages wait for it once or
twice): losses stay there until the log reads a window of them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.base.distributed import (
    StopFlag,
    from_rank_0,
    local_world,
    of_all,
    rank,
    share_of_host,
    together,
    world,
)
from engine.base.errors import ConfigError, EngineError
from engine.base.files import hard_link
from engine.base.progress import Progress
from engine.base.sections import HERE
from engine.config import Config, Phase
from engine.data.batch import BadChip, Batch, Request, read_for
from engine.data.forms import open_source
from engine.data.loader import Loader
from engine.data.selection import quarantine
from engine.data.selection.chips import select_chips
from engine.data.selection.quarantine import in_validation
from engine.data.selection.supply import Supply, training_requests
from engine.inference import pictures
from engine.inference.chips import chosen_views, predict_chips
from engine.model import weights
from engine.model.unet import BiomassUNet
from engine.run.background import Background
from engine.run.folder import claim
from engine.run.log import RunLog
from engine.run.profile import Profile
from engine.training import checkpoint, dump
from engine.training.cut import cut, device_memory, explain
from engine.training.engine import make_engine
from engine.training.losses import make_loss
from engine.training.optim import learning_rate, set_learning_rate
from engine.training.shown import Shown
from engine.training.start import starting_model
from engine.training.state import full_state
from engine.training.update.batchnorm import average_statistics
from engine.training.update.ema import Ema
from engine.training.update.loss_scale import LossScale
from engine.training.update.step import Step
from engine.training.window import Window


class Stopped(EngineError):
    """The run was asked to stop and has saved its state."""


class Interrupted(Exception):
    """A validation was asked to stop."""


@dataclass
class State:
    """Where a run stands.  Chips count, and not ranks or micro-batches: so any number of ranks goes on from here."""

    phase: int = 0
    epoch: int = 0  # in the phase, to do next
    chips: int = 0  # of the epoch's order that were trained on
    step: int = 0  # since the run began
    global_batch: int = 0  # chips a step
    best: float = float("inf")  # of the phase: validation RMSE, mean over chips
    best_ema: float = float("inf")  # the same of the average of the weights
    skipped: int = 0  # updates left out because the gradient was not finite
    loss_scale: LossScale = field(default_factory=LossScale)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> State:
        return cls(**{**saved, "loss_scale": LossScale(**saved["loss_scale"])})


class Trainer:
    def __init__(self, config: Config, device: torch.device, profile: Profile | None = None,
                 restart: bool = False):
        self.config, self.device = config, device
        self.folder = config.run_folder
        self.backend = config.data.backend
        if self.backend == "auto":
            self.backend = "gpu" if device.type == "cuda" else "cpu"
        with together():
            self.train_chips, self.val_chips = select_chips(config)
        self.quarantine, whole = None, self.train_chips
        if config.data.bad_chips == "quarantine":
            self.quarantine = quarantine.inspect(config, self.train_chips + self.val_chips, self.val_chips, restart)
            self.train_chips, self.val_chips = map(self.quarantine.kept, (self.train_chips, self.val_chips))
            whole = self.quarantine.whole(self.train_chips)
        with together():
            self.source = open_source(whole, nodata_months=config.data.nodata_months,
                                      cache_gb=config.data.cache_gb, backend=self.backend, need_target=True)
        self.dataset = self.source.dataset
        self.loss = make_loss(config.loss.name, self.dataset.target, **config.loss.options)
        memory = min(of_all(device_memory(device, local_world())))  # all cut alike
        self.sharding = cut(config, self.dataset, world(), rank(), memory)
        self.eval_batch = config.validate_.micro_batch or self.sharding.micro_batch
        self.eval_views = chosen_views(config.validate_.tta)
        self.stop = StopFlag()
        self.background = Background()
        self.checkpoints = checkpoint.Checkpoints(config, self.background)
        self.profile = profile or Profile(None, self.folder)
        self.lock = claim(self.folder, config, restart,
                          {"values": self.source.values, "dataset": self.dataset.dump(pictures=False)})
        self._say(explain(self.sharding, config))
        if config.data.cache_gb and local_world() > 1:
            self._say(f"data.cache_gb: {config.data.cache_gb:g} GB for each rank, "
                      f"{config.data.cache_gb * local_world():g} GB on a host of {local_world()}")

    # The run -------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """Train all phases, or what is left of them.  Returns the last validation's metrics.

        Raises Stopped, with everything saved, where `engine.base.stopping` says so.
        """
        found: tuple[str | None, dict[str, Any]] | None = None
        with together():
            if rank() == 0:
                path, state = self._where_to_begin()
                found = None if path is None else str(path), asdict(state)
        begin, saved = from_rank_0(found)
        resume_from, self.state = None if begin is None else Path(begin), State.from_dict(saved)
        with together():
            if self.quarantine is not None:
                self.quarantine.begin(self.state.step)
        self.log = RunLog(self.folder, self.state.step, validated=not self.state.chips)
        metrics: dict[str, float] = {}
        try:
            while self.state.phase < len(self.config.phases):
                metrics = self._run_phase(self.config.phases[self.state.phase], resume_from)
                resume_from = None
        finally:
            self.background.close()
            self.log.close()
            if self.lock is not None:
                self.lock.close()
        return metrics

    def _where_to_begin(self) -> tuple[Path | None, State]:
        found, batch = checkpoint.find(self.checkpoints.folder), self.sharding.global_batch
        if found is None:
            return None, State(global_batch=batch)
        path, state = found[0], State.from_dict(found[1])
        if state.global_batch != batch:
            raise ConfigError(f"{path} was written with steps of {state.global_batch} chips, the recipe says "
                              f"{batch}: some would be trained on twice; set train.global_batch: {state.global_batch}")
        return path, state

    def _run_phase(self, phase: Phase, resume_from: Path | None) -> dict[str, float]:
        HERE.enter("starting")
        state, config = self.state, self.config
        self.phase_chips = self.train_chips
        if phase.train_on == "all" and not config.data.overfit:
            self.phase_chips = sorted(self.train_chips + self.val_chips, key=lambda chip: chip.id)
        self.steps_per_epoch = self.sharding.steps(len(self.phase_chips))
        with together():
            model = starting_model(config, self.dataset, state.phase, self.device, self._say)
        self.engine, reducer = make_engine(model, config, self.sharding, self.device, self._say)
        self.ema = Ema(self.engine, config.train.ema) if config.train.ema is not None else None
        if resume_from is not None:
            checkpoint.load(self.engine, resume_from, self.ema)
            self._say(f"resumed from {resume_from}")
        train_loader = self._loader(self.sharding.micro_batch, warp=True)
        eval_loader = self._loader(self.eval_batch, warp=False)
        batches = Supply(train_loader, lambda: self._requests(self._step_in_epoch), self.sharding.accumulate,
                         self.quarantine)
        title = f"phase {phase.name}" if len(config.phases) > 1 else "training"
        metrics: dict[str, float] = {}
        with Progress(title, phase.epochs * self.steps_per_epoch, "step", quiet=rank() != 0,
                      done=state.epoch * self.steps_per_epoch + self._step_in_epoch) as progress:
            self.window = Window(self.log, train_loader, progress, self.sharding.global_batch)
            self.step = Step(self.engine, reducer, self.loss, config, self.sharding, state.loss_scale,
                             self.window.shape)
            while state.epoch < phase.epochs:
                metrics = self._run_epoch(phase, batches, eval_loader, progress) or metrics
        self.checkpoints.finish()  # the next phase begins with weights that rank 0 has written
        self.engine.destroy()
        state.phase, state.epoch, state.best, state.best_ema = state.phase + 1, 0, float("inf"), float("inf")
        return metrics

    def _run_epoch(self, phase: Phase, batches: Iterator[Batch], eval_loader: Loader,
                   progress: Progress) -> dict[str, float] | None:
        state, config = self.state, self.config
        lr = learning_rate(phase, config.optimizer, state.epoch)
        set_learning_rate(self.engine.optimizer, lr)
        self.engine.train()
        while self._step_in_epoch < self.steps_per_epoch:
            batch = self._next(batches)
            if self._agreed():
                self._save_and_stop()
            with self.profile.step(state.step):
                taken = self.step.take(state.step, self._micro_batches(batch, batches))
            state.step += 1
            state.chips += self.sharding.global_batch
            if self.ema is not None:
                self.ema.update(state.epoch * self.steps_per_epoch + self._step_in_epoch)
            self.window.add(taken, lr)
            progress.advance(1, self.window.note)
            last = self._step_in_epoch == self.steps_per_epoch
            if state.step % config.log.every == 0 or last:
                self._flush()
            every = config.checkpoint.every_steps
            if every and state.step % every == 0 and not last:
                self._save()
        if self.stop.agreed():
            self._save_and_stop()
        state.epoch, state.chips = state.epoch + 1, 0
        if state.epoch % config.validate_.every and state.epoch < phase.epochs:
            return None
        try:
            metrics = self._validate(phase, eval_loader, progress)
        except Interrupted:  # the epoch is trained and not validated: so is what is saved
            state.epoch, state.chips = state.epoch - 1, self.steps_per_epoch * self.sharding.global_batch
            self._save_and_stop()
        self._save()
        return metrics

    @property
    def _step_in_epoch(self) -> int:
        return self.state.chips // self.sharding.global_batch

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """The next micro-batch; where a rank cannot read its own, all ranks leave before the step."""
        HERE.enter("reading")
        try:
            return next(batches)
        except Exception as error:
            self.stop.failed(error)

    def _agreed(self) -> bool:
        """Whether all stop.  On the way they hear which chips have turned bad."""
        if self.quarantine is None:
            return self.stop.agreed()
        stop = self.stop.agreed(self.quarantine.news())
        self.quarantine.hear(self.stop.told)
        return stop

    def _micro_batches(self, first: Batch, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Those of a step that `first` begins."""
        yield first
        for _ in range(1, self.sharding.accumulate):
            batch = self._next(batches)
            self._agreed()  # whether all could read; a wish to stop waits for the end of the step
            yield batch

    # Batches -------------------------------------------------------------------------------------------------

    def _loader(self, batch_size: int, warp: bool) -> Loader:
        data = self.config.data
        return Loader(self.source, batch_size=batch_size, device=self.device, backend=self.backend, warp=warp,
                      precision=self.config.train.precision, readers=share_of_host(data.readers),
                      threads=share_of_host(data.threads), prefetch=data.prefetch)

    def _requests(self, start: int) -> Iterator[list[Request]]:
        """This rank's micro-batches from step `start` of the epoch to the end of the phase."""
        state, phases = self.state, self.config.phases
        before = sum(phase.epochs for phase in phases[:state.phase])
        return training_requests(self.phase_chips, self.config, self.dataset, self.sharding, self.quarantine,
                                 epochs=range(before + state.epoch, before + phases[state.phase].epochs),
                                 start=start, step=state.step - self._step_in_epoch + start)

    # Validation and saving -----------------------------------------------------------------------------------

    def _validate(self, phase: Phase, loader: Loader, progress: Progress) -> dict[str, float]:
        """Of the weights, and of their average where there is one; the metrics of the weights."""
        shown = Shown(min(self.config.log.chips, len(self.val_chips)), self.device)
        metrics, of_ema = self._evaluate(loader, shown), None
        if self.ema is not None:
            with self.ema.in_place():
                of_ema = self._evaluate(loader)
        HERE.enter("saving")
        self._show(shown)
        self._keep(phase, metrics, progress)
        if self.ema is not None and of_ema is not None:
            with self.ema.in_place():
                self._keep(phase, of_ema, progress, "ema")
        return metrics

    def _evaluate(self, loader: Loader, shown: Shown | None = None) -> dict[str, float]:
        HERE.enter("validation")
        average_statistics(self.engine.module)
        self.engine.eval()

        def seen(batch: Batch, prediction: torch.Tensor) -> None:
            if shown is not None:
                shown.add(batch, prediction)
            HERE.enter("validation")  # the next batch's, also where ranks read
            if self.stop.agreed():
                raise Interrupted

        with torch.compiler.set_stance("force_eager"):  # compiling for validation too would take as long again
            try:
                table = predict_chips(self.engine.module, loader, self.val_chips, micro_batch=self.eval_batch,
                                      tta=self.eval_views, precision=self.config.train.precision, device=self.device,
                                      each=seen)
            except BadChip as bad:
                self.stop.failed(in_validation(bad, self.state.step))
        return table.metrics()

    def _keep(self, phase: Phase, metrics: dict[str, float], progress: Progress, of: str = "") -> None:
        """Log metrics, and export the weights that have them: as the last ones, and the best if they are."""
        state, best = self.state, f"best_{of}" if of else "best"
        # Chips that were trained on do not choose weights
        judged = phase.train_on == "fold" or self.config.data.overfit
        score, kind = metrics["rmse_per_chip"], "validation" if judged else "seen_in_training"
        self.log.scalars(f"{kind}_{of}" if of else kind, state.step, metrics)
        kinds = ["last"]
        if not judged or score < getattr(state, best):
            setattr(state, best, score)
            kinds.append("best")
        kinds = [f"{kind}-{of}" if of else kind for kind in kinds]
        self._export([f"{phase.name}-{kind}" for kind in kinds] + kinds, metrics)
        progress.say(f"epoch {state.epoch}, step {state.step}{f', {of}' if of else ''}: RMSE {score:.2f} "
                     f"{self.dataset.target.unit} (mean over {len(self.val_chips)} chips), pooled "
                     f"{metrics['rmse_pooled']:.2f}, predicting the mean {metrics['rmse_of_mean']:.2f}"
                     f"{'' if judged else ', on chips seen in training'}")

    def _show(self, shown: Shown) -> None:
        predictions, step = shown.reduce(), self.state.step

        def draw_all() -> None:
            for chip, prediction in zip(self.val_chips, predictions):
                try:
                    stack = read_for(Request(chip), self.source.stack, chip)
                except BadChip as bad:
                    raise in_validation(bad, step) from None
                figure = pictures.chip_figure(chip.id, stack, prediction, stack.label[..., 0])
                self.log.picture(f"chips/{chip.id}", step, pictures.pixels(figure))

        if rank() == 0:
            self.background.do(draw_all)

    def _export(self, names: list[str], metrics: dict[str, float]) -> None:
        """Write weights/{name}.safetensors for each name, one file under all of them."""
        model: BiomassUNet = self.engine.module
        state = full_state(self.engine)
        if rank() == 0:
            paths = [self.folder / "weights" / f"{name}.safetensors" for name in names]
            self.checkpoints.before(weights.save_weights, paths[0], state, model.config(),
                                    {**self._notes(), "metrics": json.dumps(metrics)})
            self.checkpoints.before(hard_link, paths[0], paths[1:])

    def _notes(self) -> dict[str, str]:
        """What weights say of themselves."""
        return {"run": self.config.run.name, "step": str(self.state.step), "dataset": json.dumps(self.dataset.dump())}

    def _flush(self) -> None:
        state, skipped = self.state, self.window.flush(self.state.step, self.state.skipped)
        state.skipped += skipped
        if skipped and self.window.skipped_in_a_row >= self.config.train.not_finite:
            again = itertools.islice(self._requests(self._step_in_epoch - 1), self.sharding.accumulate)
            left = dump.leave(self.folder / "dump", state.step - 1, self.engine,
                              self._loader(self.sharding.micro_batch, warp=True).batches(again), self.config,
                              self._notes(), self.step.loss_scale)
            raise dump.diverged(left, self.window.skipped_in_a_row)

    def _save(self) -> None:
        HERE.enter("saving")
        self._flush()  # or a kill before the next line of the log would lose the steps until here
        average_statistics(self.engine.module)
        self.checkpoints.save(self.engine, self.state.step, asdict(self.state), self.ema)

    def _save_and_stop(self) -> None:
        self._save()
        self.checkpoints.finish()
        raise Stopped(f"stopped after step {self.state.step} with everything saved in {self.folder}; "
                      f"the same command goes on from here")

    def _say(self, text: str) -> None:
        if rank() == 0:
            print(text, flush=True)
