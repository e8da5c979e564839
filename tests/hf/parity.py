"""What the ranks of the parity tests run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_lightseq import hf
from tests.hf import tiny

CHECKPOINTS: dict[str, dict[str, Any] | None] = {
    "without": None,
    "repeated": {"use_reentrant": False},
    "kept": {"use_reentrant": False, "context_fn": hf.keep_attention},
}
Row = tuple[str, str, int, str, float, float, int]
"""Model, batch, ranks, checkpoints, difference of the loss, of gradients, attention forwards."""


def compare(names: list[str], sizes: list[int], checkpoints: list[str]) -> list[Row]:
    """Every batch with the models on groups of several sizes and on one process."""
    hf.register()
    rank = dist.get_rank()
    groups = {size: dist.new_group(list(range(size))) for size in sizes}
    contexts = {size: hf.ContextParallel(group) for size, group in groups.items() if rank < size}
    rows: list[Row] = []
    for name in names:
        for kind, batch in tiny.batches().items():
            wanted = tiny.reference(tiny.model(name), batch) if rank == 0 else None
            for size, cp in contexts.items():
                for checkpoint in checkpoints:
                    forwards = cp.stats.forwards
                    found = one_step(tiny.model(name, "lightseq"), cp, batch, CHECKPOINTS[checkpoint])
                    tiny.summed(found, lambda x, group=groups[size]: dist.all_reduce(x, group=group))
                    if wanted is not None:
                        loss, gradients = tiny.difference(found, wanted)
                        rows.append(
                            (name, kind, size, checkpoint, loss, gradients, cp.stats.forwards - forwards)
                        )
    dist.barrier()
    return rows


def one_step(built: Any, cp: hf.ContextParallel, batch: tiny.Batch, checkpoints: Any) -> tiny.Result:
    """This rank's part of loss and gradients."""
    cp.check(built)
    if checkpoints is not None:
        built.gradient_checkpointing_enable(checkpoints)
    return tiny.step(built, cp.shard(batch), cp.num_targets(batch))


def planned_ahead(name: str) -> list[tuple[int, float]]:
    """Plans that each batch makes in its forward pass, and how far its loss is off, with the next batch prepared."""
    hf.register()
    cp, kinds = hf.ContextParallel(dist.group.WORLD), list(tiny.batches().values())
    model, one, made = tiny.model(name, "lightseq"), tiny.model(name), []
    for batch, following in zip(kinds, [*kinds[1:], None], strict=True):
        local, before = cp.shard(batch), _plans(cp)
        loss = model(**local, num_items_in_batch=tiny.targets(batch)).loss.detach()
        planned = _plans(cp) - before
        dist.all_reduce(loss)
        made.append((planned, float((loss - tiny.reference(one, batch)[0]).abs())))
        if following is not None:
            cp.prepare(following)
    return made


def _plans(cp: hf.ContextParallel) -> int:
    return sum(len(attention._plans) for attention in cp._attentions.values())


def gathered_logits() -> list[float]:
    """How far logits that were gathered are from those of one process, and the gradients of a loss of them."""
    hf.register()
    cp = hf.ContextParallel(dist.group.WORLD)
    apart = []
    for batch in tiny.batches().values():
        kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        weights = torch.randn(tiny.VOCABULARY, generator=torch.Generator().manual_seed(3))
        ours, one = tiny.model("llama", "lightseq"), tiny.model("llama")
        local = cp.shard(batch)
        logits = cp.gather(ours(**local).logits, local)
        inputs = {name: x for name, x in batch.items() if name != "labels"} | {"use_cache": False}
        wanted = one(**inputs).logits
        apart.append(float((logits - wanted)[kept].abs().max()))
        assert not logits[~kept].any()
        # Every rank has the whole loss: a part's gradient is summed over the ranks, which is P times that of one.
        ((logits @ weights)[kept].square().sum() / cp.size).backward()
        (wanted @ weights)[kept].square().sum().backward()
        found = tiny.summed((torch.zeros(()), tiny.gradients(ours)), dist.all_reduce)
        apart.append(tiny.difference(found, (torch.zeros(()), tiny.gradients(one)))[1])
    return apart
