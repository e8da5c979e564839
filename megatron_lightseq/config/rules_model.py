"""Rules on numbers, the model and its parallel sizes.

A rule is a predicate named after what holds; the decorator carries its message.
"""

from __future__ import annotations

from megatron_lightseq.config.rules import Bound, Machine, RuleBook, bound_rule
from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.errors import ConfigError
from megatron_lightseq.schedule.network import NETWORKS

_COUNT = Bound(low=1)
_NOT_NEGATIVE = Bound(low=0)
_POSITIVE = Bound(low=0, open_low=True)
_PROBABILITY = Bound(low=0, high=1)

BOUNDS = RuleBook(
    bound_rule(key, bound)
    for bound, keys in {
        _COUNT: "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
        "max_position_embeddings rotary_base make_vocab_size_divisible_by tensor_model_parallel_size "
        "pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage context_parallel_size cp_ulysses_size "
        "recompute_num_layers mlp_tile_tokens loss_tile_tokens "
        "lr_decay_iters seq_length micro_batch_size global_batch_size train_iters "
        "eval_interval eval_iters log_interval vocab_size save_interval q_lora_rank kv_lora_rank qk_head_dim "
        "window_attn_skip_freq qk_pos_emb_head_dim v_head_dim mtp_num_layers num_experts moe_ffn_hidden_size "
        "moe_router_topk moe_shared_expert_intermediate_size expert_model_parallel_size expert_tensor_parallel_size",
        _NOT_NEGATIVE: "min_lr lr_warmup_iters weight_decay clip_grad num_workers mtp_loss_scaling_factor "
        "moe_aux_loss_coeff",
        _POSITIVE: "norm_epsilon init_method_std lr adam_eps distributed_timeout_minutes exit_duration_in_mins",
        _PROBABILITY: "attention_dropout hidden_dropout adam_beta1 adam_beta2",
        Bound(low=0, high=1, open_low=True, open_high=False): "rotary_percent",
        Bound(low=0, high=2**32): "seed",
    }.items()
    for key in keys.split()
)

MODEL, PARALLEL, CONTEXT = RuleBook(), RuleBook(), RuleBook()

_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def data_parallel_size(c: PretrainConfig, m: Machine) -> int:
    """Data parallel ranks; 0 where the world is no multiple of the model (which has a rule of its own)."""
    world_size = m.world_size or 0
    return 0 if world_size % c.parallel.model_parallel_size else world_size // c.parallel.model_parallel_size


# --- model ------------------------------------------------------------------------------------------------------


@MODEL.rule(
    "hidden_size",
    "num_attention_heads",
    "kv_channels",
    text="hidden_size must be a multiple of num_attention_heads unless kv_channels gives the head dimension",
    remedy="Use hidden_size in multiples of {num_attention_heads}, or set kv_channels",
)
def hidden_size_divides_by_heads(c: PretrainConfig, _: Machine) -> bool:
    given = c.model.kv_channels is not None or c.model.multi_latent_attention
    return given or c.model.hidden_size % c.model.num_attention_heads == 0


@MODEL.rule(
    "num_attention_heads",
    "num_query_groups",
    text="num_attention_heads must be a multiple of num_query_groups",
    remedy="Use num_query_groups that divides {num_attention_heads}",
)
def heads_divide_by_query_groups(c: PretrainConfig, _: Machine) -> bool:
    return c.model.num_attention_heads % c.model.query_groups == 0


@MODEL.rule(
    "hidden_size",
    "num_attention_heads",
    "kv_channels",
    "qk_pos_emb_head_dim",
    "rotary_percent",
    "position_embedding_type",
    text="RoPE turns pairs of dimensions: the head dimension (with latent attention qk_pos_emb_head_dim) times "
    "rotary_percent must be an even number",
    remedy="Use an even head dimension and a rotary_percent such as 1.0 or 0.5",
)
def rotary_dimension_is_even(c: PretrainConfig, _: Machine) -> bool:
    latent = c.model.multi_latent_attention
    turned = (c.model.qk_pos_emb_head_dim if latent else c.model.head_dim) * c.model.rotary_percent
    return c.model.position_embedding_type != "rope" or (int(turned) >= 2 and turned % 2 == 0)


