"""Linformer (arXiv 2006.04768) over a cut sequence, as the sequence-parallelism paper has it (arXiv 2105.13120).

Keys and values are projected along the sequence, from N tokens to R rows. Every rank holds the columns of the
projections that belong to its own tokens, so what it computes of the rows is a part of a sum. One all-reduce of 2 x R
rows gives every rank all of them, whatever N is. Attention to these rows is not causal, so this is for encoders.

torchrun --nproc-per-node 2 docs/examples/linformer.py
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_reduce


def dist_linformer(
    q: Tensor, k: Tensor, v: Tensor, to_keys: Tensor, to_values: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """Bidirectional attention to R rows in place of N tokens; collective, forward and backward.

    Args:
        q, k, v: (S, B, H, D), this rank's tokens.
        to_keys, to_values: (S, R), what each of this rank's tokens adds to each row.
        group: the ranks of the sequence; None for one rank.

    Returns:
        (S, B, H, D), differentiable in all tensors. Gradients of the projections are complete: a rank holds its columns
        alone.
    """
    rows = torch.stack([torch.einsum("sr,sbhd->bhrd", p, x) for p, x in ((to_keys, k), (to_values, v))])
    keys, values = rows if group is None else all_reduce(rows, group=group)
    out = F.scaled_dot_product_attention(q.permute(1, 2, 0, 3), keys, values)
    return out.permute(2, 0, 1, 3)


def main() -> None:
    """One step on random tokens; prints the shapes, and what the all-reduce carries."""
    dist.init_process_group("gloo")
    tokens, rows = 512, 64
    torch.manual_seed(dist.get_rank())
    q, k, v = (torch.randn(tokens, 1, 8, 64, requires_grad=True) for _ in "qkv")
    to_keys, to_values = (torch.randn(tokens, rows, requires_grad=True) for _ in range(2))
    out = dist_linformer(q, k, v, to_keys, to_values, dist.group.WORLD)
    out.sum().backward()
    total = tokens * dist.get_world_size()
    print(f"rank {dist.get_rank()}: {tuple(out.shape)} of {total} tokens, {2 * rows} rows reduced")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
