"""A model of one's own in plain torch: compiled layers without graph breaks, FSDP2, and its sequence cut over ranks.

torchrun --nproc-per-node 2 -m docs.examples.compiled_fsdp2

Prints the same losses with one rank and with several.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, rms_norm, silu

import megatron_lightseq as mls
from megatron_lightseq.attention import DistAttention, OperatorAttention

WORDS, WIDTH, HEADS, LAYERS, LENGTH, STEPS = 128, 64, 4, 2, 256, 3


class Layer(nn.Module):
    """Attention and an MLP, each with a norm in front."""

    def __init__(self, attention: DistAttention) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.projection = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.attention = OperatorAttention(attention)

    def forward(self, x: Tensor) -> Tensor:
        """(S, B, WIDTH): this rank's tokens come first."""
        q, k, v = self.qkv(rms_norm(x, (WIDTH,))).unflatten(-1, (3, HEADS, WIDTH // HEADS)).unbind(2)
        x = x + self.projection(self.attention(q, k, v).flatten(2))
        return x + self.down(silu(self.up(rms_norm(x, (WIDTH,)))))


class Model(nn.Module):
    """Tokens and global positions to logits."""

    def __init__(self, attention: DistAttention) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer(attention) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.words(tokens) + self.positions(positions)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def main(backend: str = "inductor") -> list[float]:
    """Train; returns the loss of every step."""
    size, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    layout = mls.SequenceLayout.contiguous(size)
    torch.manual_seed(1)
    model = Model(DistAttention(mesh["cp"].get_group(), layout=layout))
    for layer in model.layers:
        layer.compile(fullgraph=True, backend=backend)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    random = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        text = torch.randint(WORDS, (LENGTH + 1, 1), generator=random)
        whole = text[:-1], torch.arange(LENGTH)[:, None], text[1:]
        tokens, positions, targets = (layout.shard(x, rank, 0) for x in whole)
        logits = model(tokens, positions)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / LENGTH
        (loss * size).backward()  # FSDP2 averages gradients over its ranks
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = main()
    if dist.get_rank() == 0:
        print(found)
    dist.destroy_process_group()
