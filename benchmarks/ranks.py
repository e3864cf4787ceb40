"""One step on several ranks: what communication costs, measured here, and what a model of it expects of real networks.

    python benchmarks/ranks.py               1, 2 and 4 ranks on this CPU, one thread each, gloo over loopback
    python benchmarks/ranks.py --predict     the model's table alone: one host of GPUs, and several over a network

Measured is a training step (forward, backward, gradients averaged, AdamW) of a small model; each rank's chips keep the
same number of months, so that ranks wait for the network alone.  Weak scaling: so many chips a rank; strong: so many
together.  Ways:

no communication     each rank for itself: the cores are shared as in the others, so what these take more is
                     communication's (and, with more ranks than cores, waiting for ranks that had no core)
after the backward   gradients flattened, one all-reduce, copied back: what DeepSpeed does at ZeRO stage 0
beside the backward  ours, `engine.training.update.reduction`: as many buckets as the real model has

The model: an all-reduce of b bytes over n ranks takes the less of
    a ring   2 (n − 1) / n · b / B + base + (steps inside hosts) · α + (steps between hosts) · β
    a tree   the ring's first term / TREE + base + 2 ((ranks of a host − 1) · α + log2(hosts) · β)
with B the slowest link's effective rate (a host's network link carries the ring of all its ranks once each way); these
are the estimates that NCCL itself chooses by (src/graph/tuning.cc, ncclTopoTuneModel).  A step is fixed + chips ·
per chip, times what ranks wait for the one that keeps most months (by the plan); backwards are two thirds of it, their
buckets become ready at equal intervals, and are sent one after the other; what ends after the backward is waited for.
That they take nothing from the backward beside which they are sent is assumed, too.  What stands in `ASSUMED` is
printed with the result.  The same model, with the rate and latency of gloo measured here,
is held against the steps measured here.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from harness import Recorder, Timing, Variant, common_options, out_path, spread
from machine import ceilings
from torch import nn

from engine.base.cli import main
from engine.base.errors import ConfigError
from engine.config import Augment
from engine.data.biomassters import BIOMASSTERS, C, T
from engine.data.plan import deal, kept_months
from engine.model.unet import BiomassUNet
from engine.training.losses import make_loss
from engine.training.update.reduction import BUCKET_BYTES, Reducer

WORLDS = (1, 2, 4)
ALONE, AFTER, BESIDE = "no communication", "after the backward", "beside the backward"
BACKWARD = 2 / 3  # of a step's time: two of the three products of every convolution
COPIES = 6  # times that `AFTER` passes the gradients through memory: joined, divided, copied back; read and written
TREE = 0.92  # of a ring's rate (NCCL, tuning.cc)
GPUS = 8  # of a host

ASSUMED = {
    "chips/s of a GPU at 16 chips (H200, estimated from layer shapes, not measured)": 95.0,
    "ms of it a step, whatever its chips: AdamW, clipping, launches (estimated)": 11.2,
    "NVLink, GB/s each way (450 by data sheet; what a ring reaches: github.com/NVIDIA/nccl-tests/issues/212)": 370.0,
    "share of a network's bit rate that arrives (assumed)": 0.85,
    "us of a call (NCCL, tuning.cc, Simple)": 8.4,
    "us between two GPUs of a host (NCCL, tuning.cc, Simple ring)": 3.4,
    "us between two hosts (NCCL, tuning.cc, Simple ring)": 14.0,
}


# The model -----------------------------------------------------------------------------------------------------


class Network(NamedTuple):
    """rate: bytes/s each way over the slowest link.  base, inside, between: seconds of a call, of a step between ranks
    of a host, and between hosts.  per_host: ranks of a host."""

    rate: float
    base: float
    inside: float
    between: float
    per_host: int

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds for `size` bytes."""
        if ranks == 1:
            return 0.0
        hosts = -(-ranks // self.per_host)
        crossings = 2 * hosts if hosts > 1 else 0
        moved = 2 * (ranks - 1) / ranks * size / self.rate
        ring = moved + (2 * (ranks - 1) - crossings) * self.inside + crossings * self.between
        within = min(ranks, self.per_host) - 1
        tree = moved / TREE + 2 * (within * self.inside + float(np.log2(hosts)) * self.between)
        return self.base + min(ring, tree)


def nvidia(hosts: int, gigabits: float) -> Network:
    """Hosts of 8 GPUs, each with so many Gb/s to the others."""
    nvlink, share, base, inside, between = list(ASSUMED.values())[2:7]
    rate = nvlink * 1e9 if hosts == 1 else min(nvlink * 1e9, share * gigabits / 8 * 1e9)
    return Network(rate, base * 1e-6, inside * 1e-6, between * 1e-6, GPUS)


def exposed(compute: float, size: float, ranks: int, network: Network, bucket: float) -> float:
    """Seconds that a step of `compute` seconds takes longer with its buckets sent beside the backward."""
    buckets = max(1, round(size / bucket))
    each, backward = network.all_reduce(size / buckets, ranks), BACKWARD * compute
    end = 0.0
    for k in range(buckets):
        end = max(end, backward * (k + 1) / buckets) + each
    return end - backward


@functools.cache
def waiting(ranks: int, chips: int) -> float:
    """The slowest rank's months over the mean, dealt as the plan does: of the recipe's first 8,192 chips, or 200 steps.
    """
    batch, found = ranks * chips, []
    for step in range(max(1, min(200, 8192 // batch))):
        kept = [kept_months(Augment(), T, 0, 0, step * batch + k) for k in range(batch)]
        found.append(max(sum(kept[i] for i in hand) for hand in deal(kept, ranks)) * ranks / sum(kept))
    return float(np.mean(found))


class Expected(NamedTuple):
    """Of a layout; efficiencies are against one GPU with as many chips, which waits for nobody."""

    alone: float  # seconds of a step
    waiting: float  # the slowest rank's months over the mean
    all_reduce: float  # seconds, of all gradients at once
    after: float  # efficiency, gradients sent after the backward
    beside: float  # efficiency, sent beside it


def expect(parameters: int, width: int, hosts: int, gigabits: float, chips: int, rate: float) -> Expected:
    """hosts × 8 GPUs, `chips` each, gradients of `width` bytes; rate: chips/s of one GPU at 16 chips."""
    ranks, network = hosts * GPUS, nvidia(hosts, gigabits)
    fixed = list(ASSUMED.values())[1] * 1e-3
    alone = fixed + chips * (1 / rate - fixed / 16)
    slowest = waiting(ranks, chips)
    compute, size = alone * slowest, parameters * width
    reduce = network.all_reduce(size, ranks)
    late = exposed(compute, size, ranks, network, BUCKET_BYTES * width / 4)
    return Expected(alone, slowest, reduce, alone / (compute + reduce), alone / (compute + late))


def table(rate: float) -> str:
    """16 chips a GPU, and the recipe's 16 chips cut over 8 and 16 GPUs, as Markdown, with what is assumed."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in BiomassUNet("tf_efficientnetv2_l", (384, 368, 352, 336, 320)).parameters())
    layouts = [(1, 0, 16), *((hosts, gigabits, 16) for gigabits in (400, 100) for hosts in (2, 4, 8, 16, 32, 64)),
               (1, 0, 2), (2, 400, 1), (2, 100, 1)]
    lines = ["| GPUs | network of a host | chips a GPU | alone, ms | slowest rank | all-reduce, ms | after | beside | "
             "bf16: all-reduce, ms | after | beside |", "|" + " --- |" * 11]
    for hosts, gigabits, chips in layouts:
        full, half = (expect(parameters, width, hosts, gigabits, chips, rate) for width in (4, 2))
        lines.append(f"| {hosts * GPUS} | {f'{gigabits} Gb/s' if gigabits else 'NVLink'} | {chips} | "
                     f"{full.alone * 1e3:.0f} | {full.waiting:.3f} | " + " | ".join(
                         f"{e.all_reduce * 1e3:.1f} | {e.after:.0%} | {e.beside:.0%}" for e in (full, half)) + " |")
    assumed = [f"- {name}: {rate if k == 0 else value:g}" for k, (name, value) in enumerate(ASSUMED.items())]
    return "\n".join([*lines, "", *assumed])


# Measured ------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What all ranks share; `months`: kept of each chip."""

    backbone: str
    decoder: tuple[int, ...]
    size: int
    months: int


class Team:
    """`world` processes that do what they are told, all the same."""

    def __init__(self, world: int, work: Work):
        self.world, context, port = world, multiprocessing.get_context("spawn"), _free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(theirs, rank, world, port, work), daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)
            theirs.close()
        self._answers()

    def do(self, *order: Any) -> float:
        """Have all ranks do it.  Returns the slowest one's seconds; raises RuntimeError with a rank's error."""
        for pipe in self._pipes:
            pipe.send(order)
        return max(self._answers())

    def _answers(self) -> list[float]:
        answers = [pipe.recv() for pipe in self._pipes]
        for answer in answers:
            if isinstance(answer, str):
                raise RuntimeError(answer)
        return answers

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(pipe: Connection, rank: int, world: int, port: int, work: Work) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world,
                                timeout=timedelta(minutes=2))
        steps, answer = _Steps(work), 0.0
        while True:
            pipe.send(answer)
            name, *args = pipe.recv()
            dist.barrier()
            start = time.perf_counter()
            getattr(steps, name)(*args)
            answer = time.perf_counter() - start
    except EOFError:  # the parent has gone
        pass
    except Exception as error:
        pipe.send(f"rank {rank} of {world}: {traceback.format_exception_only(error)[-1].strip()}")


class _Steps:
    """What one rank does."""

    def __init__(self, work: Work):
        torch.manual_seed(0)
        self.model = BiomassUNet(work.backbone, work.decoder).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.reducer = Reducer(self.model, bucket_bytes=gradient_bytes(self.model) // real_buckets())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, fused=True)
        self.loss = make_loss("per_chip_rmse", BIOMASSTERS.target)
        self.work = work

    def step(self, way: str, chips: int) -> None:
        size = self.work.size
        images = torch.rand(chips, T, size, size, C, generator=torch.Generator().manual_seed(0)).permute(0, 1, 4, 2, 3)
        dropped = (torch.arange(T) >= self.work.months).expand(chips, T)
        loss = self.loss(self.model(images, dropped), torch.full((chips, size, size), 60.0))
        if way == BESIDE:
            self.reducer.begin()
        loss.backward()
        if way == BESIDE:
            self.reducer.finish()
        elif way == AFTER:
            reduce_after(self.parameters)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def all_reduce(self, size: int, times: int) -> None:
        """`size` bytes, so many times."""
        tensor = torch.zeros(size // 4)
        for _ in range(times):
            dist.all_reduce(tensor)


def reduce_after(parameters: Sequence[nn.Parameter]) -> None:
    """The plain way: all gradients joined, one all-reduce, copied back.  The mean over ranks, in place."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.flatten() for grad in grads])
    flat /= dist.get_world_size()
    dist.all_reduce(flat)
    for parameter, grad, mean in zip(parameters, grads, flat.split([grad.numel() for grad in grads])):
        parameter.grad = grad.copy_(mean.view_as(grad))


def gradient_bytes(model: nn.Module) -> int:
    return 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def real_buckets() -> int:
    """In how many buckets the real model's 131 M gradients travel."""
    return -(-4 * 131_000_000 // BUCKET_BYTES)


# The benchmark -------------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser, n=9)
    parser.add_argument("--predict", action="store_true", help="print the model's table alone; measure nothing")
    parser.add_argument("--rate", type=float, default=next(iter(ASSUMED.values())),
                        help="chips/s of one GPU at 16 chips (default: %(default)g, an estimate)")
    parser.add_argument("--backbone", default="tf_efficientnetv2_b0")
    parser.add_argument("--size", type=int, default=64, help="pixels a side (default: 64)")
    parser.add_argument("--chips", type=int, default=1, help="a rank, in weak scaling (default: 1)")
    return parser


def run(args: argparse.Namespace) -> int:
    text = table(args.rate)
    if args.predict:
        print(text)
        return 0
    if args.device == "gpu":
        raise ConfigError("--device gpu: ranks are measured on the CPU only; for GPUs compare the steps in the "
                          "history.jsonl of a run with --predict --rate CHIPS_PER_S")
    work = Work(args.backbone, (48, 40, 32, 24, 16), args.size, 10)
    if args.smoke:
        args.n, work = 1, Work("tf_mobilenetv3_small_minimal_100", (8,) * 5, 64, 2)
    device = torch.device("cpu")
    model = BiomassUNet(work.backbone, work.decoder)
    size = gradient_bytes(model)
    measured = ceilings(device, torch.float32, small=args.smoke)
    recorder = Recorder(out_path(args, "ranks", device), "ranks", device,
                        {"backbone": work.backbone, "decoder": list(work.decoder), "pixels": work.size,
                         "kept months": work.months, "precision": "fp32", "threads a rank": 1,
                         "gradients, MB": round(size / 1e6, 1), "buckets": real_buckets(),
                         "backend": "gloo over loopback"}, measured)
    teams: dict[int, Team] = {}
    try:
        for world in WORLDS[:2] if args.smoke else WORLDS:
            teams[world] = Team(world, work)
        _measure(recorder, teams, args, size, measured["copy_bytes_per_s"])
    finally:
        for team in teams.values():
            team.close()
    failed = recorder.close()
    print(f"\nexpected of the real model on GPUs, by the same model of communication:\n\n{text}")
    return failed


def _measure(recorder: Recorder, teams: dict[int, Team], args: argparse.Namespace, size: int, copy: float) -> None:
    networks = _networks(recorder, teams, args.n, size)
    _, *several = teams
    for title, shares in (("weak scaling", dict.fromkeys(teams, args.chips)),
                          ("strong scaling", {world: max(teams) * args.chips // world for world in teams})):
        keys = [(1, ALONE), *((world, way) for world in several for way in (ALONE, AFTER, BESIDE))]
        variants = [Variant(f"{world} ranks, {way}" if world > 1 else "1 rank",
                            _step(teams[world], way, shares[world]), work={"chips": float(world * shares[world])})
                    for world, way in keys]
        timings = dict(zip(keys, recorder.group(title, variants, n=args.n, memory=False,
                                                warmup=min(2, args.n))))
        if not any(timing.error for timing in timings.values()):
            for world in several:
                _compare(recorder, f"{title}, {world} ranks", timings, world, size, networks[world], copy)


def _step(team: Team, way: str, chips: int) -> Callable[[int], None]:
    def call(_: int) -> None:
        team.do("step", way, chips)

    return call


def _networks(recorder: Recorder, teams: dict[int, Team], n: int, size: int) -> dict[int, Network]:
    """Rate and latency of gloo here, from an all-reduce of next to nothing and one of all gradients; one of a bucket
    between them shows how far a line through both holds."""
    bucket = size // real_buckets() // 4 * 4
    sizes = {"4 kB": (4096, 50), "a bucket": (bucket, 10), "all gradients": (size, 1)}
    networks = {}
    for world in [world for world in teams if world > 1]:
        found: dict[str, float] = {}

        def reduce(name: str, team: Team = teams[world]) -> Callable[[int], dict[str, float]]:
            amount, times = sizes[name]
            return lambda _: {"ms each": team.do("all_reduce", amount, times) / times * 1e3}

        timings = recorder.group(f"all-reduce over {world} ranks", [
            Variant(f"{name}, {times} at once", reduce(name)) for name, (_, times) in sizes.items()],
            n=n, memory=False)
        for name, timing in zip(sizes, timings):
            if timing.error is None:
                found[name] = float(np.median(timing.extra["ms each"])) / 1e3
        if len(found) < len(sizes):
            continue
        per_byte = max(1e-15, (found["all gradients"] - found["4 kB"]) / (size - 4096))
        factor = 2 * (world - 1) / world
        networks[world] = Network(factor / per_byte, found["4 kB"], 0.0, 0.0, world)
        recorder.note(f"gloo over {world} ranks", **{
            "GB/s each way": factor / per_byte / 1e9, "ms of a call": found["4 kB"] * 1e3,
            "a bucket by these, ms": networks[world].all_reduce(bucket, world) * 1e3,
            "measured, ms": found["a bucket"] * 1e3})
    return networks


def _compare(recorder: Recorder, title: str, timings: dict[tuple[int, str], Timing], world: int, size: int,
             network: Network, copy: float) -> None:
    """The share of communication, and the model's step against the measured one."""
    alone = np.asarray(timings[world, ALONE].seconds)
    compute = float(np.median(alone))
    reduce, copies = network.all_reduce(size, world), COPIES * size / copy
    free = compute + copies + exposed(compute, size, world, network, size / real_buckets())
    expected = {AFTER: (compute + copies + reduce,) * 2,
                BESIDE: (free, compute + copies + real_buckets() * network.all_reduce(size / real_buckets(), world))}
    for way, (low, high) in expected.items():
        seconds = np.asarray(timings[world, way].seconds)
        share, median = spread(list(1 - alone / seconds)), float(np.median(seconds))
        values = {"share of communication": share["median"], "from": share["low"], "to": share["high"],
                  "measured, ms": median * 1e3}
        if way == AFTER:
            values |= {"predicted, ms": low * 1e3, "measured over predicted": median / low}
        else:
            values |= {"predicted if it takes no core, ms": low * 1e3, "predicted if all of it does, ms": high * 1e3}
        recorder.note(f"{title}, {way}", **values)


if __name__ == "__main__":
    main(arguments(), run)
