"""No line where windows meet, and little that depends on where they lie.

A network that averages over its window (squeeze-and-excitation) answers differently in the next one, so maps laid side
by side have steps at the border.  A landscape has steps of its own, more in some columns than in others: what is looked
at is how much larger differences between neighbouring pixels are across the borders of windows than elsewhere, divided
by the same of the same ground in a map whose windows end elsewhere.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml

from engine.data.dataset import Dataset, load_dataset
from engine.data.reference import transform
from engine.data.scene.grid import Windows
from engine.data.scene.scene import open_scene
from engine.data.scene.source import SceneSource
from engine.inference.landscape.mapper import Options, predict_scene
from engine.model.unet import BiomassUNet
from engine.model.weights import save_weights
from tests.conftest import SHARED
from tests.scenes import DATASET, TILE, make_scene

SHIFT = 11  # pixels that the other map's grid begins later


class Maps:
    """Maps of a scene, and of what lies SHIFT pixels right and below of its corner."""

    def __init__(self, scene: Path, weights: Path, folder: Path):
        self.scene, self.weights, self.folder = scene, weights, folder

    @functools.cache  # noqa: B019
    def map(self, overlap: int, shifted: bool = False) -> np.ndarray:
        scene, out = self.scene, self.folder / f"{overlap}-{shifted}.tif"
        if shifted:
            said = yaml.safe_load(scene.read_text())
            with rasterio.open(self.folder / f"{overlap}-False.tif") as raster:
                west, south, east, north = raster.bounds
            said["grid"] = {"bounds": [west + 10 * SHIFT, south, east, north - 10 * SHIFT]}
            scene = scene.with_name("shifted.yaml")
            scene.write_text(yaml.safe_dump(said, sort_keys=False))
        predict_scene([self.weights], scene, out, Options(overlap=overlap), device=torch.device("cpu"))
        with rasterio.open(out) as raster:
            values = raster.read(1).astype(np.float64)
            return np.where(values == raster.nodata, np.nan, values)

    def seam(self, overlap: int) -> float:
        """Across the borders of windows against elsewhere, divided by the same in the shifted map."""
        ours = self.map(overlap)[SHIFT:, SHIFT:]
        other = self.map(overlap, True)
        height, width = (length + SHIFT for length in ours.shape)
        windows, shifted = Windows(height, width, TILE, overlap), Windows(*other.shape, TILE, overlap)
        across: list[list[np.ndarray]] = [[], []]
        elsewhere: list[list[np.ndarray]] = [[], []]
        for axis, places, others in ((0, windows.rows, shifted.rows), (1, windows.columns, shifted.columns)):
            # A difference is known by the second of its two pixels, in the shifted grid
            edges = {place + end - SHIFT for place in places for end in (0, TILE)}
            away = {place + end for place in others for end in (0, TILE)}
            for n, found in enumerate((ours, other)):
                steps = np.abs(np.diff(found, axis=axis))
                on = [edge - 1 for edge in sorted(edges - away) if 1 <= edge <= steps.shape[axis]]
                off = [step for step in range(steps.shape[axis]) if step + 1 not in edges | away]
                across[n].append(np.take(steps, on, axis).ravel())
                elsewhere[n].append(np.take(steps, off, axis).ravel())
        ratios = [np.nanmean(np.concatenate(a)) / np.nanmean(np.concatenate(b)) for a, b in zip(across, elsewhere)]
        return float(ratios[0] / ratios[1])


def lived_in(scene: Path, dataset: Dataset, band: str, folder: Path) -> Path:
    """Weights that were trained a little, on the scene itself: to answer with a band of it, averaged over steps."""
    found = open_scene(scene, dataset)
    windows = Windows(found.grid.height, found.grid.width, TILE, 32)
    source = SceneSource(found, windows, 1)
    images, kept = [], []
    for row, column in np.ndindex(len(windows.rows), len(windows.columns)):
        stack = source.stack(source.chip(row, column))
        images.append(torch.from_numpy(transform(stack, None)[0]).permute(0, 3, 1, 2))
        kept.append(torch.arange(dataset.months) < len(stack.months))
    chips, there = torch.stack(images), torch.stack(kept)
    target = (chips[:, :, dataset.bands.index(band)] * there[:, :, None, None]).sum(1) / there.sum(1)[:, None, None]
    target = (target - target.mean()) / target.std()
    torch.manual_seed(0)
    losses, trained = [], BiomassUNet("tf_mobilenetv3_small_minimal_100", [16, 12, 8, 8, 8],
                                      in_channels=dataset.channels, tile=TILE)
    optimizer = torch.optim.AdamW(trained.parameters(), 1e-2)
    for step in range(60):
        some = torch.randint(len(chips), (4,))
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 60)
        loss = (trained(chips[some], ~there[some])[:, 0] - target[some]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.6
    path = folder / "weights.safetensors"
    save_weights(path, trained, trained.config(), {"dataset": json.dumps(dataset.dump())})
    return path


@pytest.fixture(scope="module", params=["made", "real"])
def maps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Maps:
    folder, dataset, band = tmp_path_factory.mktemp(request.param), DATASET, "nir"
    if request.param == "made":
        scene = make_scene(folder / "scene", 260, 280)
    elif (SHARED / "scene").is_dir():
        scene = folder / "scene.yaml"
        scene.write_text(yaml.safe_dump({"images": {name: str(SHARED / "scene" / f"scene_{name}_{{step:02d}}.tif")
                                                    for name in ("S1", "S2")}}))
        dataset = load_dataset("biomassters").model_copy(update={"tile": TILE})
        band = "B8"
    else:
        pytest.skip(f"{SHARED / 'scene'} does not exist on this machine")
    return Maps(scene, lived_in(scene, dataset, band, folder), folder)


@pytest.mark.parametrize("overlap", [16, 32])
def test_windows_leave_no_line(maps: Maps, overlap: int) -> None:
    assert maps.seam(overlap) < 1.03


def test_without_blending_they_do(maps: Maps) -> None:
    assert maps.seam(0) > 1.2
