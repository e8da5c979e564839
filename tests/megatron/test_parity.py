"""One seed, one model: every parallel layout, method and kind of recomputation trains it in the same way.

fp32, five steps of AdamW, loss masks that differ between ranks: losses agree to 1e-5 relative, gradient norms to
1e-4 (issue 2, "What must hold").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.megatron.runs import Run, on_ranks, train

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ("core_attn",)}
CP2 = {"context_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP = {"num_layers_per_virtual_pipeline_stage": 1}
SHARDED_OPTIMIZER = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}

LAYOUTS = [
    pytest.param(1, {"cp_method": "megatron"}, id="megatron"),
    pytest.param(1, {"cp_method": "megatron", **FULL}, id="megatron-full"),
    pytest.param(2, {"cp_method": "megatron", **TP2, **SP}, id="megatron-tp2sp"),
    *[
        pytest.param(cp, {"context_parallel_size": cp, "cp_method": method}, id=f"cp{cp}-{method}")
        for cp in (2, 3, 4)
        for method in ("lightseq", "zigzag", "ring")
    ],
    pytest.param(2, {**CP2, "cp_method": "ring", "cp_layout": "striped"}, id="cp2-ring-striped"),
    pytest.param(2, {**CP2, "cp_overlap": False}, id="cp2-no-overlap"),
    pytest.param(1, FULL, id="full"),
    pytest.param(2, {**CP2, **FULL}, id="cp2-full"),
    pytest.param(2, {**CP2, **FULL, "keep_attention_on_recompute": False}, id="cp2-full-recomputed"),
    pytest.param(2, {**CP2, **BLOCK}, id="cp2-block"),
    pytest.param(2, {**CP2, **SELECTIVE}, id="cp2-selective"),
    pytest.param(2, TP2, id="tp2"),
    pytest.param(2, {**PP2, **VPP}, id="pp2vpp"),
    pytest.param(4, {**TP2, **CP2}, id="tp2-cp2"),
    pytest.param(4, {**TP2, **SP, **CP2}, id="tp2sp-cp2"),
    pytest.param(4, {**TP2, **SP, **CP2, **FULL, "cp_method": "zigzag"}, id="tp2sp-cp2-zigzag-full"),
    pytest.param(4, {**PP2, **CP2}, id="pp2-cp2"),
    pytest.param(4, {**PP2, **CP2, **FULL}, id="pp2-cp2-full"),
    pytest.param(4, {**PP2, **VPP, **CP2, **BLOCK}, id="pp2vpp-cp2-block"),
    pytest.param(4, CP2, id="dp2-cp2"),
    pytest.param(4, {**CP2, **SHARDED_OPTIMIZER, **FULL}, id="dp2-cp2-sharded-optimizer-full"),
    pytest.param(4, {**PP2, **CP2, **SHARDED_OPTIMIZER}, id="pp2-cp2-sharded-optimizer"),
    pytest.param(4, {**PP2, **VPP, **SHARDED_OPTIMIZER}, id="pp2vpp-dp2-sharded-optimizer"),
]


@pytest.fixture(scope="module")
def single() -> Run:
    """The run that all others must reproduce: one rank."""
    run: Run = on_ranks(1, train, {})[0]
    assert run.losses[-1] < run.losses[0] - 0.3, "it must learn, to detect wrong gradients"
    return run


def agree(run: Run, reference: Run) -> None:
    assert run.losses == pytest.approx(reference.losses, rel=1e-5, abs=0)
    assert run.grad_norms == pytest.approx(reference.grad_norms, rel=1e-4, abs=0)
    assert run.eval_loss == pytest.approx(reference.eval_loss, rel=1e-5, abs=0)
    assert run.num_tokens == reference.num_tokens


@pytest.mark.parametrize(("world_size", "overrides"), LAYOUTS)
def test_trains_like_one_rank(single: Run, world_size: int, overrides: dict[str, Any]) -> None:
    runs = on_ranks(world_size, train, overrides)
    for run in runs:
        agree(run, single)
    assert [run.losses for run in runs] == [runs[0].losses] * world_size


OTHER_MODELS = {
    "gpt2-like": {
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "swiglu": False,
        "add_bias_linear": True,
        "untie_embeddings_and_output_weights": True,
    },
    "qk-norm-multi-query": {"qk_layernorm": True, "num_query_groups": 1, "rotary_percent": 0.5},
}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param("gpt2-like", {**PP2, **CP2}, id="gpt2-pp2-cp2"),
        pytest.param("qk-norm-multi-query", {**PP2, **CP2, **FULL}, id="qk-norm-pp2-cp2-full"),
        pytest.param("qk-norm-multi-query", {**TP2, **CP2}, id="qk-norm-tp2-cp2"),  # fewer groups than ranks
    ],
)
def test_other_models_train_like_one_rank(model: str, layout: dict[str, Any]) -> None:
    overrides = OTHER_MODELS[model]
    reference = on_ranks(1, train, {**overrides, "cp_method": "megatron"})[0]
    for run in on_ranks(4, train, {**overrides, **layout}):
        agree(run, reference)


def test_average_of_averages_is_exact_too(single: Run) -> None:
    """Without calculate_per_token_loss each micro-batch has the same weight, regardless of the ranks' masks."""
    off = {"calculate_per_token_loss": False}
    reference = on_ranks(1, train, off)[0]
    assert reference.losses != pytest.approx(single.losses, rel=1e-5), "the two averages differ on this data"
    for layout in (CP2, {**PP2, **CP2}, {**CP2, "cp_method": "zigzag"}):
        agree(on_ranks(4, train, {**off, **layout})[0], reference)


