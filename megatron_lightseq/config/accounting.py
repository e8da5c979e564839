"""Floating-point operations of a step, computed from the configuration."""

from __future__ import annotations

from megatron_lightseq.config.sections import PretrainConfig


def step_flops(config: PretrainConfig, vocab_size: int) -> float:
    """Floating-point operations that one step needs over all ranks, forward and backward.

    Six per token and matrix weight (PaLM, arXiv 2204.02311, appendix B), of experts only those the token is routed to,
    plus causal attention, which is half of the full square. Without recomputation, and without padding except that of
    the vocabulary.

    Args:
        config: of the run.
        vocab_size: rows of the output layer.
    """
    return 6.0 * _step_tokens(config) * _weights(config, vocab_size, _attention_products(config))


def hardware_flops(config: PretrainConfig, vocab_size: int) -> float:
    """Floating-point operations that one step executes over all ranks: :func:`step_flops` and recomputation.

    Recomputed are the layers and modules that the configuration names, and MLPs and losses computed in slices.

    Args:
        config: of the run.
        vocab_size: rows of the output layer.
    """
    return _executed_flops(config, vocab_size, _attention_products(config))


def linear_flops(config: PretrainConfig, vocab_size: int) -> float:
    """As :func:`hardware_flops`, without attention's products of queries by keys and probabilities by values."""
    return _executed_flops(config, vocab_size, 0.0)


def output_flops(config: PretrainConfig, vocab_size: int) -> float:
    """Of :func:`linear_flops`, those of the output layer, which the last pipeline stage executes."""
    factor = 8.0 if _is_sliced(config, config.recompute.loss_tile_tokens) else 6.0
    return factor * _step_tokens(config) * config.model.hidden_size * vocab_size


def layer_parameters(config: PretrainConfig, number: int) -> tuple[float, float]:
    """Weights of the matrices of a layer, counted from 1: those that every rank of a stage shares, and its experts'."""
    experts, model = config.experts, config.model
    dense = _attention_weights(config)
    if experts.num_experts is None or not experts.is_in(number):
        return dense + _mlp_weights_of(config, number), 0
    matrices = (3 if model.activation[1] else 2) * model.hidden_size
    dense += matrices * (experts.moe_shared_expert_intermediate_size or 0)
    return (
        dense + model.hidden_size * experts.num_experts,
        matrices * config.expert_ffn_size * experts.num_experts,
    )


def _step_tokens(config: PretrainConfig) -> int:
    return config.training.seq_length * config.training.global_batch_size


def _weights(config: PretrainConfig, vocab_size: int, products: float) -> float:
    """Multiplications per token of a forward pass, with ``products`` for attention in every layer."""
    model = config.model
    attention = _attention_weights(config) + products
    layer = attention + _mlp_weights(config)
    output = model.hidden_size * vocab_size
    further_tokens = model.mtp_num_layers or 0
    depth = 2 * model.hidden_size**2 + attention + _mlp_weights_of(config, model.num_layers) + output
    return model.num_layers * layer + output + further_tokens * depth


def _executed_flops(config: PretrainConfig, vocab_size: int, products: float) -> float:
    again = _recomputed_weights(config, products) + _sliced_weights(config, vocab_size)
    return _step_tokens(config) * (6.0 * _weights(config, vocab_size, products) + 2.0 * again)


def _recomputed_weights(config: PretrainConfig, products: float) -> float:
    """Multiplications per token that recomputed layers and modules repeat, with ``products`` for attention."""
    model, recompute = config.model, config.recompute
    products = 0.0 if _keeps_attention(config) else products
    layers, depths = model.num_layers, model.mtp_num_layers or 0
    if recompute.recompute_granularity == "selective":
        mlp = _mlp_weights(config) * ("mlp" in recompute.recompute_modules)
        return (layers + depths) * (products * ("core_attn" in recompute.recompute_modules) + mlp)
    if recompute.recompute_granularity is None:
        return 0.0
    if recompute.recompute_method == "block":
        of_chunk = config.parallel.num_layers_per_virtual_pipeline_stage
        of_chunk = of_chunk or layers // config.parallel.pipeline_model_parallel_size
        layers = layers // of_chunk * min(recompute.recompute_num_layers or 0, of_chunk)
    # Slices recompute their MLP in any case; a checkpoint of a single layer does not recompute it a second time.
    leaves_mlp = config.recomputes_single_layers and _is_sliced(config, recompute.mlp_tile_tokens)
    layer = _attention_weights(config) + products + (0 if leaves_mlp else _mlp_weights(config))
    return (layers + depths) * layer + depths * 2 * model.hidden_size**2


