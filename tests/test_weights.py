"""Weights: round trips, the winner's files, and pickles that must not be executed."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from engine.errors import WeightsError
from engine.model import BiomassUNet
from engine.tensors import read_tensors
from engine.unpickle import ALLOWED, Rebuild
from engine.weights import fill, load_model, read_weights, save_weights
from tests.winner import FIXTURE, needs_fixture

BACKBONE = "tf_mobilenetv3_small_minimal_100"
WIDTHS = [48, 40, 32, 24, 16]
ARCHITECTURE = {"backbone": BACKBONE, "decoder_channels": WIDTHS, "in_channels": 15}


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


# --- what torch.save writes -------------------------------------------------------------------------------------------

def every_dtype() -> dict[str, torch.Tensor]:
    names = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
             "complex64", "complex128", "uint16", "uint32", "uint64")
    return {name: torch.arange(6).to(getattr(torch, name)) for name in names}


def views() -> dict[str, torch.Tensor]:
    base = torch.arange(60.0)
    return {"base": base, "offset": base[7:], "transposed": base.view(6, 10).T, "strided": base.view(3, 20)[1:, ::3],
            "expanded": base[:1].expand(4, 3), "scalar": base[5], "empty": base[3:3],
            "empty_2d": base.view(6, 10)[:, :0],
            "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)}


@pytest.mark.parametrize("state", [every_dtype(), views()], ids=["dtypes", "views"])
def test_plain_state_dicts(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "state.pth"
    torch.save(OrderedDict(state), path)
    assert_same(read_tensors(path)[0], state)


def test_views_of_one_storage_share_memory(tmp_path: Path) -> None:
    torch.save(views(), tmp_path / "state.pth")
    got, _ = read_tensors(tmp_path / "state.pth")
    got["base"][7] = -1
    assert got["offset"][0] == -1


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_parameter("absent", None)
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(2, 2, bias=False))
        self.nothing = None


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: {"model": m, "epoch": 3}])
def test_whole_modules(wrap: Callable[[nn.Module], Any], protocol: int, tmp_path: Path) -> None:
    module = Part().double()
    module.inner[0].weight.requires_grad_(False)
    module.register_forward_hook(print)
    torch.save(wrap(module), tmp_path / "module.pth", pickle_protocol=protocol)
    assert_same(read_tensors(tmp_path / "module.pth")[0], dict(module.state_dict()))


def test_an_object_that_is_no_module(tmp_path: Path) -> None:
    module = Part()
    module.__dict__["_buffers"] = [torch.ones(1)]
    torch.save(module, tmp_path / "m.pth")
    with pytest.raises(WeightsError, match=r"test_weights.Part is no torch module \(_buffers is a list\)"):
        read_tensors(tmp_path / "m.pth")


def test_a_parameter_with_attributes(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.arange(3.0))
    parameter.note = "kept"  # type: ignore[attr-defined]
    torch.save({"a": parameter, "b": nn.Parameter(torch.ones(1))}, tmp_path / "p.pth")
    assert_same(read_tensors(tmp_path / "p.pth")[0], {"a": parameter.data, "b": torch.ones(1)})


# --- pickles that want to be executed ---------------------------------------------------------------------------------

class Calls:
    """Pickles to a call of `function` on `args`."""

    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def zipped(path: Path, content: bytes, **records: bytes) -> Path:
    """A torch.save zip with this pickle; records are storages by key, as data_0."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for key, raw in records.items():
            archive.writestr(f"archive/data/{key.removeprefix('data_')}", raw)
    return path


def attacks(target: Path) -> dict[str, bytes]:
    """Pickles each of which makes `target` when loaded by pickle itself."""
    touch = f"open({str(target)!r}, 'w').close()"
    text = str(target).encode()
    return {
        "system": pickle.dumps(Calls(os.system, f"touch {target}")),
        "eval, protocol 0": pickle.dumps(Calls(eval, touch), protocol=0),
        "exec, protocol 5": pickle.dumps(Calls(exec, touch), protocol=5),
        "inst": b"(S'touch " + text + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'touch " + text + b"'\no.",
        "subprocess": pickle.dumps(Calls(subprocess.getoutput, f"touch {target}")),
        "getattr chain": pickle.dumps(Calls(target.touch)),
        "dotted name": b"\x80\x04\x8c\x08builtins\x8c\x0dexec.__call__\x93\x8c" + bytes([len(touch)]) + touch.encode()
                       + b"\x85R.",
        "state": b"\x80\x02}(X\x01\x00\x00\x00acos\nsystem\nX" + (len(text) + 6).to_bytes(4, "little") + b"touch "
                 + text + b"\x85Rub.",
    }


