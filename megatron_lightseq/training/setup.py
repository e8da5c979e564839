"""From a configuration to everything that a training step needs, built from megatron-core's own parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_lightseq.attention import AttentionStats
from megatron_lightseq.config import PretrainConfig, ResolvedConfig, resolve
from megatron_lightseq.config.sizes import ParallelSizes
from megatron_lightseq.config.validate import TRAINING_RULES
from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.megatron.batch import adopt_layout
from megatron_lightseq.megatron.cpu import platform as cpu_platform
from megatron_lightseq.megatron.fixes.apply import fix_model
from megatron_lightseq.megatron.fixes.experts import with_invariant_experts
from megatron_lightseq.megatron.fixes.torch_norms import extend_torch_norms
from megatron_lightseq.megatron.seeded_init import NamedTransformerLayer, WeightNames
from megatron_lightseq.megatron.sequence_slices import compute_in_slices
from megatron_lightseq.megatron.spec import gpt_layer_spec, mtp_block_spec
from megatron_lightseq.training.machine import this_machine
from megatron_lightseq.training.model_parts import finish_model
from megatron_lightseq.training.parallel_groups import ProcessGroups
from megatron_lightseq.training.trained_parts import check_trained, choose_trained
from megatron_lightseq.training.translate import optimizer_config, transformer_config, virtual_stages
from megatron_lightseq.transport.group import rank_in


@dataclass(kw_only=True, slots=True)
class Training:
    """A model ready to train: what :func:`build_training` returns and :func:`train_step` takes."""

    resolved: ResolvedConfig
    """The configuration, with what follows from it."""
    model_config: TransformerConfig
    """Megatron's view of the configuration."""
    chunks: list[DistributedDataParallel]
    """This rank's model: one chunk, or one per virtual pipeline stage."""
    optimizer: Any
    """A MegatronOptimizer."""
    scheduler: OptimizerParamScheduler
    """The learning rate schedule; ``num_steps`` is the number of optimizer steps taken."""
    groups: ProcessGroups
    collection: ProcessGroupCollection
    """Megatron's groups, among them ``dp_cp``, the data and context parallel ranks together."""
    sizes: ParallelSizes
    layout: SequenceLayout
    """Which context-parallel rank holds which tokens."""
    padded_vocab_size: int
    attention_stats: AttentionStats = field(default_factory=AttentionStats)
    """Attention forward passes, bytes and waiting time of this rank; not counted with ``cp_method: megatron``."""

    @property
    def config(self) -> PretrainConfig:
        """The configuration of the run."""
        return self.resolved.config

    @property
    def num_microbatches(self) -> int:
        """Micro-batches per step and data parallel rank."""
        training = self.config.training
        return training.global_batch_size // (training.micro_batch_size * self.sizes.data)

    @property
    def models(self) -> list[GPTModel]:
        """The chunks without their DDP and precision wrappers, as checkpoints store them."""
        return [gpt_model(chunk) for chunk in self.chunks]

    @property
    def device(self) -> torch.device:
        """The device that batches are moved to."""
        return model_device()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes losses."""
        return any(model.post_process for model in self.models)


def gpt_model(module: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DDP and precision wrappers."""
    inner: Any = module
    while not isinstance(inner, GPTModel):
        inner = inner.module
    return inner


