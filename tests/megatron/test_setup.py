"""build_training: configurations that break a rule are refused, and a seed determines one model."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.errors import LightSeqError
from tests.megatron.runs import TINY, VOCAB_SIZE, on_ranks

REFUSED: list[Any] = [
    pytest.param(
        {"context_parallel_size": 3},
        r"context_parallel_size 3, world size 2: .*the world size must be a multiple.*torchrun",
        id="world-size",
    ),
    pytest.param(
        {"global_batch_size": 3},
        r"global_batch_size 3, micro_batch_size 1, .*a multiple of micro_batch_size \* data parallel size",
        id="batch",
    ),
    pytest.param(
        {"pipeline_model_parallel_size": 2, "num_layers": 3},
        r"num_layers 3, pipeline_model_parallel_size 2: .*Use a num_layers that is a multiple of 2",
        id="layers",
    ),
    pytest.param(
        {"context_parallel_size": 2, "cp_method": "megatron"},
        r"cp_method megatron, context_parallel_size 2, .*only with Transformer Engine\. .*choose another cp_method",
        id="baseline-with-cp",
    ),
    pytest.param(
        {"attention_dropout": 0.1, "num_layers": 0},
        r"2 problems in the configuration:\n1\. num_layers 0.*\n2\. .*attention_dropout 0\.1",
        id="several",
    ),
]
"""Configuration rules are checked here for programs that did not validate theirs. No corpus is required."""


def _build(overrides: dict[str, Any], activate: bool = True) -> Any:
    from megatron.core import parallel_state

    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from megatron_lightseq.training.setup import build_training

    if activate:
        cpu_platform.activate()
    else:
        cpu_platform.deactivate()
    try:
        build_training(with_values(PretrainConfig(), **{**TINY, **overrides}), vocab_size=VOCAB_SIZE)
    except LightSeqError as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
    return None


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_refuses_sizes_that_do_not_fit(overrides: dict[str, Any], message: str) -> None:
    for found in on_ranks(2, _build, overrides):
        assert re.search(message, found), found


def test_needs_a_platform_and_a_world() -> None:
    if torch.cuda.is_available():
        pytest.skip("runs on machines without a GPU")
    (message,) = on_ranks(1, _build, {}, False)
    assert re.search(r"no CUDA device and no CPU platform: .*cpu\.platform\.activate\(\)", message), message
    assert re.search(r"torch.distributed uninitialised: .*init_process_group", _build({})), "in this process"


def test_vocabulary_is_padded_alike_for_every_tensor_parallel_size() -> None:
    from megatron_lightseq.training.setup import pad_vocab_size

    def padded(vocab_size: int, **overrides: int) -> int:
        return pad_vocab_size(with_values(PretrainConfig(), **overrides), vocab_size)

    assert [padded(257, tensor_model_parallel_size=tp) for tp in (1, 2, 4, 8)] == [384] * 4
    assert padded(256) == 256
    assert padded(257, make_vocab_size_divisible_by=1, tensor_model_parallel_size=2) == 258


def _weights(overrides: dict[str, Any]) -> dict[str, torch.Tensor]:
    """This rank's weights, by their names in the whole model."""
    from megatron.core import parallel_state

    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from megatron_lightseq.training.setup import build_training

    cpu_platform.activate()
    training = build_training(with_values(PretrainConfig(), **{**TINY, **overrides}), vocab_size=VOCAB_SIZE)
    weights: dict[str, torch.Tensor] = {}
    for model in training.models:
        numbers = [layer.layer_number - 1 for layer in model.decoder.layers]
        for name, parameter in model.named_parameters():
            found = re.sub(r"layers\.(\d+)\.", lambda match: f"layers.{numbers[int(match[1])]}.", name)  # noqa: B023
            weights[found] = parameter.detach().clone()
    parallel_state.destroy_model_parallel()
    return weights


UNTIED = {"untie_embeddings_and_output_weights": True, "num_layers": 4}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"pipeline_model_parallel_size": 2}, id="pp2"),
        pytest.param(
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}, id="pp2vpp"
        ),
        pytest.param({"context_parallel_size": 2}, id="cp2"),
        pytest.param({"tensor_model_parallel_size": 2}, id="tp2"),
    ],
)
def test_a_seed_names_one_model(layout: dict[str, int]) -> None:
    (whole,) = on_ranks(1, _weights, UNTIED)
    parts = on_ranks(2, _weights, {**UNTIED, **layout})
    assert set().union(*parts) == set(whole)
    for name, weight in whole.items():
        shards = [part[name] for part in parts if name in part]
        if shards[0].shape == weight.shape:
            assert all(torch.equal(shard, weight) for shard in shards), name
        else:
            assert {tuple(row) for row in weight.flatten().view(-1, 4).tolist()} == {
                tuple(row) for shard in shards for row in shard.flatten().view(-1, 4).tolist()
            }, name


def test_layers_and_seeds_differ() -> None:
    (whole,) = on_ranks(1, _weights, UNTIED)
    (other,) = on_ranks(1, _weights, {**UNTIED, "seed": 7})
    first, second = (whole[f"decoder.layers.{i}.mlp.linear_fc1.weight"] for i in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(whole["embedding.word_embeddings.weight"], whole["output_layer.weight"])
    assert not torch.equal(first, other["decoder.layers.0.mlp.linear_fc1.weight"])
    assert first.std().item() == pytest.approx(TINY["init_method_std"], rel=0.1)
    projection = whole["decoder.layers.0.self_attention.linear_proj.weight"]
    assert projection.std().item() == pytest.approx(TINY["init_method_std"] / 8**0.5, rel=0.1)


def _dropout_draws(overrides: dict[str, Any]) -> tuple[float, float]:
    """The next random numbers of dropout, outside and inside tensor-parallel regions."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from megatron_lightseq.training.setup import build_training

    cpu_platform.activate()
    build_training(with_values(PretrainConfig(), **{**TINY, **overrides}), vocab_size=VOCAB_SIZE)
    outside = torch.rand(1).item()
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(1).item()
    parallel_state.destroy_model_parallel()
    return outside, inside


def test_dropout_differs_where_tokens_differ_and_agrees_where_they_are_shared() -> None:
    """Ranks 0 and 1 share tokens (TP), ranks 0 and 2 do not (CP)."""
    draws = on_ranks(4, _dropout_draws, {"tensor_model_parallel_size": 2, "context_parallel_size": 2})
    outside, inside = zip(*draws, strict=True)
    assert outside[0] == outside[1] != outside[2] == outside[3]
    assert len(set(inside)) == 4


@pytest.mark.parametrize(("backend", "urgent"), [("nccl", ["cp"]), ("gloo", [])])
def test_transfers_between_gpus_start_before_waiting_blocks(
    monkeypatch: pytest.MonkeyPatch, backend: str, urgent: list[str]
) -> None:
    """Megatron gives the NCCL communicators of these groups streams of high priority."""
    from megatron.core import parallel_state

    from megatron_lightseq.training import setup

    class Asked(Exception):
        pass

    def initialize(*_: object, **options: Any) -> None:
        raise Asked(options["high_priority_stream_groups"])

    assert 'get_nccl_options("cp", ' in inspect.getsource(parallel_state.initialize_model_parallel)
    monkeypatch.setattr(setup.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(setup.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(setup, "_check_world", lambda: None)
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: False)
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", initialize)
    with pytest.raises(Asked) as asked:
        setup.initialize_parallel(with_values(PretrainConfig(), **TINY))
    assert asked.value.args == (urgent,)
