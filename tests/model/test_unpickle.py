"""What torch.save writes is read without executing it, and pickles that want to be executed are refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from engine.base.errors import WeightsError
from engine.model.tensors import read_tensors
from engine.model.unpickle import ALLOWED, Rebuild
from tests.model.test_weights import assert_same

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
    with pytest.raises(WeightsError, match=r"test_unpickle.Part is no torch module \(_buffers is a list\)"):
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


# --- damaged tensors --------------------------------------------------------------------------------------------------

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
