"""Routing to many small experts, as DeepSeek does it: dense layers first, a shared expert, groups."""

from __future__ import annotations

from megatron_lightseq.convert.families.family import Keys
from megatron_lightseq.convert.fields import Fields


def fine_grained_keys(fields: Fields, *, experts: int, topk: int, dense: int, shared: int) -> Keys:
    """Widths and numbers of experts; arguments are a family's defaults for absent fields."""
    layers, width = fields.whole("num_hidden_layers"), fields.whole("moe_intermediate_size")
    first = min(fields.whole("first_k_dense_replace", dense), layers)
    for name in ("ep_size", "moe_layer_freq"):
        fields.expect(name, 1)
    keys: Keys = {
        "num_experts": fields.whole("n_routed_experts", experts),
        "moe_ffn_hidden_size": width,
        "moe_router_topk": fields.whole("num_experts_per_tok", topk),
        "moe_shared_expert_intermediate_size": width * fields.whole("n_shared_experts", shared),
        "moe_router_dtype": "fp32",
        **_balancing(fields),
    }
    if first:
        keys["moe_layer_freq"] = [0] * first + [1] * (layers - first)
    return keys


def sigmoid_routing_keys(
    fields: Fields, *, experts: int, topk: int, groups: int, topk_groups: int, scaling: float, dense: int
) -> Keys:
    """Sigmoid scores, with a bias that balances the load; arguments are defaults as in :func:`fine_grained_keys`."""
    fields.expect("scoring_func", "sigmoid")
    fields.expect("topk_method", "noaux_tc")
    fields.expect("norm_topk_prob", True)
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):
        fields.take(name, None)  # layers that transformers leaves out
    keys = fine_grained_keys(fields, experts=experts, topk=topk, dense=dense, shared=1)
    chosen = keys["moe_router_topk"]
    if chosen < 2:
        raise fields.refusal(
            "num_experts_per_tok", chosen, "the weights of two experts or more are normalised"
        )
    keys |= {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": fields.real("routed_scaling_factor", scaling),
    }
    return keys | group_keys(fields, chosen, rated_by=2, groups=groups, topk_groups=topk_groups)


def group_keys(fields: Fields, topk: int, *, rated_by: int, groups: int, topk_groups: int) -> Keys:
    """Group-limited routing.

    Args:
        fields: of the model.
        topk: experts of a token.
        rated_by: so many best experts of a group rate it in transformers; in Megatron topk / topk_group do.
        groups: default number of groups.
        topk_groups: default number of groups that a token's experts are chosen from.

    Raises:
        UnsupportedError: Megatron would rate the groups by other experts.
    """
    number, best = fields.whole("n_group", groups), fields.whole("topk_group", topk_groups)
    if number == best:  # all groups are chosen
        return {}
    if topk // best != rated_by:
        rule = f"groups are rated by their best {rated_by}, in recipes by num_experts_per_tok / topk_group"
        raise fields.refusal("topk_group", best, rule)
    return {"moe_router_num_groups": number, "moe_router_group_topk": best}


def _balancing(fields: Fields) -> Keys:
    """The auxiliary loss: over each sequence, or over the micro-batch."""
    coefficient = fields.real("aux_loss_alpha", fields.real("router_aux_loss_coef", 0.0))
    by_sequence = fields.flag("seq_aux", True)
    if not coefficient:
        return {"moe_router_load_balancing_type": "none"}
    kind = "seq_aux_loss" if by_sequence else "aux_loss"
    return {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": coefficient}
