"""Tensors by name: out of any file that may hold weights, without executing it, and into safetensors files.

Under `engine.model.weights` (whole models) and `engine.model.unet` (a pretrained encoder).  Safetensors files are read
by their library, the zips of `torch.save` by `engine.model.unpickle`; the kind is told by the first bytes, not by the
file's name.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.base.errors import WeightsError
from engine.base.files import atomic_write
from engine.base.texts import parse_json
from engine.model.unpickle import Inert, TensorNote, TorchZip

WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name

DEEPEST = 100  # modules in modules

CHECKSUM = "crc32"  # the text of a sealed file that holds it

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
               torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
               torch.bool: "BOOL"}  # safetensors' own


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All tensors of a weights file by name, on the CPU, and what the file says about itself.

    Accepts safetensors, compared with the checksum that sealed ones hold; a `torch.save` zip of a state dict, of a dict
    that holds one under "state_dict", "model" or "module", or of a whole module.  The second result: a safetensors
    file's metadata; or `args` (a saved argparse.Namespace as a dict) and `name` (a pickled module's attribute), as far
    as present.
    Raises WeightsError, naming the file and the remedy.
    """
    path = Path(path)
    head = _head(path)
    if head[:2] == b"PK":
        return _from_torch_zip(path)
    if head[8:9] == b"{":
        return _from_safetensors(path)
    if head[:1] == b"\x80":
        raise WeightsError(f"{path}: in torch.save's format from before 1.6, which cannot be read without executing "
                           "it; on a machine that trusts it, load it and save its state dict as .safetensors")
    raise WeightsError(f"{path}: neither safetensors nor a file of torch.save, or cut off at its start; "
                       "copy or download it again")


def read_metadata(path: Path) -> dict[str, str]:
    """The texts of a safetensors file; none of other kinds.  Raises WeightsError for one that is damaged."""
    if _head(path)[8:9] != b"{":
        return {}
    try:
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except SafetensorError as error:
        raise WeightsError(f"{path}: truncated or damaged ({error}); copy or download it again") from error


def _head(path: Path) -> bytes:
    """By which the kinds are told."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; give a .safetensors file or one written by torch.save")
    with path.open("rb") as handle:
        return handle.read(9)


def write_tensors(path: Path | str, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str],
                  sealed: bool = False) -> str:
    """Write tensors and texts as one safetensors file; atomic, and the same bytes for the same content.  Returns the
    SHA-256 of what was meant to be written, in hexadecimal.  sealed: with a checksum among the texts: the format itself
    has none, and a flipped bit would be another weight.

    Tensor by tensor, where the library would first put the whole file together in memory and stop all threads for it
    (1.4 s for the real model here).  Format: https://github.com/huggingface/safetensors#format.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # keeps each aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted(texts.items()))}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    if sealed:
        header["__metadata__"][CHECKSUM] = _checksum(header, (_bytes(tensor) for _, tensor in ordered))
    text = _json(header)
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with atomic_write(path) as handle:

        def put(data: Any) -> None:
            handle.write(data)
            digest.update(data)

        put(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            put(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()


def _json(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def _checksum(header: Mapping[str, Any], parts: Iterable[Any]) -> str:
    """CRC-32, in hexadecimal, of all that a file says beside it: header and tensors' bytes."""
    texts = {name: text for name, text in header["__metadata__"].items() if name != CHECKSUM}
    crc = zlib.crc32(_json({**header, "__metadata__": texts}))
    for part in parts:
        crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def _compare(path: Path, said: str) -> None:
    """Raises WeightsError where a file is not as it was sealed."""
    with path.open("rb") as handle:
        header = parse_json(handle.read(int.from_bytes(handle.read(8), "little")))
        found = _checksum(header, iter(lambda: handle.read(1 << 22), b""))
    if found != said:
        raise WeightsError(f"{path}: damaged (its checksum is {found}, and {said} was written); copy or download it "
                           f"again")


def _from_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (not a dict)
            texts = dict(handle.metadata() or {})
    except SafetensorError as error:
        raise WeightsError(f"{path}: truncated or damaged ({error}); copy or download it again") from error
    if CHECKSUM in texts:
        _compare(path, texts.pop(CHECKSUM))
    return _unwrapped(tensors), texts


def _from_torch_zip(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with TorchZip(path) as archive:
        holder = archive.content if isinstance(archive.content, dict) else {}
        weights = next((holder[key] for key in ("state_dict", "model", "module") if key in holder), archive.content)
        if isinstance(weights, Inert):
            notes = dict(_module_notes(weights, "", path))
        elif isinstance(weights, dict):
            notes = {str(name): note for name, note in weights.items() if isinstance(note, TensorNote)}
        else:
            notes = {}
        if not notes:
            found = weights.origin if isinstance(weights, Inert) else type(weights).__name__
            raise WeightsError(f"{path}: holds no weights (found: {found}); give a state dict, a dict with "
                               "'state_dict', or a module, as torch.save writes them")
        tensors = {name: archive.tensor(note) for name, note in notes.items()}
    about: dict[str, Any] = {}
    args = holder.get("args")
    if isinstance(args, (Inert, dict)):
        about["args"] = dict(args.state if isinstance(args, Inert) else args)
    if isinstance(weights, Inert) and isinstance(weights.state.get("name"), str):
        about["name"] = weights.state["name"]
    return _unwrapped(tensors), about


def _module_notes(module: Inert, prefix: str, path: Path) -> Iterator[tuple[str, TensorNote]]:
    """What `module.state_dict()` would hold, read from the pickled attributes of torch.nn.Module."""
    if prefix.count(".") > DEEPEST:
        raise WeightsError(f"{path}: its module contains itself, or is nested too deep; save the state dict alone")
    hidden = _attribute(module, "_non_persistent_buffers_set", set, path)
    for part in ("_parameters", "_buffers"):
        for name, note in _attribute(module, part, dict, path).items():
            if isinstance(note, TensorNote) and not (part == "_buffers" and name in hidden):
                yield f"{prefix}{name}", note
    for name, child in _attribute(module, "_modules", dict, path).items():
        if isinstance(child, Inert):
            yield from _module_notes(child, f"{prefix}{name}.", path)


def _attribute(module: Inert, name: str, kind: type, path: Path) -> Any:
    value = module.state.get(name)
    if value is not None and not isinstance(value, kind):
        raise WeightsError(f"{path}: its {module.origin} is no torch module ({name} is a {type(value).__name__}); "
                           "save the state dict alone")
    return value or kind()


def _unwrapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for wrapper in WRAPPERS * 2:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors
