"""Tiny models of transformers with random weights, batches of every kind, and one process as their reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY, LENGTH, WINDOW = 96, 144, 30
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": WINDOW, "attn_logit_softcapping": 0.5}),
    "gemma3": (
        "Gemma3",
        {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt-oss": ("GptOss", {"head_dim": 16, "sliding_window": WINDOW, **EXPERTS}),
    "mixtral": ("Mixtral", {"sliding_window": None, **EXPERTS}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
}
Batch = dict[str, Tensor]
Result = tuple[Tensor, dict[str, Tensor]]
"""Loss and gradients by name."""


def model(name: str, implementation: str = "eager", **changes: Any) -> Any:
    """A model of ``MODELS``, the same in every process."""
    family, options = MODELS[name]
    configs = [f"{family}TextConfig", f"{family}Config"]
    config = next(getattr(transformers, c) for c in configs if hasattr(transformers, c))
    transformers.logging.set_verbosity_error()
    torch.manual_seed(1)
    kind = getattr(transformers, f"{family}ForCausalLM")
    sizes = {**BASE, **options, **changes}
    if "rope_parameters" in sizes and not hasattr(config(), "rope_parameters"):  # before transformers 5
        sizes["rope_scaling"] = dict(sizes.pop("rope_parameters"))
        sizes["rope_theta"] = sizes["rope_scaling"].pop("rope_theta")
    built = kind._from_config(config(**sizes), attn_implementation=implementation)
    return built.train()


DOCUMENTS = ([37, 50, 1, 20, LENGTH - 108], [100, LENGTH - 100])


def batches(length: int = LENGTH) -> dict[str, Batch]:
    """Every kind of batch, with labels as collators make them: the first token of a document is no target."""
    random = torch.Generator().manual_seed(5)

    def ids(rows: int, tokens: int = length) -> Tensor:
        return torch.randint(3, VOCABULARY, (rows, tokens), generator=random)

    def labelled(tokens: Tensor, **others: Tensor) -> Batch:
        return {"input_ids": tokens, "labels": tokens.clone(), **others}

    found = {"causal": labelled(ids(1)), "rows": labelled(ids(3)), "odd length": labelled(ids(1, length - 5))}
    for name, documents in (("packed", DOCUMENTS[:1]), ("packed rows", DOCUMENTS)):
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])
        packed = labelled(ids(len(documents)), position_ids=positions)
        packed["labels"][positions == 0] = -100
        found[name] = packed
    for side in ("right", "left"):
        keep = torch.ones(3, length, dtype=torch.long)
        for row, padding in enumerate((0, 31, 85)):
            padded = slice(length - padding, length) if side == "right" else slice(0, padding)
            keep[row, padded] = 0
        batch = labelled(ids(3), attention_mask=keep)
        batch["labels"][keep == 0] = -100
        batch["labels"][:, 1:][(keep[:, 1:] == 1) & (keep[:, :-1] == 0)] = -100  # what padding would predict
        found[f"padded {side}"] = batch
    answer = labelled(ids(1))
    answer["labels"][:, : length * 3 // 4] = -100  # some ranks have no targets
    found["prompt"] = answer
    return found


def targets(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def step(built: Any, batch: Any, num_targets: int | None) -> Result:
    """Loss and gradients of one batch."""
    built.zero_grad(set_to_none=True)
    counted = {} if num_targets is None else {"num_items_in_batch": num_targets}
    loss = built(**batch, **counted).loss
    loss.backward()
    return loss.detach().clone(), gradients(built)


def gradients(built: Any) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in built.named_parameters()
    }


def reference(built: Any, batch: Batch) -> Result:
    """One process, document by document where there are several, so that nothing can leak between them."""
    total = targets(batch)
    if "position_ids" not in batch:
        return step(built, {**batch, "use_cache": False}, total)
    results = [step(built, {**part, "use_cache": False}, total) for part in _documents(batch)]
    loss = torch.stack([loss for loss, _ in results]).sum()
    return loss, {name: sum(parts[name] for _, parts in results) for name in results[0][1]}  # type: ignore[misc]


def _documents(batch: Batch) -> Iterator[Batch]:
    for row, positions in enumerate(batch["position_ids"]):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        for begin, end in itertools.pairwise(starts):
            yield {name: batch[name][row : row + 1, begin:end] for name in ("input_ids", "labels")}


def difference(found: Result, wanted: Result) -> tuple[float, float]:
    """The loss's difference, and the largest of any gradient relative to the largest entry of that gradient.

    Gradients whose entries are all below a thousandth of the model's largest (those of sinks: sums that cancel, on one
    rank as well) are measured by that thousandth.
    """
    floor = max(float(want.abs().max()) for want in wanted[1].values()) / 1000
    apart = [
        float((found[1][name] - want).abs().max() / want.abs().max().clamp(min=floor))
        for name, want in wanted[1].items()
    ]
    return float((found[0] - wanted[0]).abs()), max(apart)


def summed(result: Result, reduce: Callable[[Tensor], Any]) -> Result:
    """The sum of all ranks' parts."""
    for x in (result[0], *result[1].values()):
        reduce(x)
    return result
