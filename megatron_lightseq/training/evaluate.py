"""``lightseq eval``, on one rank: the loss of a checkpoint by position."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_lightseq.config import PretrainConfig, ResolvedConfig, with_values
from megatron_lightseq.errors import ConfigError, explain

NOT_TRAINING = {
    "save": None,
    "resume": "off",
    "finetune": True,
    "report_dir": None,
    "tensorboard_dir": None,
    "wandb_project": None,
    "wandb_exp_name": None,
    "wandb_save_dir": None,
}
"""Keys of a recipe that concern training only, or that say how it goes on."""


def for_evaluation(config: PretrainConfig) -> PretrainConfig:
    """The configuration with which the weights of ``load`` are evaluated on the validation split.

    Raises:
        ConfigError: there is no checkpoint to evaluate.
    """
    if config.checkpoint.load is None:
        raise ConfigError(
            explain(
                got="no --load",
                rule="the weights of a checkpoint are evaluated",
                remedy="Name the folder that a run or an import has saved to with --load",
            )
        )
    interval = config.training.eval_interval or config.training.train_iters
    return with_values(config, eval_interval=interval, **NOT_TRAINING)


def evaluate_checkpoint(
    resolved: ResolvedConfig, num_buckets: int, show: Callable[[dict[str, Any]], None]
) -> None:
    """Evaluate together with the other ranks.

    Args:
        resolved: from :func:`for_evaluation`.
        num_buckets: ranges of positions.
        show: called on rank 0 with the result, all of it plain values.
    """
    from megatron_lightseq.training.by_position import loss_by_position
    from megatron_lightseq.training.checkpoint.loading import load_checkpoint
    from megatron_lightseq.training.data.datasets import build_datasets, open_corpora, verify_contents
    from megatron_lightseq.training.data.loaders import valid_iterator
    from megatron_lightseq.training.job.failure import EVALUATE, SET_UP
    from megatron_lightseq.training.job.join import join
    from megatron_lightseq.training.loop import share_of
    from megatron_lightseq.training.setup import build_training

    config = resolved.config
    corpora = open_corpora(config)
    with join(resolved, corpora.fingerprint) as job:
        if config.data.verify_data:
            verify_contents(corpora, part=job.launch.rank, num_parts=job.launch.world_size)
        job.channel.enter(0, SET_UP)
        training = build_training(resolved, vocab_size=corpora.vocab_size)
        datasets = build_datasets(config, corpora)
        loaded = load_checkpoint(training, Path(config.checkpoint.load or ""))
        job.channel.enter(0, EVALUATE)
        iterators = [valid_iterator(config, datasets, share_of(training)) for _ in training.chunks]
        buckets = loss_by_position(training, iterators, config.training.eval_iters, num_buckets)
        if job.launch.rank == 0:
            tokens = sum(bucket.num_tokens for bucket in buckets)
            total = sum((bucket.loss or 0.0) * bucket.num_tokens for bucket in buckets)
            show(
                {
                    "checkpoint": str(loaded.folder),
                    "seq_length": config.training.seq_length,
                    "sequences": config.training.eval_iters * config.training.global_batch_size,
                    "num_tokens": tokens,
                    "loss": total / tokens if tokens else None,
                    "by_position": [
                        {"first": x.first, "last": x.last, "num_tokens": x.num_tokens, "loss": x.loss}
                        for x in buckets
                    ],
                }
            )
