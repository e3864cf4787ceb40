"""torch's functions and operators on tensors that a stand-in for CUDA holds (see `tests.rehearsal.device`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.rehearsal.state import CUDA, Mistake, State, memory

_aten = torch.ops.aten
_GETTER = {name: getattr(torch.Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu")}
# On a GPU their result's shape, or the result itself, has to come to the host
_WAITING = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.equal.default,
            _aten._unique2.default, _aten.repeat_interleave.Tensor}
_ANYWHERE = {_aten._has_compatible_shallow_copy_type.default}  # look at no value
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}


class Functions(TorchFunctionMode):
    """What Python asks torch for, before C++ sees the device."""

    def __init__(self, device: State):
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self.device.quiet:
            return func(*args, **kwargs)
        if func is torch.Tensor.backward:  # this mode stays on: its Python asks for devices, too
            kwargs["grad_tensors"] = kwargs.pop("gradient", None)
            with self:
                return torch.autograd.backward(*args, **kwargs)
        own = _OWN.get(func)
        if own is not None:
            return own(self.device, func, *args, **kwargs)
        place = kwargs.get("device")
        if place is not None:
            kwargs["device"] = "cpu"
        pin = kwargs.pop("pin_memory", False)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on = on_cuda(place) if place is not None else any(map(self.device.has, tensors))
        if on and not tensors and func in (torch.tensor, torch.as_tensor):
            self.device.wait("values from the host")
        before, self.device.factory = self.device.factory, on
        try:
            result = func(*args, **kwargs)
        finally:
            self.device.factory = before
        if place is not None and isinstance(result, Tensor):
            self.device.mark(result, yes=on)
        return self.device.mark(result, "pinned") if pin else result


class Operators(TorchDispatchMode):
    """Every operator, those of autograd too: where its results lie, and whether its arguments lie together."""

    def __init__(self, device: State):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device, kwargs = self.device, kwargs or {}
        if device.quiet:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [device.has(tensor) for tensor in tensors]
        on = any(here) if tensors else device.factory or torch._C._current_graph_task_id() != -1
        if not on:
            return func(*args, **kwargs)
        if func is _aten.copy_.default and here[0] != here[1]:
            device.move(args[1], args[0], bool(args[2]) if len(args) > 2 else False)
            return args[0]
        if func in _INDEXING and any(not yes or tensor.dtype == torch.bool
                                     for tensor, yes in list(zip(tensors, here))[1:]):
            device.wait("an index from the host, or a mask")
        elif func not in _ANYWHERE and not all(yes or tensor.ndim == 0 for tensor, yes in zip(tensors, here)):
            raise Mistake(f"{func}: Expected all tensors to be on the same device, but found cuda:0 and cpu: "
                          + ", ".join(f"{'cuda' if yes else 'cpu'} {list(t.shape)}" for t, yes in zip(tensors, here)))
        if func in _WAITING:
            device.wait(str(func))
            device.current[-1].run()
            out = func(*args, **kwargs)
            return device.mark(out) if isinstance(out, Tensor) else out
        known = set(map(memory, tensors))
        result = device.operate(func, args, kwargs, known)
        for out in tree_leaves(result):
            if isinstance(out, Tensor) and memory(out) not in known:
                device.mark(out)
        return result


def on_cuda(place: Any) -> bool:
    return torch.device(place).type == "cuda"


def _to(device: State, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        args = (CUDA if device.has(args[0]) else torch.device("cpu"), args[0].dtype, *args[1:])
    copy = kwargs.pop("copy", False)
    place, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    on = device.has(tensor) if place is None else on_cuda(place)
    dtype = dtype or tensor.dtype
    if on == device.has(tensor):
        return func(tensor, dtype=dtype, copy=copy, memory_format=layout or torch.preserve_format)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("a gradient through a copy between devices")
    with device.unwatched():
        target = torch.empty_like(tensor, dtype=dtype, memory_format=layout or torch.preserve_format)
    # like torch's, which are no inference tensors outside inference mode
    target = torch.empty(0, dtype=dtype).set_(target.untyped_storage(), 0, target.shape, target.stride())
    if on:
        device.mark(target)
    elif non_blocking:
        device.mark(target, "pinned")
    device.move(tensor, target, non_blocking)
    return target


def _pin(device: State, func: Any, tensor: Tensor) -> Tensor:
    if device.has(tensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    return device.mark(tensor.clone(), "pinned")


def record_stream(tensor: Tensor, stream: Any) -> None:
    device = State.active
    if not device.has(tensor):
        raise RuntimeError("record_stream of a tensor that is on the host")
    device.readers.setdefault(memory(tensor), set()).add(stream)


def _to_numpy(device: State, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if device.has(tensor):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
                        "memory first.")
    return func(tensor, *args, **kwargs)


def _deepcopy(device: State, func: Any, tensor: Tensor, memo: Any) -> Tensor:
    copy = func(tensor, memo)  # of the storage, which no operator sees
    return device.mark(copy, yes=device.has(tensor))


def _to_list(device: State, func: Any, tensor: Tensor) -> Any:
    if device.has(tensor):
        device.wait("tolist")
        device.current[-1].run()
    return func(tensor)


def _type(device: State, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    name = func(tensor, *args, **kwargs)
    return name.replace("torch.", "torch.cuda.") if isinstance(name, str) and device.has(tensor) else name


_OWN: dict[Any, Callable[..., Any]] = {
    _GETTER["device"]: lambda device, func, tensor: CUDA if device.has(tensor) else func(tensor),
    _GETTER["is_cuda"]: lambda device, func, tensor: device.has(tensor),
    _GETTER["is_cpu"]: lambda device, func, tensor: not device.has(tensor),
    torch.Tensor.get_device: lambda device, func, tensor: 0 if device.has(tensor) else -1,
    torch.Tensor.is_pinned: lambda device, func, tensor: device.pinned(tensor),
    torch.Tensor.to: _to,
    torch.Tensor.cpu: lambda device, func, tensor: _to(device, torch.Tensor.to, tensor, "cpu"),
    torch.Tensor.cuda: lambda device, func, tensor: _to(device, torch.Tensor.to, tensor, CUDA),
    torch.Tensor.pin_memory: _pin,
    torch.Tensor.numpy: _to_numpy,
    torch.Tensor.__array__: _to_numpy,
    torch.Tensor.tolist: _to_list,
    torch.Tensor.__deepcopy__: _deepcopy,
    torch.Tensor.type: _type,
}


class Autocast(torch.autocast):
    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True,
                 cache_enabled: bool | None = None):
        if device_type == "cuda" and dtype is None:
            dtype = torch.float16
        super().__init__(device_type.replace("cuda", "cpu"), dtype, enabled, cache_enabled)


def grouped(real: Callable[..., Any]) -> Callable[..., Any]:
    def group(tensors: list[list[Tensor | None]], with_indices: bool = False) -> Any:
        on = any(State.active.has(tensor) for tensor in tensors[0] if tensor is not None)
        return {((CUDA if on else place), dtype): group for (place, dtype), group in
                real(tensors, with_indices).items()}

    return group
