"""What comes from outside is never executed: files that want to be are put into every door, and refused in one message.

`DOORS` says how a file comes in; `READERS` and `OPTIONS` hold it to the code: each place of the engine that reads, and
each option of a command that takes a text, has its door here, or says why it has none.  docs/security.md is the page.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import importlib
import io
import json
import os
import pickle
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.errors import EntryNotFoundError

from engine.base import made as claims
from engine.base.errors import EngineError
from engine.config import Config, Place, load_config
from engine.data import metadata
from engine.data.biomassters import BIOMASSTERS
from engine.data.dataset import described, load_dataset
from engine.data.index import open_index
from engine.data.made import fields, sample
from engine.data.made import scene as made_scene
from engine.data.scene import cut
from engine.data.scene.grid import Grid
from engine.data.scene.headers import read_header
from engine.data.scene.scene import open_scene
from engine.data.selection import folds, quarantine
from engine.data.store import chip_file
from engine.data.store.pack import check_settings, encode_chip
from engine.data.tiff import tiff
from engine.inference import made as maps
from engine.inference.landscape.area import read_zones
from engine.inference.landscape.mapper import _is_made
from engine.inference.predictor import choose_chips
from engine.model.backbones import build_backbone
from engine.model.weights import load_model, read_notes
from engine.run import folder as run_folder
from engine.run.log import _parsed
from engine.training import checkpoint, dump
from tests.conftest import ROOT
from tests.scenes import place

RECIPE = ROOT / "configs" / "demo.yaml"
TINY = "tf_mobilenetv3_small_minimal_100"


class Bait:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


def _saved(save: Callable[[Any, Any], object], value: object) -> bytes:
    buffer = io.BytesIO()
    save(buffer, value)
    return buffer.getvalue()


def _torch(value: object, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


# Each: what it looks like, and a reader that is taken in by it, so that a form which does nothing is seen
FORMS: dict[str, tuple[Callable[[Path], bytes], Callable[[bytes], object]]] = {
    "pickle": (lambda m: pickle.dumps(Bait(m)), pickle.loads),
    "text pickle": (lambda m: pickle.dumps(Bait(m), protocol=0), pickle.loads),
    "torch zip": (lambda m: _torch({"state_dict": Bait(m)}, True),
                  lambda data: torch.load(io.BytesIO(data), weights_only=False)),
    "torch legacy": (lambda m: _torch(Bait(m), False), lambda data: torch.load(io.BytesIO(data), weights_only=False)),
    "npy": (lambda m: _saved(np.save, np.array([Bait(m)], object)),
            lambda data: np.load(io.BytesIO(data), allow_pickle=True)),
    "npz": (lambda m: _saved(np.savez, np.array([Bait(m)], object)),
            lambda data: np.load(io.BytesIO(data), allow_pickle=True)["arr_0"]),
    "yaml": (lambda m: f"name: !!python/object/apply:os.mkdir ['{m}']\n".encode(), yaml.unsafe_load),
    "python": (lambda m: f"__import__('os').mkdir('{m}')".encode(), lambda data: eval(data)),
    "gzip": (lambda m: gzip.compress(pickle.dumps(Bait(m))), lambda data: pickle.loads(gzip.decompress(data))),
}


def _put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _beside(folder: Path, data: bytes, name: str, more: str, content: str) -> Path:
    """`data` in a file, and a file that names it."""
    _put(folder / name, data)
    return _put(folder / more, content.encode())


def _checkpoint(folder: Path, data: bytes) -> None:
    """Sealed as the engine seals its own, with tensors that are none."""
    path = folder / "step-00000001"
    files = {}
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        _put(path / name, data)
        files[name] = {"size": len(data), "sha256": checkpoint.sha256(path / name)}
    _put(path / checkpoint.NOTE, checkpoint._sealed(
        {"format": checkpoint.FORMAT, "step": 1, "state": {}, "files": files}).encode())
    found = checkpoint.find(folder)
    assert found is not None
    checkpoint.load(None, found[0])


def _store(folder: Path, data: bytes) -> None:
    entry = {"id": "a", "split": "train", "months": {}, "label": None}
    manifest = {"version": chip_file.VERSION, "dataset": BIOMASSTERS.dump(), "chips": [entry]}
    _put(folder / "chips" / "a.safetensors", data)
    _put(folder / chip_file.MANIFEST, json.dumps(manifest).encode())
    check_settings(folder, BIOMASSTERS, chip_file.STEPS)


def _scene_of(folder: Path, data: bytes, name: str = "a.tif") -> None:
    images = {"S1": {0: name}}
    open_scene(_beside(folder, data, name, "scene.yaml", yaml.safe_dump({"images": images})))


def _stac(folder: Path, data: bytes) -> None:
    stac = {"items": "items.json", "assets": {"S1": ["vv"]}}
    open_scene(_beside(folder, data, "items.json", "scene.yaml", yaml.safe_dump({"stac": stac})))


def _run(folder: Path, data: bytes) -> None:
    config = load_config(RECIPE, [f"run.folder={folder}", "run.name=r"])
    _put(folder / "r" / "config.yaml", data)
    run_folder.claim(folder / "r", config, False, {"values": "steps"})


def _hub(folder: Path, data: bytes) -> None:
    """timm's weights by its hub, which has them as a pickle and not as safetensors."""

    def download(*_: object, filename: str, **__: object) -> str:
        if filename.endswith(".safetensors"):
            raise EntryNotFoundError("there is none")
        return str(_put(folder / filename, data))

    with mock.patch("timm.models._hub.hf_hub_download", download):
        try:
            build_backbone(TINY, 3, True)
        finally:
            assert any(folder.iterdir())  # it was asked for


