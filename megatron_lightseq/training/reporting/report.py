"""The header of a run before its first step, and the summary and pictures after its last."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lightseq.config import PretrainConfig, ResolvedAttention, ResolvedConfig
from megatron_lightseq.config.choices import AUTO
from megatron_lightseq.schedule import Direction
from megatron_lightseq.training.checkpoint.state import Position
from megatron_lightseq.training.data.datasets import Corpora
from megatron_lightseq.training.job.join import Job
from megatron_lightseq.training.reporting.goodput import Goodput, goodput
from megatron_lightseq.training.reporting.metrics import (
    TrainMetrics,
    ValidationMetrics,
    read_lines,
    read_metrics,
)
from megatron_lightseq.training.reporting.progress import count, describe_sizes, duration, verdict
from megatron_lightseq.training.setup import Training

logger = logging.getLogger(__name__)

SUMMARY_NAME, LOSS_PICTURE, SCHEDULE_PICTURE = "summary.json", "loss.png", "schedule.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run ended; the same on every rank, except ``metrics_path``."""

    position: Position
    resumed_from: int
    """The step that the run resumed from; 0 for a new run."""
    stopped: str | None
    """Why it ended before ``train_iters``; None if it did not."""
    checkpoint: Path | None
    metrics_path: Path | None
    seconds: float
    """Wall-clock time from the first step to the last."""
    stragglers: tuple[str, ...] = ()
    """Ranks that were slower than the others for a while, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The end of a run in numbers."""

    steps: int
    first_loss: float
    """Of the first recorded step, which an earlier run may have taken if this one was resumed."""
    last_loss: float
    """Mean over the last ten steps."""
    entropy: float | None
    """Unigram entropy of the corpus, nats per token."""
    validation_loss: float | None
    tokens_per_second: float
    """Median over this run's steps."""
    seconds: float
    stopped: str | None
    checkpoint: str | None
    goodput: float | None
    """Part of the run's time, all attempts together, that went into steps which count; None if it is not known."""
    goodput_seconds: dict[str, float]
    """That time, and what was lost by what; empty if it is not known."""
    stragglers: tuple[str, ...]


def header(training: Training, corpora: Corpora, job: Job) -> list[tuple[str, str]]:
    """Names and values on model, ranks, attention, data and batch. Collective: parameters are spread over ranks."""
    config, sizes = training.config, training.sizes
    model, settings = config.model, config.training
    parallel = describe_sizes(tp=sizes.tensor, pp=sizes.pipeline, cp=sizes.context, dp=sizes.data)
    extras = [
        "sequence parallel" if config.parallel.sequence_parallel else "",
        "distributed optimizer" if config.parallel.use_distributed_optimizer else "",
        _expert_ranks(config),
    ]
    attention = f"{_methods(training.resolved)}, kernel {job.kernel}"
    if config.context.cp_comm_type:
        attention += f", or per layer as in cp_comm_type ({', '.join(config.context.cp_comm_type)})"
    if sizes.context > 1:
        overlap = "on" if config.context.cp_overlap else "off"
        attention += f", {training.layout.name} layout over {sizes.context} ranks, overlap {overlap}"
    attention += _scores(config)
    tokens = sum(int(index.lengths.sum()) for index in corpora.indexes)
    entropy = "unknown" if corpora.entropy is None else f"{corpora.entropy:.3f} nats"
    batch = settings.seq_length * settings.global_batch_size
    return [
        (
            "model",
            f"{count(num_parameters(training))} parameters: {model.num_layers} layers, hidden {model.hidden_size}, "
            f"{_heads(config)}, vocabulary {corpora.vocab_size}, {'bf16' if settings.bf16 else 'fp32'}"
            f"{_variants(config)}",
        ),
        (
            "ranks",
            ", ".join(
                [f"{sizes.world_size} on {job.device.type}/{job.backend}: {parallel}", *filter(None, extras)]
            ),
        ),
        ("attention", attention),
        ("data", f"{count(tokens)} tokens, unigram entropy {entropy}"),
        (
            "steps",
            f"{settings.train_iters} of {settings.global_batch_size} x {settings.seq_length} = {batch:,} tokens",
        ),
    ]


def _methods(resolved: ResolvedConfig) -> str:
    """The configured method; with `auto`, also what it stands for."""
    method = resolved.config.context.cp_method
    if method != AUTO or resolved.attention is None:
        return method
    chosen = dict.fromkeys(kind.schedules.name for kind in resolved.attention.kinds)
    return f"{method} ({', '.join(chosen)})"


def _heads(config: PretrainConfig) -> str:
    model = config.model
    if model.multi_latent_attention:
        return f"{model.num_attention_heads} heads of {model.head_dim}:{model.value_head_dim}, from latent vectors"
    return f"{model.num_attention_heads} heads in {model.query_groups} groups"


def _variants(config: PretrainConfig) -> str:
    experts, found = config.experts, ""
    if experts.num_experts is not None:
        found += f", {experts.moe_router_topk} of {experts.num_experts} experts"
        found += " and a shared expert" if experts.moe_shared_expert_intermediate_size else ""
    if config.model.mtp_num_layers is not None:
        found += f", multi-token prediction of depth {config.model.mtp_num_layers}"
    return found


