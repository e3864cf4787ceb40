"""The same bits from run to run, on one machine, device and number of ranks: `train.deterministic`.

The plan, the batches and the month attention are so anyway.  What is not, on a GPU: cuDNN tries out algorithms and
takes the quickest of the day, some of which add up in no order; so do cuBLAS with a workspace on several streams, and
PyTorch's own atomics.  An operator that has no other way raises RuntimeError and names itself.
"""

from __future__ import annotations

import os

import torch


def set_deterministic(wanted: bool) -> None:
    """To be called before the process multiplies matrices on a GPU."""
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.deterministic = wanted
    # Numbers of kept months make about ten shapes; the log says what the trials cost
    torch.backends.cudnn.benchmark = not wanted
    if wanted:
        from torch._inductor import config  # takes a second

        config.deterministic = True  # it measures kernels on the device, and takes the quicker
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the larger that NVIDIA calls reproducible