NAMES = list(attacks(Path("x")))


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_pickle_does_nothing(name: str, tmp_path: Path) -> None:
    target = tmp_path / "executed"
    attack = attacks(target)[name]
    try:
        pickle.loads(attack)  # the attack is real
    except Exception:  # some fail after having done their work
        assert target.exists()
    assert target.exists()
    target.unlink()
    with pytest.raises(WeightsError, match=r"evil.pth: (holds no weights|its pickle cannot be read)"):
        read_tensors(zipped(tmp_path / "evil.pth", attack))
    assert not target.exists()


def test_a_hostile_object_beside_the_weights_does_nothing(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    evil = Calls(os.system, f"touch {target}")
    state = {"w": torch.ones(3), "evil": evil}
    torch.save({"state_dict": state, "args": evil, "evil": [evil, {evil}]}, tmp_path / "evil.pth")
    tensors, about = read_tensors(tmp_path / "evil.pth")
    assert_same(tensors, {"w": torch.ones(3)})
    assert about == {"args": {}}
    assert not target.exists()


def test_what_the_pickle_gets_cannot_be_changed(tmp_path: Path) -> None:
    before = dict(ALLOWED)
    for name in ("torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict", "builtins set"):
        for state in (b"}(X\x01\x00\x00\x00aK\x01u", b"N}(X\x04\x00\x00\x00noteK\x01u\x86"):
            attack = b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n" + state + b"b."
            with pytest.raises(WeightsError, match="cannot be read"):
                read_tensors(zipped(tmp_path / "evil.pth", attack))
    assert before == ALLOWED
    assert all(callable(entry.note) for entry in ALLOWED.values() if isinstance(entry, Rebuild))


def test_a_module_that_contains_itself(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module._modules["again"] = module
    torch.save(module, tmp_path / "m.pth")
    with pytest.raises(WeightsError, match="contains itself"):
        read_tensors(tmp_path / "m.pth")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.pth"
    torch.save(Part(), path)
    return path


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_pickles_are_read_or_refused(good: Path, data: st.DataObject) -> None:
    with zipfile.ZipFile(good) as archive:
        records = {name.partition("/")[2]: bytearray(archive.read(name)) for name in archive.namelist()}
    content = records["data.pkl"]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = zipped(good.with_name("bad.pth"), bytes(content),
                  **{f"data_{name.removeprefix('data/')}": bytes(raw) for name, raw in records.items()
                     if name.startswith("data/")})
    try:
        tensors, _ = read_tensors(path)
    except WeightsError as error:
        assert "bad.pth" in str(error)
    else:
        for tensor in tensors.values():
            if tensor.numel() < 10**6:
                tensor.clone()  # whatever it is, it lies in memory that is ours


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_refused(good: Path, cut: float) -> None:
    whole = good.read_bytes()
    path = good.with_name("cut.pth")
    path.write_bytes(whole[:int(len(whole) * cut)])
    with pytest.raises(WeightsError, match=r"cut.pth: .*(truncated|cut off).*(copy|download)"):
        read_tensors(path)


# --- other damage -----------------------------------------------------------------------------------------------------

def test_a_flipped_bit_in_a_tensor_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"w": torch.full((100,), 1.5)}, path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(torch.full((100,), 1.5).numpy().tobytes()) + 17] ^= 4
    path.write_bytes(raw)
    with pytest.raises(WeightsError, match=r"w.pth: its part 'data/0' is missing or damaged \(Bad CRC"):
        read_tensors(path)


def test_storages_that_do_not_hold_their_tensors(tmp_path: Path) -> None:
    note = ("ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI{elements}\ntQ"
            "I{offset}\n(I{size}\nt(I{stride}\ntI00\nNtR")

    def read(raw: bytes | None = bytes(16), **numbers: int) -> dict[str, torch.Tensor]:
        filled = note.format(**{"elements": 4, "offset": 0, "size": 4, "stride": 1, **numbers})
        records = {} if raw is None else {"data_0": raw}
        return read_tensors(zipped(tmp_path / "w.pth", f"(dS'w'\n{filled}s.".encode(), **records))[0]

    assert_same(read(), {"w": torch.zeros(4)})
    assert_same(read(offset=1, size=2, stride=2), {"w": torch.zeros(2)})
    outside: list[dict[str, int]] = [{"size": 5}, {"offset": 1}, {"stride": 2}, {"offset": -1}, {"stride": -1},
                                     {"size": 2**70, "stride": 0}]
    for numbers in outside:
        with pytest.raises(WeightsError, match=r"does not lie in its storage of 16 bytes"):
            read(**numbers)
    with pytest.raises(WeightsError, match="has 12 bytes, but the pickle tells of 16"):
        read(raw=bytes(12))
    with pytest.raises(WeightsError, match="part 'data/0' is missing"):
        read(raw=None)


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


def test_damaged_metadata(model: BiomassUNet, tmp_path: Path) -> None:
    for said in ("{", "{}", "3"):
        save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors",
                  {"architecture": said})
        with pytest.raises(WeightsError, match="metadata 'architecture' is damaged"):
            read_weights(tmp_path / "w.safetensors")
