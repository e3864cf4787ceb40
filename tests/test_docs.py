"""Pages are true of what they name: links and their anchors, files, the commands' options, keys of recipes, names of
the engine."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.base.errors import ConfigError
from engine.config import load_config
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         *(ROOT / room / "README.md" for room in ("tests", "tests/golden", "kernels", "benchmarks"))]
ROOMS = ("engine", "kernels", "configs", "benchmarks", "launch", "tests", "docs")
NAMES = {path.name for room in ROOMS for path in (ROOT / room).rglob("*")} | {path.name for path in ROOT.iterdir()}
NOT_HERE = {"config.yaml", "report.txt", "dataset.yaml", "scene.yaml"}  # in runs' folders, and in data's
FILES = (".json", ".npz", ".py")  # what looks like a key of a recipe, `model.py`, and is none
USERS = {"README.md", "data.md", "datasets.md", "training.md", "predicting.md"}  # a bare `--option` is one of launch/

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_PATH = re.compile(rf"(?<![\w./{{}}-])(?:(?:{'|'.join(ROOMS)})(?:/[\w.*{{}},-]+)+|(?:[\w-]+/)+[\w-]+\.(?:py|cpp|md))")
_FILE = re.compile(r"`([\w-]+\.(?:py|cpp|md|sh|yaml|sbatch|toml|txt))`")
_COMMAND = re.compile(r"launch/(train|predict|prepare|slurm)\.(?:py|sbatch)(?: +([^`\n|]*))?")
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
_KEY = re.compile(r"`((?:run|data|augment|model|loss|optimizer|train|validate|checkpoint|log)(?:\.[a-z]\w*)+)(?=[:`])")
_OBJECT = re.compile(r"(?<![\w./-])engine(?:\.[A-Za-z_]\w*)+")


def wrong(text: str, page: Path) -> Iterator[str]:
    """What `text`, the content of `page`, says that is not so."""
    prose = _FENCE.sub("", text)
    for link in _LINK.findall(prose):
        if not re.match(r"https?://", link):
            yield from _wrong_link(link, page, text)
    plain = re.sub(r"https?://\S+", "", _LINK.sub("]", text)).replace("\\\n", " ")
    for match in _PATH.finditer(plain):
        path = match[0].rstrip(".,")
        places = (ROOT, page.parent, ROOT / "engine")
        if not all(any(any(place.glob(one)) for place in places) for one in _braces(path)):
            yield f"no file {path}"
    yield from (f"no file {name}" for name in _FILE.findall(plain) if name not in {*NAMES, *NOT_HERE})
    for command, words in _COMMAND.findall(plain):
        yield from _wrong_command({"slurm": "train"}.get(command, command), words.split(" #")[0])
    if page.name in USERS and page.parent in (ROOT, ROOT / "docs"):
        known = {option for parsers in (_parsers(name) for name in ("train", "predict", "prepare"))
                 for parser in parsers.values() for option in parser}
        yield from (f"no option {option}" for span in re.findall(r"`([^`\n]+)`", _FENCE.sub("", plain))
                    if span.startswith("--") for option in _OPTION.findall(span) if option not in known)
    yield from (f"no key {key}" for key in _KEY.findall(plain) if not key.endswith(FILES) and not _is_key(key))
    for name in set(_OBJECT.findall(plain)):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            yield f"no object {name}"


def _wrong_link(link: str, page: Path, text: str) -> Iterator[str]:
    name, _, anchor = link.partition("#")
    target = page.parent / name
    if not target.exists():
        yield f"no file {link}"
    elif anchor and anchor not in _anchors(target.read_text() if name else text):
        yield f"no heading {link}"


def _anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def _braces(path: str) -> list[str]:
    """`a{1,2}` as a1 and a2; `{chip}` as any."""
    match = re.search(r"\{([^}]*)\}", path)
    if match is None:
        return [path]
    choices = match[1].split(",") if "," in match[1] else ["*"]
    return [one for choice in choices for one in _braces(path[:match.start()] + choice + path[match.end():])]


def _parsers(command: str) -> dict[str, set[str]]:
    """Options by subcommand, "" where the command has none."""
    parser = importlib.import_module(f"launch.{command}").arguments()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return {name: set(sub._option_string_actions) for name, sub in action.choices.items()}
    return {"": set(parser._option_string_actions)}


def _wrong_command(command: str, words: str) -> Iterator[str]:
    parsers, chosen = _parsers(command), ""
    if "" not in parsers:
        chosen = words.split(maxsplit=1)[0] if words.strip() else ""
        if chosen not in parsers:
            if chosen:
                yield f"launch/{command}.py has no {chosen}"
            return
    yield from (f"launch/{command}.py{chosen and ' ' + chosen} has no {option}" for option in _OPTION.findall(words)
                if option not in parsers[chosen])
    for item in re.findall(r"--set (\S+=\S*)", words):
        yield from _wrong_override(item)


def _wrong_override(item: str) -> Iterator[str]:
    try:
        load_config(ROOT / "configs" / "demo.yaml", [item])
    except ConfigError as error:
        yield str(error)


def _is_key(key: str) -> bool:
    """Whether a recipe knows it: as an override that holds no value, it is refused for that alone, or not at all."""
    return not any("unknown key" in line for line in _wrong_override(f"{key}=null"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_true(page: Path) -> None:
    assert list(wrong(page.read_text(), page)) == []


@pytest.mark.parametrize(("text", "expected"), [
    ("[the loop](engine/trainers.py)", "no file engine/trainers.py"),
    ("[the loop](docs/training.md#the-lop)", "no heading docs/training.md#the-lop"),
    ("[above](#nowhere)", "no heading #nowhere"),
    ("![picture](docs/demo.jpg)", "no file docs/demo.jpg"),
    ("see `engine/parallel.py`", "no file engine/parallel.py"),
    ("see engine/data/views, and more", "no file engine/data/views"),
    ("all of `configs/biomassters-zero{1,4}.yaml`", "no file configs/biomassters-zero{1,4}.yaml"),
    ("```mermaid\ndata/loaders.py\n```", "no file data/loaders.py"),
    ("in `trainers.py`", "no file trainers.py"),
    ("`python launch/train.py --config X --resume`", "launch/train.py has no --resume"),
    ("```bash\ntorchrun launch/train.py \\\n  --conf X  # --no\n```", "launch/train.py has no --conf"),
    ("`launch/prepare.py pack --data A --region eu`", "launch/prepare.py pack has no --region"),
    ("`launch/prepare.py unpack --data A`", "launch/prepare.py has no unpack"),
    ("with `--losless`", "no option --losless"),
    ("`launch/train.py --config X --set train.batch=4`", "configs/demo.yaml: unknown key 'train.batch'"),
    ("set `data.cache: 4`", "no key data.cache"),
    ("`engine.data.reference.transfrom`", "no object engine.data.reference.transfrom"),
])
def test_what_is_not_so_is_seen(text: str, expected: str) -> None:
    [found] = wrong(text, ROOT / "README.md")
    assert expected in found


def test_what_is_so_passes() -> None:
    text = """# A heading, with `code` (and more)
[up](#a-heading-with-code-and-more), `engine/data/plan.py`, `benchmarks/results/*.jsonl`, `train.micro_batch`,
`engine.kfold`, `launch/prepare.py`, [`launch/train.py`](launch/train.py), `--into-store`, `model.py`,
`deepspeed --num_gpus 4 launch/train.py --config X --set run.name=y`"""
    assert list(wrong(text, ROOT / "README.md")) == []
