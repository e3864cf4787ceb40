"""The benchmarks' own code: statistics, result files, rendering, the baselines they compare with, and that they run.

No test here looks at a time that was measured.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.data.biomassters import TILE
from tests.conftest import ROOT, SHARED, environment
from tests.hosts import forks

sys.path.insert(0, str(ROOT / "benchmarks"))  # benchmarks are scripts

import data_check
import gpu_report
import harness
import levers
import loader
import render
import repeat_store
import step_estimate
from model_parts import Flop, Setup
from plain_model import PlainUNet

from engine.base import cli
from engine.data.batch import Request
from engine.data.forms import open_source
from engine.data.index import open_index
from engine.data.plan import IDENTITY, Draw, dihedral, rotation
from engine.data.reference import transform
from engine.data.store.chip_file import read_head
from engine.model.unet import BiomassUNet

CPU = torch.device("cpu")


class Clock:
    """A perf_counter that only moves when it is told to."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(harness.time, "perf_counter", fake.perf_counter)
    return fake


def takes(clock: Clock, name: str, seconds: list[float], calls: list[str] | None = None,
          **options: object) -> harness.Variant:
    """A variant whose repeats take these seconds, warm-up first."""
    left = iter(seconds)

    def run(_: int) -> dict[str, float]:
        clock.now += next(left)
        if calls is not None:
            calls.append(name)
        return {"twice": 2 * clock.now}

    return harness.Variant(name, run, **options)  # type: ignore[arg-type]


