"""All rules together."""

from __future__ import annotations

from megatron_lightseq.config.rules import Machine, Rule, broken, report
from megatron_lightseq.config.rules_model import BOUNDS, CONTEXT, MODEL, PARALLEL
from megatron_lightseq.config.rules_run import BATCH, CHECKPOINT, DATA, RECOMPUTE
from megatron_lightseq.config.rules_variants import EXPERTS, LATENT, MULTI_TOKEN, WINDOWS
from megatron_lightseq.config.sections import PretrainConfig

_OF_TRAINING = (MODEL, WINDOWS, LATENT, MULTI_TOKEN, EXPERTS, PARALLEL, CONTEXT, RECOMPUTE, BATCH)
RELATIONS = (*_OF_TRAINING, DATA, CHECKPOINT)


def rules() -> tuple[Rule, ...]:
    """Every rule, in the order in which reports list them."""
    return (*BOUNDS, *(rule for book in RELATIONS for rule in book))


def violations(config: PretrainConfig, machine: Machine | None = None) -> list[str]:
    """A message for every rule that the configuration breaks; rules that need unknown facts are not asked."""
    machine = machine or Machine()
    found = broken(config, machine, bounds=BOUNDS, relations=RELATIONS)
    return [rule.message(config, machine) for rule in found]


def validate(config: PretrainConfig, machine: Machine | None = None) -> None:
    """Raise ConfigError with every violated rule, its values and its remedy; return if there is none."""
    found = violations(config, machine)
    if found:
        raise report(found)


def validate_training(config: PretrainConfig, machine: Machine) -> None:
    """As :func:`validate`, but for rules on data and checkpoints: for programs that bring their own of either."""
    found = broken(config, machine, bounds=BOUNDS, relations=_OF_TRAINING)
    if found:
        raise report([rule.message(config, machine) for rule in found])
