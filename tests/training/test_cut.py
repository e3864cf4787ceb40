"""How a global batch is cut over ranks and memories, and what is said of it."""

from __future__ import annotations

import json

import pytest
import torch

from engine.base.errors import ConfigError
from engine.config import Config, parse_config
from engine.data.biomassters import BIOMASSTERS
from engine.model.unet import BiomassUNet
from engine.training.cut import FILL, cut, explain, memory_need
from engine.training.dryrun import describe


def config(global_batch: int = 16, **train: object) -> Config:
    return parse_config({"data": {"path": "/none"}, "model": {
        "backbone": "tf_mobilenetv3_small_minimal_100", "decoder_channels": [8, 8, 8, 8, 8]},
        "train": {"global_batch": global_batch, "precision": "fp32", **train}}, "a test")


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("micro", ["auto", 1])
def test_the_global_batch_is_the_recipes_at_any_world_size(world: int, micro: str | int) -> None:
    for rank in {0, world - 1}:
        sharding = cut(config(micro_batch=micro), BIOMASSTERS, world, rank)
        assert (sharding.global_batch, sharding.world, sharding.rank) == (16, world, rank)
        share = 16 // world
        assert (sharding.micro_batch, sharding.accumulate) == ((share, 1) if micro == "auto" else (1, share))


def test_the_largest_even_part_that_fits_into_memory() -> None:
    recipe = config(24)
    need = memory_need(recipe, BIOMASSTERS)

    def memory(chips: int) -> int:
        return int(need.of(chips) / FILL) + 1

    for chips, expected in ((24, 24), (23, 12), (12, 12), (11, 8), (7, 6), (5, 4), (1, 1)):
        sharding = cut(recipe, BIOMASSTERS, 1, 0, memory(chips))
        assert (sharding.micro_batch, sharding.accumulate) == (expected, 24 // expected)
    assert cut(recipe, BIOMASSTERS, 3, 0, memory(7)).micro_batch == 4  # of its 8
    with pytest.raises(ConfigError, match=r"train.micro_batch: one chip needs \d+\.\d GiB .*checkpoint_activations"):
        cut(recipe, BIOMASSTERS, 1, 0, memory(1) - 2**20)


def test_what_cannot_be_cut_evenly_is_refused_with_what_can() -> None:
    with pytest.raises(ConfigError, match="16 chips cannot be cut evenly over 3 ranks; start 1 or 2 or 4 or 8 or 16"):
        cut(config(), BIOMASSTERS, 3)
    with pytest.raises(ConfigError, match="each of 2 ranks has 8 of the 16 chips .* no multiple of 3; give a divisor"):
        cut(config(micro_batch=3), BIOMASSTERS, 2)


def test_memory_is_estimated_from_above_and_not_by_far() -> None:
    recipe = config()
    need = memory_need(recipe, BIOMASSTERS)
    model = BiomassUNet(recipe.model.backbone, recipe.model.decoder_channels, BIOMASSTERS.channels).train()
    model.keep_less = False
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(torch.randn(1, 12, 15, 256, 256), torch.zeros(1, 12, dtype=torch.bool))
    measured = sum(storage.nbytes() for storage in kept.values())
    assert out.requires_grad and 0.6 * need.chip < measured <= 1.02 * need.chip
    assert need.fixed == 16 * sum(p.numel() for p in model.parameters())
    half = memory_need(config(precision="bf16"), BIOMASSTERS)
    assert half.fixed == need.fixed and half.chip == need.chip // 2


def test_what_is_said_of_batchnorm() -> None:
    whole, split = config(), config(micro_batch=2)
    assert explain(cut(whole, BIOMASSTERS, 1), whole) == \
        "a step: 16 chips = micro-batches of 16 × 1 accumulated × 1 rank"
    text = explain(cut(whole, BIOMASSTERS, 4), whole)
    assert text.startswith("a step: 16 chips = micro-batches of 4 × 1 accumulated × 4 ranks\nBatchNorm sees 4 chips")
    assert "one rank with memory for all would see 16" in text and "train.micro_batch: 4 gives the same losses" in text
    assert "BatchNorm" not in explain(cut(split, BIOMASSTERS, 4), split)  # the same at any world size


@pytest.mark.parametrize("launcher", [{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"},
                                      {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}])
def test_a_dry_run_says_the_cut_that_a_launcher_would_get(launcher: dict[str, str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    for key, value in launcher.items():
        monkeypatch.setenv(key, value)
    text = describe(config())
    assert explain(cut(config(), BIOMASSTERS, 4), config()) in text
    start = text.index("# DeepSpeed") + len("# DeepSpeed")
    derived = json.loads(text[start:text.index("\n# parameters")])
    assert (derived["train_batch_size"], derived["train_micro_batch_size_per_gpu"],
            derived["gradient_accumulation_steps"]) == (16, 4, 1)