@MODEL.rule(
    "seq_length",
    "max_position_embeddings",
    text="seq_length must not exceed max_position_embeddings",
    remedy="Set max_position_embeddings to null or to at least {seq_length}",
)
def positions_reach_seq_length(c: PretrainConfig, _: Machine) -> bool:
    longest = c.model.max_position_embeddings
    return longest is None or c.training.seq_length <= longest


# --- parallel sizes ---------------------------------------------------------------------------------------------


@PARALLEL.rule(
    *_SIZES,
    needs="world_size",
    text="the world size must be a multiple of the product of the parallel sizes",
    remedy="Start tensor * pipeline * context ranks, or a multiple, with torchrun --nproc-per-node",
)
def world_size_is_product(c: PretrainConfig, m: Machine) -> bool:
    return data_parallel_size(c, m) >= 1


@PARALLEL.rule(
    "num_attention_heads",
    "tensor_model_parallel_size",
    text="tensor parallelism shares whole heads: num_attention_heads must be a multiple of its size",
    remedy="Use tensor_model_parallel_size that divides {num_attention_heads}",
)
def heads_divide_by_tensor_parallel(c: PretrainConfig, _: Machine) -> bool:
    return c.model.num_attention_heads % c.parallel.tensor_model_parallel_size == 0


@PARALLEL.rule(
    "num_query_groups",
    "tensor_model_parallel_size",
    text="num_query_groups must be a multiple or a divisor of tensor_model_parallel_size",
    remedy="Use num_query_groups {tensor_model_parallel_size} or a multiple of it",
)
def query_groups_fit_tensor_parallel(c: PretrainConfig, _: Machine) -> bool:
    groups, size = c.model.query_groups, c.parallel.tensor_model_parallel_size
    return groups % size == 0 or size % groups == 0


@PARALLEL.rule(
    "ffn_hidden_size",
    "hidden_size",
    "swiglu",
    "tensor_model_parallel_size",
    text="the MLP's width must be a multiple of tensor_model_parallel_size",
    remedy="Set ffn_hidden_size to a multiple of {tensor_model_parallel_size}",
)
def ffn_divides_by_tensor_parallel(c: PretrainConfig, _: Machine) -> bool:
    if c.experts.num_experts is not None:  # which have a rule of their own
        return True
    return c.model.ffn_size % c.parallel.tensor_model_parallel_size == 0


@PARALLEL.rule(
    "num_layers",
    "pipeline_model_parallel_size",
    text="num_layers must be a multiple of pipeline_model_parallel_size",
    remedy="Use num_layers in multiples of {pipeline_model_parallel_size}",
)
def layers_divide_by_pipeline(c: PretrainConfig, _: Machine) -> bool:
    return c.model.num_layers % c.parallel.pipeline_model_parallel_size == 0


@PARALLEL.rule(
    "num_layers_per_virtual_pipeline_stage",
    "pipeline_model_parallel_size",
    text="the interleaved pipeline schedule needs pipeline_model_parallel_size > 1",
    remedy="Set num_layers_per_virtual_pipeline_stage to null, or pipeline_model_parallel_size to 2 or more",
)
def virtual_pipeline_needs_pipeline(c: PretrainConfig, _: Machine) -> bool:
    return not c.parallel.virtual_pipeline or c.parallel.pipeline_model_parallel_size > 1


@PARALLEL.rule(
    "num_layers",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    text="a pipeline stage must hold two or more virtual stages of equal size",
    remedy="Use num_layers_per_virtual_pipeline_stage that divides num_layers / {pipeline_model_parallel_size} "
    "at least twice, or null",
)
def layers_divide_by_virtual_stages(c: PretrainConfig, _: Machine) -> bool:
    per_virtual = c.parallel.num_layers_per_virtual_pipeline_stage
    if per_virtual is None or c.parallel.pipeline_model_parallel_size == 1:
        return True
    per_stage = c.model.num_layers // c.parallel.pipeline_model_parallel_size
    return per_stage % per_virtual == 0 and per_stage >= 2 * per_virtual


