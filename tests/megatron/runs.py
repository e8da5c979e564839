"""Short training runs on gloo ranks, for comparison: same data and seed, any parallel layout."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tests.harness.ranks import run_ranks

SEQ_LENGTH = 48  # divides by 2 x 3 (zigzag over three ranks) and by 2 x 4
VOCAB_SIZE = 61
TINY = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "make_vocab_size_divisible_by": 64,
    "init_method_std": 0.1,  # so that attention matters in a model this small
    "seq_length": SEQ_LENGTH,
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "train_iters": 5,
    "lr": 3e-3,
    "weight_decay": 0.01,
}


@dataclass(frozen=True)
class Run:
    """The results of one rank."""

    losses: list[float]
    grad_norms: list[float]
    num_tokens: list[int]
    eval_loss: float
    forwards: int
    bytes_sent: int
    layer_calls: int
    """Attention layers times micro-batches on this rank, over all training steps."""
    load_balancing_losses: list[float | None]


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``run_ranks`` with a long timeout: the first call on a rank imports Megatron, possibly on a busy machine."""
    return run_ranks(world_size, function, *args, timeout_s=240)


def train(overrides: dict[str, Any], prepare: Callable[[], Any] | None = None) -> Run:
    """Train a tiny model on this rank for TINY's steps; ``prepare`` may seed a bug first."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from megatron.core import parallel_state

    from megatron_lightseq.megatron.cpu import platform as cpu_platform

    if not torch.cuda.is_available():
        cpu_platform.activate()
    undo = prepare() if prepare is not None else None
    try:
        return _train({**TINY, **overrides})
    finally:
        parallel_state.destroy_model_parallel()
        if undo is not None:
            undo()


def _train(flat: dict[str, Any]) -> Run:
    from megatron_lightseq.config import PretrainConfig, with_values
    from megatron_lightseq.training.setup import build_training
    from megatron_lightseq.training.step import evaluate, train_step

    config = with_values(PretrainConfig(), **flat)
    training = build_training(config, vocab_size=VOCAB_SIZE)
    results = [
        train_step(training, [batches(training, step) for _ in training.chunks])
        for step in range(config.training.train_iters)
    ]
    stats = training.attention_stats
    forwards, bytes_sent = stats.forwards, stats.bytes_sent
    layers = sum(len(model.decoder.layers) for model in training.models)
    return Run(
        losses=[result.loss for result in results],
        grad_norms=[result.grad_norm for result in results],
        num_tokens=[result.num_tokens for result in results],
        eval_loss=evaluate(training, [batches(training, 99) for _ in training.chunks], 1).loss,
        forwards=forwards,
        bytes_sent=bytes_sent,
        layer_calls=layers * training.num_microbatches * config.training.train_iters,
        load_balancing_losses=[result.load_balancing_loss for result in results],
    )


def batches(training: Any, step: int) -> Iterator[dict[str, torch.Tensor]]:
    """The micro-batches of this data-parallel rank: learnable tokens, and loss masks uneven along them."""
    settings = training.config.training
    data_ranks, length = training.sizes.data, settings.seq_length
    generator = torch.Generator().manual_seed(1000 + step)
    start = torch.randint(0, VOCAB_SIZE, (settings.global_batch_size, 1), generator=generator)
    stride = torch.randint(1, 4, (settings.global_batch_size, 1), generator=generator)
    text = (start + stride * torch.arange(length + 1)) % VOCAB_SIZE
    kept = torch.linspace(0.1, 1.0, length)  # early tokens are masked far more often than late ones
    loss_mask = (torch.rand(settings.global_batch_size, length, generator=generator) < kept).float()
    shape = (training.num_microbatches, data_ranks, settings.micro_batch_size, -1)
    data_rank = 0 if training.groups.dp is None else training.groups.dp.rank()
    for micro_text, micro_mask in zip(
        text.view(shape)[:, data_rank], loss_mask.view(shape)[:, data_rank], strict=True
    ):
        yield {
            "tokens": micro_text[:, :-1].contiguous(),
            "labels": micro_text[:, 1:].contiguous(),
            "loss_mask": micro_mask.contiguous(),
            "position_ids": torch.arange(length).expand(len(micro_text), -1).contiguous(),
        }
