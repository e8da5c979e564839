"""Hybrid models: programs of one's own with a pattern of layers, packed documents, recomputation, checkpoints."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lightseq.errors import ConfigError
from tests.megatron.runs import TINY, VOCAB_SIZE, batches, on_ranks, train

DELTA_NETS = {
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "optimizer": "sgd",  # Adam would divide rounding errors of the decays' gradients by themselves
    "lr": 0.1,
}
LINEAR = {
    "experimental_attention_variant": "linear",
    "linear_attention_freq": 2,
    "optimizer": "sgd",
    "lr": 0.1,
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PACKED = {"reset_attention_mask": True, "reset_position_ids": True}


def assert_same(expected: Any, found: Any) -> None:
    for one, other in zip(expected.losses, found.losses, strict=True):
        assert abs(one - other) <= 1e-5
    for one, other in zip(expected.grad_norms, found.grad_norms, strict=True):
        assert abs(one - other) <= 1e-4 * one
    assert abs(expected.eval_loss - found.eval_loss) <= 1e-5


@pytest.mark.parametrize("name", ["delta nets", "linear"])
def test_several_ranks_train_like_one(name: str) -> None:
    model = DELTA_NETS if name == "delta nets" else LINEAR
    alone = on_ranks(1, train, model)[0]
    for ranks, scan in ((2, "ring"), (3, "auto"), (4, "doubling")):
        values = {**model, "context_parallel_size": ranks, "cp_linear_scan": scan}
        assert_same(alone, on_ranks(ranks, train, values)[0])
    tensor = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2}
    assert_same(alone, on_ranks(4, train, {**model, **tensor})[0])
    pipeline = {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}
    assert_same(alone, on_ranks(4, train, {**model, **pipeline})[0])


def test_scan_and_kernel_of_a_recipe_reach_its_linear_layers() -> None:
    warnings.simplefilter("ignore")
    from megatron_lightseq.config import PretrainConfig, with_values
    from megatron_lightseq.megatron import gpt_layer_spec

    values = {**TINY, **LINEAR, "cp_linear_scan": "doubling", "cp_linear_kernel": "torch"}
    config = with_values(PretrainConfig(), **values)
    settings = gpt_layer_spec(config).params["choices"].linear.core_attention.params["settings"]
    assert (settings.scan, settings.kernel) == ("doubling", "torch")
    attention = settings.attention(None, normalize=True)
    assert (attention._scan, attention._kernel) == ("doubling", "torch")


def test_a_recomputed_layer_repeats_neither_attention_nor_its_scan() -> None:
    values = {**DELTA_NETS, **FULL, "context_parallel_size": 2}
    plain = on_ranks(2, train, {**DELTA_NETS, "context_parallel_size": 2})[0]
    kept = on_ranks(2, train, values)[0]
    again = on_ranks(2, train, {**values, "keep_attention_on_recompute": False})[0]
    assert_same(plain, kept)
    assert_same(plain, again)
    assert plain.forwards == kept.forwards == plain.layer_calls
    assert again.forwards == 2 * plain.layer_calls


def _own_losses(pattern: str, cp: int) -> list[float]:
    """Per-token losses of a GPTModel of one's own, gathered over its context-parallel ranks, and what it is made of."""
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_lightseq.megatron import adopt_layout, hybrid_block_spec, shard_batch
    from megatron_lightseq.megatron.cpu import platform
    from tests.megatron.test_gated_delta_net import layer_config

    platform.activate()
    parallel_state.initialize_model_parallel(context_parallel_size=cp)
    try:
        model_parallel_cuda_manual_seed(1)
        torch.manual_seed(5)
        config = layer_config(
            num_layers=len(pattern), context_parallel_size=cp, hidden_dropout=0.0, attention_dropout=0.0
        )
        model = GPTModel(config, hybrid_block_spec(config, pattern), 64, 48, position_embedding_type="rope")
        kinds = {"G": "LightSeqGatedDeltaNet", "L": "LinearCoreAttention", "*": "LightSeqCoreAttention"}
        for letter, layer in zip(pattern, model.decoder.layers, strict=True):
            mixer = layer.self_attention
            assert type(mixer if letter == "G" else mixer.core_attention).__name__ == kinds[letter]
        layout = adopt_layout(model)
        tokens = torch.randint(0, 64, (1, 49))
        batch = {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "position_ids": torch.arange(48)[None],
        }
        shard = shard_batch(batch, layout, parallel_state.get_context_parallel_rank())
        losses: list[float] = (
            model(shard["tokens"], shard["position_ids"], None, labels=shard["labels"]).flatten().tolist()
        )
        return losses
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("pattern", ["GGG*", "GL*G", "GG", "LL"])
def test_programs_of_ones_own_give_a_pattern(pattern: str) -> None:
    """Also where no layer has softmax attention."""
    (alone,) = on_ranks(1, _own_losses, pattern, 1)
    for ranks in (2, 3):
        found = [loss for part in on_ranks(ranks, _own_losses, pattern, ranks) for loss in part]
        assert found == pytest.approx(alone, abs=2e-5)


