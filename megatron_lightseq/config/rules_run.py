"""Rules on recompute, optimizer, batch, data, checkpoints and logging."""

from __future__ import annotations

import math

from megatron_lightseq.config.rules import Machine, RuleSet
from megatron_lightseq.config.rules_parallel import data_parallel_size
from megatron_lightseq.config.sections import LoggingConfig, PretrainConfig

RECOMPUTE, BATCH, DATA, CHECKPOINT, LOGGING = RuleSet(), RuleSet(), RuleSet(), RuleSet(), RuleSet()

BYTE_VOCABULARY = 257
"""Tokens of the byte tokenizer: 256 bytes and end-of-document."""


# --- recompute --------------------------------------------------------------------------------------------------


@RECOMPUTE.rule(
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    remedy="Set recompute_method to uniform and recompute_num_layers to 1",
)
def full_recompute_names_layers(c: PretrainConfig, _: Machine) -> bool:
    """full recompute needs recompute_method and recompute_num_layers, which select the layers."""
    named = c.recompute.recompute_method is not None and c.recompute.recompute_num_layers is not None
    return c.recompute.recompute_granularity != "full" or named


@RECOMPUTE.rule(
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    remedy="Set recompute_granularity to full, or both to null",
)
def layers_belong_to_full_recompute(c: PretrainConfig, _: Machine) -> bool:
    """recompute_method and recompute_num_layers apply only to full recompute."""
    named = c.recompute.recompute_method is not None or c.recompute.recompute_num_layers is not None
    return c.recompute.recompute_granularity == "full" or not named


@RECOMPUTE.rule(
    "recompute_granularity",
    "recompute_num_layers",
    "num_layers",
    "pipeline_model_parallel_size",
    remedy="Lower recompute_num_layers",
)
def recompute_fits_stage(c: PretrainConfig, _: Machine) -> bool:
    """recompute_num_layers must not exceed the number of layers per pipeline stage."""
    count = c.recompute.recompute_num_layers
    if c.recompute.recompute_granularity != "full" or count is None:
        return True
    return count <= c.model.num_layers // c.parallel.pipeline_model_parallel_size


@RECOMPUTE.rule(
    "recompute_granularity",
    "recompute_modules",
    remedy="Set recompute_modules, for example to [core_attn]",
)
def selective_recompute_names_modules(c: PretrainConfig, _: Machine) -> bool:
    """selective recompute needs one or more modules, each listed once."""
    modules = c.recompute.recompute_modules
    return c.recompute.recompute_granularity != "selective" or 0 < len(modules) == len(set(modules))


@RECOMPUTE.rule(
    "recompute_granularity",
    "recompute_modules",
    needs="has_transformer_engine",
    remedy="Remove layernorm from recompute_modules, or install Transformer Engine",
)
def layernorm_recompute_needs_transformer_engine(c: PretrainConfig, m: Machine) -> bool:
    """Megatron-Core 0.16 needs Transformer Engine to recompute a layernorm."""
    named = c.recompute.recompute_granularity == "selective" and "layernorm" in c.recompute.recompute_modules
    return not named or m.has_transformer_engine is not False


@RECOMPUTE.rule(
    "mlp_tile_tokens",
    "num_experts",
    remedy="Set mlp_tile_tokens to null; loss_tile_tokens does work with experts",
)
def mlp_tiles_are_dense(c: PretrainConfig, _: Machine) -> bool:
    """mlp_tile_tokens slices dense MLPs only: experts receive tokens from the whole sequence and from other ranks."""
    return c.recompute.mlp_tile_tokens is None or c.experts.num_experts is None


@RECOMPUTE.rule(
    "mlp_tile_tokens",
    "recompute_granularity",
    "recompute_modules",
    remedy="Remove mlp from recompute_modules",
)
def mlp_is_recomputed_once(c: PretrainConfig, _: Machine) -> bool:
    """mlp_tile_tokens already recomputes the MLP slice by slice, and selective recompute would run it once more."""
    as_module = c.recompute.recompute_granularity == "selective" and "mlp" in c.recompute.recompute_modules
    return c.recompute.mlp_tile_tokens is None or not as_module


# --- optimizer --------------------------------------------------------------------------------------------------


@BATCH.rule("min_lr", "lr", remedy="Lower min_lr, for example to a tenth of {lr}")
def min_lr_is_below_lr(c: PretrainConfig, _: Machine) -> bool:
    """min_lr must not exceed lr."""
    return c.optimizer.min_lr <= c.optimizer.lr


