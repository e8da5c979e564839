"""Does a model give the same loss and gradients with its sequence cut? ``python -m megatron_lightseq.hf.check MODEL``.

One process with eager attention is compared with several over gloo, all on this machine, for plain, packed and padded
batches of random tokens. In the one process, packed text is trained document by document, so that nothing can leak.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lightseq.errors import LightSeqError
from megatron_lightseq.hf.attention import register
from megatron_lightseq.hf.batch import IGNORE_INDEX
from megatron_lightseq.hf.context import ContextParallel
from megatron_lightseq.hf.supported import IMPLEMENTATION, check_model

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
"""In fp32: of the loss, and of a gradient's largest error relative to its largest entry."""

Batch = dict[str, Tensor]
Result = tuple[float, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is compared."""

    model: str
    """A folder or a name that ``from_pretrained`` takes."""
    cp: int
    """Ranks."""
    whole: bool
    """With the model's own weights and all layers; otherwise cut down, with random weights."""
    layers: int
    vocabulary: int
    length: int
    """Tokens of a row."""
    method: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One kind of batch."""

    batch: str
    loss: float
    """Of one process."""
    loss_error: float
    gradient_error: float
    """The largest of any parameter, relative to the largest entry of its gradient."""
    parameter: str
    """Whose gradient that is."""

    @property
    def passed(self) -> bool:
        """Whether both are within the tolerances; NaN is not."""
        return self.loss_error <= LOSS_TOLERANCE and self.gradient_error <= GRADIENT_TOLERANCE


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; exit status 0 for PASS, 1 for FAIL, 2 for a model that is refused."""
    request = _parsed(arguments)
    try:
        rows, memory = compare(request)
    except LightSeqError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(report(request, rows, memory))
    return 0 if all(row.passed for row in rows) else 1


def compare(request: Request) -> tuple[list[Row], list[float]]:
    """One process, then several: rows by kind of batch, and peak memory in GiB of the one, then of each of the others.

    Raises:
        LightSeqError: the model is refused.
    """
    with tempfile.TemporaryDirectory(prefix="lightseq-check-") as folder:
        register()
        check_model(build(request, IMPLEMENTATION), cut=request.cp > 1)
        _start(_one_process, request, folder, 1)
        _start(_rank, request, folder, request.cp)
        found = torch.load(Path(folder, "rows"), weights_only=False)
        memory = [float(Path(folder, name).read_text()) for name in ("memory", *_memory_names(request.cp))]
    return found, memory


def report(request: Request, rows: Sequence[Row], memory: Sequence[float]) -> str:
    """The table, and PASS or FAIL."""
    what = "whole" if request.whole else f"cut down to {request.layers} layers, random weights"
    lines = [f"{request.model}, {what}: one process and {request.cp} ranks, {request.length} tokens, fp32"]
    lines.append(f"{'batch':14} {'loss':>10} {'difference':>11} {'gradients':>11}  of")
    for row in rows:
        lines.append(
            f"{row.batch:14} {row.loss:10.6f} {row.loss_error:11.1e} {row.gradient_error:11.1e}  {row.parameter}"
            f"{'' if row.passed else '  <- differs'}"
        )
    ranks = ", ".join(f"{gib:.2f}" for gib in memory[1:])
    lines.append(f"peak memory, GiB: one process {memory[0]:.2f}; ranks {ranks}")
    passed = all(row.passed for row in rows)
    lines.append(
        f"{'PASS' if passed else 'FAIL'} (loss within {LOSS_TOLERANCE}, gradients {GRADIENT_TOLERANCE})"
    )
    return "\n".join(lines) + "\n"


def build(request: Request, implementation: str) -> Any:
    """The model, the same in every process."""
    import transformers

    transformers.logging.set_verbosity_error()
    options = {"attn_implementation": implementation}
    if request.whole:
        built = transformers.AutoModelForCausalLM.from_pretrained(
            request.model, dtype=torch.float32, **options
        )
    else:
        config = cut_down(transformers.AutoConfig.from_pretrained(request.model), request)
        torch.manual_seed(1)
        built = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    return built.train()


def cut_down(config: Any, request: Request) -> Any:
    """A configuration with fewer layers, one of each type first, and fewer words."""
    text = config.get_text_config()
    number = min(request.layers, text.num_hidden_layers)
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        text.layer_types = (list(dict.fromkeys(kinds)) * number)[:number]
    text.num_hidden_layers = number
    text.vocab_size = min(request.vocabulary, text.vocab_size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, 0)
    return config


def batches(vocabulary: int, length: int) -> dict[str, Batch]:
    """Random tokens, by kind of batch."""
    random = torch.Generator().manual_seed(5)

    def ids(rows: int, tokens: int) -> Batch:
        found = torch.randint(3, vocabulary, (rows, tokens), generator=random)
        return {"input_ids": found, "labels": found.clone()}

    plain, odd, padded, packed = ids(2, length), ids(1, length - 1), ids(2, length), ids(1, length)
    padded["attention_mask"] = torch.ones_like(padded["input_ids"])
    padded["attention_mask"][1, : length // 3] = 0
    padded["labels"][1, : length // 3 + 1] = IGNORE_INDEX
    lengths = [length // 8, length // 2, 1]
    positions = torch.cat([torch.arange(n) for n in (*lengths, length - sum(lengths))])[None]
    packed["position_ids"] = positions
    packed["labels"][positions == 0] = IGNORE_INDEX
    packed["labels"][:, : length // 4] = IGNORE_INDEX  # the first ranks have few targets or none
    return {"rows": plain, "odd length": odd, "padded left": padded, "packed": packed}


def one_result(model: Any, batch: Batch) -> Result:
    """Loss and gradients of one process."""
    count = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    model.zero_grad(set_to_none=True)
    total = 0.0
    for part in _documents(batch):
        loss = model(**part, use_cache=False, num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    return total, _gradients(model)


def rank_result(model: Any, batch: Batch, cp: ContextParallel) -> Result:
    """The same of all ranks of a group together."""
    model.zero_grad(set_to_none=True)
    loss = model(**cp.shard(batch), num_items_in_batch=cp.num_targets(batch)).loss
    loss.backward()
    total, gradients = loss.detach().clone(), _gradients(model)
    if cp.size > 1:
        for x in (total, *gradients.values()):
            dist.all_reduce(x, group=cp.group)
    return total.item(), gradients


def row_of(batch: str, found: Result, wanted: Result) -> Row:
    """How far apart two results are. A gradient below a thousandth of the model's largest is measured by that."""
    floor = max(float(want.abs().max()) for want in wanted[1].values()) / 1000
    errors = {
        name: float((found[1][name] - want).abs().max() / want.abs().max().clamp(min=floor))
        for name, want in wanted[1].items()
    }
    parameter = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return Row(
        batch=batch,
        loss=wanted[0],
        loss_error=abs(found[0] - wanted[0]),
        gradient_error=errors[parameter],
        parameter=parameter,
    )


def _documents(batch: Batch) -> list[Batch]:
    if "position_ids" not in batch:
        return [batch]
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    return [
        {name: batch[name][:, begin:end] for name in ("input_ids", "labels")}
        for begin, end in itertools.pairwise(starts)
        if end - begin > 1  # a single token has no target
    ]


def _gradients(model: Any) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _start(function: Any, request: Request, folder: str, ranks: int) -> None:
    torch.multiprocessing.spawn(function, args=(request, folder, ranks), nprocs=ranks)


def _one_process(_: int, request: Request, folder: str, __: int) -> None:
    model = build(request, "eager")
    results = {
        name: one_result(model, batch)
        for name, batch in batches(_vocabulary(model, request), request.length).items()
    }
    torch.save(results, Path(folder, "reference"))
    Path(folder, "memory").write_text(str(_peak_gib()))


def _rank(rank: int, request: Request, folder: str, ranks: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    register()
    model = build(request, IMPLEMENTATION)
    cp = ContextParallel(dist.group.WORLD, method=request.method)
    results = {
        name: rank_result(model, batch, cp)
        for name, batch in batches(_vocabulary(model, request), request.length).items()
    }
    Path(folder, _memory_names(ranks)[rank]).write_text(str(_peak_gib()))
    if rank == 0:
        wanted = torch.load(Path(folder, "reference"))
        torch.save(
            [row_of(name, found, wanted[name]) for name, found in results.items()], Path(folder, "rows")
        )
    dist.barrier()
    dist.destroy_process_group()


def _vocabulary(model: Any, request: Request) -> int:
    """Words of the random tokens: those that were asked for, as far as the model has them."""
    return min(request.vocabulary, int(model.config.get_text_config().vocab_size))


def _memory_names(ranks: int) -> list[str]:
    return [f"memory{rank}" for rank in range(ranks)]


def _peak_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _parsed(arguments: Sequence[str] | None) -> Request:
    parser = argparse.ArgumentParser(prog="python -m megatron_lightseq.hf.check", description=__doc__)
    parser.add_argument("model", help="a folder or a name that from_pretrained takes")
    parser.add_argument("--cp", type=int, default=2, help="ranks (default 2)")
    parser.add_argument(
        "--whole", action="store_true", help="own weights and all layers; default: cut down, random"
    )
    parser.add_argument(
        "--layers", type=int, default=2, help="layers of a model that is cut down (default 2)"
    )
    parser.add_argument(
        "--vocabulary", type=int, default=2048, help="words of the random tokens (default 2048)"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default 512)")
    parser.add_argument("--method", default="lightseq", help="as --cp-method of lightseq pretrain")
    given = parser.parse_args(arguments)
    if given.cp < 1 or given.layers < 1 or given.length < 16 or given.vocabulary < 8:
        parser.error("--cp and --layers are at least 1, --length at least 16, --vocabulary at least 8")
    return Request(**vars(given))


if __name__ == "__main__":
    sys.exit(main())
