"""Names that come from outside stay in their folder, sizes are believed after a look, and nothing goes to the network.

docs/security.md says what is trusted; tests/test_security.py holds that nothing is executed.
"""

from __future__ import annotations

import gzip
import http.server
import json
import struct
import sys
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from engine.base import cli
from engine.base.errors import ConfigError, DataError, EngineError, WeightsError
from engine.base.texts import parse_json, parse_yaml, read_json
from engine.config import load_config
from engine.data import metadata
from engine.data.biomassters import BIOMASSTERS
from engine.data.dataset import parse_dataset
from engine.data.fetch.download import _chosen, _remote
from engine.data.index import open_index
from engine.data.scene.gdal import CRSError, parse_crs, rasterio
from engine.data.scene.headers import read_header
from engine.data.scene.scene import open_scene
from engine.data.store import chip_file
from engine.data.tiff import tiff
from engine.model.tensors import read_tensors
from engine.model.weights import load_model
from engine.run.folder import _claim
from tests.conftest import ROOT
from tests.scenes import CRS, make_scene, place, write_raster, write_weights

RECIPE = ROOT / "configs" / "demo.yaml"
OUTSIDE = ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\nb", "x" * 300]


# Names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_in_recipes(name: str) -> None:
    for key in ("run", "phases.0"):
        change = {"run": {"name": name}} if key == "run" else {"phases": [{"epochs": 1, "name": name}]}
        with pytest.raises(ConfigError, match="name"):
            load_config(RECIPE, [f"{key}={json.dumps(value)}" for key, value in change.items()])


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 300, "a/" + "x" * 300])
def test_places_that_no_disk_has(name: str, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("data.path", "run.folder", "model.weights", "model.pretrained", "data.dataset"):
        with pytest.raises(ConfigError, match=f"{key}.*no file can have the name"):
            load_config(RECIPE, [f"{key}={json.dumps(name)}"])
    if name and "\0" not in name:  # which no command line can hold
        import launch.prepare

        monkeypatch.setattr(sys, "argv", ["prepare.py", "verify", "--data", name])
        with pytest.raises(SystemExit, match="2"):
            cli.main(launch.prepare.arguments(), lambda args: args.run(args))
        assert "--data: no file can have the name" in capsys.readouterr().err


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_in_metadata(name: str, tmp_path: Path) -> None:
    for row in (f'"{name}",train', f'"a_S1_00.tif","{name}"') if name else ('"",train',):
        (tmp_path / "features_metadata.csv").write_text(f"filename,split\n{row}\n")
        with pytest.raises(DataError, match=r"metadata.csv.*download the CSV again"):
            list(metadata.read_metadata(tmp_path))


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_in_descriptions(name: str) -> None:
    for change in ({"name": name}, {"folders": {"train": name}}, {"target": {"file": f"{name}/{{chip}}.tif"}},
                   {"sensors": [{**BIOMASSTERS.dump()["sensors"][0], "name": name}]}):
        raw = BIOMASSTERS.dump()
        raw = {**raw, **{key: {**raw.get(key, {}), **value} if isinstance(value, dict) else value
                         for key, value in change.items()}}
        if name in (".", "..", "", "a\nb") and "target" in change:
            continue  # `../{chip}.tif` is held by "../x"; "/{chip}.tif" by the absolute one
        if len(name) == 300 and "target" not in change:
            continue
        with pytest.raises(DataError, match="name|file"):
            parse_dataset(raw, "it")


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_in_manifests(name: str, tmp_path: Path) -> None:
    """Of which there is a file, where that can be."""
    (tmp_path / "chips").mkdir()
    for beside in (tmp_path / "x.safetensors", tmp_path / "chips" / ".safetensors"):
        beside.write_bytes(b"")
    for value in (name, 5, None, ["a"]):
        months = {sensor.name: "1" * 12 for sensor in BIOMASSTERS.sensors}
        entry = {"id": value, "split": "train", "months": months, "label": None}
        (tmp_path / chip_file.MANIFEST).write_text(json.dumps(
            {"version": chip_file.VERSION, "dataset": BIOMASSTERS.dump(), "chips": [entry]}))
        with pytest.raises(DataError, match="manifest.json"):
            open_index(tmp_path)


def test_places_of_downloads() -> None:
    for url in ("s3://b/train_agbm/../../a_agbm.tif", "s3://b/../a_agbm.tif", "/etc/a_agbm.tif",
                "s3://b/train_agbm/a/b_agbm.tif"):
        with pytest.raises(DataError, match="is not s3://BUCKET"):
            _remote(metadata.Published(Path("a_agbm.tif"), 1, 1, {"us": url}), "us")


def test_a_list_of_chips(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("../../etc/passwd\n")
    with pytest.raises(DataError, match="not in the metadata CSV"):
        _chosen(str(tmp_path / "ids"), ["a"])


def test_what_is_written_follows_no_link(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a_agbm.tif").symlink_to(kept)
    tiff.write_map(tmp_path / "out" / "a_agbm.tif", np.zeros((4, 4)))
    assert kept.read_text() == "mine" and not (tmp_path / "out" / "a_agbm.tif").is_symlink()


def test_restart_deletes_links_and_not_what_they_name(tmp_path: Path) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    (elsewhere / "curves").write_text("mine")
    run.mkdir()
    (run / "tensorboard").symlink_to(elsewhere)
    _claim(run, load_config(RECIPE), True, {"values": "steps"})
    assert (elsewhere / "curves").exists() and not (run / "tensorboard").exists()


def test_a_link_of_an_archive_is_not_archived(tmp_path: Path) -> None:
    """Of a submission: its maps are read and coded anew."""
    from engine.inference.submission import Submission

    tiff.write_map(tmp_path / "a_agbm.tif", np.zeros((256, 256)))
    (tmp_path / "b_agbm.tif").symlink_to(tmp_path / "a_agbm.tif")
    Submission(tmp_path / "out.tar", BIOMASSTERS, ("a", "b")).write(tmp_path)
    with tarfile.open(tmp_path / "out.tar") as archive:
        assert all(entry.isfile() and "/" not in entry.name for entry in archive.getmembers())


# Sizes -------------------------------------------------------------------------------------------------------------


def test_aliases_that_mean_a_billion_values() -> None:
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    for text in (laughs, laughs.replace("[x, x]", "{x: 1}").replace("a9: &a9 [", "a9:\n  <<: ["), "a: &a [*a]"):
        with pytest.raises(ValueError, match="alias"):
            parse_yaml(text)
    assert parse_yaml("a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("text", ["!!int ''", "!!float ''", "!!bool x", "!!timestamp x", "2024-13-45", "[" * 2000,
                                  "? [a]\n: b", "a: *b"])
def test_yaml_that_breaks_its_reader(text: str) -> None:
    with pytest.raises(ValueError, match="."):
        parse_yaml(text)


def test_json_that_is_too_deep_or_has_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="nested"):
        parse_json("[" * 100_000)
    monkeypatch.setattr("engine.base.texts.LARGEST_JSON", 1 << 20)
    with pytest.raises(ValueError, match="larger than 1 MB"):
        read_json("/dev/zero")


def test_headers_that_ask_for_more_than_there_is(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for size in (2**60, 2**40, 2**31):
        path.write_bytes(struct.pack("<Q", size) + b'{"a":{}}')
        with pytest.raises(WeightsError, match="damaged"):
            read_tensors(path)
        with pytest.raises(DataError, match="no end"):
            chip_file.read_head(path)
    huge = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    text = json.dumps(huge).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(WeightsError, match="damaged"):
        read_tensors(path)


@pytest.mark.parametrize("said", [{"decoder_channels": [2**40] * 5}, {"in_channels": 2**40}, {"tile": 10**9},
                                  {"backbone": 5}, {"backbone": "hf-hub:somebody/something"}, {"tile": "a"}])
def test_weights_that_ask_for_another_model(said: dict[str, Any], tmp_path: Path) -> None:
    whole = write_weights(tmp_path / "whole.safetensors")
    tensors, about = read_tensors(whole)
    save_file(tensors, tmp_path / "w.safetensors",
              {**about, "architecture": json.dumps(json.loads(about["architecture"]) | said)})
    with pytest.raises(WeightsError, match=r"w\.safetensors: its"):
        load_model(tmp_path / "w.safetensors")


def test_a_zip_that_inflates(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for entry in old.infolist():
            bomb = entry.filename.endswith("byteorder")
            new.writestr(entry.filename, bytes(1 << 24) if bomb else old.read(entry),
                         zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED)
    with pytest.raises(WeightsError, match="compressed, which torch.save never does"):
        read_tensors(tmp_path / "b.pth")


def _retold(path: Path, tag: int, value: int) -> None:
    """A TIFF's tag, another value."""
    data = bytearray(path.read_bytes())
    count = struct.unpack_from("<H", data, 8)[0]
    [at] = [10 + 12 * i for i in range(count) if struct.unpack_from("<H", data, 10 + 12 * i)[0] == tag]
    struct.pack_into("<HHII", data, at, tag, 4, 1, value)
    path.write_bytes(data)


def test_a_tiff_of_a_million_squared(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tiff.write(path, np.zeros((256, 256), np.float32))
    for tag in (tiff.WIDTH, tiff.LENGTH):
        _retold(path, tag, 10**6)
    with pytest.raises(DataError, match="damaged header"):
        tiff.read_into(path, np.empty((256, 256), np.float32))


@pytest.mark.parametrize("compression", ["deflate", "lzma"])
def test_a_tiff_that_inflates(compression: str, tmp_path: Path) -> None:
    """One strip says it is 64 KiB, and is 16 MiB."""
    import lzma

    import tifffile

    image = np.zeros((256, 256), np.uint8)
    path, kind = tmp_path / "a.tif", {"deflate": "zlib", "lzma": "lzma"}[compression]
    tifffile.imwrite(path, image, compression=kind, rowsperstrip=256, metadata=None)
    out = np.empty((256, 256), np.uint8)
    tiff.read_into(path, out)
    bomb = zlib.compress(bytes(1 << 24)) if compression == "deflate" else lzma.compress(bytes(1 << 24))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + bomb)
    _retold(path, tiff.STRIP_OFFSETS, size)
    _retold(path, tiff.STRIP_COUNTS, len(bomb))
    with pytest.raises(DataError, match="inflates to more than its 65536 bytes"):
        tiff.read_into(path, out)


def test_a_line_without_end(tmp_path: Path) -> None:
    (tmp_path / "features_metadata.csv.gz").write_bytes(gzip.compress(b"filename\n" + b"a" * (1 << 26)))
    with pytest.raises(DataError, match="a line of more than"):
        list(metadata.read_metadata(tmp_path))


# The network -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}", asked
    found.shutdown()


def _vrt(source: str) -> str:
    return (f'<VRTDataset rasterXSize="64" rasterYSize="64"><SRS>{CRS}</SRS><GeoTransform>{", ".join(map(str, _GEO))}'
            '</GeoTransform><VRTRasterBand dataType="Float32" band="1"><SimpleSource>'
            f'<SourceFilename relativeToVRT="0">{source}</SourceFilename>'
            '<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>')


_GEO = place().to_gdal()
_WMS = ('<GDAL_WMS><Service name="TMS"><ServerUrl>{}/${{z}}</ServerUrl></Service><DataWindow><UpperLeftX>0</UpperLeftX>'
        '<UpperLeftY>0</UpperLeftY><LowerRightX>100</LowerRightX><LowerRightY>-100</LowerRightY><TileLevel>1</TileLevel>'
        '</DataWindow><Projection>EPSG:3857</Projection><BandsCount>1</BandsCount></GDAL_WMS>')


def _pixels(path: Path) -> Any:
    read_header(path)
    with rasterio.open(path) as raster:
        return raster.read(1)


def test_rasters_of_a_scene_ask_no_server(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = server
    own = write_raster(tmp_path / "own.tif", np.ones((64, 64, 1), np.float32))
    texts = {"a.tif": _vrt(f"/vsicurl/{address}/a.tif"), "a.vrt": _vrt(f"/vsicurl/{address}/a.tif"),
             "b.tif": _WMS.format(address), "b.vrt": _vrt(_WMS.format(address).replace("<", "&lt;")),
             "c.tif": f"{address}/a.tif", "d.tif": _vrt(str(own))}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        with pytest.raises((DataError, rasterio.errors.RasterioIOError)):
            _pixels(tmp_path / name)
    (tmp_path / "d.vrt").write_text(_vrt(str(own)))  # one's own, of files here, is read
    assert _pixels(tmp_path / "d.vrt").min() == 1
    for name in (f"/vsicurl/{address}/a.tif", f"{address}/a.tif"):
        with pytest.raises(DataError, match="no such file"):
            read_header(Path(name))
    assert asked == []


def test_a_crs_is_no_place(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = server
    (tmp_path / "a.prj").write_text(parse_crs("EPSG:3067").to_wkt())
    for text in (f"{address}/crs", str(tmp_path / "a.prj"), "ftp://a/b"):
        with pytest.raises(CRSError, match="is a place and no CRS"):
            parse_crs(text)
    for text in ("EPSG:3067", "http://www.opengis.net/def/crs/OGC/1.3/CRS84", "urn:ogc:def:crs:OGC:1.3:CRS84",
                 parse_crs("EPSG:3067").to_wkt()):
        assert parse_crs(text).is_valid
    scene = make_scene(tmp_path / "scene")
    scene.write_text(scene.read_text() + f"grid: {{crs: '{address}/crs'}}\n")
    with pytest.raises(DataError, match=r"grid\.crs"):
        open_scene(scene)
    assert asked == []


@pytest.mark.parametrize("href", ["{}/a.tif", "/vsicurl/{}/a.tif", "s3://b/a.tif", "../../../no/such.tif", "a\0.tif",
                                  "x" * 300, "file:///dev/zero"])
def test_hrefs_of_stac_items(href: str, server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = server
    item = {"type": "Feature", "stac_version": "1.0.0", "id": "a", "bbox": [0, 0, 1, 1],
            "geometry": {"type": "Point", "coordinates": [0, 0]}, "properties": {"datetime": "2020-06-01T00:00:00Z"},
            "links": [{"rel": rel, "href": f"{address}/{rel}"} for rel in ("self", "root", "parent", "collection")],
            "assets": {"vv": {"href": href.format(address)}}}
    (tmp_path / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": [item]}))
    (tmp_path / "scene.yaml").write_text(yaml.safe_dump({"stac": {"items": "items.json", "assets": {"S1": ["vv"]}}}))
    with pytest.raises(EngineError, match="not on this machine|no such file|no raster"):
        open_scene(tmp_path / "scene.yaml")
    assert asked == []
