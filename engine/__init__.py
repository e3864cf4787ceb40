"""Training engine for satellite time series: see README.md, then `engine/trainer.py`.

For notebooks and scripts, `engine` hands out what people call by name.  Each is imported when it is first asked for, so
`import engine` itself needs neither torch nor time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config import load_config
    from engine.data.chip_view import open_chip
    from engine.data.dataset import Dataset
    from engine.data.index import open_index
    from engine.data.selection.folds import kfold, stratified
    from engine.inference.arrays import predict
    from engine.inference.fold import optimize_for_inference
    from engine.inference.metrics import per_chip_rmse
    from engine.model.unet import BiomassUNet
    from engine.model.weights import load_model

__all__ = [
    "BiomassUNet",
    "Dataset",
    "kfold",
    "load_config",
    "load_model",
    "open_chip",
    "open_index",
    "optimize_for_inference",
    "per_chip_rmse",
    "predict",
    "stratified",
]

_WHERE = {
    "BiomassUNet": "engine.model.unet",
    "Dataset": "engine.data.dataset",
    "kfold": "engine.data.selection.folds",
    "load_config": "engine.config",
    "load_model": "engine.model.weights",
    "open_chip": "engine.data.chip_view",
    "open_index": "engine.data.index",
    "optimize_for_inference": "engine.inference.fold",
    "per_chip_rmse": "engine.inference.metrics",
    "predict": "engine.inference.arrays",
    "stratified": "engine.data.selection.folds",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'engine' has no attribute {name!r}; it hands out {', '.join(__all__)}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
