"""Valid files of every kind, and what users' commands do with them, step by step, in the current folder.

A step returns what was read, as numbers and texts that can be compared, or raises as the command would.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import tifffile
import torch
import yaml

from engine.base.errors import DataError, EngineError
from engine.config import load_config
from engine.data.batch import Request
from engine.data.dataset import described, load_dataset
from engine.data.forms import open_source
from engine.data.index import open_index
from engine.data.loader import Loader
from engine.data.made.fields import make_fields
from engine.data.metadata import read_metadata
from engine.data.scene.grid import Box
from engine.data.scene.rasters import Rasters
from engine.data.scene.scene import _read, open_scene
from engine.data.selection import quarantine
from engine.data.selection.chips import select_chips
from engine.data.selection.folds import save_folds
from engine.data.selection.quarantine import Quarantine
from engine.data.store import chip_file
from engine.data.store.pack import pack
from engine.data.tiff.checksum import posix_cksum
from engine.inference import made
from engine.inference.landscape.area import read_zones
from engine.inference.predictor import _fit, choose_chips
from engine.model.weights import load_model, read_notes
from engine.run import folder as run_folder
from engine.run.log import RunLog
from engine.training import checkpoint
from engine.training.dryrun import describe
from launch import prepare
from tests import scenes
from tests.faults import formats, mutate
from tests.faults.mutate import Mutation

Step = Callable[[], Any]

RECIPE = """\
# a recipe with every section
data:
  path: tree
  dataset: tree/dataset.yaml
  split: {scheme: kfold, folds: 2, fold: 1, seed: 7}
  chips: null
  nodata_months: mask
  readers: 1
  threads: auto
  cache_gb: 0.5
  verify: true
run: {name: small, folder: runs, seed: 3}
augment: {hflip: 0.5, rot90: true, rotate: 0.25, degrees: 30, group: 4, months_step: 1}
model: {backbone: tf_mobilenetv3_small_minimal_100, decoder_channels: [8, 8, 8, 8, 8], initial_prediction: 12.5}
loss: {name: huber, options: {delta: 20.0, ignore_above: 300}}
optimizer: {lr: 1e-3, weight_decay: 0.01, betas: [0.9, 0.99], eps: 1.0e-8, clip: 5}
phases:
  - {name: first, epochs: 2, lr: 0.002, min_lr: 1.0e-4}
  - {name: second, epochs: 1, train_on: all, start_from: last}
