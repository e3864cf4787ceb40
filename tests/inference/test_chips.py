"""Views of the square: what each does, that it is undone, and how their predictions are averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.base.errors import ConfigError
from engine.base.sections import HERE
from engine.config import Validate
from engine.data.batch import Batch
from engine.inference.chips import ALL, VIEWS, chosen_views, predict_batch, predict_views

OF_NUMPY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "id": lambda x: x, "h": np.fliplr, "v": np.flipud, "hv": lambda x: np.rot90(x, 2), "t": np.transpose,
    "r90": np.rot90, "r270": lambda x: np.rot90(x, 3), "a": lambda x: np.rot90(x, 2).T}
PICTURE = np.arange(12).reshape(3, 4)


def batch() -> Batch:
    images = torch.rand(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    dropped = torch.tensor([[False, True, True], [False, False, False]])
    return Batch(images, dropped, *[torch.empty(0)] * 3, [])


def slanted(images: Tensor, dropped: Tensor) -> Tensor:
    """A model that is blind neither to place nor to the months that are dropped; [B,T,C,H,W] -> [B,1,H,W]."""
    slope = torch.linspace(0, 1, images.shape[-1]) + 3 * torch.linspace(0, 1, images.shape[-2])[:, None] ** 2
    return (images[:, :, 0] * ~dropped[..., None, None]).sum(1, keepdim=True) * slope


def test_views_do_what_they_are_called() -> None:
    assert VIEWS.keys() == OF_NUMPY.keys() and len(set(VIEWS.values())) == 8
    for name, view in VIEWS.items():
        seen = view.of(torch.from_numpy(PICTURE))
        np.testing.assert_array_equal(seen, OF_NUMPY[name](PICTURE), name)
        np.testing.assert_array_equal(view.undone(seen), PICTURE, name)


@pytest.mark.parametrize("at_once", [1, 3, 4, 8])
def test_predictions_of_views_come_upright_and_in_order(at_once: int) -> None:
    """And each pass is a sign of life."""
    given, sizes, alive = batch(), [], HERE.alive

    def forward(images: Tensor, dropped: Tensor) -> Tensor:
        sizes.append(len(images))
        return slanted(images, dropped)

    names = ("r90", *(name for name in VIEWS if name != "r90"))
    for name, prediction in zip(names, predict_views(forward, given, names, "fp32", at_once), strict=True):
        turned = slanted(torch.from_numpy(turn(given.images.numpy(), OF_NUMPY[name])), given.dropped)
        undo = {"r90": "r270", "r270": "r90"}.get(name, name)
        np.testing.assert_array_equal(prediction, turn(turned.numpy(), OF_NUMPY[undo]), name)
    assert HERE.alive - alive == len(sizes)
    assert sizes == {1: [2] * 8, 3: [6, 6, 4], 4: [8, 8], 8: [16]}[at_once]


def turn(maps: np.ndarray, how: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.stack([how(x) for x in maps.reshape(-1, *maps.shape[-2:])]).reshape(maps.shape)


def test_the_mean_is_added_in_order() -> None:
    given = batch()
    for names in (("id",), ("id", "h", "v", "hv"), tuple(VIEWS)):
        total = torch.zeros(())
        for prediction in predict_views(slanted, given, names, "fp32"):
            total = total + prediction
        for at_once in (1, 4):
            assert torch.equal(predict_batch(slanted, given, names, "fp32", at_once), total / len(names))


def test_views_are_chosen_by_name() -> None:
    assert chosen_views([ALL]) == tuple(VIEWS) and chosen_views(("hv", "id")) == ("hv", "id")


@pytest.mark.parametrize("wrong", ["hv", [], ["id", "x"], ["id", "id"], [ALL, "t"]])
def test_what_is_no_choice_of_views_is_refused(wrong: Sequence[str]) -> None:
    with pytest.raises(ConfigError, match=r"tta .*: give a list of one or more of id, h, v, hv, t, r90, r270, a, each "
                                          r"once, or d4"):
        chosen_views(wrong)


def test_a_recipe_knows_every_view() -> None:
    of_list: Any = get_type_hints(Validate)["tta"]
    assert get_args(get_args(of_list)[0]) == (*VIEWS, ALL)
