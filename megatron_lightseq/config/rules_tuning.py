"""Rules on adapters and frozen parameters."""

from __future__ import annotations

from dataclasses import fields

from megatron_lightseq.config.rules import Machine, RuleSet
from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.config.sections_tuning import TuningConfig

TUNING, TUNED_WEIGHTS = RuleSet(), RuleSet()

_LORA_KEYS = tuple(key.name for key in fields(TuningConfig) if key.name.startswith("lora_"))
_MLP_TARGETS = {"linear_fc1", "linear_fc2"}


@TUNING.rule(*_LORA_KEYS, remedy="Set lora_dim, for example to 16, or remove the other keys of LoRA")
def lora_keys_need_a_rank(c: PretrainConfig, _: Machine) -> bool:
    """lora_alpha, lora_dropout and lora_target_modules describe adapters, which exist if lora_dim is set."""
    default = TuningConfig()
    same = all(getattr(c.tuning, key) == getattr(default, key) for key in _LORA_KEYS)
    return c.tuning.lora_dim is not None or same


@TUNING.rule("lora_target_modules", remedy="Name one or several layers, each once")
def lora_targets_are_named_once(c: PretrainConfig, _: Machine) -> bool:
    """adapters need at least one target."""
    targets = c.tuning.lora_target_modules
    return 0 < len(targets) == len(set(targets))


@TUNING.rule(
    "lora_dim",
    "lora_target_modules",
    "num_experts",
    remedy="Set lora_target_modules to [linear_qkv, linear_proj]",
)
def experts_have_no_adapters(c: PretrainConfig, _: Machine) -> bool:
    """adapters of MLPs are for dense MLPs: experts have none."""
    if c.tuning.lora_dim is None or c.experts.num_experts is None:
        return True
    return not _MLP_TARGETS & set(c.tuning.lora_target_modules)


@TUNING.rule(
    "lora_dim",
    "multi_latent_attention",
    "mtp_num_layers",
    "experimental_attention_variant",
    remedy="Set lora_dim to null, and choose what is trained with frozen_parameters",
)
def adapters_are_for_softmax_attention(c: PretrainConfig, _: Machine) -> bool:
    """adapters are built for decoders with grouped-query attention: not for latent or linear attention, and not for
    layers of multi-token prediction.
    """
    if c.tuning.lora_dim is None:
        return True
    model = c.model
    others = model.multi_latent_attention or model.mtp_num_layers is not None
    return not others and c.linear.experimental_attention_variant is None


@TUNING.rule("lora_dim", "frozen_parameters", remedy="Remove frozen_parameters")
def adapters_freeze_the_rest(c: PretrainConfig, _: Machine) -> bool:
    """with lora_dim, everything but the adapters is frozen already."""
    return c.tuning.lora_dim is None or not c.tuning.frozen_parameters


@TUNED_WEIGHTS.rule(
    "lora_dim",
    "frozen_parameters",
    "load",
    "resume",
    remedy="Set load to a checkpoint and finetune to true",
)
def trained_parts_need_a_model(c: PretrainConfig, _: Machine) -> bool:
    """what is frozen must come from a checkpoint: random weights that are never trained are of no use."""
    partial = c.tuning.lora_dim is not None or bool(c.tuning.frozen_parameters)
    return not partial or c.checkpoint.load is not None or c.checkpoint.resume == "auto"
