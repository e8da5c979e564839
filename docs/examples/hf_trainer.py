"""A script with Hugging Face's Trainer, its sequences cut over all ranks.

torchrun --nproc-per-node 2 -m docs.examples.hf_trainer

Two things differ from a script without context parallelism: ``hf.Trainer``, and ``parallelism_config``. The data
collator pads documents of all lengths, as in any such script.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import TrainingArguments

from docs.examples import hf_tiny
from megatron_lightseq import hf


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows with padding on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[i < len(row["input_ids"]) for i in range(longest)] for row in rows]).long()
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def main() -> list[tuple[float, float]]:
    """Train and evaluate; returns the loss and gradient norm of every step, and the loss of the evaluation."""
    hf.register()
    size = int(os.environ.get("WORLD_SIZE", 1))
    parallel: dict[str, Any] = {} if size == 1 else {"parallelism_config": hf.ParallelismConfig(cp_size=size)}
    data = list(hf_tiny.documents(24))
    with tempfile.TemporaryDirectory() as folder:
        trainer = hf.Trainer(
            model=hf_tiny.model(),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=3,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": False},
                learning_rate=0.5,
                optim="sgd",
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                save_strategy="no",
                disable_tqdm=True,
                **parallel,
            ),
            train_dataset=data,
            eval_dataset=data[:5],
            data_collator=collate,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        evaluation = trainer.evaluate()
    steps = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    return [*steps, (evaluation["eval_loss"], 0.0)]


if __name__ == "__main__":
    found = main()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(found)
    if dist.is_initialized():
        dist.destroy_process_group()
