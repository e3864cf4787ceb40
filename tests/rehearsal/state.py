"""What a stand-in for CUDA knows (see `tests.rehearsal.device`): which memory lies where, what waits in the queues of
streams, and where the host had to wait for them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

if TYPE_CHECKING:
    from tests.rehearsal.cuda import Stream

CUDA = torch.device("cuda", 0)
PEAK = 3 * 2**30  # bytes that max_memory_allocated reports
_STANDINS = {str(Path(__file__).with_name(f"{name}.py")) for name in ("state", "functions", "cuda")}


class Mistake(AssertionError):
    """What a GPU would not have reported, or only as wrong numbers."""


class State:
    """What the device of `tests.rehearsal.device` holds, and when it does what."""

    active: State  # of the stand-ins below

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
        ours = [frame for frame in traceback.extract_stack()
                if "/site-packages/" not in frame.filename and frame.filename not in _STANDINS]
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