train: {global_batch: 2, micro_batch: 1, precision: fp32, zero_stage: 0, device: cpu, compile: auto, timeout_s: 60}
validate: {every: 1, micro_batch: 2, tta: [id, h]}
checkpoint: {every_steps: 5, keep: 2}
log: {every: 10, chips: 2}
deepspeed: {wall_clock_breakdown: false}
"""
ZONE = {"type": "FeatureCollection", "crs": {"type": "name", "properties": {"name": scenes.CRS}}, "features": [
    {"type": "Feature", "properties": {"name": "east"}, "geometry": {"type": "Polygon", "coordinates": [[
        [scenes.ORIGIN[0] + x, scenes.ORIGIN[1] - y] for x, y in ((0, 0), (400, 0), (400, 500), (0, 500), (0, 0))]]}}]}


def make(folder: Path) -> None:
    """All valid files, under `folder`."""
    folder.mkdir()
    tree = folder / "tree"
    make_fields(tree, scenes.DATASET, 4, 3, test_chips=1)
    chips = open_index(tree).chips
    _csv(tree / "features_metadata.csv", [(chip.split, path) for chip in chips for path in chip.files[:-1]])
    _csv(tree / "train_agbm_metadata.csv",
         [("", chip.label) for chip in chips if chip.label is not None and chip.split == "train"])
    pack(tree, folder / "store", workers=1)
    scenes.write_weights(folder / "weights.safetensors")
    model = scenes.model()
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace(backbone=model.backbone)},
               folder / "winner.pth")
    scenes.make_scene(folder / "scene", 70, 80)
    (folder / "scene" / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": [
        {"type": "Feature", "stac_version": "1.0.0", "id": f"item {step}", "geometry": None, "links": [],
         "properties": {"datetime": f"2021-0{5 + step}-20T10:00:00Z", "eo:cloud_cover": 10 * step},
         "assets": {"vv": {"href": f"rasters/radar_0{step}.tif"}}} for step in (0, 1)]}))
    (folder / "scene" / "stac.yaml").write_text(yaml.safe_dump({
        "dataset": "dataset.yaml", "images": {"relief": "rasters/relief.tif"},
        "stac": {"items": "items.json", "assets": {"radar": ["vv"]}}}))
    (folder / "zones.geojson").write_text(json.dumps(ZONE))
    ids = [chip.id for chip in chips if chip.split == "train"]
    save_folds(folder / "folds.json", [ids[:2], ids[2:]], {"scheme": "kfold"})
    (folder / "recipe.yaml").write_text(RECIPE)
    run = folder / "run"
    (run / "weights").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(load_config(folder / "recipe.yaml").dump(), sort_keys=False))
    (run / "data.json").write_text(json.dumps({"values": chip_file.EXACT, "dataset": scenes.DATASET.dump()}) + "\n")
    (run / "history.jsonl").write_text("".join(json.dumps({"kind": "step", "step": n, "loss": 1 / n}) + "\n"
                                               for n in range(1, 9)))
    (run / quarantine.REPORT).write_text(json.dumps({ids[0]: "damaged", ids[1]: {"since_step": 3, "why": "cut"}}))
    scenes.write_weights(run / "weights" / "best.safetensors")
    for step in (1, 2):
        tensors = {name: {"a": torch.full((3, 5), float(step)), "b": torch.arange(step)}
                   for name in (checkpoint.MODEL, checkpoint.OPTIMIZER)}
        checkpoint.write(run / "checkpoints", step, tensors, {"state": {"step": step, "epoch": 0}}, 5)
    (folder / "maps").mkdir()
    (folder / "maps" / "a_carbon.tif").touch()
    (folder / "maps" / made.FILE).write_text(json.dumps(MAPS, indent=1) + "\n")


MAPS = {"weights": "0" * 64, "chips": 3, "tta": ["id"], "batch": None, "compile": False}


def _csv(path: Path, files: list[tuple[str, Path]]) -> None:
    with path.open("w", newline="") as handle:
        out = csv.writer(handle, lineterminator="\n")
        out.writerow(["filename", "chip_id", "size", "cksum", "split", "s3path_us"])
        for split, file in files:
            data = file.read_bytes()
            out.writerow([file.name, file.name[:8], len(data), posix_cksum(data), split, f"s3://bucket/{file.name}"])


def _digest(*arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _by_others(path: Path) -> str:
    """What tifffile and GDAL read there."""
    with rasterio.open(path) as raster:
        head = raster.crs, raster.transform, raster.dtypes, raster.nodatavals
    return f"{head} {_digest(tifffile.imread(path))}"


# Steps -------------------------------------------------------------------------------------------------------------


def _text(path: str) -> str:
    return Path(path).read_text()


def _command(*words: str) -> str:
    """What a command of launch/prepare.py prints; its error says with it what it has listed before."""
    args = prepare.arguments().parse_args(list(words))
    out, listed = StringIO(), StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(listed):
            args.run(args)
    except EngineError as error:
        raise type(error)(f"{error}\n{listed.getvalue()}") from None
    return out.getvalue()


def _index(root: str) -> Any:
    index = open_index(root)
    return index.dataset.dump(), [(chip.id, chip.split, chip.months, chip.label is not None) for chip in index.chips]


def _stacks(root: str) -> Any:
    """Every chip, by name."""
    chips = open_index(root).chips
    source = open_source(chips, nodata_months="mask")
    return {chip.id: _digest(*(stack := source.stack(chip)).images, stack.label, stack.months) for chip in chips}


def _batches(root: str) -> Any:
    """Every chip, by the loader."""
    chips = open_index(root).chips
    loader = Loader(open_source(chips, nodata_months="mask"), batch_size=2, device=torch.device("cpu"), backend="cpu",
                    precision="fp32", warp=False, readers=1, threads=1)
    requests = [[Request(chip, row=row + n) for n, chip in enumerate((list(chips) * 2)[row:row + 2])]
                for row in range(0, len(chips), 2)]
    return [_digest(batch.images.numpy(), batch.label.numpy(), batch.dropped.numpy())
            for batch in loader.batches(iter(requests))]


def _rows() -> Any:
    """What verify goes by: the checksum is of a file's length too."""
    return sorted({(str(row.path), row.cksum or row.size) for row in read_metadata(Path("tree"), load_dataset(
        "tree/dataset.yaml").folders)}, key=str)


