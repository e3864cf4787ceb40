"""Stand-ins for what torch.cuda has, with the parameters of the real ones (see `tests.rehearsal.device`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from tests.rehearsal.functions import on_cuda
from tests.rehearsal.state import CUDA, PEAK, Mistake, State, poison


class Stream:
    work: deque[Callable[[], None]]

    def __new__(cls, device=None, priority=0, **kwargs):  # type: ignore[no-untyped-def]
        if kwargs:
            raise NotImplementedError(f"a stream of {kwargs}")
        self = super().__new__(cls)
        self.device, self.work = CUDA, deque()
        State.active.streams.append(self)
        self.cuda_stream = len(State.active.streams)
        return self

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __repr__(self) -> str:
        return f"stream {self.cuda_stream}"

    def wait_event(self, event):  # type: ignore[no-untyped-def]
        event.wait(self)

    def wait_stream(self, stream):  # type: ignore[no-untyped-def]
        State.active.calls.append(f"{self} waits for {stream}")
        self.wait_event(stream.record_event())

    def record_event(self, event=None):  # type: ignore[no-untyped-def]
        event = event or Event()
        event.record(self)
        return event

    def query(self):  # type: ignore[no-untyped-def]
        return not self.work

    def synchronize(self):  # type: ignore[no-untyped-def]
        State.active.wait("a stream's synchronize")
        self.run()

    def is_capturing(self):  # type: ignore[no-untyped-def]
        return State.active.capture is not None

    def ask(self, work: Callable[[], None]) -> None:
        self.work.append(work)
        if not State.active.late or (State.active.early and self is State.active.streams[0]):
            self.run()

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        while self.work and not until():
            with State.active.unwatched():
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
        stream = stream or State.active.current[-1]
        if self.timing:
            State.active.calls.append("time")
        self.marker = _Marker(stream)
        stream.ask(self.marker.pass_)

    def wait(self, stream=None):  # type: ignore[no-untyped-def]
        (stream or State.active.current[-1]).ask(self._recorded().run)

    def query(self):  # type: ignore[no-untyped-def]
        return self.marker is None or self.marker.done

    def synchronize(self):  # type: ignore[no-untyped-def]
        if not self._recorded().done:
            State.active.wait("an event's synchronize")
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
            State.active.ask(work)


class graph:
    def __init__(self, cuda_graph, pool=None, stream=None, capture_error_mode="global", enable_annotations=False,  # type: ignore[no-untyped-def]
                 annotation_config=None, check_input_liveness=False):
        self.graph, self.note = cuda_graph, f"capture, {capture_error_mode}, pool {pool}"

    def __enter__(self) -> None:
        State.active.calls.append(self.note)
        State.active.capture = self.graph.work

    def __exit__(self, *_: object) -> None:
        State.active.capture = None
        with State.active.unwatched():
            for out in State.active.poisoned:  # a capture computes nothing
                poison(out)
        State.active.poisoned.clear()


class stream:
    def __init__(self, stream):  # type: ignore[no-untyped-def]
        self.stream = stream

    def __enter__(self) -> None:
        State.active.current.append(self.stream)

    def __exit__(self, *_: object) -> None:
        State.active.current.pop()


def synchronize(device=None):  # type: ignore[no-untyped-def]
    State.active.wait("synchronize")
    State.active.finish()


def _sleep(cycles):  # type: ignore[no-untyped-def]
    State.active.calls.append(f"sleep {cycles}")


def current_stream(device=None):  # type: ignore[no-untyped-def]
    return State.active.current[-1]


def set_device(device):  # type: ignore[no-untyped-def]
    if not on_cuda(device):
        raise ValueError(f"Expected a cuda device, but got: {device}")


def get_device_properties(device=None):  # type: ignore[no-untyped-def]
    return SimpleNamespace(name="stand-in", total_memory=80 * 2**30, multi_processor_count=132, major=9, minor=0,
                           uuid="00000000-0000-0000-0000-000000000000", L2_cache_size=50 * 2**20)


class Runtime:
    """Of libcudart: what page-locks memory, with its error codes."""

    def cudaHostRegister(self, address: int, size: int, flags: int) -> Any:
        error = torch._C._cudart.cudaError
        if address % 4096 or address in State.active.registered:
            return error(712)  # cudaErrorHostMemoryAlreadyRegistered; pages that two arrays share come to it, too
        State.active.registered[address] = size
        State.active.locked.append(address)
        return error.success

    def cudaHostUnregister(self, address: int) -> Any:
        return torch._C._cudart.cudaError.success if State.active.registered.pop(address, 0) else 713


def _cudart():  # type: ignore[no-untyped-def]
    return Runtime()


STANDINS: dict[str, Any] = {
    "torch.cuda.Stream": Stream, "torch.cuda.Event": Event, "torch.cuda.CUDAGraph": CUDAGraph,
    "torch.cuda.graph": graph, "torch.cuda.stream": stream, "torch.cuda.synchronize": synchronize,
    "torch.cuda.current_stream": current_stream, "torch.cuda.set_device": set_device, "torch.cuda.cudart": _cudart,
    "torch.cuda.get_device_properties": get_device_properties,
    "torch.cuda._sleep": _sleep,
    "torch.accelerator.current_stream": lambda device=None, /: State.active.current[-1],
    "torch.accelerator.is_available": lambda: True,
    "torch.cuda.is_available": lambda: True, "torch.cuda.is_initialized": lambda: True,
    "torch.cuda.device_count": lambda: 1, "torch.cuda.current_device": lambda: 0,
    "torch.cuda.graph_pool_handle": lambda: (0, 1), "torch.cuda.empty_cache": lambda: None,
    "torch.cuda.max_memory_allocated": lambda device=None: PEAK,
    "torch.cuda.memory_allocated": lambda device=None: PEAK // 2,
    "torch.cuda.reset_peak_memory_stats": lambda device=None: None,
}


def named(path: str) -> Any:
    found: Any = torch
    for name in path.split(".")[1:]:
        found = getattr(found, name)
    return found
