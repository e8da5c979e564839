from __future__ import annotations

from typing import Any

import pytest

from tests.harness.ranks import run_ranks
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


def counted(overrides: dict[str, Any]) -> int:
    """Parameters as the header of a run tells them."""
    from megatron_lightseq.training.report import num_parameters

    with saved_runs.built(overrides) as training:
        return num_parameters(training)


def listed(overrides: dict[str, Any]) -> int:
    """Parameters of a model that is all on one rank."""
    with saved_runs.built(overrides) as training:
        return sum(parameter.numel() for parameter in training.models[0].parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_counted_once_on_every_layout(tied: bool) -> None:
    overrides = {"untie_embeddings_and_output_weights": not tied}
    expected = run_ranks(1, listed, overrides)[0]
    assert run_ranks(1, counted, overrides) == [expected]
    for name, (world_size, layout) in LAYOUTS.items():
        assert run_ranks(world_size, counted, {**overrides, **layout}) == [expected] * world_size, name


def flops(overrides: dict[str, Any]) -> tuple[float, float, float]:
    """Flops of a step as we tell them, as torch counts them, and what the reference kernel does on top."""
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_lightseq.training.report import model_flops
    from megatron_lightseq.training.step import train_step
    from tests.megatron.runs import batches

    with saved_runs.built(overrides) as training:
        with FlopCounterMode(display=False) as counter:
            train_step(training, batches(training, 0))
        model, settings = training.config.model, training.config.training
        tokens = settings.seq_length * settings.global_batch_size
        width = model.num_attention_heads * model.head_dim
        product = 2.0 * tokens * model.num_layers * settings.seq_length * width  # one over the whole square
        masked_half, scores_again = 3.0 * product, product
        return model_flops(training), float(counter.get_total_flops()), masked_half + scores_again


@pytest.mark.parametrize("swiglu", [True, False])
def test_flops_are_those_that_torch_counts(swiglu: bool) -> None:
    """The reference kernel multiplies the masked half of the square as well, and the scores again in backward."""
    told, counted_by_torch, on_top = run_ranks(1, flops, {"cp_kernel": "reference", "swiglu": swiglu})[0]
    assert told + on_top == counted_by_torch
