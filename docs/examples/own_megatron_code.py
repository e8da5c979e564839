"""LightSeq in a program of one's own that builds Megatron's GPTModel: three lines differ, marked (1) to (3).

torchrun --nproc-per-node 2 docs/examples/own_megatron_code.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from megatron_lightseq.megatron import adopt_layout, gpt_layer_spec, shard_batch
from megatron_lightseq.megatron.cpu import platform as cpu_platform


def main() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    else:
        cpu_platform.activate()  # lets Megatron run without CUDA; not needed on GPUs
        dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(1234)

    config = TransformerConfig(
        num_layers=2,
        hidden_size=128,
        num_attention_heads=8,
        num_query_groups=2,
        context_parallel_size=dist.get_world_size(),
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    model = GPTModel(
        config,
        gpt_layer_spec(config),  # (1) instead of get_gpt_layer_local_spec() and the like
        vocab_size=512,
        max_sequence_length=256,
        position_embedding_type="rope",
    )
    layout = adopt_layout(model)  # (2) rotary positions and batch checks follow the attention

    tokens = torch.randint(0, 512, (1, 257), generator=torch.Generator().manual_seed(0))
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "position_ids": torch.arange(256).unsqueeze(0),
    }
    batch = {name: tensor.to(next(model.parameters()).device) for name, tensor in batch.items()}
    rank = parallel_state.get_context_parallel_rank()
    batch = shard_batch(batch, layout, rank)  # (3) instead of get_batch_on_this_cp_rank()

    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    losses.mean().backward()
    total = torch.stack([losses.sum().detach(), torch.tensor(float(losses.numel()), device=losses.device)])
    dist.all_reduce(total)
    print(
        f"rank {rank}: {losses.shape[1]} of {int(total[1])} tokens, mean loss {(total[0] / total[1]).item():.4f}"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
