"""A stand-in for CUDA, so that what runs on a GPU runs first on a machine that has none.

`with Device() as device:` torch's tensors on "cuda" are CPU tensors whose memory is marked; streams, events, graphs and
the runtime are the classes below, with the parameters of the real ones (`STANDINS`; a test compares them).  Branches
for CUDA are taken, with real values.  As on a GPU, tensors of two devices do not mix, and `device.waits` tells where
the host had to wait for the device.

`Device(late=True)` runs late: what a stream was asked for waits in its queue until somebody synchronises, and results
are NaN until then.  Of memory that is torch's own on the device (or page-locked by torch, which remembers events) the
queue holds references, as torch's allocators do in effect.  Of other memory, DALI's outputs and what was page-locked by
hand, it holds none: where its owner has let go of it too early, the late read fails.  `early`: the first stream, the
consumer's, is not late itself, but waits for others.

What it cannot show: kernels, their speed, allocation, and errors inside CUDA, cuDNN, NCCL or nvCOMP.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

CUDA = torch.device("cuda", 0)
PEAK = 3 * 2**30  # bytes that max_memory_allocated reports
_aten = torch.ops.aten
_GETTER = {name: getattr(torch.Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu")}
# On a GPU their result's shape, or the result itself, has to come to the host
_WAITING = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.equal.default,
            _aten._unique2.default, _aten.repeat_interleave.Tensor}
_ANYWHERE = {_aten._has_compatible_shallow_copy_type.default}  # look at no value
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}


class Mistake(AssertionError):
    """What a GPU would not have reported, or only as wrong numbers."""


class Device:
    """CUDA's part, played by the CPU, inside `with`."""

    active: Device  # of the stand-ins below

    def __init__(self, late: bool = False, early: bool = False):
        self.late, self.early = late, early
        self.waits: list[str] = []  # where the host waited for the device: what, and the line that asked
        self.calls: list[str] = []  # of streams, events and graphs, in order
        self.readers: dict[int, set[Stream]] = {}  # streams that record_stream named, by memory
        self.registered: dict[int, int] = {}  # bytes page-locked by hand, by address
        self.locked: list[int] = []  # every address that ever was
        self.capture: list[Callable[[], None]] | None = None
        self.quiet = False  # the stand-in itself is at work: nothing is watched
        self.factory: bool | None = None  # where a tensor made from nothing lies; None: on the host
        self._marks: dict[str, dict[int, StorageWeakRef]] = {"cuda": {}, "pinned": {}, "borrowed": {}}
        self.streams: list[Stream] = []
        self.poisoned: list[Tensor] = []

    def __enter__(self) -> Device:
        Device.active = self
        self.current = [Stream()]
        self._stack = ExitStack()
        for path, fake in STANDINS.items():
            owner, _, name = path.rpartition(".")
            self._stack.enter_context(mock.patch.object(_named(owner), name, fake))
        self._stack.enter_context(mock.patch.object(torch.cuda, "_lazy_init", lambda: None))
        # which looks at its argument before it asks modes
        self._stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", _record_stream))
        for owner in (torch, torch.amp):  # CPU tensors have the CPU's autocast
            self._stack.enter_context(mock.patch.object(owner, "autocast", _Autocast))
        self._stack.enter_context(mock.patch.object(
            torch._C, "_group_tensors_by_device_and_dtype", _grouped(torch._C._group_tensors_by_device_and_dtype)))
        self._stack.enter_context(_Operators(self))
        self._stack.enter_context(_Functions(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # Memory ------------------------------------------------------------------------------------------------------

    def mark(self, tensor: Tensor, what: str = "cuda", yes: bool = True) -> Tensor:
        storage = tensor.untyped_storage()
        if yes:
            self._marks[what][storage._cdata] = StorageWeakRef(storage)  # which also keeps the key from being reused
        else:
            self._marks[what].pop(storage._cdata, None)
        return tensor

    def is_(self, what: str, tensor: Tensor) -> bool:
        return memory(tensor) in self._marks[what]

    def has(self, tensor: Tensor) -> bool:
        return memory(tensor) in self._marks["cuda"]

    def pinned(self, tensor: Tensor) -> bool:
        return self.is_("pinned", tensor) or self._by_hand(tensor)

    def _by_hand(self, tensor: Tensor) -> bool:
        first = tensor.untyped_storage().data_ptr()
        return any(start <= first < start + size for start, size in self.registered.items())

    def holder(self, value: Any) -> Callable[[], Any]:
        """What gives `value` back when the device gets there."""
        if not isinstance(value, Tensor) or not (self.is_("borrowed", value) or self._by_hand(value)):
            return lambda: value
        reference, dtype = StorageWeakRef(value.untyped_storage()), value.dtype
        shape, strides, offset = value.shape, value.stride(), value.storage_offset()

        def back() -> Tensor:
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                raise Mistake("the device reads memory that its owner has let go")
            return torch.empty(0, dtype=dtype).set_(storage, offset, shape, strides)

        return back

    # Time --------------------------------------------------------------------------------------------------------

    def wait(self, why: str) -> None:
        if self.capture is not None:
            raise Mistake(f"{why} while a graph is captured")
        ours = [f for f in traceback.extract_stack() if "/site-packages/" not in f.filename and f.filename != __file__]
        self.waits.append(f"{why} ({ours[-1].filename}:{ours[-1].lineno})" if ours else why)

    def ask(self, work: Callable[[], None]) -> None:
        """Of the current stream."""
        if self.capture is not None:
            self.capture.append(work)
        else:
            self.current[-1].ask(work)

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        before, self.quiet = self.quiet, True
        try:
            with torch.inference_mode():
                yield
        finally:
            self.quiet = before

    def finish(self) -> None:
        """Run all that any stream was asked for."""
        for stream in self.streams:
            stream.run()

    # Operators ---------------------------------------------------------------------------------------------------

    def operate(self, func: Any, args: Any, kwargs: Any, known: set[int]) -> Any:
        """An aten operator on the device, whose arguments lie in `known`: now, or late into what is returned."""
        if not self.late and self.capture is None:
            return func(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        held, made = [self.holder(leaf) for leaf in leaves], []
        if func._schema.is_mutable:
            written = [value for value, argument in zip(args, func._schema.arguments)
                       if argument.alias_info is not None and argument.alias_info.is_write]
            if len(written) < len(func._schema.returns):
                raise NotImplementedError(f"{func} writes to some results and makes others")
            result = written[0] if func._schema.returns else None
        else:
            with self.unwatched() if self.capture is None else ExitStack():
                result = func(*args, **kwargs)
            made = [out for out in tree_leaves(result) if isinstance(out, Tensor) and memory(out) not in known]
            if not made:  # a view
                return result
        if self.capture is None:
            for out in made:
                poison(out)
        else:
            self.poisoned += made

        def work() -> None:
            again_args, again_kwargs = tree_unflatten([give() for give in held], spec)
            again = func(*again_args, **again_kwargs)
            for out, value in zip(made, (v for v in tree_leaves(again) if isinstance(v, Tensor))):
                out.copy_(value)

        del leaves
        self.ask(work)
        return result

    def move(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        """Copy between host and device, as torch's copy_ does."""
        host = target if self.has(source) else source
        # a conversion, or another layout, takes a temporary of its own
        direct = source.dtype == target.dtype and source.stride() == target.stride()
        overlaps = non_blocking and self.pinned(host) and direct
        give, into = self.holder(source), self.holder(target)
        if not overlaps:
            self.wait(f"a copy {'to' if host is target else 'from'} {'' if self.pinned(host) else 'pageable '}host "
                      "memory")
            self.current[-1].run()
            with self.unwatched():
                target.copy_(source)
            return
        with self.unwatched():
            poison(target)
        del source, target, host
        self.ask(lambda: into().copy_(give()))


def memory(tensor: Tensor) -> int:
    """What views of one memory have in common."""
    return tensor.untyped_storage()._cdata


def poison(tensor: Tensor) -> None:
    """What memory holds before the device has got there."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(0 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)


# torch's functions and operators ------------------------------------------------------------------------------------


class _Functions(TorchFunctionMode):
    """What Python asks torch for, before C++ sees the device."""

    def __init__(self, device: Device):
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
        on = _on_cuda(place) if place is not None else any(map(self.device.has, tensors))
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


class _Operators(TorchDispatchMode):
    """Every operator, those of autograd too: where its results lie, and whether its arguments lie together."""

    def __init__(self, device: Device):
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


def _on_cuda(place: Any) -> bool:
    return torch.device(place).type == "cuda"


def _to(device: Device, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        args = (CUDA if device.has(args[0]) else torch.device("cpu"), args[0].dtype, *args[1:])
    copy = kwargs.pop("copy", False)
    place, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    on = device.has(tensor) if place is None else _on_cuda(place)
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


def _pin(device: Device, func: Any, tensor: Tensor) -> Tensor:
    if device.has(tensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    return device.mark(tensor.clone(), "pinned")


def _record_stream(tensor: Tensor, stream: Stream) -> None:
    device = Device.active
    if not device.has(tensor):
        raise RuntimeError("record_stream of a tensor that is on the host")
    device.readers.setdefault(memory(tensor), set()).add(stream)


def _to_numpy(device: Device, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if device.has(tensor):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
                        "memory first.")
    return func(tensor, *args, **kwargs)


def _deepcopy(device: Device, func: Any, tensor: Tensor, memo: Any) -> Tensor:
    copy = func(tensor, memo)  # of the storage, which no operator sees
    return device.mark(copy, yes=device.has(tensor))


def _to_list(device: Device, func: Any, tensor: Tensor) -> Any:
    if device.has(tensor):
        device.wait("tolist")
        device.current[-1].run()
    return func(tensor)


def _type(device: Device, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
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


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True,
                 cache_enabled: bool | None = None):
        if device_type == "cuda" and dtype is None:
            dtype = torch.float16
        super().__init__(device_type.replace("cuda", "cpu"), dtype, enabled, cache_enabled)


def _grouped(real: Callable[..., Any]) -> Callable[..., Any]:
    def grouped(tensors: list[list[Tensor | None]], with_indices: bool = False) -> Any:
        on = any(Device.active.has(tensor) for tensor in tensors[0] if tensor is not None)
        return {((CUDA if on else place), dtype): group for (place, dtype), group in
                real(tensors, with_indices).items()}

    return grouped


# torch.cuda ---------------------------------------------------------------------------------------------------------


class Stream:
    work: deque[Callable[[], None]]

    def __new__(cls, device=None, priority=0, **kwargs):  # type: ignore[no-untyped-def]
        if kwargs:
            raise NotImplementedError(f"a stream of {kwargs}")
        self = super().__new__(cls)
        self.device, self.work = CUDA, deque()
        Device.active.streams.append(self)
        self.cuda_stream = len(Device.active.streams)
        return self

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __repr__(self) -> str:
        return f"stream {self.cuda_stream}"

    def wait_event(self, event):  # type: ignore[no-untyped-def]
        event.wait(self)

    def wait_stream(self, stream):  # type: ignore[no-untyped-def]
        Device.active.calls.append(f"{self} waits for {stream}")
        self.wait_event(stream.record_event())

    def record_event(self, event=None):  # type: ignore[no-untyped-def]
        event = event or Event()
        event.record(self)
        return event

    def query(self):  # type: ignore[no-untyped-def]
        return not self.work

    def synchronize(self):  # type: ignore[no-untyped-def]
        Device.active.wait("a stream's synchronize")
        self.run()

    def is_capturing(self):  # type: ignore[no-untyped-def]
        return Device.active.capture is not None

    def ask(self, work: Callable[[], None]) -> None:
        self.work.append(work)
        if not Device.active.late or (Device.active.early and self is Device.active.streams[0]):
            self.run()

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        while self.work and not until():
            with Device.active.unwatched():
                self.work.popleft()()


class _Marker:
    def __init__(self, stream: Stream):
        self.stream, self.done = stream, False

    def run(self) -> None:
        self.stream.run(lambda: self.done)

    def pass_(self) -> None:
        self.done = True


class Event:
    marker: _Marker | None

    def __new__(cls, enable_timing=False, blocking=False, interprocess=False, external=False):  # type: ignore[no-untyped-def]
        self = super().__new__(cls)
        self.marker, self.timing = None, enable_timing
        return self

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, stream=None):  # type: ignore[no-untyped-def]
        stream = stream or Device.active.current[-1]
        self.marker = _Marker(stream)
        stream.ask(self.marker.pass_)

    def wait(self, stream=None):  # type: ignore[no-untyped-def]
        (stream or Device.active.current[-1]).ask(self._recorded().run)

    def query(self):  # type: ignore[no-untyped-def]
        return self.marker is None or self.marker.done

    def synchronize(self):  # type: ignore[no-untyped-def]
        if not self._recorded().done:
            Device.active.wait("an event's synchronize")
            self._recorded().run()

    def elapsed_time(self, end_event):  # type: ignore[no-untyped-def]
        if not (self.timing and end_event.timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if not (self._recorded().done and end_event._recorded().done):
            raise RuntimeError("device not ready")
        return 1.0

    def _recorded(self) -> _Marker:
        if self.marker is None:
            raise Mistake("an event that was never recorded: CUDA would not wait for it")
        return self.marker


class CUDAGraph:
    def __new__(cls, keep_graph=False):  # type: ignore[no-untyped-def]
        self = super().__new__(cls)
        self.work = []
        return self

    work: list[Callable[[], None]]

    def replay(self):  # type: ignore[no-untyped-def]
        for work in self.work:
            Device.active.ask(work)


class graph:
    def __init__(self, cuda_graph, pool=None, stream=None, capture_error_mode="global", enable_annotations=False,  # type: ignore[no-untyped-def]
                 annotation_config=None, check_input_liveness=False):
        self.graph, self.note = cuda_graph, f"capture, {capture_error_mode}, pool {pool}"

    def __enter__(self) -> None:
        Device.active.calls.append(self.note)
        Device.active.capture = self.graph.work

    def __exit__(self, *_: object) -> None:
        Device.active.capture = None
        with Device.active.unwatched():
            for out in Device.active.poisoned:  # a capture computes nothing
                poison(out)
        Device.active.poisoned.clear()


class stream:
    def __init__(self, stream):  # type: ignore[no-untyped-def]
        self.stream = stream

    def __enter__(self) -> None:
        Device.active.current.append(self.stream)

    def __exit__(self, *_: object) -> None:
        Device.active.current.pop()


def synchronize(device=None):  # type: ignore[no-untyped-def]
    Device.active.wait("synchronize")
    Device.active.finish()


def current_stream(device=None):  # type: ignore[no-untyped-def]
    return Device.active.current[-1]


def set_device(device):  # type: ignore[no-untyped-def]
    if not _on_cuda(device):
        raise ValueError(f"Expected a cuda device, but got: {device}")


def get_device_properties(device=None):  # type: ignore[no-untyped-def]
    return SimpleNamespace(name="stand-in", total_memory=80 * 2**30, multi_processor_count=132, major=9, minor=0,
                           uuid="00000000-0000-0000-0000-000000000000", L2_cache_size=50 * 2**20)


class _Runtime:
    """Of libcudart: what page-locks memory, with its error codes."""

    def cudaHostRegister(self, address: int, size: int, flags: int) -> Any:
        error = torch._C._cudart.cudaError
        if address % 4096 or address in Device.active.registered:
            return error(712)  # cudaErrorHostMemoryAlreadyRegistered; pages that two arrays share come to it, too
        Device.active.registered[address] = size
        Device.active.locked.append(address)
        return error.success

    def cudaHostUnregister(self, address: int) -> Any:
        return torch._C._cudart.cudaError.success if Device.active.registered.pop(address, 0) else 713


def _cudart():  # type: ignore[no-untyped-def]
    return _Runtime()


STANDINS: dict[str, Any] = {
    "torch.cuda.Stream": Stream, "torch.cuda.Event": Event, "torch.cuda.CUDAGraph": CUDAGraph,
    "torch.cuda.graph": graph, "torch.cuda.stream": stream, "torch.cuda.synchronize": synchronize,
    "torch.cuda.current_stream": current_stream, "torch.cuda.set_device": set_device, "torch.cuda.cudart": _cudart,
    "torch.cuda.get_device_properties": get_device_properties,
    "torch.accelerator.current_stream": lambda device=None, /: Device.active.current[-1],
    "torch.accelerator.is_available": lambda: True,
    "torch.cuda.is_available": lambda: True, "torch.cuda.is_initialized": lambda: True,
    "torch.cuda.device_count": lambda: 1, "torch.cuda.current_device": lambda: 0,
    "torch.cuda.graph_pool_handle": lambda: (0, 1), "torch.cuda.empty_cache": lambda: None,
    "torch.cuda.max_memory_allocated": lambda device=None: PEAK,
    "torch.cuda.memory_allocated": lambda device=None: PEAK // 2,
    "torch.cuda.reset_peak_memory_stats": lambda device=None: None,
}


def _named(path: str) -> Any:
    found: Any = torch
    for name in path.split(".")[1:]:
        found = getattr(found, name)
    return found