@PARALLEL.rule(
    "num_layers_per_virtual_pipeline_stage",
    "overlap_p2p_comm",
    text="the interleaved schedule is only exact with overlap_p2p_comm: without it several messages between two "
    "ranks share one batch, and Megatron-Core trains on wrong activations without an error",
    remedy="Set overlap_p2p_comm to true",
)
def virtual_pipeline_needs_overlap(c: PretrainConfig, _: Machine) -> bool:
    return not c.parallel.virtual_pipeline or c.parallel.overlap_p2p_comm


@PARALLEL.rule(
    "num_layers_per_virtual_pipeline_stage",
    "pipeline_model_parallel_size",
    "micro_batch_size",
    "global_batch_size",
    "tensor_model_parallel_size",
    "context_parallel_size",
    needs="world_size",
    text="the interleaved schedule needs micro-batches per step in multiples of pipeline_model_parallel_size",
    remedy="Raise global_batch_size to {pipeline_model_parallel_size} * micro_batch_size * data parallel size",
)
def virtual_pipeline_divides_micro_batches(c: PretrainConfig, m: Machine) -> bool:
    per_micro_batch = c.training.micro_batch_size * data_parallel_size(c, m)
    if not c.parallel.virtual_pipeline or per_micro_batch == 0:
        return True
    return c.training.global_batch_size // per_micro_batch % c.parallel.pipeline_model_parallel_size == 0


@PARALLEL.rule(
    "sequence_parallel",
    "tensor_model_parallel_size",
    text="sequence_parallel shares activations between tensor parallel ranks, of which there must be two or more",
    remedy="Remove sequence_parallel, or set tensor_model_parallel_size to 2 or more",
)
def sequence_parallel_needs_tensor_parallel(c: PretrainConfig, _: Machine) -> bool:
    return not c.parallel.sequence_parallel or c.parallel.tensor_model_parallel_size > 1


@PARALLEL.rule(
    "sequence_parallel",
    "seq_length",
    "context_parallel_size",
    "tensor_model_parallel_size",
    text="with sequence_parallel, seq_length must be a multiple of context_parallel_size * "
    "tensor_model_parallel_size",
    remedy="Change seq_length to such a multiple",
)
def sequence_parallel_divides_seq_length(c: PretrainConfig, _: Machine) -> bool:
    shards = c.parallel.context_parallel_size * c.parallel.tensor_model_parallel_size
    return not c.parallel.sequence_parallel or c.training.seq_length % shards == 0


@PARALLEL.rule(
    "overlap_param_gather",
    "use_distributed_optimizer",
    "overlap_grad_reduce",
    text="overlap_param_gather gathers what the distributed optimizer sharded and needs use_distributed_optimizer "
    "and overlap_grad_reduce",
    remedy="Set both, or remove overlap_param_gather",
)
def param_gather_needs_sharding(c: PretrainConfig, _: Machine) -> bool:
    both = c.parallel.use_distributed_optimizer and c.parallel.overlap_grad_reduce
    return not c.parallel.overlap_param_gather or both


@PARALLEL.rule(
    "use_distributed_optimizer",
    "optimizer",
    text="Megatron's distributed optimizer shards Adam only",
    remedy="Use optimizer adam, or remove use_distributed_optimizer",
)
def distributed_optimizer_is_adam(c: PretrainConfig, _: Machine) -> bool:
    return not c.parallel.use_distributed_optimizer or c.optimizer.optimizer == "adam"


@PARALLEL.rule(
    "distributed_backend",
    needs="num_gpus",
    text="nccl connects GPUs, and this host shows none",
    remedy="Set distributed_backend to auto or gloo",
)
def nccl_needs_gpus(c: PretrainConfig, m: Machine) -> bool:
    return c.parallel.distributed_backend != "nccl" or m.num_gpus != 0


# --- context parallelism ----------------------------------------------------------------------------------------


@CONTEXT.rule(
    "seq_length",
    "context_parallel_size",
    text="seq_length must be a multiple of context_parallel_size, for every rank holds an equal part",
    remedy="Change seq_length to a multiple of {context_parallel_size}",
)
def seq_length_divides_by_context_parallel(c: PretrainConfig, _: Machine) -> bool:
    return c.training.seq_length % c.parallel.context_parallel_size == 0


