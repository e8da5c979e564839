"""Rules on mixtures of experts."""

from __future__ import annotations

from dataclasses import fields

from megatron_lightseq.config.rules import Machine, RuleSet
from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.config.sections_experts import ExpertsConfig

EXPERTS = RuleSet()

_EXPERT_KEYS = tuple(field.name for field in fields(ExpertsConfig) if field.name != "num_experts")


@EXPERTS.rule(
    "num_experts",
    *_EXPERT_KEYS,
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    remedy="Set num_experts, or remove the other keys",
)
def expert_keys_need_experts(c: PretrainConfig, _: Machine) -> bool:
    """expert options require num_experts."""
    sizes = (c.parallel.expert_model_parallel_size, c.parallel.expert_tensor_parallel_size)
    return c.experts.num_experts is not None or (c.experts == ExpertsConfig() and sizes == (1, None))


@EXPERTS.rule(
    "moe_router_topk",
    "num_experts",
    remedy="Use a moe_router_topk of at most {num_experts}",
)
def topk_is_within_experts(c: PretrainConfig, _: Machine) -> bool:
    """a token is routed to moe_router_topk different experts."""
    return c.experts.num_experts is None or c.experts.moe_router_topk <= c.experts.num_experts


@EXPERTS.rule(
    "num_experts",
    "expert_model_parallel_size",
    remedy="Use a num_experts that is a multiple of {expert_model_parallel_size}",
)
def experts_divide_by_expert_parallel(c: PretrainConfig, _: Machine) -> bool:
    """num_experts must be a multiple of expert_model_parallel_size, because every rank holds whole experts."""
    experts = c.experts.num_experts
    return experts is None or experts % c.parallel.expert_model_parallel_size == 0


@EXPERTS.rule(
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    needs="world_size",
    remedy="Lower expert_model_parallel_size, or start more ranks",
)
def world_size_holds_experts(c: PretrainConfig, m: Machine) -> bool:
    """the world size must be a multiple of expert tensor (null: tensor) * expert model * pipeline parallel sizes."""
    if c.experts.num_experts is None or (m.world_size or 0) % c.parallel.model_parallel_size:
        return True  # the latter has its own rule
    return (m.world_size or 0) % c.parallel.expert_parallel_size == 0


@EXPERTS.rule(
    "expert_tensor_parallel_size",
    "tensor_model_parallel_size",
    "expert_model_parallel_size",
    remedy="Set expert_tensor_parallel_size to null, or expert_model_parallel_size to 2 or more",
)
def expert_copies_are_replicas(c: PretrainConfig, _: Machine) -> bool:
    """tensor parallel ranks that hold copies of an expert must be registered as its replicas, which Megatron's layers
    do only with expert_model_parallel_size > 1; otherwise the copies would drift apart.
    """
    same = c.parallel.expert_tensor_size == c.parallel.tensor_model_parallel_size
    return c.experts.num_experts is None or same or c.parallel.expert_model_parallel_size > 1


@EXPERTS.rule(
    "num_experts",
    "tensor_model_parallel_size",
    "sequence_parallel",
    remedy="Set sequence_parallel to true",
)
def experts_need_sequence_parallel(c: PretrainConfig, _: Machine) -> bool:
    """with tensor parallelism, the router sees every token exactly once only if sequence_parallel is on."""
    cut = c.parallel.tensor_model_parallel_size == 1 or c.parallel.sequence_parallel
    return c.experts.num_experts is None or cut


@EXPERTS.rule(
    "moe_ffn_hidden_size",
    "ffn_hidden_size",
    "expert_tensor_parallel_size",
    "tensor_model_parallel_size",
    remedy="Change moe_ffn_hidden_size to such a multiple",
)
def experts_divide_by_tensor_parallel(c: PretrainConfig, _: Machine) -> bool:
    """the width of an expert (moe_ffn_hidden_size, or ffn_hidden_size) must be a multiple of
    expert_tensor_parallel_size (null: tensor_model_parallel_size).
    """
    return c.experts.num_experts is None or c.expert_ffn_size % c.parallel.expert_tensor_size == 0


@EXPERTS.rule(
    "moe_shared_expert_intermediate_size",
    "tensor_model_parallel_size",
    remedy="Use a moe_shared_expert_intermediate_size that is a multiple of {tensor_model_parallel_size}",
)
def shared_expert_divides_by_tensor_parallel(c: PretrainConfig, _: Machine) -> bool:
    """the width of the shared expert must be a multiple of tensor_model_parallel_size."""
    width = c.experts.moe_shared_expert_intermediate_size
    return width is None or width % c.parallel.tensor_model_parallel_size == 0


@EXPERTS.rule(
    "num_experts",
    "add_bias_linear",
    "moe_shared_expert_intermediate_size",
    "expert_tensor_parallel_size",
    "tensor_model_parallel_size",
    remedy="Set add_bias_linear to false, or remove the shared expert and set expert_tensor_parallel_size to 1",
)
def expert_biases_are_added_once(c: PretrainConfig, _: Machine) -> bool:
    """Megatron's shared experts have no biases, and every rank that holds a part of an expert would add its bias."""
    if c.experts.num_experts is None or not c.model.add_bias_linear:
        return True
    return c.experts.moe_shared_expert_intermediate_size is None and c.parallel.expert_tensor_size == 1


