"""A training loop of one's own with a model of transformers and packed text, on any number of ranks.

torchrun --nproc-per-node 2 -m docs.examples.hf_loop

Prints the same losses with one rank and with several.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from docs.examples import hf_tiny
from megatron_lightseq import hf

STEPS, ACCUMULATED, LENGTH = 3, 2, 256


def batches() -> Iterator[list[dict[str, Tensor]]]:
    """The micro-batches of each step: one row of several documents, whose positions restart."""
    random = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        step = []
        for _ in range(ACCUMULATED):
            cut = int(torch.randint(8, LENGTH - 8, (1,), generator=random))
            ids = torch.randint(3, hf_tiny.WORDS, (1, LENGTH), generator=random)
            positions = torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)])[None]
            step.append(
                {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
            )
        yield step


def main() -> list[float]:
    """Train; returns the loss of every step."""
    hf.register()
    cp, model = hf.ContextParallel(dist.group.WORLD), hf_tiny.model()
    cp.check(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    hf.keep_attention_in(model)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for step in batches():
        targets = sum(cp.num_targets(batch) for batch in step)
        total = torch.zeros(())
        for batch in step:
            loss = model(**cp.shard(batch), num_items_in_batch=targets).loss
            loss.backward()
            total += loss.detach()
        for x in (total, *(p.grad for p in model.parameters() if p.grad is not None)):
            dist.all_reduce(x)  # every rank has the part of its tokens
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = main()
    if dist.get_rank() == 0:
        print(found)
    dist.destroy_process_group()
