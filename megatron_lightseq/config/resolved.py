"""What `cp_method: auto` stands for in one configuration: predicted from its heads, ranks, dtype and length."""

from __future__ import annotations

from megatron_lightseq.config.flat import with_values
from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import Choice, Direction, TensorShape, rank_methods


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


def attention_mask(config: PretrainConfig) -> Mask:
    """What queries see: of windows, in the layers that have one."""
    size = config.model.window_size
    return Mask.causal() & Mask.window(*size) if size else Mask.causal()


def ranked(config: PretrainConfig) -> list[Choice]:
    """All choices for this configuration, best first; on its layout where it names one."""
    context = config.context
    layouts = None if context.cp_layout == "auto" else (context.cp_layout,)
    return rank_methods(
        config.parallel.context_parallel_size,
        attention_shape(config),
        config.training.seq_length,
        mask=attention_mask(config),
        network=context.network,
        layouts=layouts,
    )


def with_chosen_layout(config: PretrainConfig) -> PretrainConfig:
    """The configuration with the layout of the best choice, where both method and layout are left open.

    The method stays ``auto``: on that layout, attention makes the same choice for each direction.
    """
    context = config.context
    if context.cp_method != "auto" or context.cp_layout != "auto":
        return config
    if config.parallel.context_parallel_size == 1:
        return config
    return with_values(config, cp_layout=ranked(config)[0].layout)


def methods(config: PretrainConfig) -> dict[Direction, str]:
    """The method of each direction, with ``auto`` resolved on the configuration's layout."""
    if config.context.cp_method != "auto":
        return dict.fromkeys(Direction, config.context.method_name)
    best = ranked(with_values(config, cp_layout=config.context.layout_name))[0]
    return {Direction.FORWARD: best.forward.method, Direction.BACKWARD: best.backward.method}
