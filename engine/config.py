"""Recipes: YAML in, one validated `Config` out.

A recipe is a YAML file.  `extends: other.yaml` (a path relative to the file) starts from another recipe and
overrides it key by key; `--set a.b=c` overrides again.  Unknown keys are refused with the nearest known one, so a
typo never trains in silence.  Every field is documented where it stands, below.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.base.errors import ConfigError
from engine.base.files import place
from engine.base.texts import parse_yaml, read_yaml
from engine.base.values import AsSaid

Positive = Annotated[int, Field(gt=0, lt=2**31)]
NotNegative = Annotated[int, Field(ge=0, lt=2**32)]  # seeds: NumPy takes no more
Few = Annotated[int, Field(gt=0, le=1024)]
Probability = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=100)]  # of a folder or file; never `..`
Place = Annotated[str, AfterValidator(place)]  # of a file or folder


class Section(AsSaid, BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Run(Section):
    name: Name = "run"  # the run lives in {folder}/{name}
    folder: Place = "runs"
    seed: NotNegative = 0  # of weights, order and augmentation


class Split(Section):
    """Which chips validate.  `kfold` is the winner's; `stratified` balances missing months × biomass over folds;
    `file` reads a JSON list of folds as `launch/prepare.py splits` writes it."""

    scheme: Literal["kfold", "stratified", "file"] = "kfold"
    folds: Annotated[int, Field(ge=2)] = 10
    fold: NotNegative = 0
    seed: NotNegative = 314159
    path: Place | None = None  # with scheme `file`

    @model_validator(mode="after")
    def _consistent(self) -> Split:
        if self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} does not exist in {self.folds} folds: give 0..{self.folds - 1}")
        if (self.path is None) == (self.scheme == "file"):
            raise ValueError("path belongs to scheme 'file', and only to it")
        return self


class Data(Section):
    path: Place  # a folder of TIFFs, or a packed store
    # The description of what lies there: a built-in one (engine/data/datasets) or a path; the data's own wins over it
    dataset: Place = "biomassters"
    split: Split = Split()
    chips: list[str] | None = None  # only these chips (all when null)
    overfit: bool = False  # train and validate on all chips: to see that a model can learn at all
    nodata_months: Literal["fail", "mask"] = "fail"  # months whose files hold no value: an error, or left out
    backend: Literal["auto", "cpu", "gpu"] = "auto"  # where batches are made; auto: where the model is
    # Threads of a host, shared by its ranks; auto: one a core, at most 8 a rank.  Readers read files ahead and decode
    # packed stores on a CPU; threads are of DALI's CPU operators (TIFFs and lossless stores)
    readers: Few | Literal["auto"] = "auto"
    threads: Few | Literal["auto"] = "auto"
    prefetch: Few = 2  # batches prepared ahead
    cache_gb: Annotated[float, Field(ge=0, le=1e6)] = 0.0  # memory, of each rank, to keep stored chips in
    # quarantine: check all before the first step and leave bad ones out; replace those of training that turn bad later
    bad_chips: Literal["fail", "quarantine"] = "fail"
    verify: bool = False  # check sizes and checksums of every file before the first step


class Augment(Section):
    """Defaults: the 1st-place solution's."""

    hflip: Probability = 0.5
    rot90: bool = True  # k uniform in 0..3
    rotate: Probability = 0.7  # chance of a rotation by an angle uniform in ±degrees
    degrees: Annotated[float, Field(ge=0, le=180)] = 45.0
    centre_jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.1  # of the side, either way, per axis
    month_dropout: Probability = 0.5  # chance that a chip loses months
    drop_month: Probability = 0.3  # chance of each month then; never all
    # Among each `group` of successive chips, kept months are brought to a multiple of `months_step`, so that batches
    # come in few shapes; up or down at random, so that the chance of a month stays as above.  1: left as drawn.
    group: Annotated[int, Field(ge=1, le=64)] = 8
    months_step: Annotated[int, Field(ge=1, le=64)] = 12


class Model(Section):
    backbone: str = "tf_efficientnetv2_l.in21k"  # any timm model with features_only
    decoder_channels: list[Annotated[int, Field(gt=0, le=1 << 14)]] = [384, 368, 352, 336, 320]
    pretrained: bool | Place = False  # true: timm's weights from its hub; a path: a local file of them
    attention: Literal["auto", "triton", "compile", "reference"] = "auto"  # which month attention; see kernels/
    skip_dropped_months: bool = True  # the encoder sees kept months only; false: the winner's way
    # Bias of the head of a fresh model, in the target's unit; near the mean, learning starts sooner
    initial_prediction: float = 0.0
    weights: Place | None = None  # start from these (run folder, .safetensors, or the winner's .pth)


class Loss(Section):
    name: str = "per_chip_rmse"
    options: dict[str, Any] = {}


