"""The description of a data set: its sensors, bands, steps of time, ranges and target.  All else follows from it.

A description is a YAML file.  `engine/data/datasets/` holds those that come with the engine; a recipe names one of
them, or a path, in `data.dataset`; a data folder's own `dataset.yaml`, and a packed store's manifest, win over that.

Shape legend used throughout `engine`: B chips, T steps ("months"), C bands, H rows, W columns.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, StringConstraints, ValidationError, model_validator

from engine.base.errors import DataError
from engine.base.texts import parse_json, read_yaml
from engine.base.values import AsSaid

BUILT_IN = Path(__file__).with_name("datasets")
FILE = "dataset.yaml"  # a data folder's own description
LABEL_DTYPE = np.dtype("<f4")  # of labels and maps, whatever the files have
NO_TARGET = 1e38  # what NaN in a label is for DALI's warp: 0 × NaN would reach pixels on which it has no weight
CODE_ZERO = 32768  # the 16-bit code of 0 where a sensor's values are signed

Name = Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z][\w.-]*$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Pattern = Annotated[str, StringConstraints(pattern=r"^[^/\\\x00]+$", max_length=128)]  # a file's name, in its folder
Numbers = tuple[float, ...]
Dtype = Literal["uint8", "uint16", "int16", "float32"]


class Section(AsSaid):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    # By fields: pydantic would also compare the arrays that are kept beside them
    def _fields(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in type(self).model_fields)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Section) and type(self) is type(other) and self._fields() == other._fields())

    def __hash__(self) -> int:
        return hash(self._fields())


class Folders(Section):
    """Where files lie under a data folder; all in the folder itself where none of these is there."""

    train: Name = "train_features"
    test: Name = "test_features"
    target: Name = "train_target"
    test_target: Name = "test_target"


class Sensor(Section):
    """One instrument's images, a file a chip and step (`static`: a file a chip): [tile, tile, bands] of `dtype`."""

    name: Name
    file: Pattern  # with {chip} and, unless static, {step} (its number, from 0; {step:02d} with leading zeros)
    bands: Annotated[tuple[Text, ...], Field(min_length=1, max_length=64)]
    low: Numbers  # of each band: what becomes 0
    high: Numbers  # what becomes 1
    dtype: Dtype = "float32"
    unit: str = ""
    nodata: float | None = None  # a value that means nothing was seen; becomes 0, as `low` does
    packed_step: Annotated[float, Field(gt=0)] | None = None  # float32: packed stores keep whole steps of this
    static: bool = False  # one image for all steps: elevation, climate

    @model_validator(mode="after")
    def _consistent(self) -> Sensor:
        _distinct(self.bands, "bands")
        _placeholders(self.file, step=not self.static)
        for key in ("low", "high"):
            if len(getattr(self, key)) != len(self.bands):
                raise ValueError(f"{key} has {len(getattr(self, key))} numbers for {len(self.bands)} bands")
        for what, limit in [("nodata", self.nodata or 0.0), *(("high", high) for high in self.high),
                            *(("low", low) for low in self.low)]:
            _held("float32", what, limit)
        for band, low, high in zip(self.bands, self.low, self.high):
            if not np.float32(low) < np.float32(high):
                raise ValueError(f"band {band}: low {low:g} is not below high {high:g}")
            span = (high - low) / (self.packed_step or 1)
            if not 1e-30 < span < 1e30:  # what is divided by, in float32
                raise ValueError(f"band {band}: low {low:g} and high {high:g} are too close or too far apart for "
                                 f"float32{f' in steps of {self.packed_step:g}' if self.packed_step else ''}")
        if self.packed_step is not None and self.dtype != "float32":
            raise ValueError(f"packed_step belongs to float32: {self.dtype} is packed as it is")
        if self.dtype != "float32":
            for what, value in [("nodata", self.nodata or 0.0), *(("low", low) for low in self.low)]:
                _held(self.dtype, what, value)
        elif self.packed_step is not None:
            for low in self.low:
                steps = low / self.packed_step
                if abs(steps - round(steps)) > 1e-4 or not -CODE_ZERO < steps < CODE_ZERO:
                    raise ValueError(f"low {low:g} is no whole number of steps of {self.packed_step:g} within ±32767")
        return self

    # What follows: arrays are float32 [bands] unless said otherwise

    @functools.cached_property
    def zero(self) -> np.ndarray:
        return np.array(self.low, np.float32)

    @functools.cached_property
    def span(self) -> np.ndarray:
        return np.array(self.high, np.float32) - self.zero

    @functools.cached_property
    def values(self) -> np.dtype[Any]:
        """dtype of the files and of arrays read from them."""
        return np.dtype(self.dtype).newbyteorder("<")

    @functools.cached_property
    def absent(self) -> np.ndarray:
        """[bands] of `values`: what stands where there is no image.  Scales to 0, or is nodata, which does."""
        fill = self.low if self.nodata is None else (self.nodata,) * len(self.bands)
        return np.array(fill, self.values)

    @property
    def coded(self) -> bool:
        """Whether packed stores may hold it in 16-bit codes."""
        return self.dtype != "float32" or self.packed_step is not None

    @property
    def code_step(self) -> float:
        """Between neighbouring codes; 1 for integers."""
        return self.packed_step or 1

    @property
    def code_zero(self) -> int:
        """The code of the value 0."""
        return 0 if self.dtype in ("uint8", "uint16") else CODE_ZERO

    @property
    def code_nodata(self) -> int | None:
        """The code that means nodata; None where every code is a value."""
        if self.nodata is None:
            return None
        return 0 if self.dtype == "float32" else int(self.nodata) + self.code_zero

    @functools.cached_property
    def code_low(self) -> np.ndarray:
        """[bands] int64: the codes of `low`."""
        return np.rint(self.zero / self.code_step).astype(np.int64) + self.code_zero

    @functools.cached_property
    def code_span(self) -> np.ndarray:
        """`span` in codes."""
        return self.span / self.code_step