@CONTEXT.rule(
    "seq_length",
    "context_parallel_size",
    "cp_method",
    "cp_layout",
    text="the zigzag layout gives every rank two chunks: seq_length must be a multiple of 2 * context_parallel_size",
    remedy="Change seq_length to a multiple of 2 * {context_parallel_size}",
)
def seq_length_divides_by_zigzag(c: PretrainConfig, _: Machine) -> bool:
    size = c.parallel.context_parallel_size
    if c.context.layout_name != "zigzag" or c.training.seq_length % size:  # the latter has a rule of its own
        return True
    return c.training.seq_length % (2 * size) == 0


@CONTEXT.rule(
    "cp_method",
    "cp_layout",
    text="lightseq balances work over a contiguous layout",
    remedy="Set cp_layout to auto, or cp_method to ring or zigzag",
)
def lightseq_is_contiguous(c: PretrainConfig, _: Machine) -> bool:
    return c.context.cp_method != "lightseq" or c.context.layout_name == "contiguous"


@CONTEXT.rule(
    "cp_method",
    "cp_layout",
    text="the zigzag method is the ring on the zigzag layout",
    remedy="Set cp_layout to auto, or cp_method to ring",
)
def zigzag_is_zigzag(c: PretrainConfig, _: Machine) -> bool:
    return c.context.cp_method != "zigzag" or c.context.layout_name == "zigzag"


@CONTEXT.rule(
    "cp_network",
    "cp_method",
    text="cp_network describes the cluster to cp_method auto, which alone predicts",
    remedy="Remove it, or set cp_method to auto",
)
def network_is_for_auto(c: PretrainConfig, _: Machine) -> bool:
    return c.context.cp_network is None or c.context.cp_method == "auto"


@CONTEXT.rule(
    "cp_network",
    text=f"cp_network is one of {', '.join(NETWORKS)}, or numbers with units",
    remedy="Write link=450GB/s, latency=5us, ranks_per_node=8, nic=50GB/s, nic_latency=10us; only link is needed",
)
def network_is_known(c: PretrainConfig, _: Machine) -> bool:
    try:
        c.context.network  # noqa: B018 - parses
    except ConfigError:
        return False
    return True


@CONTEXT.rule(
    "cp_ulysses_size",
    "cp_method",
    "cp_comm_type",
    text="cp_ulysses_size says among how many ranks usp (Megatron's a2a+p2p) exchanges heads",
    remedy="Remove it, or set cp_method to usp",
)
def ulysses_size_is_for_usp(c: PretrainConfig, _: Machine) -> bool:
    used = c.context.cp_method == "usp" or "a2a+p2p" in c.context.cp_comm_type
    return used or c.context.cp_ulysses_size is None


@CONTEXT.rule(
    "cp_ulysses_size",
    "context_parallel_size",
    text="cp_ulysses_size ranks exchange heads: it must divide context_parallel_size",
    remedy="Set cp_ulysses_size to a divisor of {context_parallel_size}, or to null",
)
def ulysses_size_divides(c: PretrainConfig, _: Machine) -> bool:
    size = c.context.cp_ulysses_size
    return size is None or (size > 0 and c.parallel.context_parallel_size % size == 0)


@CONTEXT.rule(
    "cp_comm_type",
    "num_layers",
    text="cp_comm_type names one kind for all layers, or one for each",
    remedy="Give one value, or {num_layers}",
)
def comm_type_is_one_or_one_a_layer(c: PretrainConfig, _: Machine) -> bool:
    return len(c.context.cp_comm_type) in (0, 1, c.model.num_layers)


@CONTEXT.rule(
    "cp_comm_type",
    "cp_method",
    text="cp_comm_type chooses among methods of this package; cp_method megatron has its own",
    remedy="Remove cp_comm_type, or set cp_method to another method",
)
def comm_type_is_not_for_megatron(c: PretrainConfig, _: Machine) -> bool:
    return c.context.cp_method != "megatron" or not c.context.cp_comm_type


