"""Attention over a sequence cut over ranks, in a program without Megatron.

torchrun --nproc-per-node 2 docs/examples/own_attention.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist

import megatron_lightseq as mls


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    group, device = dist.group.WORLD, "cuda" if torch.cuda.is_available() else "cpu"
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank)

    # The whole sequence, equal on every rank here to compare with; a program would only make its shard.
    torch.manual_seed(0)
    q, k, v = (torch.randn(1024, 1, heads, 64, device=device) for heads in (8, 2, 2))

    layout = mls.SequenceLayout.contiguous(world_size)
    q_local, k_local, v_local = (layout.shard(x, rank, 0).requires_grad_() for x in (q, k, v))
    out = mls.dist_attention(q_local, k_local, v_local, group=group)
    out.square().sum().backward()

    alone = mls.dist_attention(q, k, v)
    error = (out - layout.shard(alone, rank, 0)).abs().max().item()
    print(
        f"rank {rank}: {tuple(out.shape)} of {tuple(alone.shape)}, largest difference from one rank {error:.1e}"
    )
    assert error < 1e-5
    assert k_local.grad is not None
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
