"""Descriptions of data: what is refused, and by which words; names of files; who wins; what differs."""

from __future__ import annotations

import copy
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engine.base.errors import DataError
from engine.config import parse_config
from engine.data.biomassters import BIOMASSTERS
from engine.data.dataset import (
    FILE,
    Dataset,
    Folders,
    Picture,
    Sensor,
    Target,
    described,
    differences,
    load_dataset,
    parse_dataset,
)
from engine.data.forms import open_source
from engine.data.index import open_index
from engine.data.made.fields import make_fields
from engine.data.pipeline import groups
from engine.data.selection.chips import select_chips
from engine.data.store import chip_file
from engine.data.store.pack import pack
from tests.conftest import ROOT

GRASSLAND = ROOT / "configs" / "datasets" / "grassland.yaml"
S2, RADAR, TERRAIN = range(3)


def description(**changes: Any) -> dict[str, Any]:
    """The grassland's as YAML gives it, with changes such as sensors__0__low=[…]; … takes a key away."""
    raw: dict[str, Any] = yaml.safe_load(GRASSLAND.read_text())
    for place, value in changes.items():
        *path, last = [int(word) if word.isdigit() else word for word in place.split("__")]
        at: Any = raw
        for word in path:
            at = at[word]
        if value is ...:
            del at[last]
        else:
            at[last] = copy.deepcopy(value)
    return raw


def parsed(**changes: Any) -> Dataset:
    return parse_dataset(description(**changes), "it.yaml")


