"""Experts train the same on any number of ranks. With Megatron's own routers and weights they would not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import megatron.core
import pytest
import torch

from tests.megatron.runs import TINY, VOCAB_SIZE, batches, on_ranks, train

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
    for habit in (local_numbers,) if CORE_WEIGHS_CORRECTLY else (megatrons_router, local_numbers):
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

Term = dict[str, Any]
TERMS: dict[str, Term] = {
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
    "several, with multi-token prediction": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
        "moe_aux_loss_coeff": [0.3, 0.4],
        "moe_z_loss_coeff": 0.1,
        "mtp_num_layers": 1,
        "mtp_loss_scaling_factor": 1.0,
    },
}
NO_TERM: Term = {}
CORE_WEIGHS_CORRECTLY = int(megatron.core.__version__.split(".")[1]) >= 19
"""From 0.19 on, only the loss over the global batch needs a fix."""
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "micro-batches of 2": (1, {"micro_batch_size": 2}),
    "CP 2": (2, CP2),
    "CP 2, micro-batches of 2": (2, {**CP2, "micro_batch_size": 2}),
    "TP 2": (2, TP2),
    "EP 2 over DP 2": (2, {"expert_model_parallel_size": 2}),
    "EP 2 over CP 2": (2, {**CP2, "expert_model_parallel_size": 2}),
    "DP 2, micro-batches of 2": (2, {"micro_batch_size": 2}),
    "PP 2": (2, PP2),
    "TP 2 x CP 2": (4, {**TP2, **CP2}),
    "CP 2 x DP 2": (4, CP2),
    "PP 2 x CP 2": (4, {**PP2, **CP2}),
}


@dataclass(frozen=True)
class Case:
    """One step: an auxiliary term, how the loss is normalised, and whether all sequences are equal."""

    term: str
    per_token: bool
    same: bool

    def settings(self) -> Term:
        """What a configuration gets from it."""
        mtp = {name: value for name, value in self._term.items() if name.startswith("mtp")}
        return {"calculate_per_token_loss": self.per_token, **mtp}

    def extend(self, translated: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's configuration with the router's terms, of which recipes do not have all."""

        def with_terms(*args: Any) -> Any:
            config = translated(*args)
            for name, value in self._term.items():
                if name.startswith("moe"):
                    setattr(config, name, value)
            return config

        return with_terms

    @property
    def _term(self) -> Term:
        return TERMS_AND_ROUTING.get(self.term, NO_TERM)


Step = tuple[float, float]
"""Gradient norm and loss."""


def _steps(
    layout: dict[str, Any], cases: tuple[Case, ...], habit: Callable[[], Any] | None = None
) -> list[Step]:
    """One step of a new model for each case, in the same process groups; ``habit`` reintroduces a fault."""
    from megatron.core import parallel_state

    from megatron_lightseq.megatron.cpu import platform as cpu_platform

    warnings.simplefilter("ignore")
    cpu_platform.activate()
    undo = habit() if habit is not None else None
    groups: list[Any] = []
    try:
        return [_one_step(case, layout, groups) for case in cases]
    finally:
        parallel_state.destroy_model_parallel()
        if undo is not None:
            undo()


def _one_step(case: Case, layout: dict[str, Any], groups: list[Any]) -> Step:
    """``groups``: those of an earlier call, or empty."""
    from unittest.mock import patch

    from megatron_lightseq.config import PretrainConfig, with_values
    from megatron_lightseq.training import setup
    from megatron_lightseq.training.step import train_step

    flat = {
        **TINY,
        **EXPERTS,
        "num_layers": 2,
        "moe_aux_loss_coeff": 0.0,
        "moe_router_load_balancing_type": "none",
        **case.settings(),
        **layout,
    }
    config = with_values(PretrainConfig(), **flat)
    with patch.object(setup, "transformer_config", case.extend(setup.transformer_config)):
        training = setup.build_training(config, vocab_size=VOCAB_SIZE, groups=groups[0] if groups else None)
    groups[:] = [training.groups]
    read = _equal_sequences if case.same else batches
    result = train_step(training, [read(training, 0) for _ in training.chunks])
    return result.grad_norm, result.loss


def _equal_sequences(training: Any, step: int) -> Iterator[dict[str, torch.Tensor]]:
    """As ``batches``, but every rank and micro-batch reads the same sequence, without a loss mask."""
    for batch in batches(training, step):
        micro, length = batch["tokens"].shape
        row = (torch.arange(length + 1) * 3 % VOCAB_SIZE)[None]
        yield {
            **batch,
            "tokens": row[:, :-1].repeat(micro, 1),
            "labels": row[:, 1:].repeat(micro, 1),
            "loss_mask": torch.ones(micro, length),
        }


CASES = tuple(Case(*each) for each in product(("none", *TERMS), (True, False), (True, False)))


@cache
def on_one_rank() -> dict[Case, Step]:
    """Every case, in one process with micro-batches of one sequence."""
    return dict(zip(CASES, on_ranks(1, _steps, {}, CASES)[0], strict=True))


@pytest.mark.parametrize("term", TERMS)
def test_every_auxiliary_term_counts(term: str) -> None:
    for per_token in (True, False):
        with_term, without = (on_one_rank()[Case(name, per_token, False)] for name in (term, "none"))
        assert with_term[0] != pytest.approx(without[0], rel=1e-2)