@pytest.mark.usefixtures("one_rank")
def test_patterns_and_layouts_that_do_not_fit_are_refused() -> None:
    from megatron_lightseq.config import ContextParallelConfig
    from megatron_lightseq.megatron import hybrid_block_spec
    from tests.megatron.test_gated_delta_net import layer_config

    for pattern in ("GGM*", ""):
        with pytest.raises(ConfigError, match=r"the layer pattern .*G \(gated delta net\)"):
            hybrid_block_spec(layer_config(), pattern)
    for context in (ContextParallelConfig(cp_method="zigzag"), ContextParallelConfig(cp_method="megatron")):
        with pytest.raises(ConfigError, match=r"linear layers next to cp_method .*Use cp_method lightseq"):
            hybrid_block_spec(layer_config(context_parallel_size=2), "G*", context=context)


# --- checkpoints ------------------------------------------------------------------------------------------------


def _saved_and_loaded(folder: str, save: dict[str, Any], load: dict[str, Any], saves: bool) -> list[float]:
    """Train and save, or load and train on; the losses of the steps."""
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state

    from megatron_lightseq.config import CheckpointConfig, PretrainConfig, with_values
    from megatron_lightseq.megatron.cpu import platform
    from megatron_lightseq.training.checkpoint.loading import load_checkpoint
    from megatron_lightseq.training.checkpoint.saving import save_checkpoint
    from megatron_lightseq.training.checkpoint.state import Position
    from megatron_lightseq.training.setup import build_training
    from megatron_lightseq.training.step import train_step

    platform.activate()
    values = {**TINY, **DELTA_NETS, **(save if saves else load)}
    training = build_training(with_values(PretrainConfig(), **values), vocab_size=VOCAB_SIZE)
    try:
        if not saves:
            load_checkpoint(training, Path(folder), CheckpointConfig(load=folder))
        first = 0 if saves else 2
        losses = [train_step(training, [batches(training, step)]).loss for step in range(first, first + 2)]
        if saves:
            save_checkpoint(training, Path(folder), Position(iteration=2, consumed_samples=8))
            losses += [train_step(training, [batches(training, step)]).loss for step in range(2, 4)]
        return losses
    finally:
        parallel_state.destroy_model_parallel()


def test_checkpoints_move_between_numbers_of_tensor_parallel_ranks() -> None:
    tp, cp = {"tensor_model_parallel_size": 2}, {"context_parallel_size": 2}
    with tempfile.TemporaryDirectory() as folder:
        saved = on_ranks(2, _saved_and_loaded, folder, tp, cp, True)[0]
        loaded = on_ranks(2, _saved_and_loaded, folder, tp, cp, False)[0]
    assert loaded == pytest.approx(saved[2:], abs=1e-5)