def _dump(folder: Path, data: bytes, name: str) -> None:
    """Whole but for the file `name`."""
    about = {"step": 1, "seeds": [1], "chips": [[["a"]]], "loss_scale": 1}
    _put(folder / dump.ABOUT, json.dumps(about).encode())
    _put(folder / dump.RECIPE, yaml.safe_dump(load_config(RECIPE).dump()).encode())
    _put(folder / name, data)
    about_, _ = dump._read(folder)
    dump._batches(folder / "rank-0.safetensors", about_.chips[0], BIOMASSTERS, torch.bfloat16)


def _text(data: bytes) -> str:
    return data.decode("latin-1")


DOORS: dict[str, Callable[[Path, bytes], object]] = {
    "recipe": lambda at, data: load_config(_put(at / "r.yaml", data)),
    "extends": lambda at, data: load_config(_beside(at, data, "other.yaml", "r.yaml", "extends: other.yaml")),
    "--set": lambda at, data: load_config(RECIPE, [f"run={_text(data)}"]),
    "description": lambda at, data: load_dataset(_put(at / "d.yaml", data)),
    "tree's description": lambda at, data: open_index(_put(at / "dataset.yaml", data).parent),
    "weights' note": lambda at, data: described({"dataset": _text(data)}, "weights"),
    "scene": lambda at, data: open_scene(_put(at / "scene.yaml", data)),
    "STAC items": _stac,
    "raster": _scene_of,
    "target": lambda at, data: read_header(_put(at / "target.tif", data)),
    "zones": lambda at, data: read_zones(_put(at / "z.geojson", data), Grid("EPSG:3067", place(), 8, 8)),
    "map that is there": lambda at, data: _is_made(_put(at / "map.tif", data), {}),
    "weights .pth": lambda at, data: load_model(_put(at / "w.pth", data)),
    "weights .safetensors": lambda at, data: load_model(_put(at / "w.safetensors", data)),
    "run folder's weights": lambda at, data: read_notes(
        _put(at / "weights" / "best.safetensors", b"\x02\0\0\0\0\0\0\0{}" + data).parents[1]),
    "model.pretrained": lambda at, data: build_backbone(TINY, 3, _put(at / "p.pth", data)),
    "timm's hub": _hub,
    "checkpoint.json": lambda at, data: checkpoint.find(_put(at / "step-00000001" / checkpoint.NOTE, data).parents[1]),
    "checkpoint's tensors": _checkpoint,
    "run's config.yaml": _run,
    "config.yaml of --split validation": lambda at, data: choose_chips(
        at, "validation", _put(at / "config.yaml", data).parent),
    "dump.json": lambda at, data: _dump(at, data, dump.ABOUT),
    "dump's config.yaml": lambda at, data: _dump(at, data, dump.RECIPE),
    "dump's batches": lambda at, data: _dump(at, data, "rank-0.safetensors"),
    "quarantine.json": lambda at, data: quarantine.load(_put(at / quarantine.REPORT, data).parent),
    "folds": lambda at, data: folds.load_folds(_put(at / "f.json", data)),
    "features' CSV": lambda at, data: list(metadata.read_metadata(
        _put(at / "features_metadata.csv", data).parent)),
    "labels' CSV, gzipped": lambda at, data: list(metadata.read_metadata(
        _put(at / "train_agbm_metadata.csv.gz", data if data[:2] == b"\x1f\x8b" else gzip.compress(data)).parent)),
    "TIFF": lambda at, data: tiff.read_into(_put(at / "a.tif", data), np.empty((256, 256), np.float32)),
    "TIFF that is packed": lambda at, data: encode_chip(
        "a", "train", BIOMASSTERS, {"a_S1_00.tif": data}, chip_file.STEPS),
    "map of a chip": lambda at, data: maps.read_map(_put(at / "a_agbm.tif", data), BIOMASSTERS),
    "packed chip": lambda at, data: chip_file.verify_file(_put(at / "a.safetensors", data)),
    "packed chip of a store": _store,
    "manifest": lambda at, data: open_index(_put(at / chip_file.MANIFEST, data).parent),
    "made.json of maps": lambda at, data: maps.claim(
        _beside(at, data, "made.json", "a_agbm.tif", "").parent, {"weights": "a"}),
    "made.json of a landscape": lambda at, data: claims.claim(_put(at / claims.FILE, data).parent, {}, "remove it"),
    "sample.json": lambda at, data: sample.make_sample(_put(at / sample.NOTE, data).parent, 1, 1),
    "sample.json of other data": lambda at, data: fields._claim(_put(at / fields.NOTE, data).parent, {"seed": 1}, 1, 0),
    "scene.json": lambda at, data: made_scene._claim(_put(at / made_scene.NOTE, data).parent, {"seed": 1}),
    "cut.json": lambda at, data: cut._claim(_put(at / cut.NOTE, data).parent, {"seed": 1}),
}
QUIET = {  # what cannot be read is passed over, and a run goes on
    "data.json": lambda at, data: run_folder._begun_on(_put(at / "data.json", data)),
    "history.jsonl": lambda at, data: next(filter(None, map(_parsed, data.splitlines())), None),
}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_do_what_they_are_for(form: str, marker: Path) -> None:
    make, taken_in = FORMS[form]
    taken_in(make(marker))
    assert marker.is_dir()