@BATCH.rule(
    "lr_warmup_iters",
    "lr_decay_iters",
    "train_iters",
    remedy="Lower lr_warmup_iters",
)
def warmup_ends_before_decay(c: PretrainConfig, _: Machine) -> bool:
    """warm-up must be shorter than the decay (lr_decay_iters, or train_iters if that is null)."""
    decay = c.training.train_iters if c.optimizer.lr_decay_iters is None else c.optimizer.lr_decay_iters
    return c.optimizer.lr_warmup_iters < decay


# --- batch ------------------------------------------------------------------------------------------------------


@BATCH.rule(
    "global_batch_size",
    "micro_batch_size",
    remedy="Change global_batch_size to a multiple of {micro_batch_size}",
)
def batch_divides_by_micro_batch(c: PretrainConfig, _: Machine) -> bool:
    """global_batch_size must be a multiple of micro_batch_size."""
    return c.training.global_batch_size % c.training.micro_batch_size == 0


@BATCH.rule(
    "global_batch_size",
    "micro_batch_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    needs="world_size",
    remedy="Change global_batch_size, or start fewer ranks",
)
def batch_divides_by_data_parallel(c: PretrainConfig, m: Machine) -> bool:
    """global_batch_size must be a multiple of micro_batch_size * data parallel size, which is the world size divided by
    the product of the parallel sizes.
    """
    sequences = c.training.micro_batch_size * data_parallel_size(c, m)
    if sequences == 0 or c.training.global_batch_size % c.training.micro_batch_size:
        return True  # both have their own rules
    return c.training.global_batch_size % sequences == 0


@BATCH.rule(
    "eod_mask_loss",
    "calculate_per_token_loss",
    remedy="Set calculate_per_token_loss to true",
)
def masked_loss_counts_tokens(c: PretrainConfig, _: Machine) -> bool:
    """with eod_mask_loss, ranks have different numbers of loss tokens; only calculate_per_token_loss weights them
    correctly.
    """
    return not c.data.eod_mask_loss or c.training.calculate_per_token_loss


# --- data -------------------------------------------------------------------------------------------------------


@DATA.rule(
    "data_path",
    remedy="Run `lightseq prepare-data FOLDER --output PREFIX`, then set data_path to [PREFIX]",
)
def data_is_given(c: PretrainConfig, _: Machine) -> bool:
    """training needs a corpus."""
    return bool(c.data.data_path)


@DATA.rule(
    "data_path",
    remedy="Write, for example, data_path: [0.3, data/a, 0.7, data/b]",
)
def data_weights_alternate(c: PretrainConfig, _: Machine) -> bool:
    """several data prefixes need a positive weight each, in the order weight, prefix, weight, prefix."""
    if len(c.data.data_path) < 2:
        return True
    return len(c.data.data_path) % 2 == 0 and all(map(_is_weight, c.data.data_path[::2]))


