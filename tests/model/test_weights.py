"""Weights: round trips, the winner's files, and files that do not fit."""

from __future__ import annotations

import argparse
import json
import logging
import pickle
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine.base.errors import WeightsError
from engine.model.tensors import read_tensors
from engine.model.unet import BiomassUNet
from engine.model.weights import fill, load_model, read_weights, save_weights
from tests.winner import FIXTURE, needs_fixture

BACKBONE = "tf_mobilenetv3_small_minimal_100"
WIDTHS = [48, 40, 32, 24, 16]
ARCHITECTURE = {"backbone": BACKBONE, "decoder_channels": WIDTHS, "in_channels": 15, "tile": 256}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name], tensor), name


@pytest.fixture(scope="module")
def model() -> BiomassUNet:
    torch.manual_seed(0)
    return BiomassUNet(BACKBONE, WIDTHS)


# --- our own files ----------------------------------------------------------------------------------------------------

def test_round_trip(model: BiomassUNet, tmp_path: Path) -> None:
    path = tmp_path / "new" / "best.safetensors"
    save_weights(path, model, model.config(), {"step": "12"})
    with safe_open(path, "pt") as handle:
        assert handle.metadata()["step"] == "12"
        assert json.loads(handle.metadata()["architecture"]) == ARCHITECTURE
    state, architecture = read_weights(path)
    assert architecture == ARCHITECTURE
    assert_same(state, model.state_dict())
    assert_same(load_model(path).state_dict(), model.state_dict())
    assert [file.name for file in path.parent.iterdir()] == ["best.safetensors"]  # nothing left beside it


def test_the_same_weights_give_the_same_bytes(model: BiomassUNet, tmp_path: Path) -> None:
    contents = set()
    for i in range(5):
        extra = {str(n): "é" for n in sorted(range(8), key=lambda n: (n * i) % 7)}
        save_weights(tmp_path / "w.safetensors", model, model.config(), extra)
        contents.add((tmp_path / "w.safetensors").read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / "w.safetensors", "pt") as handle:
        assert handle.metadata()["3"] == "é"
    assert_same(read_tensors(tmp_path / "w.safetensors")[0], model.state_dict())


