"""Adapters and frozen parameters: the same training on any ranks, and nothing else is trained."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.ranks import RankError
from tests.megatron.runs import on_ranks
from tests.megatron.tuned import Tuned, tune

LORA = {"lora_dim": 4, "lora_alpha": 8.0, "lr": 3e-2}
TARGETS = 4
LAYERS = 4

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp": (2, {"tensor_model_parallel_size": 2}),
    "tp sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "cp": (2, {"context_parallel_size": 2}),
    "cp 3": (3, {"context_parallel_size": 3}),
    "pp": (2, {"pipeline_model_parallel_size": 2}),
    "vpp": (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "dp sharded": (2, {"use_distributed_optimizer": True}),
    "tp sp cp": (
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2},
    ),
    "recomputed": (
        2,
        {
            "context_parallel_size": 2,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    "tiles": (
        2,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "mlp_tile_tokens": 16,
            "loss_tile_tokens": 16,
        },
    ),
}


@pytest.fixture(scope="module")
def alone() -> Tuned:
    """The adapters, trained by one process."""
    return on_ranks(1, tune, LORA)[0]


def test_only_adapters_are_trained(alone: Tuned) -> None:
    assert len(alone.changed) == 2 * TARGETS * LAYERS
    assert all("_lora." in name for name in alone.changed)
    # queries, keys and values 32 -> 64; output 32 -> 32; MLP 32 -> 2 * 64, 64 -> 32: dim * (inputs + outputs)
    expected = LAYERS * 4 * ((32 + 64) + (32 + 32) + (32 + 128) + (64 + 32))
    assert alone.trained == alone.in_optimizer == expected
    assert alone.losses[-1] < alone.losses[0] - 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_train_the_same_on_any_ranks(layout: str, alone: Tuned) -> None:
    ranks, overrides = LAYOUTS[layout]
    found = on_ranks(ranks, tune, {**LORA, **overrides})
    for each in found:
        assert each.losses == pytest.approx(alone.losses, rel=1e-5)
        assert each.grad_norms == pytest.approx(alone.grad_norms, rel=1e-4)
    assert {name for each in found for name in each.changed} == set(alone.changed)


def test_targets_alone_have_adapters() -> None:
    (found,) = on_ranks(1, tune, {**LORA, "lora_target_modules": ("linear_qkv",)})
    assert {name.split(".")[4] for name in found.changed} == {"linear_qkv_lora"}


def test_dropout_is_that_of_training_and_the_same_run_repeats(alone: Tuned) -> None:
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "lora_dropout": 0.5}
    first, again = (on_ranks(2, tune, {**LORA, **layout}) for _ in range(2))
    assert first[0].losses == first[1].losses == again[0].losses
    assert first[0].losses[0] == pytest.approx(alone.losses[0], rel=1e-5), "B is zero in the first step"
    assert first[0].losses[1:] != pytest.approx(alone.losses[1:], rel=1e-3)


FROZEN = {"frozen_parameters": ("embedding.*", "decoder.layers.[0-1].*"), "lr": 1e-2}


def test_frozen_parameters_stay_on_any_ranks() -> None:
    tied = {**FROZEN, "untie_embeddings_and_output_weights": False}
    (alone,) = on_ranks(1, tune, tied)
    assert {name.split(".")[2] for name in alone.changed if "layers" in name} == {"2", "3"}
    assert not any(name.startswith("embedding.") for name in alone.changed)
    for more in (
        {"pipeline_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ):
        patterns = (
            ("embedding.*", "decoder.layers.[0-1].mlp.*") if "pipeline_model_parallel_size" in more else None
        )
        same = {**tied, **({"frozen_parameters": patterns} if patterns else {})}
        (one,) = on_ranks(1, tune, same) if patterns else (alone,)
        found = on_ranks(2, tune, {**same, **more})
        assert found[-1].losses == pytest.approx(one.losses, rel=1e-5)
        assert {name for each in found for name in each.changed} == set(one.changed)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"frozen_parameters": ("encoder.*",)}, r"frozen_parameters with encoder\.\*: every pattern matches"),
        (
            {
                "frozen_parameters": ("embedding.*", "decoder.layers.[0-1].*"),
                "pipeline_model_parallel_size": 2,
            },
            "every pipeline stage trains at least one parameter",
        ),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RankError, match=message):
        on_ranks(2, tune, overrides)
