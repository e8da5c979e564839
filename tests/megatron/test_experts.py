"""Experts train alike on any number of ranks; what Megatron does by itself would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.megatron.runs import on_ranks, train

EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 48, "moe_aux_loss_coeff": 0.5, "train_iters": 3}
APART = {"expert_model_parallel_size": 2, "context_parallel_size": 2}


def megatrons_router() -> Callable[[], None]:
    """Each rank multiplies its share of the load balancing loss by its own tokens."""
    from megatron_lightseq.megatron.fixes import apply

    ours = apply.weigh_whole_batches
    apply.weigh_whole_batches = lambda model: 0
    return lambda: setattr(apply, "weigh_whole_batches", ours)


def local_numbers() -> Callable[[], None]:
    """Experts are drawn by their number on the rank."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megatron_lightseq.megatron.fixes import experts

    class Local(SequentialMLP):
        def __init__(self, *args: Any, weight_names: Any, **kwargs: Any) -> None:
            with weight_names.building_experts(0):
                super().__init__(*args, **kwargs)

    ours, experts.NamedExperts = experts.NamedExperts, Local  # type: ignore[misc]
    return lambda: setattr(experts, "NamedExperts", ours)


def test_experts_train_like_one_rank_and_megatrons_habits_would_not() -> None:
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
    assert weighed.losses[0] == pytest.approx(free.losses[0], rel=1e-6), "it is no part of what is reported"
    assert free.load_balancing_losses == [None] * 3


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss"])
def test_the_load_balancing_loss_that_is_reported_is_1_where_experts_are_balanced(kind: str) -> None:
    """All tokens take all experts; one layer is multi-token prediction's."""
    all_experts = {"moe_router_topk": 4, "moe_router_load_balancing_type": kind, "mtp_num_layers": 1}
    for run in on_ranks(2, train, {**EXPERTS, **all_experts, "pipeline_model_parallel_size": 2}):
        assert run.load_balancing_losses == pytest.approx([1.0] * 3, rel=1e-5)


class Ranks:
    """A process group as far as its size goes."""

    def size(self) -> int:
        return 3


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("per_token", "weight"), [(True, 3 * 5), (False, 1)])
def test_routers_of_any_model_are_mended_once(per_token: bool, weight: int) -> None:
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    from megatron_lightseq.megatron import adopt_layout, gpt_layer_spec
    from megatron_lightseq.megatron.fixes.experts import weigh_whole_batches

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
    assert weigh_whole_batches(model) == 0, "adopt_layout has done it"
    router = model.decoder.layers[0].mlp.router
    router.tp_cp_group = Ranks()
    loss = torch.tensor(0.7, requires_grad=True)
    activation = torch.zeros(5, 2, requires_grad=True)
    books = get_moe_layer_wise_logging_tracker()
    books.clear()
    attached = router.attach_and_log_load_balancing_loss(activation, 0.5, loss, "load", router.tp_cp_group)
    attached.sum().backward()
    assert loss.grad == weight
    assert books.pop("load")["values"].tolist() == [pytest.approx(1.4)], "logged without its coefficient"


def _uneven() -> tuple[list[float], list[float]]:
    import torch
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
    results = on_ranks(3, _uneven)
    assert results == [(whole, [3.0 * rank] * (rank + 1)) for rank in range(3)]
