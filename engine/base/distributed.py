"""Processes and devices: joining the others, and acting together with them."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from engine.base import launchers
from engine.base.errors import ConfigError, DeviceError, EngineError
from engine.base.launchers import Place
from engine.base.sections import HERE
from engine.base.stopping import ASKED, Asked, follow_launcher
from engine.base.watch import Watch


class Elsewhere(EngineError):
    """Another rank failed; the text says which and why."""


LOOPBACK = "127.0.0.1"


class _Joined:
    """What this process holds of the others."""

    host_group: Any = None  # gloo: messages between hosts, which no step waits for the device for
    watch: Watch | None = None
    cores: int | None = None  # see `own_cores`
    names: list[str] = []  # noqa: RUF012  (of all ranks, for people: "rank 3 on host b")


def join(wanted: str, timeout: float = 600.0, limits: Mapping[str, float] | None = None) -> torch.device:
    """Join the processes that the launcher started, alone where there is none, and return this one's device.

    wanted: "auto", "cpu" or "gpu".  timeout: seconds that ranks wait to meet, and for one that is silent.  limits: how
    many a rank may stand in a section (`engine.base.sections`), by its name, before it counts as one that hangs.  To be
    called before DeepSpeed is imported, which picks its accelerator then.
    Raises DeviceError where "gpu" is not to be had, where ranks have devices of different kinds, or share a GPU;
    ConfigError where the launcher does not say which rank this is, or the others are not met.
    """
    place = launchers.place(os.environ)
    follow_launcher()
    device, trouble = torch.device("cpu"), None
    try:
        device = own_device(wanted, place.local_rank, place.local_world)
    except DeviceError as error:
        trouble = error  # the others have to hear of it
    store = _meet(place, device, timeout, trouble)
    if limits:
        HERE.enter("starting")
    if place.world > 1 or limits:
        _Joined.watch = Watch(store.clone(), place.rank, _Joined.names, timeout, limits)
        _Joined.watch.start()
    if place.local_world > 1:  # ranks of a host share its cores
        cores = own_cores()
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(cores))
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(cores)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce first, 40 s and a compiler that may not be there
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Their own patience ends last: it would name whoever waits
    wait = timedelta(seconds=timeout + max((limits or {}).values(), default=0))
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=wait,
                            device_id=device if device.type == "cuda" else None)
    deepspeed.init_distributed(dist_backend=backend, timeout=wait, verbose=False)
    if place.world > 1:
        _Joined.host_group = dist.new_group(backend="gloo", timeout=wait)
    return device


def own_device(wanted: str, local_rank: int, local_world: int) -> torch.device:
    """The device of a rank.  Raises DeviceError where "gpu" is not to be had."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "gpu" and not gpus:
        raise DeviceError("train.device gpu: this machine has no CUDA device that torch can use; "
                          "set train.device: cpu (or auto), or install the driver")
    if wanted == "cpu" or not gpus:
        return torch.device("cpu")
    if gpus == 1:  # each rank sees its own alone (srun --gpus-per-task=1), or `_meet` finds that they share it
        return torch.device("cuda", 0)
    if local_rank >= gpus:
        raise DeviceError(f"local rank {local_rank} of {local_world} has no GPU: this machine has {gpus}; launch with "
                          f"--num_gpus {gpus}")
    return torch.device("cuda", local_rank)