@pytest.mark.parametrize("door", DOORS)
def test_nothing_is_executed(door: str, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for form, (make, _) in FORMS.items():
        with pytest.raises(EngineError) as caught:
            DOORS[door](tmp_path / form, make(marker))
        assert str(caught.value).strip() and not marker.exists(), form


@pytest.mark.parametrize("door", QUIET)
def test_nothing_is_executed_where_it_is_passed_over(door: str, tmp_path: Path, marker: Path) -> None:
    for form, (make, _) in FORMS.items():
        assert QUIET[door](tmp_path / form, make(marker)) is None and not marker.exists(), form


# That no door was forgotten ---------------------------------------------------------------------------------------

INNER = "what the engine itself has written, or the system, and nothing is made of it but a number or a copy"
READERS = {  # where in engine/ and kernels/ something is read -> its doors
    "engine/__init__.py:__getattr__": "a name of a table of its own",
    "engine/base/cli.py:main": INNER,
    "engine/base/distributed.py:_meet": "ranks: JSON",
    "engine/base/distributed.py:from_rank_0": "ranks: JSON",
    "engine/base/distributed.py:of_all": "ranks: JSON",
    "engine/base/files.py:fsync": INNER,
    "engine/base/files.py:sha256": INNER,
    "engine/base/made.py:alone": INNER,
    "engine/base/made.py:claim": ["made.json of a landscape"],
    "engine/base/stopping.py:_command": INNER,
    "engine/base/stopping.py:_fields": INNER,
    "engine/base/texts.py:parse_json": "all that call it",
    "engine/base/texts.py:read_json": "all that call it",
    "engine/base/texts.py:read_yaml": "all that call it",
    "engine/base/texts.py:_read": "all that call it",
    "engine/base/watch.py:Watch._judge": "ranks: JSON",
    "engine/base/watch.py:Watch._last_in": "ranks: JSON",
    "engine/base/watch.py:Watch._read": "ranks: JSON",
    "engine/config.py:_read_recipe": ["recipe", "extends"],
    "engine/config.py:_override": ["--set"],
    "engine/data/dataset.py:_load": ["description", "tree's description"],
    "engine/data/dataset.py:described": ["weights' note"],
    "engine/data/fetch/download.py:_chosen": "a list of ids: `test_a_list_of_chips`",
    "engine/data/fetch/download.py:Tree.finish": INNER,
    "engine/data/fetch/s3.py:_get": "bytes that are compared with their checksum, then `TIFF that is packed`",
    "engine/data/index.py:read_manifest": ["manifest"],
    "engine/data/made/fields.py:_claim": ["sample.json of other data"],
    "engine/data/made/sample.py:_claim": ["sample.json"],
    "engine/data/made/sample.py:_link": INNER,
    "engine/data/made/sample.py:bring": INNER,
    "engine/data/made/scene.py:_claim": ["scene.json"],
    "engine/data/made/scene.py:_write": INNER,
    "engine/data/metadata.py:_open": ["features' CSV", "labels' CSV, gzipped"],
    "engine/data/scene/cut.py:_claim": ["cut.json"],
    "engine/data/scene/gdal.py:parse_crs": ["scene", "zones"],
    "engine/data/scene/headers.py:make_grid": ["scene"],
    "engine/data/scene/headers.py:read_header": ["raster", "target"],
    "engine/data/scene/rasters.py:Rasters._opened": ["raster", "target"],
    "engine/data/scene/scene.py:_read": ["scene"],
    "engine/data/scene/stac.py:_read": ["STAC items"],
    "engine/data/selection/folds.py:load_folds": ["folds"],
    "engine/data/selection/quarantine.py:inspect": "by `load`",
    "engine/data/selection/quarantine.py:load": ["quarantine.json"],
    "engine/data/store/chip_file.py:open_file": ["packed chip", "packed chip of a store"],
    "engine/data/store/chip_file.py:head_of": ["packed chip"],
    "engine/data/store/chip_file.py:_parse": ["packed chip"],
    "engine/data/store/chip_file.py:_dataset": ["packed chip"],
    "engine/data/store/chip_file.py:read_into": ["packed chip"],
    "engine/data/store/cpu_batches.py:_inflate": "the library of the package lz4",
    "engine/data/store/pack.py:_read": ["TIFF that is packed"],
    "engine/data/tiff/checksum.py:cksum_file": INNER,
    "engine/data/tiff/tiff.py:read_into": ["TIFF", "map of a chip"],
    "engine/data/tiff/tiff.py:_read_plain": ["TIFF"],
    "engine/data/tiff/tiff.py:_read_any": ["TIFF"],
    "engine/data/tiff/tiff.py:_decode": ["TIFF"],
    "engine/inference/landscape/area.py:read_zones": ["zones"],
    "engine/inference/landscape/mapper.py:_is_made": ["map that is there"],
    "engine/inference/landscape/mapper.py:measure": INNER,
    "engine/inference/landscape/picture.py:map_figure": INNER,
    "engine/inference/landscape/picture.py:folds_figure": ["target"],
    "engine/inference/made.py:description": INNER,
    "engine/inference/made.py:_compare": ["made.json of maps"],
    "engine/inference/predictor.py:choose_chips": ["config.yaml of --split validation"],
    "engine/model/backbones.py:build_backbone": ["model.pretrained", "timm's hub"],
    "engine/model/backbones.py:_fitting_weights": ["model.pretrained"],
    "engine/model/backbones.py:_encoder_shapes": "a name that timm knows, without weights",
    "engine/model/tensors.py:_head": ["weights .pth", "weights .safetensors"],
    "engine/model/tensors.py:_from_safetensors": ["weights .safetensors"],
    "engine/model/tensors.py:_compare": ["weights .safetensors"],
    "engine/model/tensors.py:read_metadata": ["run folder's weights"],
    "engine/model/unpickle.py:TorchZip.__init__": ["weights .pth"],
    "engine/model/weights.py:_architecture": ["weights .safetensors"],
    "engine/model/weights.py:read_weights": ["weights .pth", "weights .safetensors"],
    "engine/model/weights.py:identify": INNER,
    "engine/run/folder.py:_begun_on": ["data.json"],
    "engine/run/folder.py:_claim": ["run's config.yaml"],
    "engine/run/folder.py:_lock": INNER,
    "engine/run/log.py:RunLog.__init__": ["history.jsonl"],
    "engine/run/log.py:_parsed": ["history.jsonl"],
    "engine/training/checkpoint.py:_examine": ["checkpoint.json"],
    "engine/training/checkpoint.py:load": ["checkpoint's tensors"],
    "engine/training/dump.py:_read": ["dump.json", "dump's config.yaml"],
    "engine/training/dump.py:_batches": ["dump's batches"],
    "kernels/native.py:_told": INNER,
    "kernels/native.py:_load": "tests/kernels/test_native.py: a folder that nobody else writes in",
}
OPTIONS = {  # of the commands: what takes a text -> its doors
    "--config": ["recipe", "extends"], "--set": ["--set"], "--weights": ["weights .pth", "run folder's weights"],
    "--ensemble": ["weights .pth"], "--data": ["tree's description", "features' CSV", "manifest", "TIFF"],
    "--scene": ["scene", "STAC items", "raster"], "--zones": ["zones"], "--target": ["target"],
    "--dataset": ["description"], "--metadata": ["features' CSV"],
    "--out": ["made.json of maps", "map that is there", "cut.json", "sample.json", "scene.json", "map of a chip"],
    "--into-store": ["packed chip of a store"], "--chips": "`test_a_list_of_chips`",
    "--replay": ["dump.json", "dump's config.yaml", "dump's batches", "weights .safetensors"],
    "--submission": "written alone", "--backbone": "a name that timm knows", "--chip": "an id that the index knows",
    "--tta": "names", "--max-time": "numbers", "--profile": "numbers", "--endpoint-url": "a server's address",
}
KEYS = {  # of recipes that name a file or folder
    "run.folder": ["run's config.yaml", "checkpoint.json", "history.jsonl", "data.json", "quarantine.json"],
    "data.path": ["tree's description", "features' CSV", "manifest", "packed chip", "TIFF"],
    "data.dataset": ["description"], "data.split.path": ["folds"],
    "model.pretrained": ["model.pretrained", "timm's hub"],
    "model.weights": ["weights .pth", "weights .safetensors"],
}
# Calls that read: of files, of texts that came in one, and what executes
_READS = re.compile(r"(read_(text|bytes|yaml|json|csv|tensors)|model_validate_json|parse_(yaml|json|crs)|"
                    r"(safe_|unsafe_)?load(s|_file)?|safe_open|fdopen|pread|preadv|ZipFile|TiffFile|_?Unpickler|CDLL|memmap|fromfile|genfromtxt|urlopen|get_object|eval|exec|"
                    r"create_model|from_user_input|from_file|extract(all)?|unpack_archive|import_module|run_path)")
_WRITES = re.compile(r"""open\(.*['"](wb?|ab|x)['"]""")


def readers() -> set[str]:
    """Functions of engine/ and kernels/ that call what reads, or executes."""
    found = set()

    def walk(node: ast.AST, path: str, where: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            inside = (*where, child.name) if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else where
            if isinstance(child, ast.Call):
                name = child.func.attr if isinstance(child.func, ast.Attribute) else getattr(child.func, "id", "")
                of = ast.unparse(child.func)
                opens = name == "open" and not _WRITES.search(ast.unparse(child))
                ours = of in ("native.load", "tl.load", "checkpoint.load", "memory.open") or of.endswith(".eval")
                if (opens or _READS.fullmatch(name)) and not ours:
                    found.add(f"{path}:{'.'.join(inside)}")
            walk(child, path, inside)

    for room in ("engine", "kernels"):
        for file in (ROOT / room).rglob("*.py"):
            walk(ast.parse(file.read_text()), str(file.relative_to(ROOT)), ())
    return found


def options() -> set[str]:
    """Of all commands, those that take a text."""
    found = set()
    for command in ("train", "predict", "prepare"):
        parsers = [importlib.import_module(f"launch.{command}").arguments()]
        for parser in parsers:
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parsers += action.choices.values()
                elif action.option_strings and action.nargs != 0 and not action.choices \
                        and action.type not in (int, float):
                    found.add(action.option_strings[-1])
    return found


def keys(section: Any = Config, at: str = "") -> set[str]:
    """Of recipes, those that hold a `Place`."""
    found = set()
    for name, kind in typing.get_type_hints(section, include_extras=True).items():
        if hasattr(kind, "model_fields"):
            found |= keys(kind, f"{at}{name.rstrip('_')}.")
        elif Place in (kind, *typing.get_args(kind)):
            found.add(f"{at}{name}")
    return found


@pytest.mark.parametrize(("table", "found"), [(READERS, readers), (OPTIONS, options), (KEYS, keys)],
                         ids=["readers", "options", "keys"])
def test_no_door_is_forgotten(table: dict[str, Any], found: Callable[[], set[str]]) -> None:
    assert set(table) == found()
    named = {door for doors in table.values() if isinstance(doors, list) for door in doors}
    assert named <= DOORS.keys() | QUIET.keys()
    if table is READERS:
        assert named >= DOORS.keys() - {"tree's description"} | QUIET.keys()
