"""The loader that people write: tifffile, NumPy, OpenCV and torch's DataLoader.  The baseline of benchmarks/loader.py.

As in the solutions of the challenge, every month is read and transformed, and dropped months are zeroed at the end.
What is done to a chip is drawn by `engine.data.plan`, as for our loader, so that both do the same work.  It is a good
one of its kind: one warp carries flip, quarter turns and rotation; flips and quarter turns alone are array moves;
workers stay alive between epochs and OpenCV's own threads are off.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import tifffile
import torch
from torch.utils.data import DataLoader, Dataset

from engine.data.batch import Request
from engine.data.biomassters import S1, S1_NODATA, S2, TILE, C, T
from engine.data.index import Chip
from engine.data.source import turn_of

Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # images [T, C, H, W] float32, dropped [T], label [H, W]


class Chips(Dataset[Sample]):
    """What the requests of `self.requests`, one after another, ask for."""

    def __init__(self, requests: Sequence[Request]):
        self.requests = list(requests)

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, number: int) -> Sample:
        chip, draw, *_ = self.requests[number]
        images, label = read_chip(chip)
        if not np.array_equal(draw.matrix, np.eye(3)):
            turn = turn_of(draw.matrix, TILE)
            if turn is not None:
                images = np.stack([turn.view(month) for month in images])
                label = turn.view(label).copy()
            else:
                images = np.stack([warp(month, draw.matrix) for month in images])
                label = warp(label[:, :, None], draw.matrix)[:, :, 0]
        keep = np.ones(T, bool) if draw.keep is None else draw.keep
        images[~keep] = 0
        tensor = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        return tensor, torch.from_numpy(~keep), torch.from_numpy(label)


def read_chip(chip: Chip) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images [T, H, W, C] and label [H, W], float32."""
    images = np.zeros((T, TILE, TILE, C), np.float32)
    bands = len(S1.bands)
    for t in range(T):
        if chip.months[0][t]:
            s1 = tifffile.imread(chip.path(0, t)).astype(np.float32)
            scaled = (s1 - S1.zero) / S1.span
            scaled[s1 == S1_NODATA] = 0
            images[t, :, :, :bands] = scaled
        if chip.months[1][t]:
            images[t, :, :, bands:] = tifffile.imread(chip.path(1, t)).astype(np.float32) / S2.span
    label = tifffile.imread(chip.label).astype(np.float32) if chip.label else np.zeros((TILE, TILE), np.float32)
    return images, label


def warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """[H, W, channels] float32 by a matrix of `engine.data.plan.Draw`, 4 channels at a time, as OpenCV takes them."""
    shift = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # OpenCV counts from the centre of the first pixel
    centred = (np.linalg.inv(shift) @ matrix.astype(np.float64) @ shift)[:2]
    groups = [cv2.warpAffine(np.ascontiguousarray(image[:, :, first:first + 4]), centred, (TILE, TILE),
                             flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REFLECT_101)
              for first in range(0, image.shape[2], 4)]
    return np.concatenate([group.reshape(TILE, TILE, -1) for group in groups], axis=2)


class PlainLoader:
    """DataLoader over a fixed list of requests, read again with every iteration."""

    def __init__(self, requests: Sequence[Request], batch_size: int, workers: int, device: torch.device):
        self._device = device
        cores = sorted(os.sched_getaffinity(0))  # a fork server does not hand its parent's cores on
        context = multiprocessing.get_context("forkserver")  # DALI's threads would not survive a fork of this process
        context.set_forkserver_preload(["torch", "cv2", "tifffile", "engine.data.loader", "engine.data.store.pack"])
        self._loader = DataLoader(
            Chips(requests), batch_size, num_workers=workers, persistent_workers=True, pin_memory=device.type == "cuda",
            multiprocessing_context=context, worker_init_fn=_Start(cores))

    def batches(self) -> Iterator[list[torch.Tensor]]:
        for batch in self._loader:
            yield [tensor.to(self._device, non_blocking=True) for tensor in batch]

    def close(self) -> None:
        """End the workers."""
        loader: Any = self._loader
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()


class _Start:
    """What a worker does first; a class, because it travels to another process."""

    def __init__(self, cores: list[int]):
        self.cores = cores

    def __call__(self, _: int) -> None:
        os.sched_setaffinity(0, self.cores)
        cv2.setNumThreads(0)
        torch.set_num_threads(1)