def _meet(place: Place, device: torch.device, timeout: float, trouble: DeviceError | None = None) -> Any:
    """The store in which the ranks have met, after all have said what they are, or what keeps them from it."""
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world), LOCAL_RANK=str(place.local_rank),
                      LOCAL_WORLD_SIZE=str(place.local_world), MASTER_ADDR=place.address,
                      MASTER_PORT=str(place.port or _free_port()))
    host = socket.gethostname()
    card = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    if place.world == 1:
        if trouble is not None:
            raise trouble
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        _Joined.names = [f"rank 0 on host {host}"]
        return dist.HashStore()  # which listens on no port
    address, own = (LOOPBACK, LOOPBACK) if place.one_host else (place.address, _address_to(place.address))
    try:
        store = _store(place, address, own, timedelta(seconds=timeout))
        said = _Said(host, own, device.type, card, sorted(os.sched_getaffinity(0)),
                     str(trouble) if trouble is not None else None)
        store.set(f"rank/{place.rank}", json.dumps(said))
        everyone = [_Said(*json.loads(store.get(f"rank/{rank}"))) for rank in range(place.world)]
        store.set(f"met/{place.rank}", "")
        if place.rank == 0:  # whose end is the store's
            store.wait([f"met/{rank}" for rank in range(place.world)])
    except (dist.DistStoreError, dist.DistNetworkError, RuntimeError, OSError) as error:
        hint = ("were all started, on this one host, as its LOCAL_WORLD_SIZE says?" if place.one_host else
                "were all started, and can they reach that host?")
        raise ConfigError(f"rank {place.rank} on {host}: not all of {place.world} ranks met at {address}:"
                          f"{os.environ['MASTER_PORT']} within {timeout:.0f} s ({error}); {hint}") from None
    _Joined.names = [f"rank {rank} on host {said.host}" for rank, said in enumerate(everyone)]
    _Joined.cores = _part_of(said.cores, [other.cores for other in everyone if other.host == host])
    if trouble is not None:
        raise trouble
    _agree(everyone)
    # By a host's own name gloo may find 127.0.1.1, as may rank 0 by MASTER_ADDR: those on other hosts know better
    if ipaddress.ip_address(own).is_loopback:
        elsewhere = (said.address for said in everyone if not ipaddress.ip_address(said.address).is_loopback)
        own = next(map(_address_to, elsewhere), own)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_of(own))
    if place.one_host:  # over several, NCCL itself knows best which network is the fast one
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    return store


def _store(place: Place, address: str, own: str, timeout: timedelta) -> Any:
    """The store at `address`, which rank 0 serves; under torchrun its agent does.

    Torch would listen on every interface of rank 0's host: it is given a socket that listens on `own` alone, rank 0's
    address on the way to the others, where it knows that.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        return next(dist.rendezvous("env://", place.rank, place.world, timeout=timeout))[0]
    port, listener = int(os.environ["MASTER_PORT"]), None
    if place.rank == 0 and (address == own or not ipaddress.ip_address(own).is_loopback):
        family = socket.AF_INET6 if ":" in own else socket.AF_INET
        listener = socket.create_server((own, port), family=family, backlog=max(128, place.world)).detach()
    return dist.TCPStore(address, port, place.world, place.rank == 0, timeout, master_listen_fd=listener)


class _Said(NamedTuple):
    """What ranks tell one another when they meet."""

    host: str
    address: str  # by which the rank goes to rank 0's host
    kind: str  # of device
    card: str | None  # a GPU's UUID
    cores: list[int]  # that it may use
    trouble: str | None


def _part_of(own: list[int], here: list[list[int]]) -> int:
    """How many of its cores a rank has for itself, where ranks `here` on its host share those that they all may use:
    a launcher may have bound each to cores of its own, or none."""
    users = Counter(core for cores in here for core in cores)
    return max(1, round(sum(1 / users[core] for core in own)))


def _agree(everyone: list[_Said]) -> None:
    names = _Joined.names
    owner: dict[str, int] = {}
    for rank, said in enumerate(everyone):
        if said.trouble is not None:
            raise Elsewhere(f"stopped by {names[rank]}: {said.trouble}")
        if said.kind != everyone[0].kind:
            raise DeviceError(f"{names[0]} works on {everyone[0].kind}, {names[rank]} on {said.kind}: ranks of one "
                              f"run need devices of one kind; set train.device (--device), or leave it out")
        if said.card is not None and owner.setdefault(said.card, rank) != rank:
            raise DeviceError(f"{names[owner[said.card]]} and rank {rank} share one GPU; start as many ranks on a "
                              f"host as it has GPUs (--num_gpus, --gpus-per-task=1)")


def _address_to(address: str) -> str:
    """This host's own address on the way to `address`."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # nothing is sent
            return probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR {address!r} cannot be reached from {socket.gethostname()} ({error}); set it to "
                          f"the name or address of rank 0's host") from None


def _interface_of(own: str) -> str:
    import psutil

    return next((name for name, addresses in psutil.net_if_addrs().items()
                 if any(found.address == own for found in addresses)), "lo")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def leave() -> None:
    """After success on all ranks: NCCL's communicators are destroyed together or not at all."""
    if _Joined.watch is not None:
        HERE.enter("")
        _Joined.watch.all_here()
        barrier()
        _Joined.watch.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def abandon(error: BaseException) -> str | None:
    """Before leaving on failure: tell the others.  Returns why they left, where it was they who failed first.

    Nothing is destroyed: that would wait for ranks that will not come.
    """
    watch = _Joined.watch
    if watch is None:
        return None
    if len(_Joined.names) == 1:
        watch.stop()
        return None
    if isinstance(error, Elsewhere):
        watch.heard()
        return None
    # How gloo, NCCL and the store report a peer that is gone
    lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and
                                                 re.search("gloo|nccl|connection|peer", str(error), re.IGNORECASE))
    reason = watch.told(3 * GONE if lost else 0)
    if reason is None:
        watch.tell(f"{type(error).__name__}: {error}" if not isinstance(error, EngineError) else str(error))
    else:
        watch.linger()
    return reason


