"""What a run leaves that stops because its steps are not finite: the last of them, whole, and how to take it again.

`dump/step-N/` holds `model.safetensors` (weights, as the step met them: none of those before it was applied),
`rank-R.safetensors` (each rank's micro-batches), `config.yaml`, and `dump.json`: seeds, chips, names of what is not
finite, versions and the command.  `replay` takes the step again in one process, without the data, DeepSpeed and
compiled blocks, and says where the first number comes up that is not finite.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import BaseModel, Field
from torch import Tensor, nn

from engine.base.distributed import of_all, rank, together, world
from engine.base.errors import DataError, EngineError
from engine.base.files import write_text
from engine.base.texts import read_yaml
from engine.config import Config, parse_config
from engine.data.batch import Batch
from engine.data.dataset import Dataset, described
from engine.data.loader import DTYPES
from engine.model.compilation import checkpoint_regions
from engine.model.tensors import read_metadata, read_tensors, write_tensors
from engine.model.weights import load_model, save_weights
from engine.training.losses import make_loss
from engine.training.start import for_training
from engine.training.state import full_state
from engine.training.update.step import seed_of, seen_in_gradient

ABOUT, MODEL, RECIPE = "dump.json", "model.safetensors", "config.yaml"
PARTS = ("images", "dropped", "label")


def leave(folder: Path, step: int, engine: Any, batches: Iterable[Batch], config: Config, notes: dict[str, str],
          loss_scale: float) -> Path:
    """Write `folder/step-N` on all ranks (a collective).  Returns it.

    step: which the batches are of, counted from 0.  notes: of the weights, as a run writes them.
    Raises EngineError where the disk does not take it.
    """
    path = folder / f"step-{step + 1:08d}"
    state, model = full_state(engine), engine.module.config()
    chips = []
    with together(), _on_disk(path):
        tensors = {}
        for turn, batch in enumerate(batches):
            images = batch.images.permute(0, 1, 3, 4, 2)  # as they lie in memory
            for name, value in zip(PARTS, (images, batch.dropped, batch.label)):
                tensors[f"{turn}.{name}"] = value
            chips.append([chip.id for chip in batch.chips])
        write_tensors(path / f"rank-{rank()}.safetensors", tensors, {})
    chips_of_all = of_all(chips)
    with together(), _on_disk(path):
        if rank() == 0:
            save_weights(path / MODEL, state, model, notes)
            write_text(path / RECIPE, yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True))
            write_text(path / ABOUT, json.dumps({
                "step": step + 1, "command": f"python launch/train.py --replay {path}",
                "seeds": [seed_of(config, step, r) for r in range(world())], "loss_scale": loss_scale,
                "chips": chips_of_all, "state": list(state),
                "state_not_finite": [name for name, value in state.items() if not value.isfinite().all()],
                "versions": {"torch": torch.__version__, "device": str(engine.device)},
            }, indent=1) + "\n")
    return path


@contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EngineError(f"training has diverged: its last steps had a loss or a gradient that is not finite "
                          f"(train.not_finite), and {path} cannot be written ({error}); make room, and the same "
                          f"command comes to it again, or lower optimizer.lr, or set train.precision: fp32") from None


def diverged(path: Path, skipped: int) -> EngineError:
    """The end of a run that has left `path`."""
    return EngineError(f"training has diverged: the last {skipped} steps had a loss or a gradient that is not finite "
                       f"(train.not_finite); the last of them is in {path}, and `python launch/train.py --replay "
                       f"{path}` says where in the model it begins; the last good checkpoint is in the run's folder; "
                       f"lower optimizer.lr, or set train.precision: fp32")


def replay(folder: Path, device: torch.device) -> Iterator[str]:
    """Take the dumped step again on `device`; lines for people.

    Raises DataError or WeightsError where `folder` holds no whole dump.
    """
    about, config = _read(folder)
    model = load_model(folder / MODEL)
    dataset = described(read_metadata(folder / MODEL), str(folder / MODEL))
    for_training(model, config, device)
    model.to(device).train()
    if config.train.checkpoint_activations:  # without it there may be too little memory
        checkpoint_regions(model)
    loss_of = make_loss(config.loss.name, dataset.target, **config.loss.options)
    yield f"step {about.step} of {config.run.name}, by {len(about.seeds)} ranks"
    for r, (seed, turns) in enumerate(zip(about.seeds, about.chips)):
        tensors = _batches(folder / f"rank-{r}.safetensors", turns, dataset, DTYPES[config.train.precision])
        torch.manual_seed(seed)
        for turn, chips in enumerate(turns):
            images, dropped, label = (tensors[f"{turn}.{name}"] for name in PARTS)
            bad = [] if images.isfinite().all() else ["images"]  # of a label it is what has no target
            with _first_not_finite(model) as found, _autocast(config, device):
                prediction = model(images.permute(0, 1, 4, 2, 3).to(device), dropped)
            loss = loss_of(prediction, label.to(device))
            bad += [f"the output of {name}" for name in found[:1]]
            yield (f"rank {r}, micro-batch {turn}: chips {', '.join(chips)}: loss {float(loss.detach()):g}; "
                   f"not finite: {', '.join(bad) or 'nothing up to here'}")
            seen_in_gradient(loss * about.loss_scale / (len(about.seeds) * len(turns))).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(list(gradients.values())) / about.loss_scale
    names = [name for name, grad in gradients.items() if not grad.isfinite().all()]
    more = f"of {len(names)} of {len(gradients)} parameters, the last {names[-1]}" if names else "nothing"
    yield f"gradient: norm {float(norm):g}; not finite: {more}"


class _About(BaseModel):
    """What `replay` needs of dump.json."""

    step: int
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]]  # of each rank
    chips: list[list[Annotated[list[str], Field(min_length=1)]]]  # of each rank and micro-batch
    loss_scale: Annotated[float, Field(gt=0)]


def _read(folder: Path) -> tuple[_About, Config]:
    try:
        about = _About.model_validate_json((folder / ABOUT).read_bytes())
        recipe = read_yaml(folder / RECIPE)
    except (OSError, ValueError):
        raise DataError(f"{folder}: not a dump, or a damaged one ({ABOUT} or {RECIPE} cannot be read); give a folder "
                        f"RUN/dump/step-N") from None
    return about, parse_config(recipe, str(folder / RECIPE))


def _batches(path: Path, turns: list[list[str]], dataset: Dataset, dtype: torch.dtype) -> dict[str, Tensor]:
    """PARTS of each micro-batch, of whose chips there are names, as the model takes them."""
    tensors, _ = read_tensors(path)
    months, side = dataset.months, dataset.tile
    for turn, chips in enumerate(turns):
        b = len(chips)
        wanted = ((b, months, side, side, dataset.channels), dtype), ((b, months), torch.bool), \
            ((b, side, side), torch.float32)
        for name, (shape, kind) in zip(PARTS, wanted):
            found = tensors.get(f"{turn}.{name}")
            if found is None or found.shape != shape or found.dtype != kind:
                raise DataError(f"{path}: has no {turn}.{name} of {b} chips: not a rank's batches of this dump; copy "
                                f"the whole folder again")
    return tensors


@contextmanager
def _first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Names of modules whose output is not finite, in the order in which they finish."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            outputs = [o.detach() for o in (output if isinstance(output, (list, tuple)) else [output])
                       if isinstance(o, Tensor) and o.is_floating_point()]
            if not all(o.isfinite().all() for o in outputs):
                found.append(name or "the model")
        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    yield found
    for handle in handles:
        handle.remove()


def _autocast(config: Config, device: torch.device) -> Any:
    precision = config.train.precision
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])