def _same_sequences(term: str, layout: str, per_token: bool) -> bool:
    """Whether a term is comparable for equal sequences only, because of what it or the loss is a mean over."""
    size, settings = LAYOUTS[layout]
    micro = settings.get("micro_batch_size", 1)
    over_batch = term == "load balancing over the global batch" and size * micro > 1
    over_micro_batch = not term.startswith(("z-loss", "load balancing by sequence")) and micro > 1
    weighs_micro_batches_equally = not per_token and ("DP" in layout or micro > 1)
    return over_batch or over_micro_batch or weighs_micro_batches_equally


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_auxiliary_term_weighs_the_same_on_any_number_of_ranks(layout: str) -> None:
    """Uses equal sequences if a term depends on the contents of a micro-batch, otherwise different ones."""
    size, settings = LAYOUTS[layout]
    cases = tuple(
        Case(term, per_token, _same_sequences(term, layout, per_token))
        for term, per_token in product(TERMS, (True, False))
    )
    for steps in on_ranks(size, _steps, settings, cases):
        for case, found in zip(cases, steps, strict=True):
            assert found == pytest.approx(on_one_rank()[case], rel=2e-5), case


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
    if CORE_WEIGHS_CORRECTLY and term != "load balancing over the global batch":
        pytest.skip("this release of Megatron-Core weighs them correctly")
    case = Case(term, True, term == "load balancing over the global batch")
    ((found, _),) = on_ranks(size, _steps, layout, (case,), megatrons_router)[0]
    assert found != pytest.approx(on_one_rank()[case][0], rel=1e-3)


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

    from megatron_lightseq.megatron import adopt_layout, gpt_layer_spec
    from megatron_lightseq.megatron.fixes.experts import weigh_auxiliary_losses
    from megatron_lightseq.training.auxiliary_losses import router_losses

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
    router_losses().clear()
    attached = router.attach_and_log_load_balancing_loss(activation, 0.5, loss, "load", router.tp_cp_group)
    attached.sum().backward()
    assert loss.grad == weight
    logged = router_losses().pop("load")
    values = logged["values"] if isinstance(logged, dict) else logged.values  # an object from 0.18 on
    assert values.tolist() == [pytest.approx(1.4)], "logged without its coefficient"


# --- routing that counts tokens -------------------------------------------------------------------------------------

COUNTING: dict[str, Term] = {
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn"},
    "sinkhorn, two experts": {"moe_router_load_balancing_type": "sinkhorn", "moe_router_topk": 2},
    "capacity": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5}
    | {"moe_expert_capacity_factor": 0.6, "moe_token_drop_policy": "probs"},
}
TERMS_AND_ROUTING = {**TERMS, **COUNTING}


def local_counts() -> Callable[[], None]:
    """Each rank routes its own tokens as if there were no others."""
    from megatron_lightseq.megatron.fixes import apply

    ours = apply.route_whole_micro_batches
    apply.route_whole_micro_batches = lambda model: 0
    return lambda: setattr(apply, "route_whole_micro_batches", ours)


@pytest.mark.parametrize("routing", COUNTING)
def test_routing_counts_the_tokens_of_the_whole_micro_batch(routing: str) -> None:
    case = Case(routing, True, False)
    ((expected,),) = on_ranks(1, _steps, {}, (case,))
    for name in ("CP 2", "TP 2", "EP 2 over CP 2", "TP 2 x CP 2"):
        size, settings = LAYOUTS[name]
        for (found,) in on_ranks(size, _steps, settings, (case,)):
            assert found == pytest.approx(expected, rel=2e-5), name
    ((found,), _) = on_ranks(2, _steps, CP2, (case,), local_counts)
    assert found != pytest.approx(expected, rel=1e-4), "with Megatron's own counts it would not"


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "dropping", [{"moe_token_drop_policy": "position"}, {"moe_pad_expert_input_to_capacity": True}]
)
def test_dropping_by_rank_is_refused_where_tokens_are_cut(dropping: dict[str, Any]) -> None:
    from megatron_lightseq.errors import UnsupportedError
    from tests.megatron.test_core_attention import build, transformer_config

    given = {
        "num_moe_experts": 2,
        "add_bias_linear": False,
        "moe_token_dispatcher_type": "alltoall",
        "moe_expert_capacity_factor": 1.0,
        **dropping,
    }
    build(transformer_config(**given))
    for cut in (CP2, TP2):
        config = transformer_config(**given)
        for name, value in cut.items():
            setattr(config, name, value)
        expected = r"moe_expert_capacity_factor = 1.0 with .* each rank would count .* Use moe_token_drop_policy probs"
        with pytest.raises(UnsupportedError, match=expected):
            build(config)


def test_a_router_that_is_not_known_is_refused() -> None:
    assert on_ranks(2, _refuses_unknown_routers) == [True, True]


def _refuses_unknown_routers() -> bool:
    from types import SimpleNamespace

    import torch.distributed as dist
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_lightseq.errors import UnsupportedError
    from megatron_lightseq.megatron.fixes.routing import route_whole_micro_batches

    class Router(TopKRouter):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.tp_cp_group = dist.group.WORLD
            self.config = SimpleNamespace(
                moe_router_load_balancing_type="sinkhorn", moe_expert_capacity_factor=None
            )

        def sinkhorn_load_balancing(self, logits: torch.Tensor) -> Any:
            return logits

    with pytest.raises(UnsupportedError, match=r"a router without Megatron-Core's sinkhorn: .*0.16.1"):
        route_whole_micro_batches(Router())
    return True


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
