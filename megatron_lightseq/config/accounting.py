"""The arithmetic of a step, counted from the configuration."""

from __future__ import annotations

from megatron_lightseq.config.sections import PretrainConfig


def step_flops(config: PretrainConfig, vocab_size: int) -> float:
    """Floating-point operations that one step needs over all ranks: forward and backward.

    Six for every weight of a matrix that a token meets (PaLM, arXiv 2204.02311, appendix B), of experts those it is
    routed to; and causal attention at half of its square. No recomputation, and no padding but the vocabulary's.

    Args:
        config: of the run.
        vocab_size: rows of the output layer.
    """
    model, training = config.model, config.training
    layer = _attention_weights(config) + _attention_products(config) + _mlp_weights(config)
    output = model.hidden_size * vocab_size
    further_tokens = model.mtp_num_layers or 0
    depth = 2 * model.hidden_size**2 + layer + output
    tokens = training.seq_length * training.global_batch_size
    return 6.0 * tokens * (model.num_layers * layer + output + further_tokens * depth)


def _attention_products(config: PretrainConfig) -> float:
    """Multiplications of queries by keys and of probabilities by values, for a token of mean position."""
    model = config.model
    return (
        config.training.seq_length / 2 * model.num_attention_heads * (model.head_dim + model.value_head_dim)
    )


def _attention_weights(config: PretrainConfig) -> int:
    """Weights of the projections around a layer's attention."""
    model = config.model
    heads, hidden = model.num_attention_heads, model.hidden_size
    out = heads * model.value_head_dim * hidden
    if not model.multi_latent_attention:
        return out + hidden * (heads + 2 * model.query_groups) * model.head_dim
    queries = hidden * heads * model.head_dim
    if model.q_lora_rank is not None:
        queries = model.q_lora_rank * (hidden + heads * model.head_dim)
    down = hidden * (model.kv_lora_rank + model.qk_pos_emb_head_dim)
    up = model.kv_lora_rank * heads * (model.qk_head_dim + model.v_head_dim)
    return queries + down + up + out


def _mlp_weights(config: PretrainConfig) -> int:
    """Weights that one token meets behind a layer's attention: the MLP, or the router and its choice of experts."""
    matrices = (3 if config.model.swiglu else 2) * config.model.hidden_size
    experts = config.experts
    if experts.num_experts is None:
        return matrices * config.model.ffn_size
    routed = experts.moe_router_topk * config.expert_ffn_size
    shared = experts.moe_shared_expert_intermediate_size or 0
    return matrices * (routed + shared) + config.model.hidden_size * experts.num_experts
