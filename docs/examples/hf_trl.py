"""TRL's SFTTrainer with packing and LoRA, its sequences cut over all ranks.

torchrun --nproc-per-node 2 docs/examples/hf_trl.py

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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from megatron_lightseq import hf


class CutSFTTrainer(hf.LightSeqTrainerMixin, SFTTrainer):
    """TRL's trainer over a context-parallel group."""


def model_and_tokenizer() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Small ones made on the spot; ``from_pretrained(..., attn_implementation="lightseq")`` for real ones."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(128)}, unk_token="t1"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", unk_token="t1", eos_token="t2"
    )
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="lightseq"), tokenizer


def documents() -> datasets.Dataset:
    """Tokenized documents of many lengths, the first part of each without labels."""
    random = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(32):
        length = int(torch.randint(20, 120, (1,), generator=random))
        ids = torch.randint(3, 128, (length,), generator=random).tolist()
        prompt = int(torch.randint(1, length - 1, (1,), generator=random))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return datasets.Dataset.from_list(rows)


def main() -> list[tuple[float, float]]:
    """Train and evaluate; returns the loss and gradient norm of every step, and the loss of the evaluation."""
    hf.register()
    datasets.disable_progress_bars()
    size = dist.get_world_size() if dist.is_initialized() else 1
    parallel: dict[str, Any] = {} if size == 1 else {"parallelism_config": hf.ParallelismConfig(cp_size=size)}
    model, tokenizer = model_and_tokenizer()
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
            train_dataset=documents(),
            eval_dataset=documents().select(range(9)),
            processing_class=tokenizer,
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