def _sliced_weights(config: PretrainConfig, vocab_size: int) -> float:
    """Multiplications per token that the backward pass of slices repeats."""
    model, recompute = config.model, config.recompute
    depths = model.mtp_num_layers or 0
    mlps = (model.num_layers + depths) * _mlp_weights(config)
    outputs = (1 + depths) * model.hidden_size * vocab_size
    return mlps * _is_sliced(config, recompute.mlp_tile_tokens) + outputs * _is_sliced(
        config, recompute.loss_tile_tokens
    )


def _keeps_attention(config: PretrainConfig) -> bool:
    return config.recompute.keep_attention_on_recompute and config.context.cp_method != "megatron"


def _is_sliced(config: PretrainConfig, slice_tokens: int | None) -> bool:
    """Whether a rank's micro-batch is longer than one slice."""
    training = config.training
    held = training.seq_length // config.parallel.context_parallel_size * training.micro_batch_size
    return slice_tokens is not None and held > slice_tokens


def _attention_products(config: PretrainConfig) -> float:
    """Multiplications per token of queries by keys and probabilities by values, averaged over positions and layers.

    In linear layers, of keys and queries by states: twice per head, and once more for what a gated delta net erases.
    """
    model, linear = config.model, config.linear
    states = 2 * model.num_attention_heads * model.head_dim * model.value_head_dim
    if linear.experimental_attention_variant == "gated_delta_net":
        states = 3 * linear.linear_num_value_heads * linear.linear_key_head_dim * linear.linear_value_head_dim
    heads = model.num_attention_heads * (model.head_dim + model.value_head_dim)
    layers = range(1, model.num_layers + 1)
    products = (states if linear.is_in(number) else heads * _seen_keys(config, number) for number in layers)
    return sum(products) / model.num_layers


def _seen_keys(config: PretrainConfig, number: int) -> float:
    """Keys that a query of a layer sees, averaged over positions."""
    model, length = config.model, config.training.seq_length
    if model.attention_chunk_size is not None and config.rope.is_in(number):
        length = min(length, model.attention_chunk_size)
    if not model.has_window(number):
        return length / 2
    window = min(model.window_size[0] + 1, length)
    return window - window**2 / (2 * length)


def _attention_weights(config: PretrainConfig) -> float:
    """Weights of the projections before and after attention, or of a gated delta net, averaged over layers."""
    model, linear = config.model, config.linear
    if linear.experimental_attention_variant != "gated_delta_net":
        return _softmax_weights(config)
    keys = linear.linear_num_key_heads * linear.linear_key_head_dim
    values = linear.linear_num_value_heads * linear.linear_value_head_dim
    projected = 2 * keys + 3 * values + 2 * linear.linear_num_value_heads
    delta_net = model.hidden_size * projected + linear.linear_conv_kernel_dim * (2 * keys + values)
    share = len(linear.layers(model.num_layers)) / model.num_layers
    return share * delta_net + (1 - share) * _softmax_weights(config)


def _softmax_weights(config: PretrainConfig) -> int:
    """Weights of the projections before and after the attention of one layer."""
    model = config.model
    heads, hidden = model.num_attention_heads, model.hidden_size
    out = heads * model.value_head_dim * hidden * (2 if model.attention_output_gate else 1)
    if not model.multi_latent_attention:
        return out + hidden * (heads + 2 * model.query_groups) * model.head_dim
    queries = hidden * heads * model.head_dim
    if model.q_lora_rank is not None:
        queries = model.q_lora_rank * (hidden + heads * model.head_dim)
    down = hidden * (model.kv_lora_rank + model.qk_pos_emb_head_dim)
    up = model.kv_lora_rank * heads * (model.qk_head_dim + model.v_head_dim)
    return queries + down + up + out


def _mlp_weights(config: PretrainConfig) -> float:
    """Weights per token of a layer's MLP, averaged over layers."""
    layers = range(1, config.model.num_layers + 1)
    return sum(_mlp_weights_of(config, number) for number in layers) / config.model.num_layers


def _mlp_weights_of(config: PretrainConfig, number: int) -> int:
    """Weights per token of one layer's MLP, or of its router and the experts that it chooses."""
    matrices = (3 if config.model.activation[1] else 2) * config.model.hidden_size
    experts = config.experts
    if experts.num_experts is None or not experts.is_in(number):
        return matrices * config.model.ffn_size
    routed = experts.moe_router_topk * config.expert_ffn_size
    shared = experts.moe_shared_expert_intermediate_size or 0
    return matrices * (routed + shared) + config.model.hidden_size * experts.num_experts