def small(**changes: Any) -> Dataset:
    return parsed(tile=32, steps=["one", "two"], **changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"name": ...}, "name: Field required"),
    ({"name": "../x"}, "name: has to be a name"),
    ({"colour": 3}, "colour: is not a key of a description (docs/datasets.md lists them)"),
    ({"tile": 100}, "tile: Input should be a multiple of 32"),
    ({"tile": 1024}, "tile: Input should be less than or equal to 512"),
    ({"pixel_metres": 0}, "pixel_metres: Input should be greater than 0"),
    ({"pixel_metres": float("inf")}, "pixel_metres: Input should be a finite number"),
    ({"steps": []}, "steps: Tuple should have at least 1 item"),
    ({"steps": [str(t) for t in range(65)]}, "steps: Tuple should have at most 64 items"),
    ({"steps": ["May", 6]}, "steps.1: Input should be a valid string"),
    ({"steps": ["May", "May"]}, "steps: May stand there twice"),
    ({"sensors": []}, "sensors: Tuple should have at least 1 item"),
    ({"sensors__0__band": ["x"]}, "sensors.0.band: is not a key"),
    ({"sensors__0__bands": []}, "sensors.0.bands: Tuple should have at least 1 item"),
    ({"sensors__0__bands": [str(b) for b in range(65)]}, "sensors.0.bands: Tuple should have at most 64 items"),
    ({"sensors__1__bands": ["VV", "VV"]}, "sensors.1: bands: VV stand there twice"),
    ({"sensors__0__low": [0]}, "sensors.0: low has 1 numbers for 5 bands"),
    ({"sensors__0__high": [1] * 6}, "sensors.0: high has 6 numbers for 5 bands"),
    ({"sensors__0__low": [0, 0, 0, 0, 10_000]}, "sensors.0: band B11: low 10000 is not below high 10000"),
    ({"sensors__2__low": [0, 16_777_216], "sensors__2__high": [1, 16_777_216.5], "sensors__2__packed_step": ...},
     "sensors.2: band slope: low 1.67772e+07 is not below high 1.67772e+07"),  # the same float32
    ({"sensors__2__high": [1500, 1e39]}, "sensors.2: high 1e+39 is beyond float32"),
    ({"sensors__0__dtype": "float32", "sensors__0__low": [-3e38] * 5, "sensors__0__high": [3e38] * 5},
     "sensors.0: band B2: low -3e+38 and high 3e+38 are too close or too far apart for float32"),
    ({"sensors__2__packed_step": 1e-40, "sensors__2__low": [0, 0]},
     "sensors.2: band elevation: low 0 and high 1500 are too close or too far apart for float32 in steps of 1e-40"),
    ({"sensors__2__nodata": -1e39}, "sensors.2: nodata -1e+39 is beyond float32"),
    ({"sensors__0__low": [0, 0, 0, 0, 0.5]}, "sensors.0: low 0.5 is no uint16"),
    ({"sensors__0__low": [-1, 0, 0, 0, 0]}, "sensors.0: low -1 is no uint16"),
    ({"sensors__0__nodata": 65_536}, "sensors.0: nodata 65536 is no uint16"),
    ({"sensors__1__nodata": -32_769}, "sensors.1: nodata -32769 is no int16"),
    ({"sensors__0__nodata": float("nan")}, "sensors.0.nodata: Input should be a finite number"),
    ({"sensors__0__dtype": "int32"}, "sensors.0.dtype: Input should be 'uint8', 'uint16', 'int16' or 'float32'"),
    ({"sensors__0__packed_step": 1}, "sensors.0: packed_step belongs to float32: uint16 is packed as it is"),
    ({"sensors__2__packed_step": 0}, "sensors.2.packed_step: Input should be greater than 0"),
    ({"sensors__2__low": [0.05, 0]}, "sensors.2: low 0.05 is no whole number of steps of 0.1 within ±32767"),
    ({"sensors__2__low": [-4000, 0]}, "sensors.2: low -4000 is no whole number of steps of 0.1 within ±32767"),
    ({"sensors__1__name": "S2"}, "sensors' names: S2 stand there twice"),
    ({"sensors__2__file": "{chip}.tif"}, "file patterns: a name such as 'a_S2_00.tif' is one of '{chip}_S2_{step:02d}"),
    ({"sensors": [{**description()["sensors"][TERRAIN]}]}, "sensors: all are static"),
    ({"target": ...}, "target: Field required"),
    ({"target__unit": ...}, "target.unit: Field required"),
    ({"target__dtype": "int8"}, "target.dtype: Input should be"),
    ({"target__nodata": float("inf")}, "target.nodata: Input should be a finite number"),
    ({"target__nodata": -4e38}, "target: nodata -4e+38 is beyond float32"),
    ({"target__nodata": -1, "target__dtype": "uint8"}, "target: nodata -1 is no uint8"),
    ({"target__nodata": 0.5, "target__dtype": "int16"}, "target: nodata 0.5 is no int16"),
    ({"folders__train": ".."}, "folders.train: has to be a name"),
    ({"folders__test": "train_features"}, "folders: train and test: train_features stand there twice"),
    ({"pictures__0__sensor": "S3"}, "pictures: sensor 'S3' is none of S2, radar, terrain"),
    ({"pictures__0__bands": ["B4", "B9", "B2"]}, "pictures: band of S2 'B9' is none of B2, B3, B4, B8, B11"),
    ({"pictures__0__clouds": "CLP"}, "pictures: band of S2 'CLP' is none of"),
    ({"pictures__0__low": [1, 2, 3]}, "pictures.0: low and high go together, with 3 numbers each"),
    ({"pictures__0__low": [1, 2, 3], "pictures__0__high": [2, 2, 4]}, "pictures.0: low has to be below high in each"),
], ids=lambda value: value[:45] if isinstance(value, str) else "")
def test_what_does_not_hold_is_refused_by_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        parsed(**changes)
    assert str(error.value).startswith("it.yaml: ") and message in str(error.value)
    assert "sensors: Tuple" not in str(error.value) or changes == {"sensors": []}  # what follows from the error