def test_a_failed_save_leaves_the_old_file(model: BiomassUNet, tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    save_weights(path, model, model.config())
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_weights(path, model, {"backbone": object()})
    assert path.read_bytes() == before


def test_dtypes_views_and_compiled_names_are_saved(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {"encoder._orig_mod.a": base[:6].view(2, 3).T, "b": base, "c": base.bfloat16()}
    save_weights(tmp_path / "w.safetensors", state, ARCHITECTURE)
    got, about = read_tensors(tmp_path / "w.safetensors")
    assert_same(got, {"encoder.a": base[:6].view(2, 3).T, "b": base, "c": base.bfloat16()})
    assert json.loads(about["architecture"]) == ARCHITECTURE


def test_a_run_folder_prefers_best(model: BiomassUNet, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"a folder without weights/best.safetensors or weights/last.safetensors"):
        read_weights(tmp_path)
    save_weights(tmp_path / "weights" / "last.safetensors", model, model.config())
    assert_same(read_weights(tmp_path)[0], model.state_dict())
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_weights(tmp_path / "weights" / "best.safetensors", other, model.config())
    assert_same(read_weights(tmp_path)[0], other)


# --- the winner's files -----------------------------------------------------------------------------------------------

@needs_fixture
def test_both_of_the_winners_kinds() -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(FIXTURE / "model_last.pth", weights_only=True)  # torch's own restricted reader
    expected = {name.removeprefix("module."): tensor for name, tensor in saved["state_dict"].items()}
    for kind in ("model_last.pth", "modelo_best.pth"):
        state, architecture = read_weights(FIXTURE / kind)
        assert architecture == ARCHITECTURE
        assert_same(state, expected)
        assert_same(load_model(FIXTURE / kind).state_dict(), expected)


@needs_fixture
def test_the_architecture_is_told_from_the_tensors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state, _ = read_weights(FIXTURE / "modelo_best.pth")
    save_file(state, tmp_path / "bare.safetensors")  # sorted names, no metadata
    with caplog.at_level(logging.WARNING):
        got, architecture = read_weights(tmp_path / "bare.safetensors")
    assert architecture == ARCHITECTURE
    assert f"taken to be {BACKBONE}" in caplog.text
    assert_same(got, state)


@needs_fixture
def test_a_backbone_that_timm_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, _ = read_weights(FIXTURE / "modelo_best.pth")
    save_file(state, tmp_path / "bare.safetensors")
    monkeypatch.setattr(timm, "list_models", lambda: ["resnet18", "tf_mobilenetv3_small_100"])
    with pytest.raises(WeightsError, match="no model of this timm has the encoder's tensors.*--backbone NAME"):
        read_weights(tmp_path / "bare.safetensors")
    assert read_weights(tmp_path / "bare.safetensors", BACKBONE)[1] == ARCHITECTURE


def test_other_channels_and_an_unknown_backbone(tmp_path: Path) -> None:
    made = BiomassUNet(BACKBONE, WIDTHS[::-1], in_channels=4)
    args = argparse.Namespace(backbone=BACKBONE)
    torch.save({"state_dict": made.state_dict(), "args": args}, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth")[1] == {**made.config(), "in_channels": 4}
    torch.save({"state_dict": made.state_dict(), "args": {"backbone": "nonsense"}}, tmp_path / "b.pth")
    with pytest.raises(WeightsError, match=r"b.pth: .*'nonsense' is not a model of timm.*--backbone NAME"):
        load_model(tmp_path / "b.pth")


def test_weights_that_do_not_fit(model: BiomassUNet, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    del state["attn.0.attn.0.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["segmentation_head.weight"] = torch.zeros(1, 20, 3, 3)
    with pytest.raises(WeightsError, match=r"somewhere does not fit the model \(1 missing: attn.0.attn.0.bias; "
                       r"1 unexpected: extra.weight; 1 of another shape: segmentation_head.weight "
                       r"\(\[1, 20, 3, 3\] in the file, \[1, 16, 3, 3\] in the model\)\); set model.backbone"):
        fill(model, state, "somewhere")
    save_weights(tmp_path / "w.safetensors", state, ARCHITECTURE)
    with pytest.raises(WeightsError, match=r"w.safetensors does not fit the model \(1 missing"):
        load_model(tmp_path / "w.safetensors")


def test_integers_are_no_weights(model: BiomassUNet) -> None:
    state = dict(model.state_dict())
    state["segmentation_head.bias"] = state["segmentation_head.bias"].to(torch.int32)  # of as many bytes
    with pytest.raises(WeightsError, match=r"1 of another kind: segmentation_head.bias \(torch.int32 in the file"):
        fill(model, state, "somewhere")


# --- damage and files of other kinds ----------------------------------------------------------------------------------

def test_files_of_other_kinds(tmp_path: Path) -> None:
    def refused(content: bytes, said: str) -> None:
        (tmp_path / "w.pth").write_bytes(content)
        with pytest.raises(WeightsError, match=rf"w.pth: {said}"):
            read_weights(tmp_path / "w.pth")

    refused(b"", "neither safetensors nor")
    refused(b"<html>404: Not Found</html>", "neither safetensors nor")
    refused(pickle.dumps({"a": 1}), "in torch.save's format from before 1.6.*save its state dict as .safetensors")
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("readme.txt", "hello")
    refused((tmp_path / "w.pth").read_bytes(), "a zip file, but not one of torch.save")
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    refused((tmp_path / "w.pth").read_bytes(), "its part 'data.pkl' is missing or damaged .compressed")
    torch.save({"lr": 1e-3, "state_dict": {}}, tmp_path / "w.pth")
    refused((tmp_path / "w.pth").read_bytes(), "holds no weights .found: dict.")
    save_file({"a": torch.ones(50)}, tmp_path / "w.pth")
    refused((tmp_path / "w.pth").read_bytes()[:-9], "truncated or damaged.*copy or download it again")
    refused((tmp_path / "w.pth").read_bytes()[:20], "truncated or damaged")


def test_weights_of_something_else(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(WeightsError, match=r"not the weights of a BiomassUNet \(first tensors: conv1.*pretrained"):
        read_weights(tmp_path / "resnet.pth")
    with pytest.raises(WeightsError, match="no such file"):
        read_weights(tmp_path / "absent.pth")


def test_a_flipped_bit_is_seen_where_we_wrote_the_file(model: BiomassUNet, tmp_path: Path) -> None:
    """Of the header and of a tensor; others' files have no checksum, and are taken."""
    path = tmp_path / "w.safetensors"
    save_weights(path, model, model.config(), {"step": "12"})
    whole = path.read_bytes()
    assert read_tensors(path)[1].keys() == {"step", "architecture"}
    for place in (whole.index(b'"12"') + 1, len(whole) - 1, len(whole) // 2):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match=r"w.safetensors: damaged \(its checksum is \w+, and \w+ was written\)"):
            load_model(path)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, path, {"architecture": json.dumps(ARCHITECTURE)})
    load_model(path)


def test_damaged_metadata(model: BiomassUNet, tmp_path: Path) -> None:
    others = [{"decoder_channels": [48, 40, 32, 24, 0.5]}, {"decoder_channels": [[48], 40, 32, 24, 16]}, {"tile": True},
              {"in_channels": 10**30}, {"in_channels": "15"}, {"backbone": 5}]
    for said in ("{", "{}", "3", *(json.dumps({**ARCHITECTURE, **other}) for other in others)):
        save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors",
                  {"architecture": said})
        with pytest.raises(WeightsError, match="metadata 'architecture' is damaged"):
            read_weights(tmp_path / "w.safetensors")
