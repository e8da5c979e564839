"""What the ranks of the tests of trainers run: a few steps, an evaluation, what is left of them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from megatron_lightseq import hf
from tests.hf import tiny

LENGTH, ROWS = 96, 16
Outcome = tuple[list[tuple[float, float]], dict[str, float], dict[str, Tensor], int]
"""(loss, gradient norm) by step, evaluation, weights, attention forwards."""


def rows(packed: bool) -> list[dict[str, Tensor]]:
    """Samples with very different numbers of targets."""
    random = torch.Generator().manual_seed(3)

    def number(below: int) -> int:
        return int(torch.randint(1, below, (1,), generator=random))

    found = []
    for _ in range(ROWS):
        ids = torch.randint(3, tiny.VOCABULARY, (LENGTH,), generator=random)
        row = {"input_ids": ids, "labels": ids.clone()}
        row["labels"][: number(LENGTH - 8)] = -100
        if packed:
            cut = number(LENGTH - 1)
            row["position_ids"] = torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)])
            row["labels"][cut] = -100
        found.append(row)
    return found


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


@contextlib.contextmanager
def launched() -> Iterator[tuple[int, int]]:
    """This rank's number and the number of ranks, as a launcher tells accelerate; nothing of it is left behind."""
    from accelerate.state import AcceleratorState, GradientState

    rank, size = dist.get_rank(), dist.get_world_size()
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_PORT": 29500,
    }
    if size > 1:
        os.environ.update({name: str(value) for name, value in names.items()})
    try:
        hf.register()
        yield rank, size
    finally:
        for name in names:
            os.environ.pop(name, None)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def arguments(cp_size: int, size: int, folder: str, **options: Any) -> transformers.TrainingArguments:
    """The same global batch for any number of ranks."""
    replicas = size // cp_size
    parallel = {}
    if size > 1:
        parallel["parallelism_config"] = hf.ParallelismConfig(cp_size=cp_size, dp_replicate_size=replicas)
    settings: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": 3,
        "per_device_train_batch_size": 2 // replicas,
        "per_device_eval_batch_size": 2 // replicas,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.5,
        "optim": "sgd",  # AdamW would turn rounding in gradients near zero into weights that are far apart
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "seed": 7,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(**{**settings, **parallel, **options})


def trainer(cp_size: int, size: int, folder: str, **options: Any) -> Any:
    """A Trainer of the tiny Llama; for one process transformers' own, with eager attention."""
    packed, evaluated = options.pop("packed", False), options.pop("evaluated", 6)
    name, changes = options.pop("model", "llama"), options.pop("changes", {})
    counting = options.pop("counting", True)
    own = {name: options.pop(name) for name in ("compute_metrics", "compute_loss_func") if name in options}
    kind = transformers.Trainer if size == 1 else hf.Trainer
    data = rows(packed)
    built = kind(
        model=tiny.model(name, "eager" if size == 1 else "lightseq", **dict(changes)),
        args=arguments(cp_size, size, folder, **options),
        train_dataset=data,
        eval_dataset=data[:evaluated],
        data_collator=collate,
        **own,
    )
    built.model.config.use_cache = False  # with a cache, eager attention of 4.57 sees across documents
    built.model_accepts_loss_kwargs = counting  # Axolotl's trainer sets it to False
    built.remove_callback(transformers.PrinterCallback)
    return built


def outcome(built: Any) -> Outcome:
    evaluation = built.evaluate()
    log = [(entry["loss"], entry["grad_norm"]) for entry in built.state.log_history if "loss" in entry]
    weights = {
        name: x.detach().clone()
        for name, x in built.accelerator.unwrap_model(built.model_wrapped).state_dict().items()
    }
    forwards = built.context_parallel.stats.forwards if hasattr(built, "context_parallel") else 0
    kept = {name: evaluation[name] for name in evaluation if name in ("eval_loss", "eval_hits")}
    return log, kept, weights, forwards


def train(cp_size: int, options: dict[str, Any], resume: str | None = None) -> Outcome:
    """A few steps and an evaluation."""
    if options.get("compute_metrics"):
        options = {**options, "compute_metrics": hits}
    with launched() as (_, size), tempfile.TemporaryDirectory() as folder:
        built = trainer(cp_size, size, options.pop("output_dir", folder), **options)
        built.train(resume_from_checkpoint=resume)
        found = outcome(built)
        built.args.to_json_string()  # loggers write it
        return found


def hits(prediction: Any) -> dict[str, float]:
    """How many targets are predicted, from the logits of whole sequences."""
    logits, labels = prediction.predictions, prediction.label_ids
    found = logits[:, :-1].argmax(-1) == labels[:, 1:]
    return {"hits": float(found[labels[:, 1:] != -100].sum()) + float(abs(logits).mean())}


def refusals(names: list[str]) -> dict[str, str]:
    """What is said about options that would give another loss."""
    import accelerate

    from megatron_lightseq.errors import LightSeqError

    found = {}
    cases: dict[str, dict[str, Any]] = {
        "label_smoothing": {"label_smoothing_factor": 0.1},
        "compute_loss_func": {"compute_loss_func": lambda *_, **__: torch.zeros(())},
        "reentrant": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        "accelerate": {},
        "sizes": {},
        "tensor parallel": {},
    }
    for name in names:
        with launched() as (_, size), tempfile.TemporaryDirectory() as folder:
            try:
                if name == "accelerate":
                    cases[name] = {"parallelism_config": _theirs(accelerate.ParallelismConfig, size)}
                if name == "sizes":
                    cases[name] = {"parallelism_config": hf.ParallelismConfig(cp_size=3)}
                if name == "tensor parallel":
                    hf.ParallelismConfig(cp_size=2, tp_size=2)
                trainer(size, size, folder, **cases[name]).train()
            except LightSeqError as error:
                found[name] = str(error)
    return found


def _theirs(kind: Any, size: int) -> Any:
    """accelerate's configuration where accelerate lets it pass (it refuses CPUs for reasons of its own)."""

    class Passing(kind):  # type: ignore[misc]
        def _validate_accelerator(self, accelerator: Any) -> None:
            pass

    return Passing(cp_size=size)