@pytest.mark.parametrize(("file", "message"), [
    ("../{chip}_{step}.tif", "sensors.0.file: has to be a file's name"),
    ("a/{chip}_{step}.tif", "sensors.0.file: has to be a file's name"),
    ("a\\{chip}_{step}.tif", "sensors.0.file: has to be a file's name"),
    ("{chip}\0{step}.tif", "sensors.0.file: has to be a file's name"),
    ("{chip}.tif", "has to hold {chip} and {step} once each"),
    ("{step}.tif", "has to hold {chip} and {step} once each"),
    ("{chip}_{chip}_{step}.tif", "has to hold {chip} and {step} once each"),
    ("{chip}_{step}_{band}.tif", "nothing else in braces"),
    ("{chip:02d}_{step}.tif", "nothing else in braces"),
    ("{chip.__class__}_{step}.tif", "nothing else in braces"),
    ("{chip}_{step!r}.tif", "nothing else in braces"),
    ("{chip}_{step:3}.tif", "nothing else in braces"),
    ("{chip}_{step:00d}.tif", "nothing else in braces"),
    ("{chip}_{step}.tif{{", "nothing else in braces"),
    ("{chip}_{step}.tiff", "has to end in .tif"),
    ("{chip}{step}.tif", "does not say where the chip ends and the step begins"),  # chip a, step 12, or a1 and 2?
    ("{step}{chip}.tif", "does not say where the chip ends and the step begins"),
    ("x{chip}1{step}.tif", "does not say where the chip ends and the step begins"),
    ("{chip}_radar_{step:02d}.tif", "a name such as 'a_radar_00.tif' is one of"),
    ("{chip}_{step}.tif", "a name such as 'a_radar_10.tif' is one of"),
])
def test_patterns_that_leave_the_folder_or_cannot_be_told_apart(file: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        parsed(sensors__0__file=file)
    assert message in str(error.value)


CHIPS = st.from_regex(r"[0-9A-Za-z][0-9A-Za-z_-]{0,12}", fullmatch=True)


@pytest.mark.parametrize("step", ["{step}", "{step:01d}", "{step:02d}", "{step:03d}"])
@given(chip=CHIPS | st.sampled_from(["0", "a_S2_03", "S2", "a_height", "a-b_", "9" * 20]),
       number=st.integers(0, 63))
def test_names_come_back(step: str, chip: str, number: int) -> None:
    data = parsed(steps=[str(t) for t in range(64)], sensors__0__file=f"x.{{chip}}_S2[{step}].tif")
    moving, _, still, label = data.names
    found = moving.fullmatch(data.feature_name(chip, S2, number))
    assert found is not None and (found["chip"], int(found["step"])) == (chip, number)
    for pattern, name in ((still, data.feature_name(chip, TERRAIN, number)), (label, data.label_name(chip))):
        found = pattern.fullmatch(name)
        assert found is not None and found["chip"] == chip


@pytest.mark.parametrize(("step", "names"), [("{step}", ["00", "01", "x", "", "١"]),
                                             ("{step:02d}", ["1", "001", "012"])])
def test_names_that_no_step_has(step: str, names: list[str]) -> None:
    """Such a file would be a month of the index, and missing when it is read."""
    pattern = parsed(sensors__0__file=f"{{chip}}_S2_{step}.tif").names[S2]
    assert pattern.fullmatch("a_S2_10.tif") and not any(pattern.fullmatch(f"a_S2_{name}.tif") for name in names)


def test_the_dot_of_a_pattern_is_a_dot() -> None:
    assert not parsed().names[TERRAIN].fullmatch("a_terrainXtif")


# Where descriptions come from ------------------------------------------------------------------------------------


def test_built_in_or_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_dataset("biomassters") == BIOMASSTERS and load_dataset(GRASSLAND) == parsed()
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(description(name="mine")))
    monkeypatch.chdir(tmp_path)
    assert load_dataset("mine.yaml").name == "mine"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(description(name="changed")))
    assert load_dataset("mine.yaml").name == "changed"  # as it is now: a notebook edits and goes on
    with pytest.raises(DataError, match=r"biomaster: cannot be read .* built-in biomassters; is it 'biomassters'\?"):
        load_dataset("biomaster")


@pytest.mark.parametrize(("text", "message"), [
    ("name: [", "it.yaml: is no YAML"), ("steps: [2024-13-01]", "it.yaml: is no YAML (month must be in 1..12)"),
    ("[" * 5000, "it.yaml: is no YAML"), ("tile: 1" + "0" * 5000, "it.yaml: is no YAML"),
    ("- a", "it.yaml: is no data set description"),
    ("name: x", "it.yaml: tile: Field required"), ("\xff", "it.yaml: cannot be read")])
