"""Read the zip files of `torch.save` without executing them.

A pickle is a program: loading one runs whatever functions it names.  Here it may name what it likes, but only the
entries of `ALLOWED` mean anything, and none of them does more than note down a tensor's place in the zip; every
other class or function becomes an `Inert` placeholder that keeps its arguments and state.  Tensors are made
afterwards, by `TorchZip.tensor`, from bounds-checked notes.  So a whole pickled module can be looked into although
its classes do not exist here.  First step of `engine.model.tensors`.

The format (torch's serialization notes, https://docs.pytorch.org/docs/stable/notes/serialization.html): an
uncompressed zip with `NAME/data.pkl`, whose persistent ids ("storage", type, key, location, elements) point to the
raw little-endian bytes in `NAME/data/KEY`.
"""

from __future__ import annotations

import io
import pickle
import reprlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.base.errors import WeightsError


class Inert:
    """Stands for an object of a class that is not loaded: keeps what it is given, does nothing.

    `origin` is the dotted name in the pickle, `args` the constructor's arguments, `state` the attributes.
    """

    origin = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = object.__new__(cls)
        self.args = args
        self.state = {}
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args: tuple[Any, ...]
        self.state: dict[Any, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return Inert(*args)

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.state.update(part)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.state[key] = value

    def append(self, item: Any) -> None:
        """A list or set subclass's items are not kept: no weights lie in one."""

    extend = add = append


class Ordered(dict):  # type: ignore[type-arg]
    """collections.OrderedDict without attributes: a file could hide its methods behind them."""

    def __setstate__(self, state: Any) -> None:
        """torch keeps a state dict's `_metadata` here, which is not needed."""


class Sealed:
    """What the pickle gets from us but cannot change."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"the file tries to set the state of a {type(self).__name__}")


@dataclass(frozen=True)
class StorageNote(Sealed):
    key: str
    dtype: torch.dtype
    elements: int


@dataclass(frozen=True)
class TensorNote(Sealed):
    """Where a tensor lies: a strided view of a storage, all in elements of `dtype`."""

    storage: StorageNote
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Rebuild(Sealed):
    """One of torch's tensor-rebuild functions, replaced by one that takes a note."""

    note: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.note(*args)


def _tensor(storage: StorageNote, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> TensorNote:
    return TensorNote(storage, storage.dtype, offset, tuple(size), tuple(stride))


def _tensor_with_dtype(storage: StorageNote, offset: int, size: tuple[int, ...], stride: tuple[int, ...],
                       requires_grad: bool, hooks: Any, dtype: torch.dtype, *_: Any) -> TensorNote:
    return TensorNote(storage, dtype, offset, tuple(size), tuple(stride))


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _from_type(rebuild: Any, kind: Any, args: tuple[Any, ...], *_: Any) -> Any:
    return rebuild(*args) if isinstance(rebuild, Rebuild) else Inert(*args)


_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}
_DTYPES = (*_STORAGES.values(), torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)

ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Ordered,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
    ("torch", "Size"): Rebuild(tuple),
    ("torch._utils", "_rebuild_tensor"): Rebuild(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Rebuild(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Rebuild(_tensor_with_dtype),
    ("torch._utils", "_rebuild_parameter"): Rebuild(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Rebuild(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Rebuild(_from_type),
    ("torch.storage", "UntypedStorage"): torch.uint8,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES},
}


class _Unpickler(pickle._Unpickler):  # the one in Python: the one in C lets a file ask for memory without end
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        return type(name.rpartition(".")[2] or "Inert", (Inert,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> StorageNote:
        kind, dtype, key, _location, elements = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(elements, int):
            raise pickle.UnpicklingError(f"a storage of an unknown kind: {reprlib.repr(pid)}")
        return StorageNote(str(key), dtype, elements)


class TorchZip:
    """One file of `torch.save`, open for reading: `content` is what was saved, with notes in place of tensors.

    Raises WeightsError, naming the file and the remedy, for a file that is damaged or of another format.
    """

    def __init__(self, path: Path):
        self.path = path
        self._storages: dict[str, torch.Tensor] = {}
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise WeightsError(f"{path}: truncated or damaged ({error}); copy or download it again") from error
        try:
            self._root = self._find_root()
            if f"{self._root}byteorder" in self._zip.namelist() and self._read("byteorder") != b"little":
                raise WeightsError(f"{path}: written on a big-endian machine; save it again as .safetensors there")
            self.content: Any = _Unpickler(io.BytesIO(self._read("data.pkl")), encoding="utf-8").load()
        except WeightsError:
            self.close()
            raise
        except Exception as error:  # a hostile or damaged pickle can fail in any way
            self.close()
            raise WeightsError(f"{path}: its pickle cannot be read ({type(error).__name__}: {error}); "
                               "copy or download it again, or save the state dict alone") from error

    def __enter__(self) -> TorchZip:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._zip.close()

    def _find_root(self) -> str:
        roots = [name.removesuffix("data.pkl") for name in self._zip.namelist() if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise WeightsError(f"{self.path}: a zip file, but not one of torch.save (no data.pkl in it); "
                               "give a .safetensors file or a file written by torch.save")
        return roots[0]

    def _read(self, record: str) -> bytes:
        try:
            entry = self._zip.getinfo(self._root + record)
            if entry.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile("compressed, which torch.save never does")
            return self._zip.read(entry)
        except (KeyError, EOFError, OSError, RuntimeError, zipfile.BadZipFile) as error:  # Runtime: encrypted
            raise WeightsError(f"{self.path}: its part {record!r} is missing or damaged ({error}); "
                               "copy or download it again") from error

    def tensor(self, note: TensorNote) -> torch.Tensor:
        """The tensor that `note` describes, on the CPU; tensors of one storage share its memory."""
        storage = note.storage
        if not isinstance(storage, StorageNote) or not isinstance(note.dtype, torch.dtype):
            raise WeightsError(f"{self.path}: holds a tensor of a kind that is not read here; save a plain state dict")
        if storage.key not in self._storages:
            raw = self._read(f"data/{storage.key}")
            if len(raw) != storage.elements * storage.dtype.itemsize:
                raise WeightsError(f"{self.path}: its part 'data/{storage.key}' has {len(raw)} bytes, but the pickle "
                                   f"tells of {storage.elements * storage.dtype.itemsize}; copy it again")
            self._storages[storage.key] = (torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw
                                           else torch.empty(0, dtype=torch.uint8))
        raw_bytes = self._storages[storage.key]
        if not _lies_within(note, raw_bytes.numel() // note.dtype.itemsize):
            raise WeightsError(f"{self.path}: a tensor of size {note.size}, stride {note.stride} at {note.offset} "
                               f"does not lie in its storage of {raw_bytes.numel()} bytes; copy the file again")
        return raw_bytes.view(note.dtype).as_strided(note.size, note.stride, note.offset)


def _lies_within(note: TensorNote, elements: int) -> bool:
    numbers = (note.offset, *note.size, *note.stride)
    if len(note.size) != len(note.stride) or not all(isinstance(n, int) and 0 <= n < 2**62 for n in numbers):
        return False
    if 0 in note.size:
        return note.offset <= elements
    return note.offset + sum((n - 1) * step for n, step in zip(note.size, note.stride)) < elements
