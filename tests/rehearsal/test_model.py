"""The GPU's side of the model, prediction and CUDA graphs, rehearsed (see `tests.rehearsal.device`); and the
stand-ins themselves against what they stand for."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tifffile
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.base.progress import Progress
from engine.data import pipeline
from engine.data.batch import Batch
from engine.data.biomassters import BIOMASSTERS, TILE
from engine.data.index import open_index
from engine.inference import cudagraphs
from engine.inference.chips import predict_batch
from engine.inference.cudagraphs import Graphed
from engine.inference.fold import optimize_for_inference
from engine.inference.metrics import ChipTable
from engine.inference.predictor import Writer, predict
from engine.model import unet as modelling
from engine.model import weights
from engine.model.unet import BiomassUNet
from engine.training.losses import make_loss
from tests.rehearsal import dali as rehearsed_dali
from tests.rehearsal.cuda import STANDINS, Runtime, get_device_properties, named
from tests.rehearsal.dali import dali
from tests.rehearsal.device import Device
from tests.rehearsal.state import CUDA, Mistake

SMALL, WIDTHS = "tf_mobilenetv3_small_minimal_100", (48, 40, 32, 24, 16)


def model() -> BiomassUNet:
    torch.manual_seed(0)
    return BiomassUNet(SMALL, WIDTHS)


def noise(seed: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 15, 64, 64, generator=torch.Generator().manual_seed(seed))


def dropping(*months: int) -> Tensor:
    """[2, 3]: of chip b the first months[b] are dropped."""
    return torch.arange(3) < torch.tensor(months)[:, None]


# The stand-ins ------------------------------------------------------------------------------------------------------


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("path", STANDINS)
def test_a_stand_in_takes_what_the_real_one_takes(path: str) -> None:
    fake, real = STANDINS[path], named(path)
    if not inspect.isclass(real):
        assert parameters(fake) == parameters(real)
        return
    own = {"__new__", "__init__"} & vars(real).keys()
    names = own | {name for name in vars(fake) if not name.startswith("_") and inspect.isfunction(getattr(fake, name))}
    for name in names - {"ask", "run", "is_capturing"}:  # ours, and one of C
        assert parameters(getattr(fake, name)) == parameters(getattr(real, name)), name


def test_other_stand_ins() -> None:
    for name in ("cudaHostRegister", "cudaHostUnregister"):
        told = getattr(torch._C._cudart, name).__doc__
        assert len(parameters(getattr(Runtime(), name))) == told.count("arg")
    assert all(hasattr(torch._C._CudaDeviceProperties, name) for name in vars(get_device_properties()))
    assert parameters(rehearsed_dali.build) == parameters(pipeline.build)
    with Device(), dali():
        fake = torch.from_dlpack
    assert parameters(fake) == parameters(torch.from_dlpack)


def test_devices_do_not_mix_and_waits_are_counted() -> None:
    with Device() as device:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        with pytest.raises(Mistake, match="found cuda:0 and cpu"):
            here + there
        with pytest.raises(TypeError, match=r"Use Tensor.cpu\(\)"):
            there.numpy()
        assert (there * 2 + torch.tensor(1.0)).device == there[1:].detach().device == CUDA and here.device.type == "cpu"
        assert not device.waits
        for wait in (lambda: bool(there.sum() > 2), there.tolist, there.cpu, there.nonzero, lambda: here.to("cuda"),
                     lambda: float(there[0]), torch.cuda.synchronize, lambda: torch.tensor(3, device="cuda")):
            before = len(device.waits)
            wait()
            assert len(device.waits) == before + 1
        here.pin_memory().to("cuda", non_blocking=True)
        assert len(device.waits) == before + 1
    assert not torch.cuda.is_available() or torch.cuda.device_count()


# Prediction ---------------------------------------------------------------------------------------------------------


class Late(Writer):
    """Without its event."""

    def _write(self, pending: Any) -> None:
        super()._write(pending._replace(done=None))


@pytest.mark.parametrize("writer", [Writer, Late])
def test_maps_are_written_when_they_have_arrived(sample: Path, tmp_path: Path, writer: type[Writer]) -> None:
    chips = open_index(sample).split("train")[:3]
    with (Device(late=True) as device, Progress("", 3, "map", quiet=True) as progress,
          writer(tmp_path, progress) as ours):
        for n, chip in enumerate(chips):
            maps = torch.full((1, 1, TILE, TILE), float(n)).pin_memory().to("cuda", non_blocking=True)
            valid = torch.tensor([True]).pin_memory().to("cuda", non_blocking=True)
            ours.add(Batch(maps, None, None, None, valid, [chip]), maps + 1)  # type: ignore[arg-type]
            del maps, valid
            ours._background.finish()
            written = list(tmp_path.iterdir())
            if writer is Late:
                assert not written  # `valid` was not there yet, and nor was a map
                continue
            assert len(written) == n  # one batch behind
        if writer is Late:
            return
        ours.finish()
        assert {wait.partition(" (")[0] for wait in device.waits} == {"an event's synchronize"}
    for n, chip in enumerate(chips):
        assert (tifffile.imread(tmp_path / f"{chip.id}_agbm.tif") == n + 1).all()


def test_predicting(sample: Path, tmp_path: Path) -> None:
    chips = open_index(sample).split("train")[:2]
    saved = BiomassUNet(SMALL, (8,) * 5)
    path = tmp_path / "w.safetensors"
    weights.save_weights(path, saved.state_dict(), saved.config(), {})
    options: dict[str, Any] = {"tta": ["id", "h"], "batch_size": 1, "n_pictures": 0}
    expected = predict(path, chips, tmp_path / "cpu", device=torch.device("cpu"), **options)
    with Device(), dali(), mock.patch.object(modelling.MonthAttention, "implementation", "reference"):
        found = predict(path, chips, tmp_path / "gpu", device=CUDA, cuda_graphs=True, **options)
    assert found == pytest.approx(expected, rel=1e-4)
    assert json.loads((tmp_path / "gpu" / "metrics.json").read_text())["chips"].keys() == {c.id for c in chips}
    for chip in chips:
        one, other = (tifffile.imread(tmp_path / name / f"{chip.id}_agbm.tif") for name in ("gpu", "cpu"))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


# CUDA graphs --------------------------------------------------------------------------------------------------------


def graphed(plain: BiomassUNet) -> tuple[Graphed, list[Tensor], list[Tensor]]:
    """Maps of some batches by graphs, and by the model."""
    ours, found, expected = Graphed(plain), [], []
    for seed, dropped in enumerate([None, dropping(1, 0), None, dropping(0, 1), dropping(1, 1)]):
        images = noise(seed).to("cuda")
        found.append(ours(images, dropped))
        with torch.inference_mode():
            expected.append(plain(images, dropped))
    return ours, found, expected


def test_a_graph_is_recorded_as_cuda_wants_it() -> None:
    runs: list[bool] = []
    cleared = mock.Mock(side_effect=lambda: device.calls.append("cache cleared"))
    with Device() as device, mock.patch.object(torch, "clear_autocast_cache", cleared):
        at = torch.ones(2, device="cuda")

        def run() -> Tensor:
            runs.append(torch.cuda.current_stream() is now)
            return at * 2

        now = torch.cuda.current_stream()
        replay, out = cudagraphs.record(run, (0, 1))
        assert device.calls == ["stream 2 waits for stream 1", "stream 1 waits for stream 2", "cache cleared",
                                "capture, thread_local, pool (0, 1)", "cache cleared"]
        assert runs == [False] * cudagraphs.WARM_UP + [True]
        assert out.isnan().all()
        at.fill_(3)
        replay()
        assert out.tolist() == [6, 6]


def test_replays_give_the_models_maps() -> None:
    plain = optimize_for_inference(model())
    plain.attn.apply(lambda level: setattr(level, "implementation", "reference"))
    with Device():
        ours, found, expected = graphed(plain.to(CUDA))
        assert len(ours._graphs) == 3 and all(map(torch.equal, found, expected))


def test_what_waits_cannot_be_captured() -> None:
    with Device(), pytest.raises(Mistake, match="while a graph is captured"):
        at = torch.ones(2, device="cuda")
        runs: list[int] = []

        def run() -> Tensor:
            runs.append(1)
            return at * (at.sum().item() if len(runs) > cudagraphs.WARM_UP else 1)

        cudagraphs.record(run, None)


# Devices, dtypes and layouts, by tensors that are on CUDA and have no values -----------------------------------------


@contextmanager
def no_values(ours: BiomassUNet) -> Iterator[None]:
    """With the parameters and buffers of `ours` on CUDA, where there is none."""
    ours.attn.apply(lambda level: setattr(level, "implementation", "triton"))
    fake = FakeTensorMode()  # made while torch sees no GPU, it leaves the driver alone
    with fake, mock.patch.object(torch.cuda, "is_available", lambda: True), \
            mock.patch.object(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True):
        for module in ours.modules():
            for name, old in module._parameters.items():
                if old is not None:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=CUDA)
                    module._parameters[name] = torch.nn.Parameter(new, old.requires_grad)
            for name, old in module._buffers.items():
                if old is not None:
                    module._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device=CUDA)
        yield


def kept(dropped: Tensor | None, images: Tensor) -> tuple[Tensor, Tensor]:
    """Of 5 months: what `kept_months` would count has no value here."""
    assert dropped is not None and dropped.device.type == "cpu"
    return (torch.zeros(5, dtype=torch.int64, device=CUDA),
            torch.zeros(len(images) + 1, dtype=torch.int32, device=CUDA))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_forward_under_autocast(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(modelling, "kept_months", kept)
    ours, levels, head = model().train(), [], []
    for level in ours.attn:
        level.register_forward_hook(lambda module, given, out: levels.extend((given[0], out)))
    ours.segmentation_head.register_forward_hook(lambda module, given, out: head.extend((given[0].dtype, out.dtype)))
    with no_values(ours):
        images = torch.empty(2, 3, 64, 64, 15, dtype=dtype, device=CUDA).permute(0, 1, 4, 2, 3)
        with torch.autocast("cuda", dtype):
            out = ours(images, torch.zeros(2, 3, dtype=torch.bool))
        assert out.device == CUDA and out.dtype == torch.float32 and out.shape == (2, 1, 64, 64)
        assert head == [torch.float32] * 2, "in bfloat16 the head quantises to 1-2 t/ha"
        for tensor in levels:
            assert tensor.device == CUDA and tensor.dtype == dtype
            # without a driver, torch takes cuDNN for one that has no bfloat16
            assert dtype == torch.bfloat16 or tensor.is_contiguous(memory_format=torch.channels_last)
        loss = make_loss("per_chip_rmse", BIOMASSTERS.target)(out, torch.empty(2, 64, 64, device=CUDA))
        assert loss.device == CUDA and loss.dtype == torch.float32


def test_predicting_by_the_model_for_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, head = optimize_for_inference(model(), "bf16"), []
    fast.segmentation_head.register_forward_hook(lambda module, given, out: head.append((len(out), out.dtype)))
    monkeypatch.setattr(modelling, "kept_months", kept)
    with no_values(fast), torch.inference_mode():
        batch = Batch(torch.empty(2, 3, 64, 64, 15, dtype=torch.bfloat16, device=CUDA).permute(0, 1, 4, 2, 3),
                      torch.zeros(2, 3, dtype=torch.bool), torch.empty(2, 64, 64, device=CUDA),
                      torch.zeros(2, dtype=torch.int64, device=CUDA), torch.ones(2, dtype=torch.bool, device=CUDA), [])
        out = predict_batch(fast, batch, ("id", "h", "v", "hv"), "bf16", views_at_once=4)
        assert head == [(8, torch.float32)]
        assert out.device == CUDA and out.dtype == torch.float32 and out.shape == (2, 1, 64, 64)
        table = ChipTable(3, CUDA)
        table.update(batch.rows, out, batch.label, batch.valid, torch.ones(2, dtype=torch.bool))
        assert table.table.device == CUDA and table.table.dtype == torch.float64


# The test of the test -----------------------------------------------------------------------------------------------


def test_a_tensor_left_on_the_host_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = optimize_for_inference(model())
    plain.attn.apply(lambda level: setattr(level, "implementation", "reference"))
    with Device(), torch.inference_mode():
        ours = copy.deepcopy(plain).to(CUDA)
        ours(noise(0).to(CUDA), dropping(1, 0))
        ours.segmentation_head.to("cpu")
        with pytest.raises(Mistake, match="found cuda:0 and cpu"):
            ours(noise(0).to(CUDA))
        with pytest.raises(Mistake, match="found cuda:0 and cpu"):
            copy.deepcopy(plain).to(CUDA)(noise(0), dropping(1, 0))
        monkeypatch.setattr(modelling, "_put", lambda small, device: small)
        with pytest.raises((Mistake, ValueError), match="cpu"):
            copy.deepcopy(plain).to(CUDA)(noise(0).to(CUDA), dropping(1, 0))


def test_a_head_in_bfloat16_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BiomassUNet, "decode", lambda self, pooled: self.segmentation_head(self.decoder(pooled)))
    with pytest.raises(AssertionError):
        test_the_forward_under_autocast(monkeypatch, torch.bfloat16)
