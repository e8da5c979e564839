"""Experts train the same on any number of ranks. With Megatron's own routers and weights they would not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.megatron.runs import on_ranks, train

EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 48, "moe_aux_loss_coeff": 0.5, "train_iters": 3}
APART = {"expert_model_parallel_size": 2, "context_parallel_size": 2}


def megatrons_router() -> Callable[[], None]:
    """Megatron's behaviour: each rank scales its load balancing loss by its local number of tokens."""
    from megatron_lightseq.megatron.fixes import apply

    ours = apply.weigh_auxiliary_losses
    apply.weigh_auxiliary_losses = lambda model: 0
    return lambda: setattr(apply, "weigh_auxiliary_losses", ours)


def local_numbers() -> Callable[[], None]:
    """Experts are initialised by their local index on the rank."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megatron_lightseq.megatron.fixes import experts

    class Local(SequentialMLP):
        def __init__(self, *args: Any, weight_names: Any, **kwargs: Any) -> None:
            with weight_names.building_experts(0):
                super().__init__(*args, **kwargs)

    ours, experts.NamedExperts = experts.NamedExperts, Local  # type: ignore[misc]
    return lambda: setattr(experts, "NamedExperts", ours)


def test_experts_train_like_one_rank_and_with_megatrons_habits_they_would_not() -> None:
    single = on_ranks(1, train, EXPERTS)[0]
    for run in on_ranks(2, train, {**EXPERTS, **APART}):
        assert run.losses == pytest.approx(single.losses, rel=1e-5)
        assert run.grad_norms == pytest.approx(single.grad_norms, rel=1e-4)
        assert run.load_balancing_losses == pytest.approx(single.load_balancing_losses, rel=1e-5)
    for habit in (megatrons_router, local_numbers):
        run = on_ranks(2, train, {**EXPERTS, **APART}, habit)[0]
        assert run.grad_norms != pytest.approx(single.grad_norms, rel=1e-4), habit.__name__


def test_the_load_balancing_loss_counts() -> None:
    weighed, free = (on_ranks(1, train, {**EXPERTS, "moe_aux_loss_coeff": w})[0] for w in (0.5, 0.0))
    assert weighed.grad_norms[0] != pytest.approx(free.grad_norms[0], rel=1e-3)
    assert weighed.losses[0] == pytest.approx(free.losses[0], rel=1e-6), "it is not in the reported loss"
    assert free.load_balancing_losses == [None] * 3


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss"])
def test_the_load_balancing_loss_that_is_reported_is_1_where_experts_are_balanced(kind: str) -> None:
    """All tokens are routed to all experts. One layer belongs to multi-token prediction."""
    all_experts = {"moe_router_topk": 4, "moe_router_load_balancing_type": kind, "mtp_num_layers": 1}
    for run in on_ranks(2, train, {**EXPERTS, **all_experts, "pipeline_model_parallel_size": 2}):
        assert run.load_balancing_losses == pytest.approx([1.0] * 3, rel=1e-5)


# --- the weight of every auxiliary term -----------------------------------------------------------------------------

TERMS: dict[str, dict[str, Any]] = {
    "load balancing": {"moe_aux_loss_coeff": 0.5, "moe_router_load_balancing_type": "aux_loss"},
    "load balancing by sequence": {
        "moe_aux_loss_coeff": 0.5,
        "moe_router_load_balancing_type": "seq_aux_loss",
    },
    "load balancing over the global batch": {
        "moe_aux_loss_coeff": 0.5,
        "moe_router_load_balancing_type": "global_aux_loss",
    },
    "z-loss": {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.2},
    "several": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
        "moe_aux_loss_coeff": [0.3, 0.4],
        "moe_z_loss_coeff": 0.1,
    },
    "multi-token prediction": {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 1.0},
}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "micro-batches of 2": (1, {"micro_batch_size": 2}),
    "CP 2": (2, CP2),
    "CP 2, micro-batches of 2": (2, {**CP2, "micro_batch_size": 2}),
    "TP 2": (2, TP2),
    "EP 2 over DP 2": (2, {"expert_model_parallel_size": 2}),
    "DP 2, micro-batches of 2": (2, {"micro_batch_size": 2}),
    "PP 2": (2, {"pipeline_model_parallel_size": 2}),
    "TP 2 x CP 2": (4, {**TP2, **CP2}),
    "CP 2 x DP 2": (4, CP2),
}


def _one_step(
    term: dict[str, Any],
    layout: dict[str, Any],
    per_token: bool,
    same: bool,
    habit: Callable[[], Any] | None = None,
) -> tuple[float, float]:
    """Gradient norm and loss of one step. ``same``: all sequences are equal; ``habit``: reintroduces a fault."""
    from unittest.mock import patch

    from megatron_lightseq.training import setup

    translated = setup.transformer_config
    extra = {name: value for name, value in term.items() if name.startswith("moe")}

    def with_terms(*args: Any) -> Any:
        config = translated(*args)
        for name, value in extra.items():
            setattr(config, name, value)
        return config

    settings = {
        **EXPERTS,
        "moe_aux_loss_coeff": 0.0,
        "moe_router_load_balancing_type": "none",
        "calculate_per_token_loss": per_token,
        "train_iters": 1,
        **{name: value for name, value in term.items() if name.startswith("mtp")},
        **layout,
    }
    with patch.object(setup, "transformer_config", with_terms):
        run = train(settings, partial(_equal_sequences, same, habit))
    return run.grad_norms[0], run.losses[0]


def _equal_sequences(same: bool, habit: Callable[[], Any] | None) -> Callable[[], None]:
    """Give every rank and micro-batch the same sequence, without a loss mask."""
    from tests.megatron import runs

    original = runs.batches

    def batches(training: Any, step: int) -> Any:
        for batch in original(training, step):
            length = batch["tokens"].shape[1]
            row = (torch.arange(length + 1) * 3 % runs.VOCAB_SIZE)[None]
            micro = len(batch["tokens"])
            yield {
                **batch,
                "tokens": row[:, :-1].repeat(micro, 1),
                "labels": row[:, 1:].repeat(micro, 1),
                "loss_mask": torch.ones(micro, length),
            }

    if same:
        runs.batches = batches
    undo = habit() if habit is not None else None

    def undo_all() -> None:
        runs.batches = original
        if undo is not None:
            undo()

    return undo_all


def _depends_on_micro_batches(term: str, layout: dict[str, Any]) -> bool:
    """Whether a term is by definition a mean over a micro-batch or over the micro-batches so far."""
    changed = layout.get("micro_batch_size", 1) > 1
    return term in ("load balancing", "several") and changed


@pytest.mark.parametrize("per_token", [True, False], ids=["per token", "per micro-batch"])
@pytest.mark.parametrize("term", TERMS)
def test_every_auxiliary_term_weighs_the_same_on_any_number_of_ranks(term: str, per_token: bool) -> None:
    """Uses equal sequences if a term depends on the contents of a micro-batch, otherwise different ones."""
    expected = {same: on_ranks(1, _one_step, TERMS[term], {}, per_token, same)[0] for same in (True, False)}
    without = on_ranks(1, _one_step, {}, {}, per_token, False)[0]
    assert expected[False][0] != pytest.approx(without[0], rel=1e-2), "the term counts"
    for name, (size, layout) in LAYOUTS.items():
        over_all = (
            term == "load balancing over the global batch" and size * layout.get("micro_batch_size", 1) > 1
        )
        by_micro_batch = not per_token and ("DP" in name or "micro" in name)  # then tokens weigh unequally
        same = over_all or by_micro_batch or _depends_on_micro_batches(term, layout)
        for found in on_ranks(size, _one_step, TERMS[term], layout, per_token, same):
            assert found == pytest.approx(expected[same], rel=2e-5), name


@pytest.mark.parametrize(
    ("term", "size", "layout"),
    [
        ("load balancing", 2, CP2),
        ("z-loss", 2, CP2),
        ("load balancing by sequence", 1, {"micro_batch_size": 2}),
        ("load balancing over the global batch", 2, {}),
    ],
)
def test_with_megatrons_own_weights_they_would_not(term: str, size: int, layout: dict[str, Any]) -> None:
    same = term == "load balancing over the global batch"
    (expected,) = on_ranks(1, _one_step, TERMS[term], {}, True, same)
    found = on_ranks(size, _one_step, TERMS[term], layout, True, same, megatrons_router)[0]
    assert found[0] != pytest.approx(expected[0], rel=1e-3)


# --- padding --------------------------------------------------------------------------------------------------------


def _padded(kind: str, per_token: bool, size: int) -> torch.Tensor:
    """The router gradient of an auxiliary term alone, with mostly padding in the second half of the sequence."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_lightseq.megatron import adopt_layout, gpt_layer_spec, shard_batch
    from megatron_lightseq.megatron.cpu import platform as cpu_platform

    cpu_platform.activate()
    parallel_state.initialize_model_parallel(context_parallel_size=size, create_gloo_process_groups=False)
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        num_moe_experts=4,
        context_parallel_size=size,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.3,
        use_cpu_initialization=True,
        calculate_per_token_loss=per_token,
        moe_router_load_balancing_type=kind if kind != "z-loss" else "none",
        moe_aux_loss_coeff=0.5 if kind != "z-loss" else 0.0,
        moe_z_loss_coeff=0.5 if kind == "z-loss" else None,
    )
    model = GPTModel(config, gpt_layer_spec(config), 64, 16, position_embedding_type="rope")
    layout = adopt_layout(model)
    tokens = torch.arange(32).view(2, 16) * 5 % 64
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[0, 10:], padding[1, 13:] = True, True
    whole = {"tokens": tokens, "position_ids": torch.arange(16).expand(2, -1), "padding_mask": padding}
    shard = shard_batch(whole, layout, dist.get_rank())
    out = model(
        shard["tokens"],
        shard["position_ids"],
        None,
        labels=shard["tokens"],
        padding_mask=shard["padding_mask"],
    )
    (out.sum() * 0).backward()
    gradient: torch.Tensor = model.decoder.layers[0].mlp.router.weight.grad
    dist.all_reduce(gradient)
    parallel_state.destroy_model_parallel()
    return gradient


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "z-loss"])
def test_padding_counts_on_no_rank(kind: str, per_token: bool) -> None:
    (expected,) = on_ranks(1, _padded, kind, per_token, 1)
    assert expected.norm() > 1e-3
    for found in on_ranks(2, _padded, kind, per_token, 2):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# --- in other programs ----------------------------------------------------------------------------------------------


