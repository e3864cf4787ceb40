"""What a landscape's map takes, by its size: peak memory of the process, and seconds beside the network's own.

    python benchmarks/landscape.py [--sizes 2000 20000] [--overlap 64]

A map of size² pixels of BioMassters (12 steps, 15 bands) is made from rasters to the valid Cloud-Optimised GeoTIFF, by
a process of its own: windows read, batches made by DALI, blended, bands written and joined.  In place of the network
stands the mean of a window's channels, which takes next to no time and no memory that grows: what is measured is what
the network waits for, and whether memory grows with the scene.  The rasters are sparse, of blocks that GDAL fills with
0, a value here: reading takes what moving pixels takes, and neither a disk nor inflating.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from harness import Recorder, Timing, Variant, common_options, out_path, result

from engine.base.cli import main
from engine.data.biomassters import BIOMASSTERS, SENSORS, T
from engine.data.scene.gdal import rasterio

HERE = Path(__file__).resolve().parents[1]

_MAP = """
import json, sys, time
from pathlib import Path
import torch
from engine.data.dataset import load_dataset
from engine.inference.landscape import mapper

class Mean:
    def __call__(self, images, dropped):
        return images[:, 0].mean(1, keepdim=True)

mapper._models = lambda *_: ([Mean()], load_dataset("biomassters"))
mapper.weights.identify = lambda path: {"path": str(path), "sha256": ""}
start = time.perf_counter()
mapper.predict_scene([Path("mean")], Path(sys.argv[1]), Path(sys.argv[2]), mapper.Options(overlap=int(sys.argv[3])),
                     device=torch.device("cpu"))
# Not ru_maxrss, which goes on from the process that started this one
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak}))
"""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser, n=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2000, 20000], help="pixels a side")
    parser.add_argument("--overlap", type=int, default=64)
    return parser


def run(args: argparse.Namespace) -> int:
    sizes, cpu = [100, 200, 300] if args.smoke else args.sizes, torch.device("cpu")
    settings = {"overlap": args.overlap, "network": "none"}
    recorder = Recorder(out_path(args, "landscape", cpu), "landscape", cpu, settings)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        timings = {size: Timing(peak=0) for size in sizes}
        for size in sizes:
            scene = make_scene(folder / str(size), size)
            for i in range(1 if args.smoke else args.n):
                out = folder / f"{size}-{i}.tif"
                done = subprocess.run([sys.executable, "-c", _MAP, scene, out, str(args.overlap)], cwd=HERE, text=True,
                                      env={"PYTHONPATH": str(HERE)}, stdout=subprocess.PIPE, check=True)
                seen = json.loads(done.stdout.splitlines()[-1])
                timings[size].seconds.append(seen["seconds"])
                timings[size].peak = max(timings[size].peak or 0, seen["peak"])
                out.unlink()
            record = result("map without a network", Variant(f"{size}²", lambda _: None, work={"pixels": size**2}),
                            timings[size], timings[sizes[0]], f"{sizes[0]}²")
            recorder.take(record)
            print(f"{size}²: {record['time']['median']:.1f} s, peak {(record['peak'] or 0) / 2**30:.3f} GiB, "
                  f"{record.get('peak_ratio', 1):.3f} of the first", flush=True)
    return recorder.close()


def make_scene(folder: Path, size: int) -> Path:
    """Its YAML file; every third step lacks the second sensor."""
    folder.mkdir(parents=True)
    names = {}
    for number, sensor in enumerate(SENSORS):
        names[sensor.name] = f"{sensor.name}_{{step:02d}}.tif"
        for step in range(T):
            if number == 0 or step % 3:
                with rasterio.open(folder / names[sensor.name].format(step=step), "w", driver="GTiff", width=size,
                                   height=size, count=len(sensor.bands), dtype=sensor.dtype, interleave="pixel",
                                   tiled=True, blockxsize=512, blockysize=512, sparse_ok=True, bigtiff="YES",
                                   crs="EPSG:3067",
                                   transform=rasterio.transform.from_origin(400_000, 7_000_000, 10, 10)):
                    pass
    path = folder / "scene.yaml"
    path.write_text(yaml.safe_dump({"dataset": BIOMASSTERS.name, "images": names}, sort_keys=False))
    return path


if __name__ == "__main__":
    main(arguments(), run)
