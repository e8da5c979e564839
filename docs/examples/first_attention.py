"""The first example of the README: causal attention over two shards, forward and backward.

torchrun --nproc-per-node 2 docs/examples/first_attention.py
"""

import torch

import megatron_lightseq as mls

torch.distributed.init_process_group("gloo")  # torchrun --nproc-per-node 2 docs/examples/first_attention.py
q, k, v = (torch.randn(512, 1, 8, 64, requires_grad=True) for _ in "qkv")  # tokens, batch, heads, head dim
out = mls.dist_attention(q, k, v, group=torch.distributed.group.WORLD)  # 512 of 1,024 rows of attention
out.sum().backward()  # gradients of keys and values return from the ranks that used them

print(f"rank {torch.distributed.get_rank()}: {tuple(out.shape)}, dk {tuple(k.grad.shape)}")
torch.distributed.destroy_process_group()
