"""CUDA graphs: which batches share one, and that a replay gives the model's own maps.  Without a GPU a recorder takes
CUDA's place, whose replay runs the model on the static inputs again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from engine.base.errors import DeviceError
from engine.inference import cudagraphs
from engine.inference.cudagraphs import Graphed
from engine.inference.fold import optimize_for_inference
from engine.model.unet import BiomassUNet

SMALL, WIDTHS = "tf_mobilenetv3_small_minimal_100", (48, 40, 32, 24, 16)


def model() -> BiomassUNet:
    torch.manual_seed(0)
    return optimize_for_inference(BiomassUNet(SMALL, WIDTHS))


def noise(seed: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 15, 64, 64, generator=torch.Generator().manual_seed(seed))


def dropping(*months: int) -> Tensor:
    """[2, 3]: of chip b the first months[b] are dropped."""
    return torch.arange(3) < torch.tensor(months)[:, None]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Outputs of the graphs captured so far; CUDA's part is played by the CPU."""
    outputs: list[Tensor] = []

    def record(run: Callable[[], Tensor], pool: object) -> tuple[Callable[[], None], Tensor]:
        out = torch.full_like(run(), float("nan"))  # a capture computes nothing
        outputs.append(out)

        def replay() -> None:
            out.copy_(run())

        return replay, out

    monkeypatch.setattr(cudagraphs, "record", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(cudagraphs, "_device", lambda model: SimpleNamespace(type="cuda"))
    yield outputs


def test_batches_of_one_shape_share_a_graph(recorded: list[Tensor]) -> None:
    plain = model()
    graphed = Graphed(plain)
    batches = [(noise(1), None), (noise(2), None), (noise(3), dropping(1, 0)), (noise(4), dropping(0, 1)),
               (noise(5), dropping(1, 1)), (noise(6), dropping(0, 0)), (noise(7, batch=1), None)]
    maps, counts = [], []
    for images, dropped in batches:
        maps.append(graphed(images, dropped))
        counts.append(len(recorded))
    assert counts == [1, 1, 2, 2, 3, 3, 4]
    with torch.inference_mode():
        for (images, dropped), found in zip(batches, maps):  # afterwards: no map was overwritten by a later replay
            assert torch.equal(found, plain(images, dropped))


def test_shapes_beyond_the_most_run_without_a_graph(recorded: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudagraphs, "MOST", 1)
    plain = model()
    graphed = Graphed(plain)
    for images, dropped in [(noise(1), None), (noise(2), dropping(2, 0)), (noise(3), None)]:
        with torch.inference_mode():
            assert torch.equal(graphed(images, dropped), plain(images, dropped))
    assert len(recorded) == 1


def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(DeviceError, match=r"--device gpu, or leave out --cuda-graphs"):
        Graphed(model())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replays_on_a_gpu(precision: str) -> None:
    from engine.inference.chips import autocast

    device = torch.device("cuda")
    plain = optimize_for_inference(BiomassUNet(SMALL, WIDTHS).to(device), precision)  # type: ignore[arg-type]
    graphed = Graphed(plain)
    for seed, dropped in enumerate([None, dropping(1, 0), None, dropping(0, 1)]):
        images = noise(seed).to(device)
        with torch.inference_mode(), autocast(device, precision):
            found, expected = graphed(images, dropped), plain(images, dropped)
        torch.testing.assert_close(found, expected, rtol=1e-2 if precision == "bf16" else 1e-4, atol=1e-2)
    assert len(graphed._graphs) == 2