@EXPERTS.rule(
    "num_experts",
    "moe_layer_freq",
    "num_layers",
    remedy="Put a 1 into moe_layer_freq, or remove num_experts",
)
def some_layer_has_experts(c: PretrainConfig, _: Machine) -> bool:
    """with num_experts at least one layer has experts."""
    layers = range(1, c.model.num_layers + 1)
    return c.experts.num_experts is None or any(c.experts.is_in(number) for number in layers)


@EXPERTS.rule(
    "moe_router_pre_softmax",
    "moe_router_topk",
    "moe_router_score_function",
    remedy="Set moe_router_pre_softmax to null or true",
)
def single_expert_has_a_weight(c: PretrainConfig, _: Machine) -> bool:
    """a softmax over a single chosen expert is always 1, and the router would not learn."""
    experts = c.experts
    after = experts.moe_router_score_function == "softmax" and experts.moe_router_pre_softmax is False
    return not (after and experts.moe_router_topk == 1)


@EXPERTS.rule(
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk",
    "num_experts",
    remedy="Set both, or neither",
)
def expert_groups_are_limited(c: PretrainConfig, _: Machine) -> bool:
    """group-limited routing needs moe_router_num_groups and moe_router_group_topk."""
    return (c.experts.moe_router_num_groups is None) == (c.experts.moe_router_group_topk is None)


@EXPERTS.rule(
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk",
    "num_experts",
    remedy="Use groups that divide num_experts, and a moe_router_topk that is a multiple of moe_router_group_topk",
)
def expert_groups_hold_the_chosen(c: PretrainConfig, _: Machine) -> bool:
    """a group is rated by its best moe_router_topk / moe_router_group_topk experts: moe_router_num_groups must divide
    num_experts, moe_router_group_topk groups must exist, and a group must hold as many experts.
    """
    experts, groups, chosen = c.experts, c.experts.moe_router_num_groups, c.experts.moe_router_group_topk
    if groups is None or chosen is None or experts.num_experts is None:
        return True  # these have their own rules
    rated, rest = divmod(experts.moe_router_topk, chosen)
    fits = experts.num_experts % groups == 0 and chosen <= groups
    return fits and rest == 0 and 1 <= rated <= experts.num_experts // groups


@EXPERTS.rule(
    "moe_router_enable_expert_bias",
    "moe_router_score_function",
    "moe_router_bias_update_rate",
    remedy="Set moe_router_enable_expert_bias to true with sigmoid scores, or remove both keys",
)
def expert_bias_needs_sigmoid(c: PretrainConfig, _: Machine) -> bool:
    """the bias of experts is added to sigmoid scores; moe_router_bias_update_rate belongs to it."""
    experts = c.experts
    if experts.moe_router_enable_expert_bias:
        return experts.moe_router_score_function == "sigmoid"
    return experts.moe_router_bias_update_rate == ExpertsConfig().moe_router_bias_update_rate


@EXPERTS.rule(
    "moe_apply_probs_on_input",
    "moe_router_topk",
    remedy="Set moe_router_topk to 1, or moe_apply_probs_on_input to false",
)
def input_has_one_weight(c: PretrainConfig, _: Machine) -> bool:
    """moe_apply_probs_on_input multiplies a token by the weight of its only expert."""
    return not c.experts.moe_apply_probs_on_input or c.experts.moe_router_topk == 1


@EXPERTS.rule(
    "moe_shared_expert_gate",
    "moe_shared_expert_intermediate_size",
    remedy="Set moe_shared_expert_intermediate_size, or moe_shared_expert_gate to false",
)
def shared_gate_has_an_expert(c: PretrainConfig, _: Machine) -> bool:
    """moe_shared_expert_gate is the gate of the shared expert."""
    gated = c.experts.moe_shared_expert_gate
    return not gated or c.experts.moe_shared_expert_intermediate_size is not None


@EXPERTS.rule(
    "moe_aux_loss_coeff",
    "moe_router_load_balancing_type",
    remedy="Set moe_router_load_balancing_type to aux_loss or seq_aux_loss, or moe_aux_loss_coeff to 0",
)
def aux_loss_has_a_type(c: PretrainConfig, _: Machine) -> bool:
    """moe_aux_loss_coeff weights a load balancing loss, which moe_router_load_balancing_type none lacks."""
    return c.experts.moe_aux_loss_coeff == 0 or c.experts.moe_router_load_balancing_type != "none"


@EXPERTS.rule(
    "moe_grouped_gemm",
    "num_experts",
    needs="has_transformer_engine",
    remedy="Set moe_grouped_gemm to false, or install transformer_engine on a machine with GPUs",
)
def grouped_gemm_needs_transformer_engine(c: PretrainConfig, m: Machine) -> bool:
    """the grouped GEMM over local experts comes from Transformer Engine, which is not available."""
    return not c.experts.moe_grouped_gemm or m.has_transformer_engine is not False


@EXPERTS.rule(
    "num_experts",
    "recompute_granularity",
    "recompute_modules",
    remedy="Remove mlp from recompute_modules, or use full recompute",
)
def experts_are_not_recomputed_as_mlp(c: PretrainConfig, _: Machine) -> bool:
    """Megatron ignores selective recompute of mlp in layers with experts."""
    asked = c.recompute.recompute_granularity == "selective" and "mlp" in c.recompute.recompute_modules
    return c.experts.num_experts is None or not asked