class Ranks:
    """A fake process group that only has a size."""

    def size(self) -> int:
        return 3


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("per_token", "weight"), [(True, 3 * 5), (False, 1)])
def test_routers_of_any_model_are_fixed_once(per_token: bool, weight: int) -> None:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    from megatron_lightseq.megatron import adopt_layout, gpt_layer_spec
    from megatron_lightseq.megatron.fixes.experts import weigh_auxiliary_losses

    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        num_moe_experts=2,
        moe_aux_loss_coeff=0.5,
        add_bias_linear=False,
        attention_dropout=0.0,
        calculate_per_token_loss=per_token,
    )
    model = GPTModel(config, gpt_layer_spec(config), 64, 16)
    adopt_layout(model)
    assert weigh_auxiliary_losses(model) == 0, "adopt_layout has done it"
    router = model.decoder.layers[0].mlp.router
    router.tp_cp_group = Ranks()
    router.eval().routing(
        torch.randn(5, 1, 2)
    )  # counts tokens; auxiliary losses are computed in training only
    loss = torch.tensor(0.7, requires_grad=True)
    activation = torch.zeros(5, 2, requires_grad=True)
    tracker = get_moe_layer_wise_logging_tracker()
    tracker.clear()
    attached = router.attach_and_log_load_balancing_loss(activation, 0.5, loss, "load", router.tp_cp_group)
    attached.sum().backward()
    assert loss.grad == weight
    assert tracker.pop("load")["values"].tolist() == [pytest.approx(1.4)], "logged without its coefficient"