def _chip(root: str, folder: str) -> str:
    """The first that has files."""
    return sorted(Path(root, folder).iterdir())[0].name.partition("_")[0].partition(".")[0]


def _weights(path: str) -> Any:
    model = load_model(path)
    dataset = described(read_notes(path), path)
    if path.endswith(".safetensors"):  # the winner's are of BioMassters
        _fit(dataset, open_index("tree").chips[0], Path(path))
    return model.config(), dataset.dump(), _digest(*(value.numpy() for value in model.state_dict().values()))


def _scene(path: str) -> Any:
    scene = open_scene(path)
    grid = scene.grid
    rasters, box = Rasters(scene, 1), Box(0, 0, min(grid.height, 200), min(grid.width, 200))
    pixels = {str(key): _digest(*rasters.read(*key, box)) for key in scene.images}
    return scene.dataset.dump(), grid.crs.to_wkt(), tuple(grid.transform), grid.width, grid.height, pixels


def _zones() -> Any:
    """As the file has them."""
    zones = read_zones(Path("zones.geojson"), open_scene("scene/scene.yaml").grid)
    return {"features": [{"geometry": json.loads(json.dumps(zone.shape))} for zone in zones]}  # lists for tuples


def _folds() -> Any:
    found = []
    for fold in (0, 1):
        config = load_config("recipe.yaml", ["data.split={scheme: file, path: folds.json}", f"data.split.fold={fold}",
                                             "data.verify=false"])
        found.append([[chip.id for chip in chips] for chips in select_chips(config)])
    return found


def _plan() -> str:
    text = describe(load_config("recipe.yaml"))
    problem = text.partition("unknown, the data cannot be read: ")[2]
    if problem:
        raise DataError(problem)
    return text


def _claim_run() -> str:
    config = load_config("recipe.yaml")
    data = {"values": chip_file.EXACT, "dataset": scenes.DATASET.dump()}
    lock = run_folder.claim(Path("run"), config, False, data)
    if lock is not None:
        lock.close()
    return "claimed"


def _history() -> int:
    """How many lines are left out."""
    path = Path("run/history.jsonl")
    before = len(path.read_bytes().splitlines())
    RunLog(Path("run"), 2**40).close()
    return before - len(path.read_text().splitlines())


def _quarantine() -> Any:
    """As the file has it."""
    first, second = (chip.id for chip in open_index("tree").split("train")[:2])
    bad = Quarantine(Path("run"), {first: "damaged", second: "cut"}, quarantine.load(Path("run")))
    said = {**bad.left_out, **{chip: turned._asdict() for chip, turned in bad.turned.items()}}
    bad.begin(5)
    return said


def _maps() -> bool:
    return made.claim(Path("maps"), MAPS)


def _checkpoint() -> Any:
    found = checkpoint.find(Path("run/checkpoints"))
    assert found is not None
    path, state = found
    return path.name, state, hashlib.sha256((path / checkpoint.MODEL).read_bytes()).hexdigest()


class Kind(NamedTuple):
    """files: patterns of those that are damaged.  steps: by name, in the order of their cost."""

    count: int  # of 300
    files: tuple[str, ...]
    mutations: list[Mutation]
    steps: dict[str, Step]


