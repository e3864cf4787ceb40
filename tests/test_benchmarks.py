"""The benchmarks' own code: statistics, result files, rendering, the baselines they compare with, and that they run.

No test here looks at a time that was measured.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, environment

sys.path.insert(0, str(ROOT / "benchmarks"))  # benchmarks are scripts

import harness
import render
from plain_model import PlainUNet

from engine.data.index import open_index
from engine.data.plan import IDENTITY, Draw, dihedral, rotation
from engine.data.reference import transform
from engine.data.request import Request
from engine.data.source import open_source
from engine.model import BiomassUNet

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
    """64 MiB of tensors, half of them let go, then 64 MiB that no tensor knows of; beside a variant that takes nothing;
    what is resident is added."""
    def run(_: int) -> None:
        first = torch.ones(1 << 23)
        torch.ones(1 << 23)
        _touch(1 << 26)
        del first

    big = harness.Variant("big", run)
    none = harness.Variant("none", lambda _: None, resident=5 << 20)
    timings = harness.measure([big, none], device=CPU, n=1, warmup=2)
    assert timings[0].peak == 1 << 26 and timings[1].peak == 5 << 20
    if harness._reset_high_water():  # a sandbox may forbid it
        grown = [timing.extra["process GiB"][0] * 1024 for timing in timings]  # MiB
        assert 90 < grown[0] < 110 and 5 <= grown[1] < 10


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
def test_without_a_gpu_it_says_so(script: str) -> None:
    if script == "loader":
        pytest.importorskip("cv2", reason="needs opencv-python-headless")
    done = run_script(script, "--device", "gpu")
    assert done.returncode == 2 and "no CUDA device" in done.stderr and "Traceback" not in done.stderr


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
    draws = {"none": IDENTITY, "turned": Draw(dihedral(True, 3, np.eye(3)), keep),
             "rotated": Draw(dihedral(True, 1, rotation(0.5, np.array([120.0, 140.0]))), keep)}
    stack = open_source([chip]).stack(chip)
    for name, draw in draws.items():
        images, dropped, label = plain_loader.Chips([Request(chip, draw)])[0]
        expected, expected_label = transform(stack, draw.matrix)
        expected[~draw.keep] = 0
        off = np.abs(images.numpy().transpose(0, 2, 3, 1) - expected)
        assert off.max() < (0.05 if name == "rotated" else 1e-6), name
        assert off.mean() < (1e-3 if name == "rotated" else 1e-7), name
        assert np.abs(label.numpy() - expected_label).mean() < 0.5, name
        assert dropped.tolist() == (~draw.keep).tolist()


# They run ----------------------------------------------------------------------------------------------------------


def run_script(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "benchmarks" / f"{script}.py", *map(str, words)], cwd=ROOT,
                          env=environment(), text=True, capture_output=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("words", [("attention",), ("same_padding",), ("model", "--parts", "training"),
                                   ("model", "--parts", "inference"), ("model", "--parts", "stages"),
                                   ("model", "--parts", "months"), ("loader",),
                                   ("loader", "--cold", "--modes", "without augmentation")],
                         ids="-".join)
def test_it_runs(words: tuple[str, ...], tmp_path: Path) -> None:
    if words[0] == "loader":
        pytest.importorskip("cv2", reason="needs opencv-python-headless")
    done = run_script(*words, "--smoke", "--device", "cpu", "--out", tmp_path / "r.jsonl")
    assert done.returncode == 0, done.stderr
    records = harness.read(tmp_path / "r.jsonl")
    timed = [record for record in records[1:] if "variant" in record]
    assert len(timed) >= 3 and all("time" in record for record in timed)
    assert {"commit", "cpu", "versions", "load"} <= records[0]["environment"].keys()
    for _, group in itertools.groupby(timed, key=lambda r: (r["group"], r.get("x"))):
        assert next(iter(group))["ratio"]["median"] == 1  # the baseline is in every group
    assert "### " in render.render_file(tmp_path / "r.jsonl")