def _is_weight(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def split_shares(split: str) -> tuple[float, float, float] | None:
    """Shares of training, validation and test, which sum to 1; None if the text is not such a split."""
    try:
        numbers = [float(part) for part in split.split(",")]
    except ValueError:
        return None
    total = sum(numbers)
    if len(numbers) != 3 or min(numbers) < 0 or not 0 < total < math.inf:
        return None
    return numbers[0] / total, numbers[1] / total, numbers[2] / total


@DATA.rule(
    "split",
    remedy="Write, for example, 969,30,1",
)
def split_is_three_shares(c: PretrainConfig, _: Machine) -> bool:
    """split must be three numbers (training, validation, test), none of them negative and the first above 0."""
    shares = split_shares(c.data.split)
    return shares is not None and shares[0] > 0


@DATA.rule(
    "eval_interval",
    "split",
    remedy="Set eval_interval to null, or use a split with validation data, such as 969,30,1",
)
def evaluation_has_data(c: PretrainConfig, _: Machine) -> bool:
    """evaluation needs validation data, and the validation share is 0."""
    shares = split_shares(c.data.split)
    return c.training.eval_interval is None or shares is None or shares[1] > 0


@DATA.rule(
    "tokenizer_type",
    "tokenizer_model",
    remedy="Set tokenizer_model to a `tokenizers` JSON file with tokenizer_type hf, or to null with another type",
)
def tokenizer_model_belongs_to_hf(c: PretrainConfig, _: Machine) -> bool:
    """tokenizer_type hf needs tokenizer_model, and the other tokenizers do not have one."""
    return (c.data.tokenizer_type == "hf") == (c.data.tokenizer_model is not None)


@DATA.rule(
    "tokenizer_type",
    "eod_token",
    remedy="Set eod_token to null, or tokenizer_type to hf",
)
def eod_token_belongs_to_hf(c: PretrainConfig, _: Machine) -> bool:
    """only the hf tokenizer has named tokens."""
    return c.data.eod_token is None or c.data.tokenizer_type == "hf"


@DATA.rule(
    "tokenizer_type",
    "vocab_size",
    remedy="Set vocab_size to one more than the largest token id",
)
def null_tokenizer_gives_vocabulary(c: PretrainConfig, _: Machine) -> bool:
    """tokenizer_type null does not define a vocabulary size."""
    return c.data.tokenizer_type != "null" or c.data.vocab_size is not None


@DATA.rule(
    "tokenizer_type",
    "vocab_size",
    remedy=f"Set vocab_size to null or to at least {BYTE_VOCABULARY}",
)
def vocabulary_holds_bytes(c: PretrainConfig, _: Machine) -> bool:
    """the byte tokenizer has 257 tokens."""
    return c.data.tokenizer_type != "byte" or (c.data.vocab_size or BYTE_VOCABULARY) >= BYTE_VOCABULARY


# --- checkpoints ------------------------------------------------------------------------------------------------


@CHECKPOINT.rule(
    "save_interval",
    "save",
    remedy="Set save to a folder, or save_interval to null",
)
def save_interval_needs_save(c: PretrainConfig, _: Machine) -> bool:
    """save_interval needs save, the folder to save checkpoints in."""
    return c.checkpoint.save_interval is None or c.checkpoint.save is not None


@CHECKPOINT.rule(
    "save_retain_interval",
    "save_interval",
    remedy="Use a multiple of save_interval, or null",
)
def retained_checkpoints_are_saved(c: PretrainConfig, _: Machine) -> bool:
    """save_retain_interval chooses among the checkpoints that save_interval makes: it must be a multiple of it."""
    retain, interval = c.checkpoint.save_retain_interval, c.checkpoint.save_interval
    return retain is None or (interval is not None and retain % interval == 0)


@CHECKPOINT.rule(
    "save_keep_last",
    "save_interval",
    remedy="Set save_interval, or save_keep_last to null",
)
def kept_checkpoints_are_several(c: PretrainConfig, _: Machine) -> bool:
    """save_keep_last chooses among the checkpoints that save_interval makes."""
    return c.checkpoint.save_keep_last is None or c.checkpoint.save_interval is not None


@CHECKPOINT.rule(
    "load_iteration",
    "load",
    remedy="Set load to a folder of checkpoints, or load_iteration to null",
)
def load_iteration_needs_load(c: PretrainConfig, _: Machine) -> bool:
    """load_iteration is the step of a checkpoint in the folder that load names."""
    return c.checkpoint.load_iteration is None or c.checkpoint.load is not None


@CHECKPOINT.rule(
    "resume",
    "save",
    remedy="Set save to a folder, or resume to off",
)
def resume_needs_save(c: PretrainConfig, _: Machine) -> bool:
    """resume auto looks for checkpoints in the folder of save."""
    return c.checkpoint.resume == "off" or c.checkpoint.save is not None


@CHECKPOINT.rule(
    "finetune",
    "load",
    remedy="Set load to a checkpoint folder, or finetune to false",
)
def finetune_needs_load(c: PretrainConfig, _: Machine) -> bool:
    """finetune starts from the weights of a checkpoint, which load must name."""
    return not c.checkpoint.finetune or c.checkpoint.load is not None


# --- logging ------------------------------------------------------------------------------------------------------


@LOGGING.rule(
    "wandb_project",
    "wandb_exp_name",
    "wandb_save_dir",
    remedy="Set wandb_project, or leave wandb_exp_name and wandb_save_dir out",
)
def wandb_run_belongs_to_a_project(c: PretrainConfig, _: Machine) -> bool:
    """wandb_exp_name and wandb_save_dir describe a run of wandb_project."""
    logging = c.logging
    return logging.wandb_project is not None or (logging.wandb_exp_name, logging.wandb_save_dir) == (
        None,
        None,
    )


@LOGGING.rule(
    "trace",
    "trace_step_start",
    "trace_step_end",
    "train_iters",
    remedy="Choose steps of the run, such as trace_step_start 3 and trace_step_end 4",
)
def traced_steps_are_taken(c: PretrainConfig, _: Machine) -> bool:
    """trace records the steps from trace_step_start to trace_step_end, in this order and none behind train_iters."""
    first, last = c.logging.trace_step_start, c.logging.trace_step_end
    return c.logging.trace is None or first <= last <= c.training.train_iters


@LOGGING.rule(
    "trace",
    "trace_step_start",
    "trace_step_end",
    remedy="Set trace to a folder, or leave trace_step_start and trace_step_end out",
)
def steps_belong_to_a_trace(c: PretrainConfig, _: Machine) -> bool:
    """trace_step_start and trace_step_end apply only to trace."""
    default = LoggingConfig()
    given = (c.logging.trace_step_start, c.logging.trace_step_end)
    return c.logging.trace is not None or given == (default.trace_step_start, default.trace_step_end)