class Target(Section):
    """What is predicted: a file a chip, [tile, tile] of `dtype`."""

    name: Text
    unit: str
    file: Pattern  # with {chip}
    dtype: Dtype = "float32"
    nodata: float | None = None  # a value that means there is no target: left out of losses and metrics
    ignore_above: float | None = None  # pixels of this and more are left out of the loss, unless loss.options says else

    @model_validator(mode="after")
    def _consistent(self) -> Target:
        _placeholders(self.file, step=False)
        _held(self.dtype, "nodata", self.nodata or 0.0)
        return self

    def hide_nodata(self, label: np.ndarray) -> None:
        """NaN, in place, where a label (float32, as in its file) is nodata."""
        if self.nodata is not None:
            label[label == np.float32(self.nodata)] = np.nan


class Picture(Section):
    """A way to show an image: one band in grey, three as red, green and blue, two and their difference."""

    title: Text
    sensor: Name
    bands: Annotated[tuple[Text, ...], Field(min_length=1, max_length=3)]
    clouds: Text | None = None  # the band that is lowest, on average, in the step to be shown
    low: Numbers | None = None  # what is black, in each colour; without, the first percentile of all
    high: Numbers | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Picture:
        colours = 1 if len(self.bands) == 1 else 3
        if (self.low is None) != (self.high is None) or any(
                len(limit) != colours for limit in (self.low, self.high) if limit is not None):
            raise ValueError(f"low and high go together, with {colours} number{'s' if colours > 1 else ''} each")
        if not all(low < high for low, high in zip(self.low or (), self.high or ())):
            raise ValueError("low has to be below high in each colour")
        return self


