"""The part of inference.py that maps a scene: for machines that have the extra `scene`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harness import Recorder, Variant
from plain_scene import map_scene

from engine.data.biomassters import BIOMASSTERS, SENSORS, TILE
from engine.data.made.scene import make_scene
from engine.data.scene.grid import Windows
from engine.data.scene.scene import open_scene
from engine.inference import pictures
from engine.inference.landscape import mapper
from engine.inference.landscape.area import Area
from engine.inference.landscape.bands import Bands, write_cog
from engine.inference.landscape.picture import map_figure

if TYPE_CHECKING:
    from inference import Bench


def scene_map(recorder: Recorder, bench: Bench, folder: Path, size: int, n: int) -> None:
    """From rasters to a map; both by models that stand ready."""
    place, name, overlap = bench.place, folder / "scene" / "scene.yaml", TILE // 4
    make_scene(name.parent, BIOMASSTERS, size, seed=1)
    scene = open_scene(name)
    rasters = {(SENSORS[number].name, step): image[0][0].path for (number, step), image in scene.images.items()}
    options = mapper.Options(place.tta, place.precision, overlap, batch=place.batch)
    windows = Windows(size, size, TILE, overlap)

    def plain(_: int) -> None:
        map_scene(rasters, place.out / "map.tif", lambda images, dropped: bench.plain_maps(
            bench.plain, images.to(place.device), dropped), overlap=overlap, batch=place.batch)

    def ours(_: int) -> None:
        out, beside = place.out / "map.tif", place.out / "beside.tif"
        bands = Bands(place.out / "parts", windows, 1)
        bands.folder.mkdir()
        mapper.Mapper([bench.fast], scene, windows, bands, options, place.device, place.threads, place.threads).run(
            bands.missing)
        area = Area(scene.grid, BIOMASSTERS.target.unit, [])
        write_cog(bands, windows, scene.grid, beside, [("AGBM", "t/ha")], {})
        mapper.measure(beside, windows, area, bands)
        beside.replace(out)
        pictures.save(map_figure(out, BIOMASSTERS.target, out.name), out.with_suffix(".png"))

    work = {"pixels": float(size**2)}
    recorder.group(f"a scene of {size}² pixels", [Variant(name, call, bench.clear, work=work) for name, call in
                                                  (("plain script", plain), ("ours", ours))], n=n, wall=True,
                   memory=False)
