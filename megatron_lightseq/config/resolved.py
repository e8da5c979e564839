"""What follows from a configuration, worked out once: its rules are checked, `auto` is replaced, schedules are built.

Everything after the start reads the one :class:`ResolvedConfig` that :func:`resolve` returns: the comparison between
ranks, the attention layers and the report all see the same methods and the same schedules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_lightseq.config.choices import AUTO, MEGATRON, method_of_comm_type
from megatron_lightseq.config.rules import Machine, RuleSet
from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.config.validate import ALL_RULES, validate
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import Problem, SchedulePair, TensorShape, rank_methods


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionKind:
    """The layers of a model whose attention has the same methods and the same mask."""

    layers: tuple[int, ...]
    """Their numbers, from 1; those of multi-token prediction follow the others."""
    schedules: SchedulePair


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedAttention:
    """How attention runs over the context parallel ranks, with nothing left open."""

    layout: SequenceLayout
    kinds: tuple[AttentionKind, ...]
    """One for every combination of methods and mask, in the order of their first layers."""

    def of_layer(self, number: int) -> SchedulePair | None:
        """The schedules of a layer, counted from 1; None for a layer that the configuration does not have."""
        return next((kind.schedules for kind in self.kinds if number in kind.layers), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedConfig:
    """A configuration that breaks no rule, with what follows from it; :func:`resolve` makes it."""

    config: PretrainConfig
    machine: Machine
    """What the rules were checked against."""
    attention: ResolvedAttention | None
    """None with `cp_method: megatron`, whose attention is not ours."""


def resolve(
    config: PretrainConfig,
    machine: Machine,
    *,
    rule_sets: Iterable[RuleSet] = ALL_RULES,
    checked: Machine | None = None,
) -> ResolvedConfig:
    """Check the rules and work out what follows from a configuration.

    Args:
        config: of the run.
        machine: what is known of it.
        rule_sets: the rules to check.
        checked: what was known when they were checked before; only those are checked that could not be then.

    Raises:
        ConfigError: every violated rule, its values and its remedy.
    """
    validate(config, machine, rule_sets=rule_sets, checked=checked)
    return ResolvedConfig(config=config, machine=machine, attention=resolve_attention(config))


def resolve_attention(config: PretrainConfig) -> ResolvedAttention | None:
    """Layout, methods and masks of a configuration whose rules hold; None with `cp_method: megatron`."""
    if config.context.cp_method == MEGATRON:
        return None
    name, fastest = _layout(config)
    layout = SequenceLayout(name, config.parallel.context_parallel_size)
    found: dict[tuple[str, Mask], SchedulePair] = {}
    layers: dict[tuple[str, Mask], list[int]] = {}
    for number in range(1, config.model.num_layers + (config.model.mtp_num_layers or 0) + 1):
        method, mask = method_of_layer(config, number), layer_mask(config, number)
        key = method, mask
        if key not in found:
            if method == AUTO and fastest is not None and fastest.problem.mask == mask:
                found[key] = fastest
            else:
                found[key] = _schedules(method, _problem(config, layout, mask))
        layers.setdefault(key, []).append(number)
    kinds = (AttentionKind(layers=tuple(layers[key]), schedules=found[key]) for key in found)
    return ResolvedAttention(layout=layout, kinds=tuple(kinds))


def _layout(config: PretrainConfig) -> tuple[str, SchedulePair | None]:
    """The name of the layout; where `auto` had to compare layouts, also the schedules it has chosen with it."""
    context, ranks = config.context, config.parallel.context_parallel_size
    if context.cp_method != AUTO or context.cp_layout != AUTO or ranks == 1:
        return context.layout_name, None
    mask = main_mask(config)
    best, *_ = rank_methods(
        ranks, attention_shape(config), config.training.seq_length, mask=mask, network=context.network
    )
    problem = _problem(config, SequenceLayout(best.layout, ranks), mask)
    return best.layout, SchedulePair.from_choice(best, problem)


def _schedules(method: str, problem: Problem) -> SchedulePair:
    return SchedulePair.fastest(problem) if method == AUTO else SchedulePair.of(method, problem)


def _problem(config: PretrainConfig, layout: SequenceLayout, mask: Mask) -> Problem:
    return Problem(
        layout=layout,
        mask=mask,
        seq_length=config.training.seq_length,
        shape=attention_shape(config),
        network=config.context.network,
        chunk=config.context.cp_invariant,
    )


def attention_shape(config: PretrainConfig) -> TensorShape:
    """The attention inputs of one rank and micro-batch."""
    tensor_ranks = config.parallel.tensor_model_parallel_size
    return TensorShape(
        batch=config.training.micro_batch_size,
        num_heads=max(1, config.model.num_attention_heads // tensor_ranks),
        num_query_groups=max(1, config.model.query_groups // tensor_ranks),
        head_dim=config.model.head_dim,
        v_head_dim=config.model.value_head_dim,
        element_bytes=2 if config.training.bf16 else 4,
    )


def main_mask(config: PretrainConfig) -> Mask:
    """The mask of the layers that see the fewest keys: a sliding window or chunks, if there are any."""
    return _mask(config, window=bool(config.model.window_size), chunked=True)


def layer_mask(config: PretrainConfig, number: int) -> Mask:
    """The mask of a layer, counted from 1; a pattern may exempt it from the window, and lack of RoPE from chunks."""
    return _mask(config, window=config.model.has_window(number), chunked=config.rope.is_in(number))


def _mask(config: PretrainConfig, *, window: bool, chunked: bool) -> Mask:
    mask, chunk = Mask.causal(), config.model.attention_chunk_size
    if window:
        mask &= Mask.window(*config.model.window_size)
    return mask & Mask.chunked(chunk) if chunk is not None and chunked else mask


def method_of_layer(config: PretrainConfig, number: int) -> str:
    """The method of a layer, counted from 1, as it was configured: it may be `auto`."""
    context = config.context
    if not context.cp_comm_type:
        return context.method_name
    comm_type = context.cp_comm_type[number - 1 if len(context.cp_comm_type) > 1 else 0]
    return method_of_comm_type(comm_type, context.method_name, context.cp_ulysses_size)
