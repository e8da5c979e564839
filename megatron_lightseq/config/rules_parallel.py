"""Rules on the sizes of tensor, pipeline, sequence and data parallelism."""

from __future__ import annotations

from megatron_lightseq.config.rules import Machine, RuleSet
from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.config.sizes import ParallelSizes
from megatron_lightseq.errors import ConfigError

PARALLEL = RuleSet()


def data_parallel_size(c: PretrainConfig, m: Machine) -> int:
    """Data parallel ranks; 0 where the sizes do not fit the world, which has its own rule."""
    try:
        return ParallelSizes.of(c, m.world_size or 0).data
    except ConfigError:
        return 0


@PARALLEL.check(
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    needs="world_size",
)
def world_size_is_product(c: PretrainConfig, m: Machine) -> None:
    """The parallel sizes must divide the ranks."""
    ParallelSizes.of(c, m.world_size or 0)


@PARALLEL.rule(
    "num_attention_heads",
    "tensor_model_parallel_size",
    remedy="Use a tensor_model_parallel_size that divides {num_attention_heads}",
)
def heads_divide_by_tensor_parallel(c: PretrainConfig, _: Machine) -> bool:
    """tensor parallelism splits attention by heads: num_attention_heads must be a multiple of
    tensor_model_parallel_size.
    """
    return c.model.num_attention_heads % c.parallel.tensor_model_parallel_size == 0


@PARALLEL.rule(
    "num_query_groups",
    "tensor_model_parallel_size",
    remedy="Use num_query_groups {tensor_model_parallel_size} or a multiple of it",
)
def query_groups_fit_tensor_parallel(c: PretrainConfig, _: Machine) -> bool:
    """num_query_groups must be a multiple or a divisor of tensor_model_parallel_size."""
    groups, size = c.model.query_groups, c.parallel.tensor_model_parallel_size
    return groups % size == 0 or size % groups == 0


@PARALLEL.rule(
    "ffn_hidden_size",
    "hidden_size",
    "swiglu",
    "tensor_model_parallel_size",
    remedy="Set ffn_hidden_size to a multiple of {tensor_model_parallel_size}",
)
def ffn_divides_by_tensor_parallel(c: PretrainConfig, _: Machine) -> bool:
    """the width of the MLP must be a multiple of tensor_model_parallel_size."""
    if c.experts.num_experts is not None:  # the width of experts has its own rule
        return True
    return c.model.ffn_size % c.parallel.tensor_model_parallel_size == 0


@PARALLEL.rule(
    "num_layers",
    "pipeline_model_parallel_size",
    remedy="Use a num_layers that is a multiple of {pipeline_model_parallel_size}",
)
def layers_divide_by_pipeline(c: PretrainConfig, _: Machine) -> bool:
    """num_layers must be a multiple of pipeline_model_parallel_size."""
    return c.model.num_layers % c.parallel.pipeline_model_parallel_size == 0


@PARALLEL.rule(
    "num_layers_per_virtual_pipeline_stage",
    "pipeline_model_parallel_size",
    remedy="Set num_layers_per_virtual_pipeline_stage to null, or pipeline_model_parallel_size to 2 or more",
)
def virtual_pipeline_needs_pipeline(c: PretrainConfig, _: Machine) -> bool:
    """the interleaved pipeline schedule needs pipeline_model_parallel_size > 1."""
    return not c.parallel.virtual_pipeline or c.parallel.pipeline_model_parallel_size > 1


@PARALLEL.rule(
    "num_layers",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    remedy="Use a num_layers_per_virtual_pipeline_stage that fits at least twice into num_layers / "
    "{pipeline_model_parallel_size} without remainder, or null",
)
def layers_divide_by_virtual_stages(c: PretrainConfig, _: Machine) -> bool:
    """a pipeline stage must hold two or more virtual stages of equal size."""
    per_virtual = c.parallel.num_layers_per_virtual_pipeline_stage
    if per_virtual is None or c.parallel.pipeline_model_parallel_size == 1:
        return True
    per_stage = c.model.num_layers // c.parallel.pipeline_model_parallel_size
    return per_stage % per_virtual == 0 and per_stage >= 2 * per_virtual


@PARALLEL.rule(
    "num_layers_per_virtual_pipeline_stage",
    "pipeline_model_parallel_size",
    "micro_batch_size",
    "global_batch_size",
    "tensor_model_parallel_size",
    "context_parallel_size",
    needs="world_size",
    remedy="Raise global_batch_size to {pipeline_model_parallel_size} * micro_batch_size * data parallel size",
)
def virtual_pipeline_divides_micro_batches(c: PretrainConfig, m: Machine) -> bool:
    """the interleaved schedule needs a number of micro-batches per step that is a multiple of
    pipeline_model_parallel_size.
    """
    per_micro_batch = c.training.micro_batch_size * data_parallel_size(c, m)
    if not c.parallel.virtual_pipeline or per_micro_batch == 0:
        return True
    return c.training.global_batch_size // per_micro_batch % c.parallel.pipeline_model_parallel_size == 0


@PARALLEL.rule(
    "sequence_parallel",
    "tensor_model_parallel_size",
    remedy="Remove sequence_parallel, or set tensor_model_parallel_size to 2 or more",
)
def sequence_parallel_needs_tensor_parallel(c: PretrainConfig, _: Machine) -> bool:
    """sequence_parallel splits activations over the tensor parallel ranks, of which there must be two or more."""
    return not c.parallel.sequence_parallel or c.parallel.tensor_model_parallel_size > 1


@PARALLEL.rule(
    "sequence_parallel",
    "seq_length",
    "context_parallel_size",
    "tensor_model_parallel_size",
    remedy="Change seq_length to such a multiple",
)
def sequence_parallel_divides_seq_length(c: PretrainConfig, _: Machine) -> bool:
    """with sequence_parallel, seq_length must be a multiple of context_parallel_size * tensor_model_parallel_size."""
    shards = c.parallel.context_parallel_size * c.parallel.tensor_model_parallel_size
    return not c.parallel.sequence_parallel or c.training.seq_length % shards == 0


@PARALLEL.rule(
    "overlap_param_gather",
    "use_distributed_optimizer",
    "overlap_grad_reduce",
    remedy="Set both, or remove overlap_param_gather",
)
def param_gather_needs_sharding(c: PretrainConfig, _: Machine) -> bool:
    """overlap_param_gather gathers parameters that use_distributed_optimizer has sharded, and needs overlap_grad_reduce
    as well.
    """
    both = c.parallel.use_distributed_optimizer and c.parallel.overlap_grad_reduce
    return not c.parallel.overlap_param_gather or both


@PARALLEL.rule(
    "use_distributed_optimizer",
    "optimizer",
    remedy="Use optimizer adam, or remove use_distributed_optimizer",
)
def distributed_optimizer_is_adam(c: PretrainConfig, _: Machine) -> bool:
    """Megatron's distributed optimizer supports only Adam."""
    return not c.parallel.use_distributed_optimizer or c.optimizer.optimizer == "adam"


@PARALLEL.rule(
    "distributed_backend",
    needs="num_gpus",
    remedy="Set distributed_backend to auto or gloo",
)
def nccl_needs_gpus(c: PretrainConfig, m: Machine) -> bool:
    """nccl communicates between GPUs, and this host has none."""
    return c.parallel.distributed_backend != "nccl" or m.num_gpus != 0