@CONTEXT.rule(
    "cp_method",
    "cp_kernel",
    text="rsa computes full rows of scores without a kernel",
    remedy="Set cp_kernel to auto, or cp_method to ring",
)
def rsa_has_no_kernel(c: PretrainConfig, _: Machine) -> bool:
    return c.context.cp_method != "rsa" or c.context.cp_kernel in ("auto", "reference")


@CONTEXT.rule(
    "cp_method",
    "cp_layout",
    text="cp_method megatron cuts sequences as Megatron does, zigzag",
    remedy="Set cp_layout to auto",
)
def megatron_method_is_zigzag(c: PretrainConfig, _: Machine) -> bool:
    return c.context.cp_method != "megatron" or c.context.layout_name == "zigzag"


@CONTEXT.rule(
    "cp_method",
    "context_parallel_size",
    needs="has_transformer_engine",
    text="cp_method megatron is Megatron's own attention, which has context parallelism in Transformer Engine only",
    remedy="Set context_parallel_size to 1, or cp_method to another method",
)
def megatron_method_needs_transformer_engine(c: PretrainConfig, m: Machine) -> bool:
    plain = c.context.cp_method == "megatron" and c.parallel.context_parallel_size > 1
    return not plain or m.has_transformer_engine is not False


@CONTEXT.rule(
    "cp_method",
    "attention_dropout",
    text="blockwise attention never holds the probabilities, and offers no dropout on them",
    remedy="Set attention_dropout to 0, or cp_method to megatron",
)
def attention_has_no_dropout(c: PretrainConfig, _: Machine) -> bool:
    return c.context.cp_method == "megatron" or c.model.attention_dropout == 0


_GPU_KERNELS = ("cuda", "flash_attn")


@CONTEXT.rule(
    "cp_kernel",
    needs="num_gpus",
    text="the kernels cuda and flash_attn run on a GPU, and this host shows none",
    remedy="Set cp_kernel to auto, cpu or sdpa",
)
def gpu_kernel_needs_gpus(c: PretrainConfig, m: Machine) -> bool:
    return c.context.cp_kernel not in _GPU_KERNELS or m.num_gpus != 0


@CONTEXT.rule(
    "cp_kernel",
    "bf16",
    text="the kernels cuda and flash_attn compute in 16 bits",
    remedy="Set bf16 to true, or cp_kernel to auto",
)
def gpu_kernel_takes_bf16(c: PretrainConfig, _: Machine) -> bool:
    return c.context.cp_kernel not in _GPU_KERNELS or c.training.bf16


@CONTEXT.rule(
    "cp_kernel",
    needs="has_flash_attn",
    text="the flash_attn kernel is the flash-attn package, which is not installed here",
    remedy="Install flash-attn, or set cp_kernel to auto",
)
def flash_attn_is_installed(c: PretrainConfig, m: Machine) -> bool:
    return c.context.cp_kernel != "flash_attn" or m.has_flash_attn is not False


@CONTEXT.rule(
    "cp_kernel",
    "cp_layout",
    "cp_method",
    text="striped layouts have causal tiles without their diagonal, which sdpa and flash_attn do not know",
    remedy="Set cp_layout to contiguous or zigzag, or cp_kernel to auto",
)
def kernel_knows_striped_tiles(c: PretrainConfig, _: Machine) -> bool:
    striped = c.context.layout_name == "striped" and c.parallel.context_parallel_size > 1
    return not striped or c.context.cp_kernel not in ("flash_attn", "sdpa")


@CONTEXT.rule(
    "cp_kernel",
    "distributed_backend",
    text="the cpu kernel reads host memory, and nccl moves GPU memory",
    remedy="Set cp_kernel to auto, or distributed_backend to gloo",
)
def cpu_kernel_is_not_nccl(c: PretrainConfig, _: Machine) -> bool:
    return c.context.cp_kernel != "cpu" or c.parallel.distributed_backend != "nccl"


@CONTEXT.rule(
    "cp_kernel",
    "cp_method",
    text="cp_method megatron uses Megatron's attention, which a kernel of ours cannot serve",
    remedy="Set cp_kernel to auto",
)
def megatron_method_has_no_kernel(c: PretrainConfig, _: Machine) -> bool:
    return c.context.cp_method != "megatron" or c.context.cp_kernel == "auto"
