"""The loader's batches against the reference in NumPy, on real chips where there are any: the numbers, not a time.

    python benchmarks/data_check.py [--device gpu] [--chips FOLDER …] [--most 4]

The first FOLDER that exists is taken, a TIFF tree; without one, chips are made, and the first line says which.  Every
stored form (TIFFs, packed, packed lossless), upright and warped, against `engine.data.reference`.  The exit status is 1
where a difference is larger than the tests of the data path allow.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from machine import use_device

from engine.base.cli import main
from engine.config import Augment
from engine.data import reference
from engine.data.batch import Request
from engine.data.biomassters import BIOMASSTERS, S1, S2
from engine.data.forms import open_source
from engine.data.index import Chip, open_index
from engine.data.loader import Loader
from engine.data.made.sample import make_sample
from engine.data.plan import IDENTITY, Draw, draw
from engine.data.source import empty_stack
from engine.data.store.pack import pack
from engine.data.tiff.source import TiffSource

FORMS = ("TIFF", "packed", "lossless")
SPANS = np.concatenate([S1.code_span, S2.code_span])  # of a band, in steps of the packed form
MOST_UPRIGHT = 0.02  # steps: rounding in float32
MOST_WARPED, FEW = 1.01, 0.002  # steps; the share of values that may be further off than MOST_UPRIGHT
LABEL = 1e-4  # of its value, and 0.01 t/ha


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu"))
    parser.add_argument("--chips", nargs="+", type=Path, default=[], help="TIFF trees; the first that exists")
    parser.add_argument("--most", type=int, default=4, help="chips of it (default: 4)")
    return parser


def run(args: argparse.Namespace) -> int:
    device = use_device(args.device)
    backend = "gpu" if device.type == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        tree = next((path for path in args.chips if path.is_dir()), None)
        print(f"real chips of {tree}" if tree else "made chips", f"on the {backend}")
        if tree is None:
            tree = Path(folder) / "made"
            make_sample(tree, args.most, seed=3)
        roots = {"TIFF": tree}
        for form in FORMS[1:]:
            roots[form] = Path(folder) / form
            pack(tree, roots[form], lossless=form == "lossless", workers=8)
        chips = list(open_index(tree).chips)[:args.most]
        augment = Augment(rotate=1, month_dropout=1)
        draws = [draw(BIOMASSTERS, augment, 0, 0, position) for position in range(len(chips))]
        wrong = 0
        for form, root in roots.items():
            stored = open_index(root).by_id()
            for warp in (False, True):
                how = draws if warp else [IDENTITY] * len(chips)
                loader = Loader(open_source([stored[chip.id] for chip in chips], backend=backend),
                                batch_size=len(chips), device=device, backend=backend, precision="fp32", warp=warp)
                [batch] = loader.batches([[Request(stored[chip.id], d) for chip, d in zip(chips, how)]])
                images = batch.images.permute(0, 1, 3, 4, 2).float().cpu().numpy()
                wrong += not _agrees(f"{form}, {'warped' if warp else 'upright'}", chips, how, warp, images,
                                     batch.label.cpu().numpy(), form == "packed")
    return 1 if wrong else 0


def _agrees(title: str, chips: list[Chip], draws: list[Draw], warp: bool, images: np.ndarray, labels: np.ndarray,
            steps: bool) -> bool:
    worst, few, label_off = 0.0, 0.0, 0.0
    for chip, how, got, label in zip(chips, draws, images, labels):
        stack = TiffSource(BIOMASSTERS).read(chip, how.keep, empty_stack(BIOMASSTERS))
        expected, expected_label = reference.transform(stack, how.matrix if warp else None, steps=steps)
        off = np.abs(got - expected) * SPANS
        worst, few = max(worst, float(off.max())), max(few, float((off > MOST_UPRIGHT).mean()))
        if chip.label is not None:
            excess = np.abs(label - expected_label) - LABEL * np.abs(expected_label)
            label_off = max(label_off, float(excess.max()))
    fine = worst < (MOST_WARPED if warp else MOST_UPRIGHT) and few < FEW and label_off < 0.01
    print(f"{'ok    ' if fine else 'WRONG '} {title}: largest difference {worst:.3g} steps, {few:.2g} of the values "
          f"more than {MOST_UPRIGHT}, label {max(label_off, 0):.2g} t/ha beyond rounding", flush=True)
    return fine


if __name__ == "__main__":
    main(arguments(), run)