def test_what_is_no_description(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_bytes(text.encode("latin1"))
    with pytest.raises(DataError) as error:
        load_dataset(tmp_path / "it.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize("data", [BIOMASSTERS, parsed()], ids=lambda data: data.name)
def test_a_dump_comes_back(data: Dataset) -> None:
    again = parse_dataset(json.loads(json.dumps(data.dump())), "it")
    assert again == data and hash(again) == hash(data)
    assert parse_dataset(yaml.safe_load(yaml.safe_dump(data.dump(), allow_unicode=True)), "it") == data


def test_a_description_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parsed().tile = 64  # type: ignore[misc]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fields") / "data"
    make_fields(root, small(), 2, seed=1, test_chips=1)
    return root


def test_the_data_s_own_description_wins(tree: Path, tmp_path: Path) -> None:
    assert open_index(tree).dataset == open_index(tree, BIOMASSTERS).dataset == small()
    recipe = {"data": {"path": str(tree), "dataset": "biomassters", "split": {"folds": 2}}}
    train, validation = select_chips(parse_config(recipe, "recipe"))
    assert [chip.dataset for chip in (*train, *validation)] == [small()] * 2

    pack(tree, tmp_path / "store", workers=1)
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert parse_dataset(manifest["dataset"], "it") == small()
    (tmp_path / "store" / FILE).write_text(yaml.safe_dump(description()))
    store = open_index(tmp_path / "store", BIOMASSTERS)
    assert store.dataset == small() and len(store) == 3
    assert all(chip_file.read_head(chip.packed).dataset == small() for chip in store.chips if chip.packed)

    # Edited in the manifest alone, it would be what weights remember and not what is done
    manifest["dataset"]["sensors"][0]["high"][0] += 1
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="describes its data otherwise than manifest.json does"):
        open_source(open_index(tmp_path / "store").chips)


def test_a_packed_chip_whose_static_blocks_differ_from_step_to_step(tree: Path, tmp_path: Path) -> None:
    """The sizes are what the kernel inflates by: those of a later step would lead it out of the file."""
    pack(tree, tmp_path, workers=1)
    path = next(iter(open_index(tmp_path).chips)).packed
    assert path is not None
    data, head = bytearray(path.read_bytes()), chip_file.read_head(path)
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    tables = head.start - header["crc32"]["data_offsets"][1]
    sizes = head.sizes.copy()
    sizes[1, head.planes.static] += 100
    first = tables + header["sizes"]["data_offsets"][0]
    data[first:first + sizes.nbytes] = sizes.tobytes()
    data[head.start - 4:head.start] = zlib.crc32(data[:head.start - 4]).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DataError, match="is no packed chip .static images differ from step to step"):
        chip_file.read_head(path)


def test_a_folder_without_one_is_what_the_recipe_says(tree: Path, tmp_path: Path) -> None:
    for folder in ("train_features", "train_target"):
        (tmp_path / folder).symlink_to(tree / folder)
    assert len(open_index(tmp_path, small())) == 2
    with pytest.raises(DataError, match=r"not a name of this data \(\{chip\}_S1_00.tif, \{chip\}_agbm.tif\)"):
        open_index(tmp_path)
    (tmp_path / FILE).write_text("name: x")
    with pytest.raises(DataError, match=f"{tmp_path / FILE}: tile: Field required"):
        open_index(tmp_path, small())


def test_a_store_of_another_description_is_refused(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "store", workers=1)
    for folder in ("train_features", "train_target", "test_features"):
        (tmp_path / "tree" / folder).parent.mkdir(exist_ok=True)
        (tmp_path / "tree" / folder).symlink_to(tree / folder)
    changed = description(tile=32, steps=["one", "two"], sensors__0__high=[9000] * 5)
    (tmp_path / "tree" / FILE).write_text(yaml.safe_dump(changed))
    with pytest.raises(DataError, match="holds chips of data set 'grassland' as it was described then"):
        pack(tmp_path / "tree", tmp_path / "store", workers=1)


