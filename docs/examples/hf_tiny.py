"""What the examples for Hugging Face users train: a small model with random weights, and documents of random tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = 128


def model() -> LlamaForCausalLM:
    """Made on the spot; ``from_pretrained(..., attn_implementation="lightseq")`` for real ones."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="lightseq").train()


def documents(number: int) -> Iterator[dict[str, list[int]]]:
    """Tokenized documents of many lengths, the first part of each without labels."""
    random = torch.Generator().manual_seed(3)
    for _ in range(number):
        length = int(torch.randint(20, 120, (1,), generator=random))
        ids = torch.randint(3, WORDS, (length,), generator=random).tolist()
        prompt = int(torch.randint(1, length - 1, (1,), generator=random))
        yield {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}
