"""The loop of hf_loop.py with parameters sharded by FSDP2 over the ranks that share the sequences.

torchrun --nproc-per-node 2 -m docs.examples.hf_fsdp2
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from docs.examples import hf_tiny
from docs.examples.hf_loop import batches
from megatron_lightseq import hf


def main() -> list[float]:
    """Train; returns the loss of every step."""
    hf.register()
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    cp, model = hf.ContextParallel(mesh["cp"].get_group()), hf_tiny.model()
    cp.check(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    hf.keep_attention_in(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for step in batches():
        targets = sum(cp.num_targets(batch) for batch in step)
        total = torch.zeros(())
        for batch in step:
            loss = model(**cp.shard(batch), num_items_in_batch=targets).loss
            (loss * size).backward()  # FSDP2 averages gradients over its ranks
            total += loss.detach()
        dist.all_reduce(total)
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