# What differs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "told"), [
    ({}, []),
    ({"name": "other", "target__name": "cover", "sensors__0__file": "{chip}-{step}-S2.tif"}, []),
    ({"pixel_metres": 20}, ["pixels of 20 m instead of 10"]),
    ({"sensors__0__bands": ["B2", "B3", "B5", "B8", "B11"], "pictures": []}, ["S2: band 3 is B5 instead of B4"]),
    ({"sensors__1__bands": ["VV", "VH", "HH"], "sensors__1__low": [0] * 3, "sensors__1__high": [1] * 3},
     ["radar: band 3 is HH instead of no band"]),
    ({"sensors__1__bands": ["VV"], "sensors__1__low": [0], "sensors__1__high": [1]},
     ["radar: band 2 is no band instead of VH"]),
    ({"sensors__1__low": [-2500, -3000]}, ["radar VH: range -3000 to -500 instead of -3200 to -500"]),
    ({"steps": ["May", "Jun"]}, ["steps May, Jun instead of Mar, Apr, May, Jun, Jul, Aug"]),
    ({"tile": 64}, ["tiles of 64 pixels instead of 128"]),
    ({"sensors__1__name": "S1"}, ["sensors S2, S1, terrain instead of S2, radar, terrain"]),
    ({"sensors__2__static": False, "sensors__2__file": "{chip}_dem_{step}.tif"},
     ["terrain: one image a step instead of one for all"]),
])
def test_differences_name_the_band(changes: dict[str, Any], told: list[str]) -> None:
    assert differences(parsed(), parsed(**changes)) == told


def test_weights_without_a_note_are_of_the_challenge() -> None:
    assert described({}, "w") == BIOMASSTERS
    assert described({"dataset": json.dumps(parsed().dump())}, "w") == parsed()
    for note, message in (("{", "w: its note 'dataset' is damaged"), ("{}", "w, dataset: name: Field required")):
        with pytest.raises(DataError, match=message):
            described({"dataset": note}, "w")


# What follows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bands", range(1, 65))
def test_groups_of_bands_are_those_that_the_warp_has(bands: int) -> None:
    cuts = groups(bands)
    assert {end - first for first, end in cuts} <= {1, 3, 4}
    assert [band for first, end in cuts for band in range(first, end)] == list(range(bands))
    assert len(cuts) == (2 if bands == 2 else -(-bands // 4))  # as few as can be


@pytest.mark.parametrize(("changes", "codes"), [
    ({"sensors__0__dtype": "uint8", "sensors__0__high": [255] * 5, "sensors__0__nodata": 255}, (0, 0, 255)),
    ({"sensors__0__nodata": 65_535}, (0, 0, 65_535)),
    ({"sensors__0__nodata": ...}, (0, 0, None)),
    ({"sensors__0__dtype": "int16", "sensors__0__nodata": -32_768, "sensors__0__low": [-7] * 5}, (32_768, 32_761, 0)),
    ({"sensors__0__dtype": "float32", "sensors__0__packed_step": 0.1, "sensors__0__low": [-0.3] * 5,
      "sensors__0__nodata": -9999}, (32_768, 32_765, 0)),
])
def test_codes(changes: dict[str, Any], codes: tuple[int, int, int | None]) -> None:
    sensor = parsed(**changes).sensors[S2]
    assert (sensor.code_zero, int(sensor.code_low[0]), sensor.code_nodata) == codes
    assert sensor.coded and (np.asarray(sensor.absent, np.float64) == (
        sensor.zero if sensor.nodata is None else sensor.nodata)).all()


def test_made_data_follow_any_description(tmp_path: Path) -> None:
    """One that is named like the built-in one too."""
    from launch import prepare

    (tmp_path / "it.yaml").write_text(yaml.safe_dump({**small().dump(), "name": "biomassters"}))
    words = ["sample", "--dataset", tmp_path / "it.yaml", "--chips", 1, "--out", tmp_path / "data"]
    assert prepare.run_sample(prepare.arguments().parse_args(list(map(str, words)))) == 0
    index = open_index(tmp_path / "data")
    assert index.dataset.name == "biomassters" and index.dataset.bands == small().bands and len(index) == 1
    assert load_dataset("biomassters") == BIOMASSTERS


def test_the_page_knows_every_key() -> None:
    page = (ROOT / "docs" / "datasets.md").read_text()
    assert f"```yaml\n{GRASSLAND.read_text()}```\n" in page
    prose = page.replace(GRASSLAND.read_text(), "")
    keys = {key for part in (Dataset, Sensor, Target, Folders, Picture) for key in part.model_fields}
    assert [key for key in sorted(keys) if f"`{key}`" not in prose] == []