def test_repeats_are_interleaved_and_warm_up_is_not_counted(clock: Clock) -> None:
    calls: list[str] = []
    a, b = takes(clock, "a", [9, 9, 1, 2, 3], calls), takes(clock, "b", [9, 9, 4, 5, 6], calls)
    timings = harness.measure([a, b], device=CPU, n=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert timings[0].seconds == [1, 2, 3] and timings[1].seconds == [4, 5, 6]
    assert len(timings[0].extra["twice"]) == 3


def test_time_is_per_call_and_preparing_is_not_counted(clock: Clock) -> None:
    def prepare(_: int) -> None:
        clock.now += 100

    variant = takes(clock, "a", [7, 1, 2, 3], calls=None, prepare=prepare)
    variant.calls = 3
    assert harness.measure([variant], device=CPU, n=1)[0].seconds == [2]


def test_a_variant_that_fails_costs_only_itself(clock: Clock, tmp_path: Path) -> None:
    def fails(_: int) -> None:
        raise RuntimeError("no memory\nand a long trace")

    recorder = harness.Recorder(tmp_path / "r.jsonl", "fake", CPU, {})
    recorder.group("g", [takes(clock, "good", [1, 1, 1]), harness.Variant("bad", fails)], n=2)
    assert recorder.close() == 1
    good, bad = harness.read(tmp_path / "r.jsonl")[1:]
    assert good["seconds"] == [1, 1] and bad["error"] == "RuntimeError: no memory" and "seconds" not in bad


def test_ratios_are_taken_round_by_round(clock: Clock, tmp_path: Path) -> None:
    """A disturbance that doubles a whole round leaves the ratio what it is."""
    recorder = harness.Recorder(tmp_path / "r.jsonl", "fake", CPU, {"precision": "fp32"})
    base, fast = takes(clock, "base", [1, 4, 8, 4]), takes(clock, "fast", [1, 2, 4, 2], work={"chips": 10.0})
    recorder.group("g", [base, fast], n=3, x=("cores", 2), memory=False)
    recorder.note("fit", slope=1.5)
    assert recorder.close() == 0
    first, one, two, note = harness.read(tmp_path / "r.jsonl")
    assert first["benchmark"] == "fake" and first["settings"] == {"precision": "fp32"}
    assert one["ratio"] == {"median": 1, "low": 1, "high": 1} and two["ratio"] == {"median": 2, "low": 2, "high": 2}
    assert two["x"] == {"cores": 2} and two["n"] == 3 and two["peak"] is None and two["seconds"] == [2, 4, 2]
    assert note == {"note": "fit", "values": {"slope": 1.5}}


def test_spread_and_line() -> None:
    assert harness.spread(list(range(11))) == {"median": 5, "low": 1, "high": 9}
    assert harness.spread([3.0]) == {"median": 3, "low": 3, "high": 3}
    assert harness.line_through([1, 2, 4], [5, 7, 11]) == pytest.approx((2, 3))


def test_peak_memory_is_that_of_the_variant() -> None:
    """In a process of its own: what other tests did to this one's allocator decides what it gives back."""
    process = forks().Process(target=_peaks)
    process.start()
    process.join()
    assert process.exitcode == 0


def _peaks() -> None:
    """128 MiB of tensors, half of them let go, then 128 MiB that no tensor knows of; beside a variant that takes
    nothing; what is resident is added."""
    def run(_: int) -> None:
        first = torch.ones(1 << 24)
        torch.ones(1 << 24)
        _touch(1 << 27)
        del first

    big = harness.Variant("big", run)
    none = harness.Variant("none", lambda _: None, resident=5 << 20)
    timings = harness.measure([big, none], device=CPU, n=1, warmup=2)
    assert timings[0].peak == 1 << 27 and timings[1].peak == 5 << 20
    if harness._reset_high_water():  # a sandbox may forbid it
        grown = [timing.extra["process GiB"][0] * 1024 for timing in timings]  # MiB
        assert 180 < grown[0] < 220 and 5 <= grown[1] < 15, grown


def _touch(size: int) -> None:
    np.ones(size, np.uint8)


@pytest.fixture
def rendered(clock: Clock, tmp_path: Path) -> Path:
    """A result file with everything that a renderer meets."""
    path = tmp_path / "fake.jsonl"
    ceilings = {"copy_bytes_per_s": 4e9, "matmul_flop_per_s": 1e12}
    recorder = harness.Recorder(path, "fake", CPU, {"widths": [8, 4]}, ceilings)
    for cores in (1, 2):
        recorder.group("curve", [takes(clock, "a", [1, 2, 2], work={"chips": 8}),
                                 takes(clock, "b", [1, 1, 1], work={"chips": 8})], n=2, x=("cores", cores))
    recorder.group("bars", [takes(clock, "a", [1, 0.5], work={"bytes": 1e9}),
                            harness.Variant("broken", lambda _: {}["x"])], n=1, floor=0.25)
    recorder.note("slope", **{"ms a month": 1234.5})
    recorder.close()
    return path


def test_rendering_is_made_from_the_file_alone(rendered: Path) -> None:
    text = render.render_file(rendered)
    rows = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines()}
    assert ("b", "2", "2", "1000 (1000–1000)", "2 (2–2)", "8") in {row[:6] for row in rows}
    assert any(row[:3] == ("a", "1", "500 (500–500)") and "2 (50%)" in row and "2" in row for row in rows), text
    assert any("KeyError: 'x'" in row for row in rows)
    assert "widths 8 4" in text and "- slope: ms a month 1234" in text
    assert rendered.with_suffix(".md").read_text().startswith(text)
    assert rendered.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_the_render_command(rendered: Path) -> None:
    done = run_script("harness", "render", rendered)
    assert done.returncode == 0 and "### curve" in done.stdout, done.stderr