# --- routing by local tokens ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "routing", [{"moe_expert_capacity_factor": 1.0}, {"moe_router_load_balancing_type": "sinkhorn"}]
)
def test_routing_by_local_tokens_is_refused_where_tokens_are_cut(routing: dict[str, Any]) -> None:
    from megatron_lightseq.errors import UnsupportedError
    from tests.megatron.test_core_attention import build, transformer_config

    config = transformer_config(num_moe_experts=2, add_bias_linear=False, **routing)
    build(config)
    for cut in ({"context_parallel_size": 2}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}):
        config = transformer_config(num_moe_experts=2, add_bias_linear=False, **routing)
        for name, value in cut.items():
            setattr(config, name, value)
        expected = (
            rf"{next(iter(routing))} = .* cut over ranks.* each rank would count its own tokens only.* Use "
        )
        with pytest.raises(UnsupportedError, match=expected):
            build(config)


# --- collectives ----------------------------------------------------------------------------------------------------


def _unequal_parts() -> tuple[list[float], list[float]]:
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    from megatron_lightseq.megatron.cpu import platform as cpu_platform

    cpu_platform.activate()
    rank, group = dist.get_rank(), dist.group.WORLD
    mine = torch.full((rank + 1, 2), float(rank))
    gathered = mappings._gather_along_first_dim(mine, group, [1, 2, 3])
    part = mappings._reduce_scatter_along_first_dim(gathered, group, [1, 2, 3])
    return gathered[:, 0].tolist(), part[:, 1].tolist()


def test_ranks_may_gather_and_scatter_unequal_parts() -> None:
    whole = [0.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    results = on_ranks(3, _unequal_parts)
    assert results == [(whole, [3.0 * rank] * (rank + 1)) for rank in range(3)]