_TREE: dict[str, Step] = {
    "index": lambda: _index("tree"), "read": lambda: _stacks("tree"), "load": lambda: _batches("tree"),
    "verify": lambda: _command("verify", "--data", "tree", "--workers", "1"),
    "splits": lambda: [_command("splits", "--data", "tree", "--folds", "2", "--out", "f.json"), _text("f.json")],
    "inspect": lambda: _command("inspect", "--data", "tree", "--chip", _chip("tree", "train_features"))}
_STORE: dict[str, Step] = {
    "index": lambda: _index("store"), "read": lambda: _stacks("store"), "load": lambda: _batches("store"),
    "verify": lambda: _command("verify", "--data", "store", "--workers", "1"),
    "inspect": lambda: _command("inspect", "--data", "store", "--chip", _chip("store", "chips"))}

KINDS: dict[str, Kind] = {
    "recipe": Kind(42, ("recipe.yaml",), mutate.YAML,
                   {"parse": lambda: load_config("recipe.yaml").dump(), "plan": _plan}),
    "dataset": Kind(30, ("tree/dataset.yaml",), mutate.YAML,
                    {"parse": lambda: load_dataset("tree/dataset.yaml").model_dump(mode="json"), **_TREE}),
    "csv": Kind(25, ("tree/*.csv",), mutate.CSV, {"rows": _rows, **_TREE}),
    "tiff": Kind(40, ("tree/train_*/*.tif",), formats.TIFF, {
        **_TREE, "pack": lambda: _command("pack", "--data", "tree", "--out", "packed", "--workers", "1"),
        "said": lambda: [_by_others(path) for path in sorted(Path("tree").rglob("*.tif"))]}),
    "packed": Kind(40, ("store/chips/*.safetensors",), formats.PACKED, _STORE),
    "manifest": Kind(20, ("store/manifest.json",), mutate.JSON, _STORE),
    "weights": Kind(25, ("weights.safetensors",), formats.WEIGHTS, {"load": lambda: _weights("weights.safetensors")}),
    "winner": Kind(15, ("winner.pth",), formats.TORCH, {"load": lambda: _weights("winner.pth")}),
    "scene": Kind(15, ("scene/scene.yaml",), mutate.YAML, {
        "parse": lambda: _read(Path("scene/scene.yaml")).model_dump(mode="json"),
        "read": lambda: _scene("scene/scene.yaml"),
        "inspect": lambda: _command("inspect", "--scene", "scene/scene.yaml")}),
    "raster": Kind(15, ("scene/rasters/*.tif",), formats.TIFF, {
        "read": lambda: _scene("scene/scene.yaml"),
        "inspect": lambda: _command("inspect", "--scene", "scene/scene.yaml"),
        "said": lambda: [_by_others(path) for path in sorted(Path("scene").rglob("*.tif"))]}),
    "stac": Kind(4, ("scene/items.json",), mutate.JSON, {"read": lambda: _scene("scene/stac.yaml")}),
    "zones": Kind(4, ("zones.geojson",), mutate.JSON, {"parse": _zones}),
    "folds": Kind(6, ("folds.json",), mutate.JSON, {"read": _folds}),
    "checkpoint": Kind(5, ("run/checkpoints/step-00000002/checkpoint.json",), mutate.JSON, {"find": _checkpoint}),
    "run": Kind(5, ("run/config.yaml",), mutate.YAML, {
        "claim": _claim_run,
        "validation": lambda: [chip.id for chip in choose_chips(Path("tree"), "validation", Path("run"))]}),
    "notes": Kind(4, ("run/data.json", "run/quarantine.json"), mutate.JSON, {
        "claim": _claim_run, "quarantine": _quarantine}),
    "history": Kind(2, ("run/history.jsonl",), [*mutate.BYTES, mutate.lines], {"history": _history}),
    "maps": Kind(3, ("maps/made.json",), mutate.JSON, {"claim": _maps}),
}
