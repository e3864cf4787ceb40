"""The DALI pipeline and the loader against the NumPy reference, on real and made chips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.base.errors import DataError, DeviceError
from engine.config import Augment
from engine.data import reference
from engine.data.batch import Batch, Request
from engine.data.biomassters import BIOMASSTERS, S1, S1_NODATA, S1_SHAPE, S2, S2_SHAPE, TILE, T
from engine.data.index import Chip, open_index
from engine.data.loader import Loader
from engine.data.plan import IDENTITY, Draw, draw
from engine.data.source import Stack, empty_stack
from engine.data.tiff.source import TiffSource

BACKENDS = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]


def load(requests: list[list[Request]], *, warp: bool, precision: str = "fp32", backend: str = "cpu",
         source: object = None, **options: int) -> Iterator[Batch]:
    device = torch.device("cuda", 0) if backend == "gpu" else torch.device("cpu")
    loader = Loader(source or TiffSource(BIOMASSTERS), batch_size=len(requests[0]), device=device, backend=backend,  # type: ignore[arg-type]
                    precision=precision, warp=warp, **options)
    return loader.batches(requests)


def expected(chip: Chip, how: Draw, warp: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    stack = TiffSource(BIOMASSTERS).read(chip, how.keep, empty_stack(BIOMASSTERS))
    return *reference.transform(stack, how.matrix if warp else None), stack.months


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_warp_it_is_the_reference(real_data: Path, backend: str) -> None:
    chips = list(open_index(real_data).chips)
    [batch] = load([[Request(chip) for chip in chips]], warp=False, backend=backend)
    assert batch.images.shape == (2, T, 15, TILE, TILE) and batch.images.dtype == torch.float32
    for b, chip in enumerate(chips):
        images, label, months = expected(chip, IDENTITY, False)
        got = batch.images[b].permute(0, 2, 3, 1).cpu().numpy()
        np.testing.assert_allclose(got, images, atol=1e-6)
        np.testing.assert_array_equal(batch.label[b].cpu().numpy(), label)
        assert batch.dropped[b].tolist() == [k >= len(months) for k in range(T)]


def test_real_values_are_normalised_as_the_winner_s(real_data: Path) -> None:
    """Against tifffile and the formulas of docs/data.md, written out once more."""
    import tifffile

    chip = open_index(real_data).by_id()["0060c0a5"]
    [batch] = load([[Request(chip)]], warp=False)
    s1 = tifffile.imread(chip.path(0, 5))
    scaled = (s1 - [-25, -62, -25, -60]) / [54, 90, 55, 82]
    scaled[s1 == -9999] = 0
    np.testing.assert_allclose(batch.images[0, 5, :4].permute(1, 2, 0), scaled, atol=1e-6)
    s2 = tifffile.imread(chip.path(1, 7)) / [19616, 18400, 17536, 17097, 16928, 16768, 16593, 16492, 15401, 15226, 255]
    np.testing.assert_allclose(batch.images[0, 7, 4:].permute(1, 2, 0), s2, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_augmented_it_is_the_reference(sample: Path, backend: str) -> None:
    chips = open_index(sample).split("train")[:4]
    augment = Augment(rotate=1, month_dropout=1)
    requests = [[Request(chip, draw(BIOMASSTERS, augment, 0, 0, p)) for p, chip in enumerate(chips)]]
    [batch] = load(requests, warp=True, backend=backend)
    for b, request in enumerate(requests[0]):
        images, label, _ = expected(request.chip, request.draw, True)
        got = batch.images[b].permute(0, 2, 3, 1).cpu().numpy()
        np.testing.assert_allclose(got[..., :4], images[..., :4], atol=1e-4)
        # Sentinel-2 is warped in integer counts: at most one count apart, and hardly ever
        difference = np.abs(got[..., 4:] - images[..., 4:]) * S2.span
        assert difference.max() < 1.01 and (difference > 0.01).mean() < 0.001
        np.testing.assert_allclose(batch.label[b].cpu().numpy(), label, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_flips_and_turns_are_exact(sample: Path, flip: bool, turns: int) -> None:
    from engine.data.plan import dihedral

    chip = open_index(sample).split("train")[0]
    how = Draw(dihedral(TILE, flip, turns, np.eye(3)), np.arange(T) < 2)
    [batch] = load([[Request(chip, how)]], warp=True)
    [plain] = load([[Request(chip, Draw(IDENTITY.matrix, how.keep))]], warp=False)
    for got, original in ((batch.images, plain.images), (batch.label[:, None], plain.label[:, None])):
        assert torch.equal(got, torch.rot90(original.flip(-1) if flip else original, turns, (-2, -1)))


def test_a_nodata_edge_does_not_bleed() -> None:
    """−9999 must become 0 before the warp mixes it with its neighbours."""
    s1 = np.full((1, *S1_SHAPE), -10, np.float32)
    s1[:, :, :128, 2:] = S1_NODATA
    stack = Stack(BIOMASSTERS, (s1, np.zeros((1, *S2_SHAPE), np.uint16)), np.zeros((TILE, TILE, 1), np.float32),
                  np.arange(1))

    class Fixed(TiffSource):
        def read(self, chip: Chip, keep: np.ndarray, into: Stack, turn: object = None) -> Stack:
            return stack

    how = draw(BIOMASSTERS, Augment(rotate=1), 1, 0, 0)
    request = Request(Chip("a", "train", BIOMASSTERS, ((True,) * T,) * 2, Path(), None), how)
    [batch] = load([[request]], warp=True, source=Fixed(BIOMASSTERS))
    values = batch.images[0, 0, :4]
    inside = (-10 - torch.tensor(S1.zero)) / torch.tensor(S1.span)
    assert values.min() >= 0 and (values <= inside[:, None, None] + 1e-5).all()
    assert (values[2] == 0).any() and torch.allclose(values[0], inside[0])


def test_dropped_months_are_zero_last_and_never_read(sample: Path, tmp_path: Path) -> None:
    import shutil


    chip = open_index(sample).split("train")[0]
    for path in (sample / "train_features").glob(f"{chip.id}_*"):
        shutil.copy(path, tmp_path)
    keep = np.ones(T, bool)
    keep[[1, 4, 9]] = False
    [one] = open_index(tmp_path).chips
    for month in (1, 4, 9):
        (tmp_path / BIOMASSTERS.feature_name(chip.id, 0, month)).write_bytes(b"not a TIFF")
    [batch] = load([[Request(one, Draw(IDENTITY.matrix, keep))]], warp=False)
    [whole] = load([[Request(chip)]], warp=False)
    assert batch.dropped[0].tolist() == [False] * 9 + [True] * 3
    assert not batch.images[0, 9:].any()
    assert torch.equal(batch.images[0, :9], whole.images[0, torch.from_numpy(keep)])


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_training_precision(real_data: Path, precision: str, dtype: torch.dtype) -> None:
    chip = open_index(real_data).by_id()["001b0634"]
    [half] = load([[Request(chip)]], warp=False, precision=precision)
    [full] = load([[Request(chip)]], warp=False)
    assert half.images.dtype == dtype and half.label.dtype == torch.float32
    assert half.images.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert (half.images.float() - full.images).abs().max() <= torch.finfo(dtype).eps * full.images.abs().max()


def test_order_and_rows_survive_reading_ahead(sample: Path) -> None:
    chips = open_index(sample).split("train")
    requests = [[Request(chips[(3 * i + j) % 8], row=2 * i + j, valid=i < 5) for j in range(2)] for i in range(6)]
    seen = list(load(requests, warp=False, readers=3, prefetch=3))
    assert [b.rows.tolist() for b in seen] == [[r.row for r in batch] for batch in requests]
    assert [b.valid.tolist() for b in seen] == [[r.valid for r in batch] for batch in requests]
    labels = {chip.id: expected(chip, IDENTITY, False)[1] for chip in chips}
    for batch, asked in zip(seen, requests):  # kept until now: buffers are not reused under a batch's feet
        assert [chip.id for chip in batch.chips] == [request.chip.id for request in asked]
        for b, request in enumerate(asked):
            np.testing.assert_array_equal(batch.label[b], labels[request.chip.id])


def test_a_loader_serves_many_epochs(sample: Path) -> None:
    chips = open_index(sample).split("train")
    loader = Loader(TiffSource(BIOMASSTERS), batch_size=2, device=torch.device("cpu"), backend="cpu", precision="fp32",
                    warp=False)
    for epoch in range(3):
        requests = [[Request(chips[epoch]), Request(chips[i])] for i in range(3)]
        seen = [batch.chips[0].id for batch in loader.batches(requests)]
        assert seen == [chips[epoch].id] * 3
    assert loader.wait > 0


def test_a_bad_file_stops_the_loader_with_its_name(sample: Path, tmp_path: Path) -> None:
    import shutil

    chip = open_index(sample).split("train")[0]
    for path in (sample / "train_features").glob(f"{chip.id}_*"):
        shutil.copy(path, tmp_path)
    broken = tmp_path / f"{chip.id}_S1_05.tif"
    broken.write_bytes(broken.read_bytes()[:500_000])
    [bad] = open_index(tmp_path).chips
    with pytest.raises(DataError, match=broken.name):
        list(load([[Request(chip)], [Request(bad)], [Request(chip)]], warp=False))


def read(chip: Chip, nodata_months: str = "fail", keep: np.ndarray | None = None) -> Stack:
    return TiffSource(BIOMASSTERS, nodata_months).read(chip, keep, empty_stack(BIOMASSTERS))


def blank(folder: Path, months: list[int], with_s2: list[int] = []) -> Chip:  # noqa: B006
    from engine.data.tiff import tiff

    for month in range(3):
        values = np.full(S1_SHAPE, S1_NODATA if month in months else -12, np.float32)
        tiff.write(folder / BIOMASSTERS.feature_name("aaaaaaaa", 0, month), values, 2)
        if month in with_s2:
            tiff.write(folder / BIOMASSTERS.feature_name("aaaaaaaa", 1, month), np.ones(S2_SHAPE, np.uint16), 1)
    return open_index(folder).chips[0]


def test_a_month_without_any_value_is_an_error_or_masked(tmp_path: Path) -> None:
    chip = blank(tmp_path, [1])
    with pytest.raises(DataError, match=r"aaaaaaaa_S1_01.tif: every value is nodata .* data.nodata_months"):
        read(chip)
    assert read(chip, "mask").months.tolist() == [0, 2]


def test_a_blank_radar_image_beside_an_optical_one_is_fine(tmp_path: Path) -> None:
    chip = blank(tmp_path, [1], with_s2=[1])
    assert read(chip).months.tolist() == [0, 1, 2]


def test_a_chip_without_any_value_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="chip aaaaaaaa .* no month holds any data"):
        read(blank(tmp_path, [0, 1, 2]), "mask")


def test_when_all_kept_months_are_missing_the_others_are_used(tmp_path: Path) -> None:
    chip = blank(tmp_path, [])
    assert read(chip, keep=np.arange(T) >= 6).months.tolist() == [0, 1, 2]


def test_nan_in_label_or_image_is_an_error(tmp_path: Path) -> None:
    from engine.data.tiff import tiff

    chip = blank(tmp_path, [])
    label = np.ones((TILE, TILE), np.float32)
    label[3, 4] = np.nan
    tiff.write_map(tmp_path / "aaaaaaaa_agbm.tif", label)
    [chip] = open_index(tmp_path).chips
    with pytest.raises(DataError, match=r"aaaaaaaa_agbm.tif: the label holds NaN"):
        read(chip)
    values = np.full(S1_SHAPE, -12, np.float32)
    values[100, 100, 3] = np.nan
    tiff.write(tmp_path / "aaaaaaaa_S1_02.tif", values, 2)
    with pytest.raises(DataError, match=r"aaaaaaaa_S1_02.tif: holds NaN"):
        read(chip)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "precision"), [("gpu", "fp32"), ("gpu", "bf16"), ("cpu", "fp32")])
def test_batches_are_right_where_the_gpu_is_behind(sample: Path, backend: str, precision: str) -> None:
    """torch's stream sleeps before it reads each batch, while the loader and DALI run ahead."""
    chips = open_index(sample).split("train")
    requests = [[Request(chips[n % 8], draw(BIOMASSTERS, Augment(rotate=1), 0, 0, n))] for n in range(12)]
    loader = Loader(TiffSource(BIOMASSTERS), batch_size=1, device=torch.device("cuda", 0), backend=backend,
                    precision=precision, warp=True, prefetch=2)
    found = []
    for delay in (0, 200_000_000):  # cycles, 0.1 s and more: several batches could be made meanwhile
        seen = []
        for batch in loader.batches(requests):
            torch.cuda._sleep(delay)
            seen.append((batch.images.clone(), batch.label.clone()))
            del batch
        torch.cuda.synchronize()
        found.append(seen)
    for one, other in zip(*found):
        assert all(map(torch.equal, one, other))
    cpu = load(requests, warp=True)
    for (images, label), batch in zip(found[1], cpu):
        apart = (images.float().cpu() - batch.images).abs()
        assert apart.mean() < (1e-4 if precision == "fp32" else 1e-3)
        torch.testing.assert_close(label.cpu(), batch.label, rtol=1e-4, atol=1e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_gpu_backend_says_what_is_missing(sample: Path) -> None:
    with pytest.raises(DeviceError, match=r"data.backend gpu: this machine has no CUDA device; set"):
        load([[Request(open_index(sample).chips[0])]], warp=False, backend="gpu")