def _scores(config: PretrainConfig) -> str:
    model, found = config.model, ""
    if model.window_size:
        layers = f"{model.num_window_layers} of {model.num_layers} layers"
        found += f", window of {model.window_size[0]} tokens back in {layers}"
    return found if model.softmax_type == "vanilla" else f"{found}, {model.softmax_type} softmax"


def _expert_ranks(config: PretrainConfig) -> str:
    size = config.parallel.expert_model_parallel_size
    return f"experts over {size} ranks" if size > 1 else ""


def num_parameters(training: Training) -> int:
    """Number of parameters of the whole model, each counted once. Collective."""
    groups = training.collection
    tied = not training.config.model.untie_embeddings_and_output_weights
    # The last pipeline stage has a copy of the embedding, as output layer and for multi-token prediction.
    copies = ("embedding.word_embeddings.weight", *(["output_layer.weight"] if tied else []))
    total = torch.zeros(2, dtype=torch.int64, device=training.device)
    for model in training.models:
        for name, parameter in model.named_parameters():
            of_experts = ".experts." in name
            tensor_ranks = groups.expt_tp if of_experts else groups.tp
            sharded = getattr(parameter, "tensor_model_parallel", False)
            is_copy = name in copies and not model.pre_process
            if (sharded or tensor_ranks.rank() == 0) and not is_copy:
                total[int(of_experts)] += parameter.numel()
    dist.all_reduce(total)
    dense, experts = total.tolist()
    return int(dense) // groups.dp_cp.size() + int(experts) // groups.expt_dp.size()


def finish(resolved: ResolvedConfig, corpora: Corpora, outcome: Outcome) -> list[str]:
    """Write summary and pictures to ``report_dir``; returns the closing lines of a run. Rank 0 only."""
    config = resolved.config
    path = outcome.metrics_path
    history, share = ([], None) if path is None else (read_metrics(path), goodput(read_lines(path)))
    steps = [metrics for metrics in history if isinstance(metrics, TrainMetrics)]
    checks = [metrics for metrics in history if isinstance(metrics, ValidationMetrics)]
    lines = [] if outcome.stopped is None else [f"stopped early: {outcome.stopped}"]
    if not steps:
        return [*lines, *_files(config, outcome, [])]
    summary = _summarise(steps, checks, corpora.entropy, outcome, share)
    lines += [
        f"{summary.steps} steps in {duration(summary.seconds)}, {summary.tokens_per_second:,.0f} tokens/s: "
        f"loss {summary.first_loss:.2f} -> {summary.last_loss:.2f}"
        + ("" if summary.validation_loss is None else f", validation {summary.validation_loss:.2f}"),
        verdict(summary.last_loss, corpora.entropy),
        *([] if share is None else [str(share)]),
        *outcome.stragglers,
    ]
    pictures = []
    if config.logging.report_dir is not None:
        folder = Path(config.logging.report_dir)
        try:
            pictures = _write(folder, resolved.attention, summary, [*steps, *checks])
        except OSError as error:  # of the report's disk; the run is complete
            logger.warning("%s: %s: there is no report", folder, error.strerror or error)
    return [*lines, *_files(config, outcome, pictures)]


def _summarise(
    steps: list[TrainMetrics],
    checks: list[ValidationMetrics],
    entropy: float | None,
    outcome: Outcome,
    share: Goodput | None,
) -> Summary:
    own = [metrics for metrics in steps if metrics.step > outcome.resumed_from] or steps
    rates = sorted(metrics.tokens_per_second for metrics in own)
    tail = [metrics.loss for metrics in steps[-10:]]
    return Summary(
        steps=outcome.position.iteration - outcome.resumed_from,
        first_loss=steps[0].loss,
        last_loss=sum(tail) / len(tail),
        entropy=entropy,
        validation_loss=checks[-1].loss if checks else None,
        tokens_per_second=rates[len(rates) // 2],
        seconds=outcome.seconds,
        stopped=outcome.stopped,
        checkpoint=None if outcome.checkpoint is None else str(outcome.checkpoint),
        goodput=None if share is None else share.share,
        goodput_seconds={} if share is None else {**asdict(share), "other": share.other},
        stragglers=outcome.stragglers,
    )


def _write(
    folder: Path, attention: ResolvedAttention | None, summary: Summary, history: list[Any]
) -> list[tuple[str, Path]]:
    from megatron_lightseq.training.reporting.plots import draw_loss, draw_schedule

    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY_NAME).write_text(json.dumps(asdict(summary), indent=1) + "\n", encoding="utf-8")
    written = [("summary", folder / SUMMARY_NAME), ("loss", folder / LOSS_PICTURE)]
    draw_loss(history, summary.entropy, folder / LOSS_PICTURE)
    if attention is not None:
        draw_schedule(attention.kinds[0].schedules.schedule(Direction.FORWARD), folder / SCHEDULE_PICTURE)
        written.append(("schedule", folder / SCHEDULE_PICTURE))
    return written


def _files(config: PretrainConfig, outcome: Outcome, pictures: list[tuple[str, Path]]) -> list[str]:
    found = [
        ("checkpoint", outcome.checkpoint),
        ("metrics", outcome.metrics_path),
        ("tensorboard", config.logging.tensorboard_dir),
        *pictures,
    ]
    return [f"{name:<11} {path}" for name, path in found if path is not None]