class Dataset(Section):
    """A whole description.  `steps`: what one image of the series stands for, in order."""

    name: Name
    tile: Annotated[int, Field(ge=32, le=512, multiple_of=32)]  # pixels a side
    pixel_metres: Annotated[float, Field(gt=0)]
    steps: Annotated[tuple[Text, ...], Field(min_length=1, max_length=64)]
    sensors: Annotated[tuple[Sensor, ...], Field(min_length=1)]
    target: Target
    folders: Folders = Folders()
    pictures: tuple[Picture, ...] = ()  # the first of which there is anything is shown; without, the first bands

    @model_validator(mode="after")
    def _consistent(self) -> Dataset:
        _distinct(self.steps, "steps")
        _distinct([sensor.name for sensor in self.sensors], "sensors' names")
        _distinct([self.folders.train, self.folders.test], "folders: train and test")
        _apart([*(sensor.file for sensor in self.sensors), self.target.file])
        if all(sensor.static for sensor in self.sensors):
            raise ValueError("sensors: all are static, and none has an image a step")
        for picture in self.pictures:
            known = {sensor.name: sensor.bands for sensor in self.sensors}
            _known(picture.sensor, known, "pictures: sensor")
            for band in (*picture.bands, *([picture.clouds] if picture.clouds else [])):
                _known(band, known[picture.sensor], f"pictures: band of {picture.sensor}")
        return self

    @property
    def months(self) -> int:
        """T."""
        return len(self.steps)

    @functools.cached_property
    def bands(self) -> tuple[str, ...]:
        """The model's input channels, in order."""
        return tuple(band for sensor in self.sensors for band in sensor.bands)

    @property
    def channels(self) -> int:
        """C."""
        return len(self.bands)

    def shape(self, sensor: Sensor) -> tuple[int, int, int]:
        """Of an image."""
        return self.tile, self.tile, len(sensor.bands)

    def feature_name(self, chip: str, sensor: int, step: int) -> str:
        return self.sensors[sensor].file.format(chip=chip, step=step)

    def label_name(self, chip: str) -> str:
        return self.target.file.format(chip=chip)

    @functools.cached_property
    def names(self) -> tuple[re.Pattern[str], ...]:
        """Of each sensor's files and, last, the labels': groups `chip` and `step`."""
        return tuple(map(_regex, (*(sensor.file for sensor in self.sensors), self.target.file)))

    def dump(self, pictures: bool = True) -> dict[str, Any]:
        """As YAML and JSON hold it; with or without what is only for people to look at."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude=None if pictures else {"pictures"})

    def alike(self, other: Dataset) -> bool:
        """Whether both describe the same data; how they are pictured does not count."""
        return self is other or self.dump(pictures=False) == other.dump(pictures=False)

    def __hash__(self) -> int:
        return hash((self.name, self.steps, self.bands))


def load_dataset(name: str | Path) -> Dataset:
    """The description of that name among the built-in ones, or at that path.

    Raises DataError where there is none, or one that does not hold.
    """
    known = sorted(path.stem for path in BUILT_IN.glob("*.yaml"))
    return _built_in(str(name)) if str(name) in known else _load(Path(name), known)


@functools.cache
def _built_in(name: str) -> Dataset:
    return _load(BUILT_IN / f"{name}.yaml", [])


def _load(path: Path, known: list[str]) -> Dataset:
    try:
        raw = read_yaml(path)
    except (OSError, UnicodeDecodeError) as error:
        close = difflib.get_close_matches(path.stem, known, n=1)
        raise DataError(f"data set description {path}: cannot be read ({getattr(error, 'strerror', None) or error}); "
                        f"give a file, or one of the built-in {', '.join(known)}"
                        + (f"; is it {close[0]!r}?" if close else "")) from None
    except ValueError as error:
        raise DataError(f"{path}: is no YAML ({error})") from None
    return parse_dataset(raw, str(path))


def parse_dataset(raw: Any, source: str) -> Dataset:
    """A description from what YAML or JSON gave.  Raises DataError that names the key, and `source`."""
    if not isinstance(raw, dict):
        raise DataError(f"{source}: is no data set description (a mapping with name, tile, steps, sensors, target …)")
    try:
        return Dataset.model_validate(raw)
    except ValidationError as error:
        told, found = [], error.errors()
        for one in found:
            deeper = any(len(other["loc"]) > len(one["loc"]) and other["loc"][:len(one["loc"])] == one["loc"]
                         for other in found)
            if one["type"] == "too_short" and deeper:
                continue  # pydantic does not count what it refused
            key = ".".join(str(part) for part in one["loc"]) or "the description"
            text = one["msg"].removeprefix("Value error, ")
            if one["type"] == "string_pattern_mismatch":
                text = ("has to be a file's name, without folders" if key.endswith("file") else
                        "has to be a name of letters, digits, '.', '_' and '-', beginning with a letter or digit")
            if one["type"] == "extra_forbidden":
                text = "is not a key of a description (docs/datasets.md lists them)"
            told.append(f"{key}: {text}")
        raise DataError(f"{source}: {'; '.join(told[:4])}") from None


def described(notes: Mapping[str, str], source: str) -> Dataset:
    """What weights were trained on, by the notes in their file; those of the challenge's winner have none.

    Raises DataError where the note is damaged.
    """
    if "dataset" not in notes:
        return load_dataset("biomassters")
    try:
        raw = parse_json(notes["dataset"])
    except ValueError:
        raise DataError(f"{source}: its note 'dataset' is damaged; export the weights again") from None
    return parse_dataset(raw, f"{source}, dataset")


def differences(was: Dataset, now: Dataset) -> list[str]:
    """Where data of `now` do not fit what was trained on `was`: sensors, bands, their ranges, steps, pixels.

    Empty: they do.  File names, folders and the target may differ.
    """
    told = []
    for ours, theirs, what in ((was.steps, now.steps, "steps"),
                               ([s.name for s in was.sensors], [s.name for s in now.sensors], "sensors")):
        if list(ours) != list(theirs):
            told.append(f"{what} {', '.join(theirs)} instead of {', '.join(ours)}")
    if was.tile != now.tile:
        told.append(f"tiles of {now.tile} pixels instead of {was.tile}")
    if was.pixel_metres != now.pixel_metres:
        told.append(f"pixels of {now.pixel_metres:g} m instead of {was.pixel_metres:g}")
    for mine, other in zip(was.sensors, now.sensors):
        if mine.bands != other.bands:
            at = next((i for i, (a, b) in enumerate(zip(mine.bands, other.bands)) if a != b),
                      min(len(mine.bands), len(other.bands)))
            a, b = (bands[at] if at < len(bands) else "no band" for bands in (mine.bands, other.bands))
            told.append(f"{mine.name}: band {at + 1} is {b} instead of {a}")
            continue
        for band, *was_range, low, high in zip(mine.bands, mine.low, mine.high, other.low, other.high):
            if was_range != [low, high]:
                told.append(f"{mine.name} {band}: range {low:g} to {high:g} instead of {was_range[0]:g} to "
                            f"{was_range[1]:g}")
        if mine.static != other.static:
            told.append(f"{mine.name}: {'one image a step' if mine.static else 'one image for all steps'} instead of "
                        f"{'one for all' if mine.static else 'one a step'}")
    return told


def _distinct(names: Any, what: str) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(f"{what}: {', '.join(twice)} stand there twice")


def _held(dtype: str, what: str, value: float) -> None:
    """Raises ValueError where `dtype` does not hold `value`."""
    if dtype == "float32":
        if abs(value) > float(np.finfo(np.float32).max):
            raise ValueError(f"{what} {value:g} is beyond float32")
    elif not (value == int(value) and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max):
        raise ValueError(f"{what} {value:g} is no {dtype}")


def _known(name: str, known: Any, what: str) -> None:
    if name not in known:
        raise ValueError(f"{what} {name!r} is none of {', '.join(known)}")


_FIELD = re.compile(r"\{(?:(?P<chip>chip)|step(?::0(?P<digits>[1-9])d)?)\}")


def _placeholders(pattern: str, step: bool) -> None:
    found = ["chip" if match["chip"] else "step" for match in _FIELD.finditer(pattern)]
    wanted = ["chip", "step"] if step else ["chip"]
    if sorted(found) != wanted or re.search(r"[{}]", _FIELD.sub("", pattern)):
        raise ValueError(f"file {pattern!r} has to hold {' and '.join('{' + name + '}' for name in wanted)} once each"
                         f"{', {step:02d} for leading zeros' if step else ''}, and nothing else in braces")
    if not pattern.endswith(".tif"):
        raise ValueError(f"file {pattern!r} has to end in .tif")
    told = _regex(pattern).fullmatch(pattern.format(chip="a11", step=12))
    if told is None or told["chip"] != "a11" or (step and int(told["step"]) != 12):
        raise ValueError(f"file {pattern!r} does not say where the chip ends and the step begins: put what is "
                         f"no digit between them")


def _apart(patterns: list[str]) -> None:
    """Raises ValueError where one file's name could be of two patterns."""
    for pattern, other, step in itertools.product(patterns, patterns, (0, 10)):  # with one digit and two
        name = pattern.format(chip="a", step=step)
        if pattern is not other and _regex(other).fullmatch(name):
            raise ValueError(f"file patterns: a name such as {name!r} is one of {pattern!r} and of {other!r}")


def _regex(pattern: str) -> re.Pattern[str]:
    """Of the names that `pattern` gives, and no others."""
    parts, at = [], 0
    for match in _FIELD.finditer(pattern):
        parts.append(re.escape(pattern[at:match.start()]))
        digits = int(match["digits"] or 1)
        parts.append(r"(?P<chip>[0-9A-Za-z][0-9A-Za-z_-]*)" if match["chip"]
                     else rf"(?P<step>\d{{{digits}}}|[1-9]\d{{{digits},}})")
        at = match.end()
    return re.compile("".join(parts) + re.escape(pattern[at:]), re.ASCII)