GONE = 2.0  # seconds


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else launchers.place(os.environ).world


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else launchers.place(os.environ).rank


def alone() -> bool:
    """Whether there is no other rank that this one has met."""
    return _Joined.host_group is None


def local_world() -> int:
    """Ranks on this host."""
    return launchers.place(os.environ).local_world


def own_cores() -> int:
    """Cores for this rank alone, of those that it may use."""
    return _Joined.cores or max(1, len(os.sched_getaffinity(0)) // local_world())


Threads = int | Literal["auto"]


def share_of_host(threads: Threads) -> int:
    """A rank's part of so many threads of its host; auto: one a core, at most 8 a rank."""
    if threads == "auto":
        return min(8, own_cores())
    return max(1, threads // local_world())


def barrier() -> None:
    """All ranks have come here.  On the host: the device may still be at work."""
    if _Joined.host_group is not None:
        HERE.passed()
        dist.barrier(group=_Joined.host_group)


def from_rank_0(value: Any) -> Any:
    """Rank 0's `value` on every rank, as JSON: a list where it was a tuple.  No rank unpickles what another sends."""
    data = json.dumps(value).encode()
    if _Joined.host_group is not None:
        HERE.passed()
        size = torch.tensor([len(data)])
        dist.broadcast(size, 0, group=_Joined.host_group)
        message = torch.zeros(int(size), dtype=torch.uint8)
        if rank() == 0:
            message.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(message, 0, group=_Joined.host_group)
        data = message.numpy().tobytes()
    return json.loads(data)


def of_all(value: Any) -> list[Any]:
    """The ranks' values, as JSON, on every rank."""
    data = json.dumps(value).encode()
    if _Joined.host_group is None:
        return [json.loads(data) for _ in range(world())]
    HERE.passed()
    sizes = [torch.tensor([0]) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(data)]), group=_Joined.host_group)
    longest = int(max(sizes))
    messages = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    own = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
    dist.all_gather(messages, own, group=_Joined.host_group)
    return [json.loads(message.numpy().tobytes()) for message in messages]


@contextmanager
def together() -> Iterator[None]:
    """A stage that all ranks pass, or none: where one fails, it raises its error and the others `Elsewhere`.

    For what a rank does by itself.  A message between ranks inside would meet the wrong one where a rank fails before
    it; an error beside one reaches the others through `abandon`.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    texts = of_all(None if failure is None else str(failure) if isinstance(failure, EngineError)
                   else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for name, text in zip(_Joined.names, texts):
        if text is not None:
            raise Elsewhere(f"stopped by {name}: {text}")


def average_(tensor: torch.Tensor) -> torch.Tensor:
    """Mean over ranks, in place."""
    if world() > 1:
        HERE.passed()
        dist.all_reduce(tensor)
        tensor /= world()
    return tensor


class StopFlag:
    """Whether any rank was asked to stop, or has failed.  Agreed on the host, so that no step waits for the device."""

    GO, STOP, FAILED = range(3)

    def __init__(self, asked: Asked = ASKED) -> None:
        self.asked = asked
        self.told: list[Any] = []  # what ranks had to tell when they last agreed, in the order of ranks

    def agreed(self, tell: Any = None) -> bool:
        """Whether to stop.  What a rank has to `tell` (as JSON; None for nothing) all find in `told`: one more
        message where there is any.  Raises Elsewhere where a rank has said `failed`."""
        state, telling = self._most(self.STOP if self.asked.now else self.GO, tell is not None)
        if state == self.FAILED:
            with together():  # they say why
                pass
        self.told = [told for told in of_all(tell) if told is not None] if telling else []
        return state == self.STOP

    def failed(self, error: Exception) -> NoReturn:
        """In place of `agreed`, before this rank leaves: raises `error`."""
        self._most(self.FAILED)
        with together():
            raise error
        raise AssertionError("unreachable")

    @staticmethod
    def _most(state: int, telling: bool = False) -> list[int]:
        flags = torch.tensor([state, telling])
        if _Joined.host_group is not None:
            HERE.passed()
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=_Joined.host_group)
        return flags.tolist()
