"""Names people write: the nearest of ours, and Megatron-LM's arguments that we spell otherwise or lack."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or None when nothing is near."""
    by_spelling = {candidate.lower().replace("-", "_"): candidate for candidate in candidates}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), by_spelling, n=1, cutoff=0.5)
    return by_spelling[found[0]] if found else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelling:
    """What a Megatron-LM argument that is no key of ours means here: values for keys, or a refusal."""

    values: tuple[tuple[str, Any], ...] = ()
    """What it stands for, when given as a flag or as `true`."""
    needs: str | None = None
    """A key that must be given too; the argument itself then adds nothing."""
    refusal: str | None = None
    """Why it is refused and what to do instead."""


def _means(**values: Any) -> Spelling:
    return Spelling(values=tuple(values.items()))


def _refused(remedy: str) -> Spelling:
    return Spelling(refusal=remedy)


_FUSION = "Remove it: fusions are used where the machine has them"
_STEPS = "Count in steps of global_batch_size: "
_ROUTER = "Remove it: experts are chosen by the softmax of the router, without capacity limits or groups"
_FP8 = "Remove it: fp8 is not offered, use bf16"
_LOGS = "Remove it: reports go to tensorboard_dir and report_dir"
_RANKS = "Remove it: the size of the world comes from torchrun, and data parallel size is what remains of it"

MEGATRON_SPELLINGS: dict[str, Spelling] = {
    "disable_bias_linear": _means(add_bias_linear=False),
    "use_rotary_position_embeddings": _means(position_embedding_type="rope"),
    "recompute_activations": _means(recompute_granularity="selective"),
    "no_overlap_p2p_communication": _means(overlap_p2p_comm=False),
    "layernorm_epsilon": _refused("Use norm_epsilon"),
    "group_query_attention": Spelling(needs="num_query_groups"),
    "use_mcore_models": Spelling(),
    "attention_softmax_in_fp32": Spelling(),
    "no_position_embedding": _refused("Use position_embedding_type: rope or none"),
    "fp16": _refused("Use bf16, which needs no loss scaling"),
    "loss_scale": _refused("Remove it: bf16 needs no loss scaling"),
    "initial_loss_scale": _refused("Remove it: bf16 needs no loss scaling"),
    "fp8": _refused(_FP8),
    "fp8_format": _refused(_FP8),
    "train_samples": _refused(_STEPS + "use train_iters"),
    "lr_decay_samples": _refused(_STEPS + "use lr_decay_iters"),
    "lr_warmup_samples": _refused(_STEPS + "use lr_warmup_iters"),
    "lr_warmup_fraction": _refused(_STEPS + "use lr_warmup_iters"),
    "rampup_batch_size": _refused("Use a constant global_batch_size"),
    "exit_interval": _refused("Use train_iters, with lr_decay_iters for the schedule's length"),
    "exit_signal_handler": _refused("Remove it: SIGTERM and Ctrl-C always save and exit"),
    "num_virtual_stages_per_pipeline_rank": _refused("Use num_layers_per_virtual_pipeline_stage"),
    "use_flash_attn": _refused("Use cp_kernel: flash_attn, or auto for our own kernels"),
    "attention_backend": _refused("Use cp_kernel to choose the attention kernel"),
    "hierarchical_context_parallel_sizes": _refused(
        "Use cp_method: usp with cp_ulysses_size, the first of the two sizes"
    ),
    "transformer_impl": _refused("Remove it: Transformer Engine modules are used when it can be imported"),
    "spec": _refused("Use megatron_lightseq.gpt_layer_spec in a program of your own"),
    "use_cpu_initialization": _refused("Remove it: weights are initialised alike on every device"),
    "no_rope_fusion": _refused(_FUSION),
    "no_gradient_accumulation_fusion": _refused(_FUSION),
    "no_masked_softmax_fusion": _refused(_FUSION),
    "no_bias_gelu_fusion": _refused(_FUSION),
    "no_bias_swiglu_fusion": _refused(_FUSION),
    "no_bias_dropout_fusion": _refused(_FUSION),
    "no_persist_layer_norm": _refused(_FUSION),
    "cross_entropy_loss_fusion": _refused(_FUSION),
    "no_create_attention_mask_in_dataloader": _refused("Remove it: masks are never materialised"),
    "reset_position_ids": _refused("Remove it: packed documents attend to each other here"),
    "reset_attention_mask": _refused("Remove it: packed documents attend to each other here"),
    "squared_relu": _refused("Use swiglu, or no-swiglu for GELU"),
    "num_moe_experts": _refused("Use num_experts"),
    "moe_layer_freq": _refused("Remove it: every layer has experts"),
    "moe_expert_capacity_factor": _refused(_ROUTER),
    "moe_pad_expert_input_to_capacity": _refused(_ROUTER),
    "moe_router_score_function": _refused(_ROUTER),
    "moe_router_enable_expert_bias": _refused(_ROUTER),
    "moe_router_pre_softmax": _refused(_ROUTER),
    "moe_router_num_groups": _refused(_ROUTER),
    "moe_router_group_topk": _refused(_ROUTER),
    "moe_router_topk_scaling_factor": _refused(_ROUTER),
    "moe_input_jitter_eps": _refused("Remove it: routing is the same on any number of ranks"),
    "moe_z_loss_coeff": _refused("Use moe_aux_loss_coeff"),
    "moe_shared_expert_overlap": _refused("Remove it: the shared expert runs before the others"),
    "moe_permute_fusion": _refused(_FUSION),
    "rope_type": _refused("Remove it: latent attention is given plain RoPE"),
    "use_torch_fsdp2": _refused("Use use_distributed_optimizer"),
    "use_megatron_fsdp": _refused("Use use_distributed_optimizer"),
    "data_parallel_size": _refused(_RANKS),
    "world_size": _refused(_RANKS),
    "mock_data": _refused(
        "Use `lightseq prepare-data --output PREFIX` (the Python standard library) and data_path"
    ),
    "train_data_path": _refused("Use data_path with split"),
    "valid_data_path": _refused("Use data_path with split"),
    "test_data_path": _refused("Use data_path with split"),
    "vocab_file": _refused("Use tokenizer_type: hf with tokenizer_model, a `tokenizers` JSON file"),
    "merge_file": _refused("Use tokenizer_type: hf with tokenizer_model, a `tokenizers` JSON file"),
    "padded_vocab_size": _refused("Use vocab_size with make_vocab_size_divisible_by"),
    "ckpt_format": _refused("Remove it: checkpoints are written in Megatron's torch_dist format"),
    "async_save": _refused("Remove it: checkpoints are written synchronously"),
    "no_save_optim": _refused("Use no_load_optim when loading"),
    "no_save_rng": _refused("Use no_load_rng when loading"),
    "use_checkpoint_args": _refused("Remove it: a checkpoint of another model is refused by name"),
    "wandb_project": _refused(_LOGS),
    "log_throughput": _refused(_LOGS),
    "log_params_norm": _refused(_LOGS),
    "timing_log_level": _refused(_LOGS),
    "tensorboard_log_interval": _refused("Use log_interval"),
}
"""Arguments of Megatron-LM that are no key of ours, by their name with underscores."""
