"""What goes wrong, silently, where one step is left out: each trap of docs/huggingface.md as a mutant."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from megatron_lightseq import hf
from tests.hf import tiny

Apart = tuple[float, float]


def _measure(
    local: Any,
    count: int | None,
    wanted: tiny.Result,
    name: str = "llama",
    scale: float = 1.0,
    **changes: Any,
) -> Apart:
    loss, gradients = tiny.step(tiny.model(name, "lightseq", **changes), local, count)
    found = (loss * scale, {key: x * scale for key, x in gradients.items()})
    return tiny.difference(tiny.summed(found, dist.all_reduce), wanted)


def batches() -> dict[str, Apart]:
    """Steps left out between a batch and its shards."""
    hf.register()
    cp, apart = hf.ContextParallel(dist.group.WORLD), {}
    kinds = tiny.batches()

    batch = kinds["causal"]
    wanted, count = tiny.reference(tiny.model("llama"), batch), tiny.targets(batch)
    apart["nothing"] = _measure(cp.shard(batch), count, wanted)
    without = cp.shard(batch)
    del without["position_ids"]
    apart["global positions"] = _measure(without, count, wanted)
    unshifted = cp.shard(batch)
    del unshifted["shift_labels"]
    unshifted["labels"] = cp.layout.shard(batch["labels"], cp.rank, 1)
    apart["the shift before the cut"] = _measure(unshifted, count, wanted)
    apart["the same, counted afterwards"] = _measure(unshifted, count - cp.size + 1, wanted)

    batch = kinds["prompt"]
    wanted = tiny.reference(tiny.model("llama"), batch)
    apart["targets counted over the group"] = _measure(cp.shard(batch), None, wanted, scale=1 / cp.size)

    batch = kinds["packed"]
    wanted, count = tiny.reference(tiny.model("llama"), batch), tiny.targets(batch)
    local = cp.shard(batch)
    blind = hf.ContextParallel(dist.group.WORLD).shard(
        {**batch, "position_ids": torch.arange(tiny.LENGTH)[None]}
    )
    apart["documents"] = _measure({**local, "lightseq": blind["lightseq"]}, count, wanted)
    for name, given in documents_in_other_words().items():
        apart[f"({name})"] = _measure(cp.shard(given), count, wanted)

    batch = kinds["padded left"]
    wanted, count = tiny.reference(tiny.model("llama"), batch), tiny.targets(batch)
    labelled = {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    apart["(labels that padding predicts)"] = _measure(cp.shard(labelled), count, wanted)
    return apart


def documents_in_other_words() -> dict[str, tiny.Batch]:
    """The packed batch, its documents described as collators other than transformers' describe them."""
    batch = tiny.batches()["packed"]
    lengths = tiny.DOCUMENTS[0]
    plain = {name: batch[name] for name in ("input_ids", "labels")}
    numbers = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return {
        "numbered in the mask": {**plain, "attention_mask": numbers + 1},
        "seq_idx": {**plain, "seq_idx": numbers.int()},
        "cu_seq_lens": {**plain, "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 50},  # type: ignore[dict-item]
    }


ROPES = {
    "dynamic": {
        "rope_type": "dynamic",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 80,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 80,
        "long_factor": [4.0] * 8,
        "short_factor": [1.0] * 8,
    },
}


def models() -> dict[str, Apart]:
    """Models that ``check`` refuses, trained without asking it."""
    hf.register()
    cp, apart = hf.ContextParallel(dist.group.WORLD), {}
    batch = tiny.batches()["causal"]
    count = tiny.targets(batch)
    for kind, rope in ROPES.items():
        changes = {"max_position_embeddings": 80 if kind == "dynamic" else 320, "rope_parameters": rope}
        wanted = tiny.reference(tiny.model("llama", **changes), batch)
        apart[kind] = _measure(cp.shard(batch), count, wanted, **changes)
    changes = {"output_router_logits": True, "router_aux_loss_coef": 0.02}
    wanted = tiny.reference(tiny.model("mixtral", **changes), batch)
    local = cp.shard(batch)
    local["lightseq"] = dataclasses.replace(local["lightseq"], router_loss_of=torch.nn.Identity())
    apart["router loss"] = _measure(local, count, wanted, "mixtral", **changes)
    wanted = tiny.reference(tiny.model("llama"), batch)
    local = cp.shard(batch)
    plain = {name: local[name] for name in ("input_ids", "labels", "shift_labels", "position_ids")}
    found = tiny.step(tiny.model("llama", "sdpa"), plain, count)
    apart["another implementation"] = tiny.difference(tiny.summed(found, dist.all_reduce), wanted)
    return apart


def one_process() -> dict[str, Apart]:
    """Packed text on one process with eager attention: when transformers itself loses the documents."""
    batch = tiny.batches()["packed"]
    wanted, count = tiny.reference(tiny.model("llama"), batch), tiny.targets(batch)
    ones = torch.ones_like(batch["input_ids"])
    cases = {
        "nothing": {"use_cache": False},
        "use_cache=False": {},
        "no attention_mask": {"use_cache": False, "attention_mask": ones},
    }
    return {
        name: tiny.difference(tiny.step(tiny.model("llama"), {**batch, **others}, count), wanted)
        for name, others in cases.items()
    }
