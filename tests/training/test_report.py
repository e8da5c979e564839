from __future__ import annotations

from typing import Any

import pytest

from tests.harness.ranks import run_ranks
from tests.harness.recipes import LATENT
from tests.training import saved_runs

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2 interleaved": (
        2,
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    ),
    "cp2": (2, {"context_parallel_size": 2}),
    "dp2": (2, {}),
}
EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 48, "moe_shared_expert_intermediate_size": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "experts": EXPERTS,
    "latent": LATENT,
    "latent, direct queries": {**LATENT, "q_lora_rank": None},
    "learnable softmax": {"softmax_type": "learnable"},
    "multi-token": {"mtp_num_layers": 2},
    "all": {**EXPERTS, **LATENT, "mtp_num_layers": 1},
}


def counted(overrides: dict[str, Any]) -> int:
    """The number of parameters in the header of a run."""
    from megatron_lightseq.training.reporting.report import num_parameters

    with saved_runs.built(overrides) as training:
        return num_parameters(training)


def listed(overrides: dict[str, Any]) -> int:
    """The number of parameters of the whole model on one rank."""
    with saved_runs.built(overrides) as training:
        return sum(parameter.numel() for parameter in training.models[0].parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_counted_once_on_every_layout(tied: bool) -> None:
    overrides = {"untie_embeddings_and_output_weights": not tied}
    expected = run_ranks(1, listed, overrides)[0]
    assert run_ranks(1, counted, overrides) == [expected]
    for name, (world_size, layout) in LAYOUTS.items():
        assert run_ranks(world_size, counted, {**overrides, **layout}) == [expected] * world_size, name


def test_experts_and_copied_embeddings_are_counted_once() -> None:
    overrides = VARIANTS["all"]
    expected = run_ranks(1, listed, overrides)[0]
    expert_ranks = {"expert_model_parallel_size": 2}
    layouts: list[tuple[int, dict[str, Any]]] = [
        (2, {**expert_ranks, "context_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
    ]
    for world_size, layout in layouts:
        assert run_ranks(world_size, counted, {**overrides, **layout}) == [expected] * world_size, layout


def flops(overrides: dict[str, Any]) -> tuple[float, float, float]:
    """FLOPs of a step: as reported, as counted by torch, and those that the reference kernel adds."""
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_lightseq.config.accounting import step_flops
    from megatron_lightseq.training.step import train_step
    from tests.megatron.runs import batches

    with saved_runs.built(overrides) as training:
        with FlopCounterMode(display=False) as counter:
            train_step(training, batches(training, 0))
        model, settings = training.config.model, training.config.training
        tokens = settings.seq_length * settings.global_batch_size
        layers = model.num_layers + (model.mtp_num_layers or 0)
        square = 2.0 * tokens * layers * settings.seq_length * model.num_attention_heads
        masked_half = 1.5 * square * (model.head_dim + model.value_head_dim)
        scores_again = square * model.head_dim
        told = step_flops(training.config, training.padded_vocab_size)
        return told, float(counter.get_total_flops()), masked_half + scores_again


@pytest.mark.parametrize("swiglu", [True, False])
def test_flops_are_those_that_torch_counts(swiglu: bool) -> None:
    """The reference kernel also computes the masked half of the scores, and recomputes the scores in backward."""
    told, counted_by_torch, on_top = run_ranks(1, flops, {"cp_kernel": "reference", "swiglu": swiglu})[0]
    assert told + on_top == counted_by_torch


@pytest.mark.parametrize("name", VARIANTS)
def test_flops_of_other_models_are_those_that_torch_counts(name: str) -> None:
    overrides = {"cp_kernel": "reference", **VARIANTS[name]}
    told, counted_by_torch, on_top = run_ranks(1, flops, overrides)[0]
    assert told + on_top == counted_by_torch
