"""All rules together."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_lightseq.config.rules import Machine, Rule, RuleSet, find_violations, report
from megatron_lightseq.config.rules_attention import ACTIVATIONS, LAYERS, SCORES
from megatron_lightseq.config.rules_context import CONTEXT
from megatron_lightseq.config.rules_experts import EXPERTS
from megatron_lightseq.config.rules_health import HEALTH
from megatron_lightseq.config.rules_linear import LINEAR
from megatron_lightseq.config.rules_model import BOUNDS, MODEL
from megatron_lightseq.config.rules_packed import PACKED
from megatron_lightseq.config.rules_parallel import PARALLEL
from megatron_lightseq.config.rules_rope import ROPE
from megatron_lightseq.config.rules_run import BATCH, CHECKPOINT, DATA, LOGGING, RECOMPUTE
from megatron_lightseq.config.rules_tuning import TUNED_WEIGHTS, TUNING
from megatron_lightseq.config.rules_variants import LATENT, MULTI_TOKEN, WINDOWS
from megatron_lightseq.config.sections import PretrainConfig

CONTEXT_RULES: tuple[RuleSet, ...] = (CONTEXT,)
"""For programs that bring their own model, data and checkpoints."""
DATA_RULES: tuple[RuleSet, ...] = (DATA,)
"""For programs that only prepare data."""
TRAINING_RULES = (
    MODEL,
    ACTIVATIONS,
    LAYERS,
    WINDOWS,
    ROPE,
    SCORES,
    LATENT,
    MULTI_TOKEN,
    EXPERTS,
    LINEAR,
    PARALLEL,
    CONTEXT,
    RECOMPUTE,
    BATCH,
    PACKED,
    TUNING,
)
"""For programs that bring their own data and checkpoints."""
ALL_RULES = (*TRAINING_RULES, *DATA_RULES, CHECKPOINT, TUNED_WEIGHTS, HEALTH, LOGGING)


def rules() -> tuple[Rule, ...]:
    """Every rule, in the order in which reports list them."""
    return (*BOUNDS, *(rule for rule_set in ALL_RULES for rule in rule_set))


def violations(
    config: PretrainConfig,
    machine: Machine | None = None,
    *,
    rule_sets: Iterable[RuleSet] = ALL_RULES,
    checked: Machine | None = None,
) -> list[str]:
    """A message for every rule that the configuration breaks; rules that need unknown facts are skipped.

    Args:
        config: to check.
        machine: what is known of it; default: nothing.
        rule_sets: rules to check besides the bounds of single numbers.
        checked: what was known when the same rules were checked before: only those are checked that could not be then.
    """
    return find_violations(config, machine or Machine(), bounds=BOUNDS, relations=rule_sets, checked=checked)


def validate(
    config: PretrainConfig,
    machine: Machine | None = None,
    *,
    rule_sets: Iterable[RuleSet] = ALL_RULES,
    checked: Machine | None = None,
) -> None:
    """Raise ConfigError with every violated rule, its values and its remedy; arguments as in :func:`violations`."""
    found = violations(config, machine, rule_sets=rule_sets, checked=checked)
    if found:
        raise report(found)
