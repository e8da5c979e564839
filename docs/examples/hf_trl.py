"""TRL's SFTTrainer with packing and LoRA, its sequences cut over all ranks.

torchrun --nproc-per-node 2 -m docs.examples.hf_trl

Two things differ from a script without context parallelism: the class, and ``parallelism_config``.
"""

from __future__ import annotations

import tempfile
from typing import Any

import datasets
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from docs.examples import hf_tiny
from megatron_lightseq import hf


class CutSFTTrainer(hf.LightSeqTrainerMixin, SFTTrainer):
    """TRL's trainer over a context-parallel group."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One word for each token."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(hf_tiny.WORDS)}, unk_token="t1"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", unk_token="t1", eos_token="t2")


def main() -> list[tuple[float, float]]:
    """Train and evaluate; returns the loss and gradient norm of every step, and the loss of the evaluation."""
    hf.register()
    datasets.disable_progress_bars()
    size = dist.get_world_size() if dist.is_initialized() else 1
    parallel: dict[str, Any] = {} if size == 1 else {"parallelism_config": hf.ParallelismConfig(cp_size=size)}
    documents = datasets.Dataset.from_list(list(hf_tiny.documents(32)))
    model = hf_tiny.model()
    torch.manual_seed(2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = CutSFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=2,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                max_length=128,
                packing=True,
                learning_rate=0.5,
                optim="sgd",
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                bf16=False,
                save_strategy="no",
                disable_tqdm=True,
                gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": False},
                **parallel,
            ),
            train_dataset=documents,
            eval_dataset=documents.select(range(9)),
            processing_class=tokenizer(),
            peft_config=LoraConfig(
                r=4,
                target_modules=["q_proj", "v_proj", "gate_proj"],
                init_lora_weights="gaussian",
                task_type="CAUSAL_LM",
            ),
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
