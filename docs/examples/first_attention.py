"""The first example of the README: causal attention over two shards, forward and backward.

torchrun --nproc-per-node 2 docs/examples/first_attention.py
"""

import torch

import megatron_lightseq as mls

torch.distributed.init_process_group("gloo")  # one process per rank, started by torchrun
q, k, v = (torch.randn(512, 1, 8, 64, requires_grad=True) for _ in "qkv")  # this rank's tokens
out = mls.dist_attention(q, k, v, group=torch.distributed.group.WORLD)  # (512, 1, 8, 64)
out.sum().backward()  # gradients of keys and values return from the ranks that used them

print(f"rank {torch.distributed.get_rank()}: {tuple(out.shape)}, dk {tuple(k.grad.shape)}")
torch.distributed.destroy_process_group()