def model_device() -> torch.device:
    """This process's GPU if CUDA is available, else the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def resolve_here(config: PretrainConfig | ResolvedConfig) -> ResolvedConfig:
    """Resolve a configuration on this machine, for programs that build it themselves and bring their own data.

    Args:
        config: of the run; one that is resolved already is returned as it is.

    Raises:
        ConfigError: torch.distributed is not initialised, there is no GPU and the CPU platform is not active, or the
            configuration breaks rules on the model, its sizes, recomputation or batches.
    """
    _check_world()
    if isinstance(config, ResolvedConfig):
        return config
    return resolve(config, this_machine(dist.get_world_size()), rule_sets=TRAINING_RULES)


def _check_world() -> None:
    if not dist.is_initialized():
        raise ConfigError(
            explain(
                got="torch.distributed uninitialised",
                rule="process groups are built over its world",
                remedy="Call torch.distributed.init_process_group first",
            )
        )
    if not torch.cuda.is_available() and not cpu_platform.is_active():
        raise ConfigError(
            explain(
                got="no CUDA device and no CPU platform",
                rule="megatron-core needs one of the two",
                remedy="Call megatron_lightseq.megatron.cpu.platform.activate() first",
            )
        )


def initialize_parallel(config: PretrainConfig | ResolvedConfig) -> ProcessGroups:
    """Build Megatron's process groups over the initialised ``torch.distributed`` world.

    Raises:
        ConfigError: as :func:`resolve_here`; or Megatron's groups exist already, with other sizes.
    """
    resolved = resolve_here(config)
    sizes = ParallelSizes.of(resolved.config, dist.get_world_size())
    parallel = resolved.config.parallel
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            sizes.tensor,
            sizes.pipeline,
            virtual_stages(resolved.config),
            context_parallel_size=sizes.context,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_size,
            distributed_timeout_minutes=math.ceil(parallel.distributed_timeout_minutes),
            high_priority_stream_groups=_urgent_groups(),
            create_gloo_process_groups=_gloo_groups_needed(),
        )
    groups = ProcessGroups.from_collection(ProcessGroupCollection.use_mpu_process_groups())
    groups.check(sizes)
    return groups


def _urgent_groups() -> list[str]:
    """Groups, by Megatron's names, whose NCCL kernels start before waiting blocks of other kernels.

    Attention blocks fill the GPU for milliseconds. At normal priority, the transfer for the next step of a ring would
    start when the last of them has a free multiprocessor.
    """
    return ["cp"] if dist.get_backend() == "nccl" else []


def _gloo_groups_needed() -> bool:
    """Whether Megatron needs gloo groups in addition, for checkpoints: of NCCL's backend alone."""
    return bool(dist.get_backend() == "nccl")