def test_a_cut_off_run_leaves_what_it_had(clock: Clock, tmp_path: Path) -> None:
    recorder = harness.Recorder(tmp_path / "r.jsonl", "fake", CPU, {})
    recorder.group("g", [takes(clock, "a", [1, 1])], n=1)
    lines = (tmp_path / "r.jsonl").read_text().splitlines()  # before it is closed
    assert [json.loads(line).get("variant") for line in lines] == [None, "a"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("script", ["attention", "model", "loader", "same_padding"])
def test_without_a_gpu_it_says_so(script: str, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    if script == "loader":
        pytest.importorskip("cv2", reason="needs opencv-python-headless")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--device", "gpu"])
    module = importlib.import_module(script)
    with pytest.raises(SystemExit, match="2"):
        cli.main(module.arguments(), module.run)
    said = capsys.readouterr().err
    assert "no CUDA device" in said and "Traceback" not in said


# The baselines compute what ours compute ---------------------------------------------------------------------------


@torch.no_grad()
def test_the_plain_model_is_the_model() -> None:
    torch.manual_seed(0)
    ours = BiomassUNet("tf_mobilenetv3_small_minimal_100", [8] * 5).eval()
    plain = PlainUNet("tf_mobilenetv3_small_minimal_100", [8] * 5).eval()
    plain.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, 15, 64, 64)
    dropped = torch.tensor([[False, True, False], [False, False, False]])
    for mask in (dropped, None):
        expected = ours(images, mask)
        assert (plain(images, mask) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_plain_loader_does_the_plan(sample: Path) -> None:
    """OpenCV interpolates in 1/32 of a pixel, so a rotated pixel may differ a little; a flip is exact."""
    pytest.importorskip("cv2", reason="needs opencv-python-headless")
    import plain_loader

    chip = open_index(sample).chips[0]
    keep = np.arange(12) % 3 > 0
    draws = {"none": IDENTITY, "turned": Draw(dihedral(TILE, True, 3, np.eye(3)), keep),
             "rotated": Draw(dihedral(TILE, True, 1, rotation(0.5, np.array([120.0, 140.0]))), keep)}
    stack = open_source([chip]).stack(chip)
    for name, draw in draws.items():
        images, dropped, label = plain_loader.Chips([Request(chip, draw)])[0]
        expected, expected_label = transform(stack, draw.matrix)
        kept = np.ones(12, bool) if draw.keep is None else draw.keep
        expected[~kept] = 0
        off = np.abs(images.numpy().transpose(0, 2, 3, 1) - expected)
        assert off.max() < (0.05 if name == "rotated" else 1e-6), name
        assert off.mean() < (1e-3 if name == "rotated" else 1e-7), name
        assert np.abs(label.numpy() - expected_label).mean() < 0.5, name
        assert dropped.tolist() == (~kept).tolist()


# They run ----------------------------------------------------------------------------------------------------------


def run_script(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "benchmarks" / f"{script}.py", *map(str, words)], cwd=ROOT,
                          env=environment(traced=False), text=True, capture_output=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("words", [("attention",), ("same_padding",), ("model",), ("inference",), ("landscape",),
                                   ("levers", "--together", "--levers", "stem", "upsample", "months", "static",
                                    "graph"),
                                   ("index",), ("loader",), ("loader", "--cold", "--modes", "without augmentation")],
                         ids="-".join)
def test_it_runs(words: tuple[str, ...], tmp_path: Path) -> None:
    if words[0] in ("loader", "inference"):
        pytest.importorskip("cv2", reason="needs opencv-python-headless")
    if words[0] == "index" and not SHARED.is_dir():
        pytest.skip(f"{SHARED} does not exist on this machine")
    done = run_script(*words, "--smoke", "--device", "cpu", "--out", tmp_path / "r.jsonl")
    assert done.returncode == 0, done.stderr
    records = harness.read(tmp_path / "r.jsonl")
    timed = [record for record in records[1:] if "variant" in record]
    assert len(timed) >= 3 and all("time" in record for record in timed)
    assert {"commit", "cpu", "versions", "load"} <= records[0]["environment"].keys()
    for _, group in itertools.groupby(timed, key=lambda r: (r["group"], r.get("x"))):
        assert next(iter(group))["ratio"]["median"] == 1  # the baseline is in every group
    assert "### " in render.render_file(tmp_path / "r.jsonl")


# Levers ------------------------------------------------------------------------------------------------------------

TINY = Setup("tf_mobilenetv3_small_minimal_100", (8,) * 5, 2, 64, "fp32", CPU)


def test_a_padded_stem_gives_the_same_maps() -> None:
    batch = levers.usual_batch(TINY)
    model = levers.build(TINY, smoke=True).eval()
    padded = levers.pad_stem(copy.deepcopy(model))
    wide = levers.pad_images(batch)
    assert wide.images.shape[2] == 16 and wide.images[0, 0].is_contiguous(memory_format=torch.channels_last) is False
    assert wide.images.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(padded(wide.images, wide.dropped), model(batch.images, batch.dropped))


def test_a_step_that_can_be_a_graph_is_the_step() -> None:
    """Gradients of both ways, seen where they are used; and that a graph would be made once."""
    batch, made = levers.usual_batch(TINY), []
    seen: dict[str, list[torch.Tensor]] = {}

    def capture(call: Any) -> Any:
        made.append(call)
        return call

    def keep(name: str) -> Any:
        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            seen.setdefault(name, []).append(parameter.grad.clone())

        return hook

    for name in ("default", "graphed"):
        model = levers.build(TINY, smoke=True)
        first = next(model.parameters())
        first.register_post_accumulate_grad_hook(keep(name))
        step = levers.step_of(model, TINY) if name == "default" else levers.graphed_step(model, batch, TINY, capture)
        step(batch)
        step(batch)
    assert len(made) == 1 and [len(grads) for grads in seen.values()] == [2, 2]
    torch.testing.assert_close(seen["graphed"], seen["default"])


@pytest.mark.parametrize("end", ["killed", "late"])
def test_a_lever_that_breaks_its_process_is_a_row(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had measured before is kept."""
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[2:] == ["--n", "3", "--levers", "stem", "--out", command[-1]]
        rows = [{"benchmark": "levers"}, {"group": "g", "variant": "15", "seconds": [1.0]}]
        Path(command[-1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        if end == "late":
            raise subprocess.TimeoutExpired(command, 240)
        return subprocess.CompletedProcess(command, -11, "", "one\nSegmentation fault\n")

    recorder = harness.Recorder(tmp_path / "r.jsonl", "fake", CPU, {})
    monkeypatch.setattr(levers.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["levers.py", "--levers", "stem", "cudnn", "--n", "3", "--out", "x"])
    levers._in_a_process(recorder, "stem", None)
    _, kept, error = harness.read(tmp_path / "r.jsonl")
    assert kept["variant"] == "15"
    assert error["error"] == {"killed": "exit status -11: Segmentation fault", "late": "took longer than 240 s"}[end]
    assert recorder.failed == [f"the stem's channels, stem: {error['error']}"]


def test_a_lever_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        """a lever"""
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setitem(levers.LEVERS, "stem", fails)
    recorder = harness.Recorder(tmp_path / "r.jsonl", "fake", CPU, {})
    for lever in ("stem", "graph"):
        levers._alone(recorder, lever, TINY, argparse.Namespace(smoke=False))
    _, failed, absent = harness.read(tmp_path / "r.jsonl")
    assert failed["error"] == "RuntimeError: CUDA error: out of memory" and absent["error"] == "needs CUDA"
    assert len(recorder.failed) == 1  # what a CPU cannot have is no failure


def test_time_that_streams_share_is_counted_once() -> None:
    assert levers.union([(0, 4), (6, 9), (1, 2), (3, 7)]) == 9
    assert levers.union([(0, 1), (5, 6)]) == 2


# The estimate --------------------------------------------------------------------------------------------------------


def test_the_estimate_of_the_page_is_the_script_s() -> None:
    """The table of docs/performance.md, for both cards; and its arithmetic is what torch's own counter says."""
    setup = Setup("tf_efficientnetv2_l", (384, 368, 352, 336, 320), 16, 256, "bf16", torch.device("meta"))
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")]
            for line in (ROOT / "docs" / "performance.md").read_text().splitlines() if line.startswith("|")]
    page = {row[0]: row[1:3] for row in rows if len(row) == 5}
    cards = (step_estimate.H200, {"copy_bytes_per_s": 3.0e12, "matmul_flop_per_s": 798e12})
    for column, rates in enumerate(cards):
        parts = step_estimate.estimate(setup, 10.2080078125, rates)
        for name, ms in [*parts.items(), ("total", sum(parts.values()))]:
            assert page[name][column] == f"{ms:.2f}", name
    flop = Flop.of(setup)
    with torch.device("meta"):
        encoder = BiomassUNet(setup.backbone, setup.decoder).train().encoder
        month = torch.empty(1, 15, 256, 256)
    counted = step_estimate.count(encoder, step_estimate.H200, lambda: encoder(month))
    assert 0.95 < counted.flop / (3 * flop.encoder) < 1  # the rest is depthwise, which counts as bytes


# The GPU check -------------------------------------------------------------------------------------------------------


def check(call: int, results: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    bare = {key: value for key, value in environment(traced=False).items()
            if key != "OUT" and not key.startswith("GPU_CHECK_")}
    return subprocess.run(["bash", ROOT / "benchmarks" / "gpu_check.sh", str(call), results], cwd=ROOT, text=True,
                          capture_output=True, timeout=500,
                          env={**bare, "PYTHON": sys.executable, "GPU_CHECK_WORK": str(results / "work"), **variables})


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A Python that writes its words down and does nothing; those that name `broken` fail."""
    path = tmp_path / "python"
    path.write_text(f"""#!/usr/bin/env bash
echo "$*" >> {tmp_path}/calls
[[ -e {tmp_path}/broken && $* == *$(cat {tmp_path}/broken 2> /dev/null)* ]] && echo "no luck" && exit 3
exit 0
""")
    path.chmod(0o755)
    return path


def said(stand_in: Path) -> str:
    return stand_in.with_name("calls").read_text()


def test_a_failed_stage_is_reported_and_hides_none(stand_in: Path, tmp_path: Path) -> None:
    stand_in.with_name("broken").write_text("--levers static")
    levers_only = {"PYTHON": str(stand_in), "GPU_CHECK_ONLY": "^lever|attention"}
    done = check(3, tmp_path / "r", **levers_only)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = (tmp_path / "r" / "summary.txt").read_text().splitlines()
    assert [re.sub(r"\d+ s", "N s", line) for line in lines[1:]] == [
        "ok     lever-dali (N s)", "ok     lever-cudnn (N s)", "ok     levers-cheap (N s)",
        "FAILED lever-static (exit 3, N s)", "ok     lever-graph (N s)", "ok     lever-products (N s)",
        "ok     attention (N s)"]
    assert "no luck" in done.stdout and "no luck" in (tmp_path / "r" / "stages" / "lever-static.log").read_text()
    stand_in.with_name("broken").unlink()
    stand_in.with_name("calls").unlink()
    done = check(3, tmp_path / "r", **levers_only)
    assert done.returncode == 0
    benchmarks = [line for line in said(stand_in).splitlines() if "--out" in line]
    assert len(benchmarks) == 1 and "--levers static" in benchmarks[0]  # the others are not repeated
    assert (tmp_path / "r" / "summary.txt").read_text().count("cached") == 6


def test_the_size_on_a_gpu_is_the_recipe_s(stand_in: Path, tmp_path: Path) -> None:
    """Nothing of a dry run's tiny sizes; and the results that a machine returns are few files."""
    out = tmp_path / "out"
    out.mkdir()
    check(1, tmp_path / "r", PYTHON=str(stand_in), OUT=str(out))
    [recipe] = [line for line in said(stand_in).splitlines() if "launch/train.py" in line]
    for words in ("configs/biomassters.yaml", "train.device=gpu", "train.global_batch=16", "train.precision=bf16",
                  "epochs: 6", "--profile steps=52:55"):
        assert words in recipe
    assert "model.backbone" not in recipe and "--smoke" not in said(stand_in)
    assert {path.name for path in out.iterdir()} == {"report.txt", "summary.txt", "results.tar.gz"}


def test_without_time_it_says_that_it_can_go_on(stand_in: Path, tmp_path: Path) -> None:
    done = check(3, tmp_path / "r", PYTHON=str(stand_in), GPU_CHECK_ONLY="^lever", GPU_CHECK_SECONDS="20")
    assert done.returncode == 6 and "FAILED lever-dali (no time left: the same call again goes on here)" in done.stdout
    assert "levers.py" not in said(stand_in)


@pytest.mark.slow
def test_a_dry_call_runs_every_command(tmp_path: Path) -> None:
    """The first call but for its benchmarks, which `test_it_runs` runs; then again, which repeats nothing."""
    some = {"GPU_CHECK_DRY": "1", "GPU_CHECK_ONLY": "environment|sample|pack|repeat|data-tests|recipe$|predict"}
    done = check(1, tmp_path, **some)
    assert done.returncode == 0, done.stdout
    report = (tmp_path / "dry" / "report.txt").read_text()
    assert re.search(r"training, recipe +[\d.]+ \(", report) and re.search(r"prediction, predict +[\d.]+", report)
    assert "Card: no GPU" in report and report in done.stdout and "FAILED" not in report
    again = check(1, tmp_path, **some)
    assert again.returncode == 0 and re.findall(r"^(\w+) ", again.stdout, re.M)[:7] == ["cached"] * 7


def test_bytes_to_read_are_those_of_the_file(stores: dict[bool, Path]) -> None:
    for chip in open_index(stores[False]).chips:
        assert chip.packed is not None
        head, one = read_head(chip.packed), np.arange(12) == chip.there[-1]
        counted = [loader.bytes_to_read(Request(chip, IDENTITY._replace(keep=keep))) for keep in (None, one)]
        assert counted == [head.end - head.start, int(head.label_sizes.sum() + head.sizes[one].sum())]


def test_a_repeated_store_is_whole(stores: dict[bool, Path], tmp_path: Path) -> None:
    for lossless, store in stores.items():
        out = tmp_path / str(lossless)
        assert repeat_store.run(argparse.Namespace(store=store, out=out, times=2)) == 0
        chips, before = open_index(out).chips, open_index(store).chips
        assert len({chip.id for chip in chips}) == 2 * len(before)
        for chip in chips:
            assert chip.packed is not None and read_head(chip.packed).chip == chip.id
        assert {str(chip.months) for chip in chips} == {str(chip.months) for chip in before}


def test_a_wrong_batch_is_seen(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Off by one count somewhere, or a label beside its chip."""
    chips = list(open_index(tree).chips)[:1]
    stack = open_source(chips).stack(chips[0])
    images, label = transform(stack, None)
    for worse, expected in ((0.0, True), (1.0, False)):
        wrong = images.copy()
        wrong[0, 3, 4, 7] += worse / data_check.SPANS[7]
        assert data_check._agrees("t", chips, [IDENTITY], False, wrong[None], label[None], False) is expected
    assert not data_check._agrees("t", chips, [IDENTITY], False, images[None], label[None] + 1, False)
    assert capsys.readouterr().out.split() .count("WRONG") == 2


# Its report ----------------------------------------------------------------------------------------------------------


def test_speed_is_of_windows_that_have_settled() -> None:
    rows = [{"step": step, "chips_per_second": float(step)} for step in range(10, 70, 10)]
    assert [row["step"] for row in gpu_report.settled(rows, 52)] == [30, 40, 50]
    assert [row["step"] for row in gpu_report.settled(rows, None)] == [30, 40, 50, 60]
    assert [row["step"] for row in gpu_report.settled(rows[:2], 15)] == [10]  # too short a run: the last before


@pytest.mark.parametrize(("kernel", "part"), [
    ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_cudnn",
     "convolutions"),
    ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_128x128_32x4_nhwc_align8>",
     "convolutions"),
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "convolutions"),
    ("void cudnn::cnn::conv2d_grouped_direct_kernel<false, true, false, false, 0, 0, int, __nv_bfloat16>", "depthwise"),
    ("triton_red_fused__native_batch_norm_legit_functional_silu_4", "elementwise and BatchNorm"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
     "elementwise and BatchNorm"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>",
     "optimizer and clipping"),
    ("_backward_kernel", "attention"), ("Memcpy HtoD (Pinned -> Device)", "data (DALI, nvCOMP, copies)"),
    ("void nvcomp::lz4DecompressBatchKernel", "data (DALI, nvCOMP, copies)"), ("a_new_kernel", "other kernels")])
def test_kernels_are_sorted_by_name(kernel: str, part: str) -> None:
    assert gpu_report.part_of(kernel) == part


def test_parts_of_a_trace(tmp_path: Path) -> None:
    """Two streams, which overlap, a gap, and what the host does, which is no part."""
    def event(name: str, ts: float, dur: float, cat: str = "kernel") -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [event("nvjet_a", 100, 50), event("odd", 120, 40), event("Memcpy HtoD", 200, 20, "gpu_memcpy"),
              event("aten::conv2d", 0, 1000, "cpu_op"), {"ph": "M", "name": "process_name"}]
    parts, other = gpu_report.breakdown(events)
    assert parts["convolutions"] == 50 and parts[gpu_report.OTHER] == 40 and other == [("odd", 40.0)]
    assert parts["data (DALI, nvCOMP, copies)"] == 20 and parts[gpu_report.GAPS] == 40  # from 160 to 200
    assert gpu_report.breakdown(events[3:]) == ({}, [])

    for folder in ("history", "profile/recipe", "stages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "stages" / "recipe.json").write_text(json.dumps(
        {"call": 1, "stage": "recipe", "status": 1, "seconds": 9, "when": "w", "card": "NVIDIA H200", "commit": "c"}))
    (tmp_path / "history" / "recipe.yaml").write_text("train:\n  micro_batch: 2\n")
    (tmp_path / "estimate.jsonl").write_text(json.dumps(
        {"note": "estimate, ms a chip", "values": {"convolutions": 0.05}}) + "\n")
    with gzip.open(tmp_path / "profile" / "recipe" / "steps-52-53.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    text = gpu_report.report(tmp_path)
    assert re.search(r"convolutions +0.025 +0.050 +0.50", text) and "other kernels: odd 0.020 ms" in text
    assert re.search(r"1 +recipe +FAILED \(1\) +9 +NVIDIA H200", text)


def test_runs_that_do_not_agree_are_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run_of(name: str, losses: list[float]) -> Path:
        (tmp_path / name).mkdir()
        rows = [{"kind": "step", "step": k, "loss": loss} for k, loss in enumerate(losses)] + [{"kind": "speed"}]
        (tmp_path / name / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    truth, near = run_of("truth", [80, 70, 60]), run_of("near", [80.1, 71, 59])
    off, short, bad = run_of("off", [82, 70, 60]), run_of("short", [80]), run_of("bad", [80, float("nan"), 60])
    assert gpu_report.agree([truth, near], 0.005, 0.05, 3)
    for wrong in (off, short, bad):
        assert not gpu_report.agree([truth, wrong], 0.005, 0.05, 3)
    assert "WRONG off" in capsys.readouterr().out


def test_maps_that_differ_are_seen(tmp_path: Path) -> None:
    from engine.base.errors import DataError
    from engine.data.tiff import tiff

    for name, value in (("a", 1.0), ("b", 1.25)):
        (tmp_path / name).mkdir()
        tiff.write_map(tmp_path / name / "x_agbm.tif", np.full((256, 256), value, np.float32))
    assert gpu_report.same(tmp_path / "a", tmp_path / "b", 0.5)
    assert not gpu_report.same(tmp_path / "a", tmp_path / "b", 0.2)
    with pytest.raises(DataError, match="not maps of the same chips"):
        gpu_report.same(tmp_path / "a", tmp_path, 0.5)
