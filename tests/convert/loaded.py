"""What ranks compute with an imported checkpoint, for run_ranks: each function runs on every rank."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist

from tests.convert.models import LENGTH


def logits(
    recipe: str, flags: list[str], tokens: torch.Tensor, saved_to: str | None = None
) -> torch.Tensor | None:
    """The logits of this rank's tokens, before that of its vocabulary share; None before the last pipeline stage.

    Args:
        recipe: the YAML file that the import has written.
        flags: command line after it.
        tokens: (B, S), the same on all ranks.
        saved_to: where to save a checkpoint of the loaded model, if anywhere.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from megatron.core import parallel_state

    from megatron_lightseq.config import load_config
    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from megatron_lightseq.training.checkpoint.loading import load_checkpoint
    from megatron_lightseq.training.checkpoint.saving import save_checkpoint
    from megatron_lightseq.training.setup import build_training

    cpu_platform.activate()
    config = load_config([recipe, "--seq-length", str(LENGTH), "--data-path", "unread", *flags])
    try:
        training = build_training(config, vocab_size=config.data.vocab_size or 0)
        resumed = load_checkpoint(training, _folder(config))
        if saved_to is not None:
            from pathlib import Path

            save_checkpoint(training, Path(saved_to), resumed.position)
        return _forward(training, tokens)
    finally:
        parallel_state.destroy_model_parallel()


def _folder(config: Any) -> Any:
    from pathlib import Path

    assert config.checkpoint.load is not None
    return Path(config.checkpoint.load)


def _forward(training: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    from megatron_lightseq.megatron import shard_batch
    from megatron_lightseq.transport.group import rank_in

    (model,) = training.models
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    batch = {"tokens": tokens, "position_ids": positions}
    shard = shard_batch(batch, training.layout, rank_in(training.groups.cp))
    model.eval()
    with torch.no_grad():
        if not model.pre_process:
            hidden = torch.empty(shard["tokens"].shape[1], len(tokens), training.config.model.hidden_size)
            dist.recv(hidden, src=dist.get_rank() - 1)
            model.set_input_tensor(hidden)
        out = model(shard["tokens"], shard["position_ids"], None)
        if not model.post_process:
            dist.send(out.contiguous(), dst=dist.get_rank() + 1)
            return None
    return out.float()