def pad_vocab_size(config: PretrainConfig, vocab_size: int) -> int:
    """The smallest multiple of ``make_vocab_size_divisible_by`` (and of TP) that holds the vocabulary.

    In Megatron-LM, padding takes part in the softmax, and the loss depends on it. Here it does not
    (:func:`megatron_lightseq.megatron.logits.finish_logits`).
    """
    multiple = math.lcm(config.model.make_vocab_size_divisible_by, config.parallel.tensor_model_parallel_size)
    return -(-vocab_size // multiple) * multiple


def build_training(
    config: PretrainConfig | ResolvedConfig,
    *,
    vocab_size: int,
    groups: ProcessGroups | None = None,
    stats: AttentionStats | None = None,
    layer_spec: ModuleSpec | None = None,
    weight_names: WeightNames | None = None,
) -> Training:
    """Model chunks, optimizer and learning rate schedule of this rank; the weights do not depend on parallelism.

    Args:
        config: of the run; resolved here (:func:`resolve_here`) if it is not yet.
        vocab_size: of the tokenizer; padded here.
        groups: from :func:`initialize_parallel`, which is called if they are not given.
        stats: where attention layers count; default: new counters.
        layer_spec: another layer specification (comparisons); default: :func:`gpt_layer_spec` of the configuration.
        weight_names: draws the initial weights; default: by the configuration's seed.

    Raises:
        ConfigError: as :func:`resolve_here`.
    """
    resolved = resolve_here(config)
    config = resolved.config
    groups = groups or initialize_parallel(resolved)
    sizes = ParallelSizes.of(config, dist.get_world_size())
    groups.check(sizes)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    if config.parallel.sequence_parallel or config.model.apply_layernorm_1p:
        extend_torch_norms()
    _seed_dropout(config, groups, collection)
    names = weight_names or WeightNames(config.training.seed)
    model_config = transformer_config(config, names)
    stats = stats or AttentionStats()
    padded_vocab_size = pad_vocab_size(config, vocab_size)
    spec = layer_spec or gpt_layer_spec(config, stats=stats, resolved=resolved.attention)
    spec = _named_layers(spec, names)
    models = [
        build_model(config, model_config, spec, padded_vocab_size, vp_stage, num_tokens=vocab_size).to(
            model_device()
        )
        for vp_stage in ([None] if virtual_stages(config) is None else range(virtual_stages(config) or 0))
    ]
    check_trained(config, models, model_device())
    layout = _adopt_layout(config, models)
    chunks = _wrap(config, model_config, models)
    optimizer = get_megatron_optimizer(
        optimizer_config(config), chunks, use_gloo_process_groups=_gloo_groups_needed()
    )
    _connect(config, model_config, chunks, optimizer)
    return Training(
        resolved=resolved,
        model_config=model_config,
        chunks=chunks,
        optimizer=optimizer,
        scheduler=_scheduler(config, optimizer),
        groups=groups,
        collection=collection,
        sizes=sizes,
        layout=layout,
        padded_vocab_size=padded_vocab_size,
        attention_stats=stats,
    )


def _seed_dropout(config: PretrainConfig, groups: ProcessGroups, collection: ProcessGroupCollection) -> None:
    """Seed dropout: different on ranks with different tokens or layers, equal on tensor parallel ranks."""
    seed = config.training.seed + 100 * rank_in(groups.pp) + 100_000 * rank_in(collection.dp_cp)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def _named_layers(spec: ModuleSpec, names: WeightNames) -> ModuleSpec:
    spec = with_invariant_experts(spec, names)
    return replace(spec, module=NamedTransformerLayer, params={**spec.params, "weight_names": names})


def build_model(
    config: PretrainConfig,
    model_config: TransformerConfig,
    spec: ModuleSpec,
    vocab_size: int,
    vp_stage: int | None = None,
    *,
    num_tokens: int | None = None,
) -> GPTModel:
    """One chunk of the model, on torch's default device.

    Args:
        config: of the run.
        model_config: Megatron's view of it.
        spec: of one layer.
        vocab_size: after padding.
        vp_stage: virtual pipeline stage; None without interleaving.
        num_tokens: the vocabulary before padding; default: there is no padding.
    """
    model = config.model
    is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    built = GPTModel(
        config=model_config,
        transformer_layer_spec=spec,
        vocab_size=vocab_size,
        max_sequence_length=model.max_position_embeddings or config.training.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=is_last,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        rope_scaling=config.rope.use_rope_scaling,
        rope_scaling_factor=config.rope.rope_scaling_factor,
        seq_len_interpolation_factor=config.rope.rotary_seq_len_interpolation_factor,
        mtp_block_spec=mtp_block_spec(spec, model.mtp_num_layers)
        if model.mtp_num_layers and is_last
        else None,
        vp_stage=vp_stage,
    )
    finish_model(config, built, vocab_size if num_tokens is None else num_tokens)
    choose_trained(config, built)
    compute_in_slices(
        built,
        config.recompute.mlp_tile_tokens,
        config.recompute.loss_tile_tokens,
        replays_value=not config.recomputes_single_layers,
    )
    return built


def _adopt_layout(config: PretrainConfig, models: list[GPTModel]) -> SequenceLayout:
    cp_size = config.parallel.context_parallel_size
    if config.context.cp_method != "megatron":
        return adopt_layout(models, packed=config.data.packed)
    for model in models:
        fix_model(model)
    return SequenceLayout.zigzag(cp_size) if cp_size > 1 else SequenceLayout.contiguous(1)


def _wrap(
    config: PretrainConfig, model_config: TransformerConfig, models: list[GPTModel]
) -> list[DistributedDataParallel]:
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    modules = [Float16Module(model_config, model) if config.training.bf16 else model for model in models]
    # Megatron overlaps only the first chunk's buckets: the other chunks' gradients are all ready at the end.
    return [
        DistributedDataParallel(model_config, ddp_config, module, disable_bucketing=index > 0)
        for index, module in enumerate(modules)
    ]


def _connect(
    config: PretrainConfig,
    model_config: TransformerConfig,
    chunks: list[DistributedDataParallel],
    optimizer: Any,
) -> None:
    """Tell Megatron's pipeline schedules how to scale, synchronise and finish gradients."""
    model_config.finalize_model_grads_func = finalize_model_grads
    model_config.grad_scale_func = optimizer.scale_loss
    if config.parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        model_config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]


def _scheduler(config: PretrainConfig, optimizer: Any) -> OptimizerParamScheduler:
    settings = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=settings.lr_decay_iters or config.training.train_iters,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=config.training.train_iters,
        wd_incr_style="constant",
        # A resumed run follows its own configuration; by default Megatron would silently keep the checkpoint's.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