class Optimizer(Section):
    """AdamW; weight decay leaves 1-D parameters (norms, biases) alone."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip: Annotated[float, Field(ge=0)] = 5.0  # gradient norm; 0 does not clip


class Phase(Section):
    """One cosine run of the learning rate with a fresh optimizer, from the weights of the phase before."""

    epochs: Positive
    name: Name = "main"
    lr: Annotated[float, Field(gt=0)] | None = None  # null: optimizer.lr
    min_lr: Annotated[float, Field(ge=0)] | None = None  # null: max(lr / 10, 5e-5), never above lr
    train_on: Literal["fold", "all"] = "fold"  # all: the validation chips too
    # Which weights of the phase before; of train.ema those that end so
    start_from: Literal["best", "last", "best-ema", "last-ema"] = "best"


class Hang(Section):
    """Seconds after which a rank that does not get on hangs: all ranks say which one it is and in what, and end."""

    starting: Positive = 1800  # setting up; where chips are checked, one chip
    reading: Positive = 600  # waiting for a micro-batch of the loader
    step: Positive = 1800  # a micro-batch forward and backward; the first of a shape compiles for minutes
    validation: Positive = 1800  # a batch, in one view
    saving: Positive = 1800  # copying, and waiting for what was to be written before


class Train(Section):
    global_batch: Annotated[int, Field(gt=0, le=1 << 20)] = 16  # chips a step, over all ranks
    # Chips a rank and forward pass, which is also what BatchNorm sees as one batch; the global batch is made of as many
    # as it takes.  auto: all of a rank's share, or as much of it as fits into memory
    micro_batch: Positive | Literal["auto"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"  # autocast; parameters stay float32
    zero_stage: Literal[0, 1, 2, 3] = 0
    device: Literal["auto", "cpu", "gpu"] = "auto"  # auto: gpu where there is one
    # torch.compile of the model's blocks, not at zero_stage 3 (see engine/model/compilation.py); auto: on a GPU.  On a
    # CPU it gains nothing over the model's own lean operators (benchmarks/results/model-cpu.md)
    compile: bool | Literal["auto"] = "auto"
    checkpoint_activations: bool = False  # less memory, a third more work: blocks are recomputed in the backward
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"  # in which gradients travel between ranks
    # Decay of an average of the weights over steps, validated beside them, saved as weights/{best,last}-ema; null: none
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    deterministic: bool = False  # the same bits from run to run on one machine; on a GPU slower
    # Steps in a row whose loss or gradient is not finite, that stop the run and leave RUN/dump; before that their
    # updates are left out.  More than the 16 in which fp16's loss scale may come down from where it begins
    not_finite: Positive = 20
    timeout_s: Positive = 600  # how long ranks wait to meet, and for one of which nothing is heard: frozen, cut off
    hang_s: Hang = Hang()  # how long they wait for one that is heard of, and does not get on


class Validate(Section):
    every: Positive = 1  # epochs; the last one of a phase always
    micro_batch: Positive | None = None  # chips a rank and forward pass; null: as in training
    tta: list[Literal["id", "h", "v", "hv", "t", "r90", "r270", "a", "d4"]] = ["id"]  # engine.inference.chips.VIEWS


class Checkpoint(Section):
    every_steps: Positive | None = None  # besides the end of every epoch that validates
    keep: Positive = 2
    failures: Positive = 3  # in a row, as on a full disk, that stop the run; before that it goes on without


class Log(Section):
    every: Positive = 20  # steps; the only time a step waits for the device
    chips: NotNegative = 4  # validation chips shown as pictures


class Config(Section):
    data: Data
    run: Run = Run()
    augment: Augment = Augment()
    model: Model = Model()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    phases: Annotated[list[Phase], Field(min_length=1)] = [Phase(epochs=100)]
    train: Train = Train()
    validate_: Validate = Field(Validate(), alias="validate")
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    deepspeed: dict[str, Any] = {}  # merged into the DeepSpeed config; what the engine decides is refused

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ValueError(f"phases: names must differ, found {names}")
        if self.train.ema is None and any(phase.start_from.endswith("-ema") for phase in self.phases[1:]):
            raise ValueError("phases: start_from an average needs train.ema, its decay, such as 0.999")
        return self

    @property
    def run_folder(self) -> Path:
        return Path(self.run.folder) / self.run.name

    def dump(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)


def load_config(path: Path | str, overrides: list[str] | None = None) -> Config:
    """Read a recipe, its ancestors and `a.b=c` overrides.  Raises ConfigError naming the file and the key."""
    path = Path(path)
    raw = _read_recipe(path, ())
    for item in overrides or []:
        _override(raw, item)
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], source: str) -> Config:
    """Validate a plain dict.  Raises ConfigError naming `source` and every wrong key."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(item) for item in _joined(error.errors())]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def _read_recipe(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise ConfigError(f"{path}: extends itself through {' -> '.join(map(str, seen))}; break the circle")
    try:
        raw = read_yaml(path)
    except FileNotFoundError:
        known = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; {path.parent} has {', '.join(known)}" if known else ""
        by = f" (named by extends in {seen[-1]})" if seen else ""
        raise ConfigError(f"{path}: no such recipe{by}{hint}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a recipe, a YAML file") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not a YAML file: {error}") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, found {type(raw).__name__}")
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    return _merged(_read_recipe((path.parent / str(parent)).resolve(), (*seen, path)), raw)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _override(raw: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {item}: write it as key.subkey=value")
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {item}: {parent} is not a section")
        node = child
    try:
        node[last] = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"--set {item}: the value is not YAML: {error}") from None


def _joined(errors: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """A key that takes one of several kinds of value fails once for each: together they are one error."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for error in errors:
        last = error["loc"][-1] if error["loc"] else ""
        kinds = isinstance(last, str) and error["type"] not in ("extra_forbidden", "missing") and \
            (last in ("bool", "int", "float", "str") or "[" in last or "-" in last)  # a kind's name, not a key's
        place = error["loc"][:-1] if kinds else error["loc"]
        if kinds and place in found:
            found[place]["msg"] += f", or {error['msg'].removeprefix('Input should be ')}"
        else:
            found[(*place, error["type"]) if not kinds else place] = {**error, "loc": place}
    yield from found.values()


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    if error["type"] == "missing":
        return f"{where!r} must be given"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (found {error['input']!r})" if where and error["type"] != "value_error" else \
        f"{where}: {message}".removeprefix(": ")


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        if isinstance(part, int):
            continue
        field = next((f for name, f in model.model_fields.items() if part in (name, f.alias)), None)
        inner = field.annotation if field else None
        if part == "phases":
            inner = Phase
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return [f.alias or name for name, f in model.model_fields.items()]