def test_dropout_survives_recomputation() -> None:
    """The recomputed forward draws the same masks, also with the random states of tensor parallelism."""
    dropout = {**TP2, **SP, **CP2, "hidden_dropout": 0.2}
    agree(on_ranks(4, train, {**dropout, **FULL})[0], on_ranks(4, train, dropout)[0])


def test_bf16_stays_close_to_fp32(single: Run) -> None:
    for overrides in ({"bf16": True}, {"bf16": True, **CP2, **FULL}):
        run = on_ranks(overrides.get("context_parallel_size", 1), train, overrides)[0]
        assert run.losses == pytest.approx(single.losses, rel=5e-3)
        assert run.losses != pytest.approx(single.losses, rel=1e-7), "it must have computed in bf16"
        assert run.grad_norms == pytest.approx(single.grad_norms, rel=5e-2)


# --------------------------------------------------------------------------------------------------------------------
# The comparison above is only useful if it fails for typical bugs.
# --------------------------------------------------------------------------------------------------------------------


def megatron_rope() -> Callable[[], None]:
    """Keeps Megatron's RoPE, which is in zigzag order regardless of the attention."""
    from megatron_lightseq.layout import SequenceLayout
    from megatron_lightseq.megatron import rope

    angles = rope.LayoutRotaryEmbedding._angles

    def zigzag(self: Any, *args: Any) -> Any:
        self.layout = SequenceLayout.zigzag(self.layout.cp_size)
        return angles(self, *args)

    rope.LayoutRotaryEmbedding._angles = zigzag
    return lambda: setattr(rope.LayoutRotaryEmbedding, "_angles", angles)


def local_average_loss() -> Callable[[], None]:
    """Each context-parallel rank divides by its local number of tokens, as a naive loss function does."""
    from megatron_lightseq.training import step

    loss = step._loss

    def local(training: Any, loss_mask: Any, token_losses: Any) -> Any:
        _, _, report = loss(training, loss_mask, token_losses)
        return (token_losses * loss_mask).sum(), loss_mask.sum().int(), report

    step._loss = local
    return lambda: setattr(step, "_loss", loss)


def last_in_first_out() -> Callable[[], None]:
    """Recomputation of several layers in one checkpoint takes the attention output of another layer."""
    from megatron_lightseq.attention.stash import AttentionStash
    from megatron_lightseq.megatron.checkpoint_scope import CheckpointScope

    stash, pop = CheckpointScope.stash, AttentionStash.pop
    CheckpointScope.stash = lambda self, module: stash(
        self, None
    )  # one stash for all layers is correct in order
    AttentionStash.pop = lambda self, q_shape: self._kept.pop()

    def undo() -> None:
        CheckpointScope.stash, AttentionStash.pop = stash, pop

    return undo


def unmarked_norms() -> Callable[[], None]:
    """Norm weights without the attribute that makes their gradients be reduced over tensor-parallel ranks."""
    from megatron.core.distributed import finalize_model_grads

    reduce = finalize_model_grads._allreduce_non_tensor_model_parallel_grads
    finalize_model_grads._allreduce_non_tensor_model_parallel_grads = lambda *_: None
    return lambda: setattr(finalize_model_grads, "_allreduce_non_tensor_model_parallel_grads", reduce)


BUGS = [
    pytest.param(2, CP2, megatron_rope, id="rope-cut-zigzag"),
    pytest.param(
        2, {**CP2, "calculate_per_token_loss": False}, local_average_loss, id="loss-by-local-tokens"
    ),
    pytest.param(2, {**CP2, **FULL, "recompute_num_layers": 2}, last_in_first_out, id="stash-out-of-order"),
    pytest.param(2, {**TP2, **SP}, unmarked_norms, id="norm-gradients-not-reduced"),
]


@pytest.mark.parametrize(("world_size", "overrides", "bug"), BUGS)
def test_parity_fails_for(
    world_size: int, overrides: dict[str, Any], bug: Callable[[], Callable[[], None]], single: Run
) -> None:
    reference = single
    if "calculate_per_token_loss" in overrides:
        reference = on_ranks(1, train, {"calculate_per_token_loss": False})[0]
    agree(on_ranks(world_size, train, overrides)[0], reference)
    with pytest.raises(AssertionError):
        agree(on_ranks(world_size, train, overrides, bug)[0], reference)
