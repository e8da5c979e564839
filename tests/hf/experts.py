"""What the ranks of the tests of the experts' load balancing loss run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_lightseq import hf
from megatron_lightseq.errors import LightSeqError
from tests.hf import parity, tiny

LOSS = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
"""Large enough that an error of it is one of the loss."""
Row = tuple[str, str, int, float, float, float]
"""Model, batch, ranks, difference of the loss, of gradients, of the load balancing loss."""


def compare(name: str, kinds: list[str], sizes: list[int], checkpoints: str = "without") -> list[Row]:
    """Batches on groups of several sizes and on one process, which sees the batch as a whole."""
    hf.register()
    rows: list[Row] = []
    groups = {size: dist.new_group(list(range(size))) for size in sizes}
    contexts = {size: hf.ContextParallel(group) for size, group in groups.items() if dist.get_rank() < size}
    for kind in kinds:
        batch = tiny.batches()[kind]
        one = tiny.model(name, **LOSS)
        wanted = tiny.step(one, {**batch, "use_cache": False}, tiny.targets(batch))
        for size, cp in contexts.items():
            model = tiny.model(name, "lightseq", **LOSS)
            assert hf.share_router_loss_in(model)
            assert hf.share_router_loss_in(model)  # once is enough
            model.register_forward_hook(keep := Keep())
            found = parity.one_step(model, cp, batch, parity.CHECKPOINTS[checkpoints])
            tiny.summed(found, lambda x, group=groups[size]: dist.all_reduce(x, group=group))
            dist.all_reduce(keep.aux, group=groups[size])
            with torch.no_grad():
                aux = one(**batch, use_cache=False).aux_loss
            rows.append((name, kind, size, *tiny.difference(found, wanted), float((keep.aux - aux).abs())))
    dist.barrier()
    return rows


class Keep:
    """A forward hook that keeps the load balancing loss."""

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        self.aux = output.aux_loss.detach().clone()


def adapted(task: str | None) -> float:
    """Gradients of adapters of PEFT, which call the model without its own hooks."""
    import peft

    hf.register()
    cp, batch = hf.ContextParallel(dist.group.WORLD), tiny.batches()["packed"]
    results = []
    for implementation in ("eager", "lightseq"):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "gate"], task_type=task)
        model = peft.get_peft_model(tiny.model("mixtral", implementation, **LOSS), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, 0, 0.1)
        if implementation == "lightseq":
            hf.share_router_loss_in(model)
            batch = cp.shard(batch)
        results.append(
            tiny.step(model, {**batch, "use_cache": False}, tiny.targets(tiny.batches()["packed"]))
        )
    tiny.summed(results[1], dist.all_reduce)
    return max(tiny.difference(results[1], results[0]))


def refusals() -> dict[str, str]:
    """What is said where the loss would be that of a shard."""
    hf.register()
    cp, batch = hf.ContextParallel(dist.group.WORLD), tiny.batches()["causal"]

    def unshared() -> None:
        tiny.model("mixtral", "lightseq", **LOSS)(**cp.shard(batch))

    def asked_by_the_batch() -> None:
        tiny.model("mixtral", "lightseq")(**cp.shard({**batch, "output_router_logits": True}))

    def another_loss() -> None:
        model = tiny.model("mixtral", "lightseq", **LOSS)
        hf.share_router_loss_in(model)
        model.num_experts_per_tok = 1  # of its loss; the routers still choose two
        model(**cp.shard(batch))

    cases: list[Callable[[], None]] = [unshared, asked_by_the_batch, another_loss]
    said = {}
    for case in cases:
        try:
            case()
        except LightSeqError as error:
            said[case.__name__] = str(error)
    return said
