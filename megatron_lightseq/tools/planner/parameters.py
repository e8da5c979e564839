"""Numbers of parameters."""

from __future__ import annotations

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.config.accounting import layer_parameters


def rank_parameters(config: PretrainConfig, vocab_size: int) -> float:
    """Parameters of a rank of the last pipeline stage, which has an output layer; norms and biases do not count.

    Args:
        config: of the run.
        vocab_size: of the tokenizer.
    """
    parallel = config.parallel
    dense = experts = 0.0
    for number in range(1, config.model.num_layers + 1):
        of_layer, of_experts = layer_parameters(config, number)
        dense, experts = dense + of_layer, experts + of_experts
    output = config.model.hidden_size * vocab_size
    of_stage = dense / parallel.tensor_model_parallel_size
    of_stage += experts / (parallel.expert_tensor_size * parallel.expert_model_parallel_size)
    return of_stage / parallel.pipeline_model_parallel_size + output / parallel.tensor_model_parallel_size
