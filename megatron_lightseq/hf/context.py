"""A context-parallel group as a Hugging Face training loop uses it: cut the batch, count targets, gather results."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lightseq.attention import AttentionStats, DistAttention
from megatron_lightseq.attention.distributed import MethodArgument
from megatron_lightseq.errors import ConfigError, TransportError, explain
from megatron_lightseq.hf import batch as batches
from megatron_lightseq.hf.batch import Sequences
from megatron_lightseq.hf.supported import check_model
from megatron_lightseq.kernels.registry import Kernel
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.transport import connect
from megatron_lightseq.transport.group import Group, rank_in, size_of

PLAN = "lightseq"
"""The keyword argument in which a batch's :class:`Shard` travels through a model to its attention layers."""


Kind = tuple[float | None, int | None, int | None]
"""What attention layers differ in: softcap, window, chunk."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a plan depends on besides the mask and the length, of one kind of layer."""

    dtype: torch.dtype
    device: torch.device
    heads: tuple[tuple[int, int], ...]
    """Number and dimension, of queries, keys and values."""

    def like(self, tokens: int, rows: int) -> tuple[Tensor, ...]:
        """Tensors (tokens, rows, heads, dimension) of such a layer, which take no memory."""
        one = torch.zeros((), dtype=self.dtype, device=self.device)
        return tuple(one.expand(tokens, rows, *heads) for heads in self.heads)


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """What the attention layers of a model must know about a batch that was cut."""

    attention: Callable[[float | None], DistAttention]
    """The attention whose scores have a given softcap."""
    sequences: Sequences
    length: int
    """Tokens of this rank's shard of a sequence."""
    group: Group | None = None
    """The ranks that hold the other shards; None if there are none."""
    is_token: Tensor | None = None
    """(S,) booleans, false at tokens of the shard that only complete the length; None if there are none."""
    adds_router_loss: bool = False
    """Whether the batch asks for the load balancing loss of experts."""
    router_loss_of: torch.nn.Module | None = None
    """The module whose output gets that loss of the whole batch; None if it stays that of a shard."""
    kinds: dict[Kind, Facts] = field(default_factory=dict)
    """The kinds of layers that were seen, of all batches of the group."""
    router_weight: float = 1.0
    """Factor of that loss, for trainers that average over ranks what is added up here."""


class ContextParallel:
    """One context-parallel group, and the attention over it.

    Nothing is global: a model may be used with several of these, and several batches may be in flight::

        hf.register()
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="lightseq")
        cp = hf.ContextParallel(group)
        cp.check(model)
        loss = model(**cp.shard(batch), num_items_in_batch=cp.num_targets(batch)).loss
        loss.backward()      # loss and gradients are this rank's part: sum them over the group
    """

    def __init__(
        self,
        group: Group | None = None,
        *,
        method: MethodArgument = "lightseq",
        layout: str = "contiguous",
        kernel: str | Kernel = "auto",
        overlap: bool = True,
        pad_to_multiple_of: int | None = None,
        check_batches: bool = True,
    ) -> None:
        """Arguments as for :func:`megatron_lightseq.dist_attention`, and two more.

        Args:
            group: the ranks that share every sequence; None for a single rank.
            pad_to_multiple_of: tokens that the length of every batch is completed to. A plan is made for every new
                length, so packed text without padding has a new plan in every batch.
            check_batches: compare the tokens of every batch between the ranks, which costs one small collective.

        Raises:
            LayoutError, UnsupportedError: as :class:`DistAttention`.
        """
        self.group, self.rank, self.size = group, rank_in(group), size_of(group)
        self.layout = SequenceLayout(layout, self.size)
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ConfigError(
                explain(
                    got=f"pad_to_multiple_of={pad_to_multiple_of}",
                    rule="it is a number of tokens, at least 1",
                    remedy="Leave it out to pad to what the ranks can share",
                )
            )
        self._multiple_of = math.lcm(self.layout.num_chunks, pad_to_multiple_of or 1)
        self.stats = AttentionStats()
        """Counts of forwards and bytes of all models that use this group."""
        self._settings: dict[str, Any] = {"method": method, "kernel": kernel, "overlap": overlap}
        self._kinds: dict[Kind, Facts] = {}
        self._attentions: dict[float | None, DistAttention] = {}
        self.attention()  # refuses settings that do not fit together
        self._transport = connect(group) if group is not None and self.size > 1 and check_batches else None

    def attention(self, softcap: float | None = None) -> DistAttention:
        """The attention of all layers whose scores have this softcap (Gemma 2; None: no softcap); made once."""
        if softcap not in self._attentions:
            self._attentions[softcap] = DistAttention(
                self.group, layout=self.layout, softcap=softcap, stats=self.stats, **self._settings
            )
        return self._attentions[softcap]

    def check(self, model: torch.nn.Module) -> None:
        """Refuse a model whose result would be another one with its sequence cut.

        Args:
            model: a transformers model; adapters of PEFT and wrappers of data parallelism are looked through.

        Raises:
            UnsupportedError: what the model has that is not supported, and what to do.
        """
        check_model(model, cut=self.size > 1)

    def shard(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of a batch. Collective: every rank gives the same whole batch.

        Rows of plain text stay rows, (B, N / P). Rows with padding or several documents become one sequence,
        (1, T / P); :meth:`gather` undoes it. Lengths need not divide: they are completed with tokens without labels.

        Args:
            batch: as a collator makes it: ``input_ids`` or ``inputs_embeds``, ``attention_mask``, ``position_ids``,
                ``labels`` or ``shift_labels``, ``cu_seq_lens_q``, ``seq_idx``; others are handed on if they are not
                tensors.

        Returns:
            Keyword arguments for the model: shards, global positions, labels that are shifted already, no cache, and
            the plan of the batch as ``lightseq``.

        Raises:
            ConfigError: tensors do not fit together.
            UnsupportedError: something in the batch that cannot be cut.
            TransportError: ranks hold different batches.
        """
        if PLAN in batch:
            raise ConfigError(
                explain(
                    got="a batch that has been cut",
                    rule="batches are cut once",
                    remedy="Call shard in your loop or leave it to the trainer, not both",
                )
            )
        sequences = batches.read(batch, self._multiple_of)
        self._check_same(sequences)
        local = {
            name: self.layout.shard(x, self.rank, 1).contiguous() for name, x in sequences.fields.items()
        }
        if "shift_labels" in local:
            local["labels"] = local["shift_labels"]  # models compute a loss only where there are labels
        shard = Shard(
            attention=self.attention,
            sequences=sequences,
            length=local["position_ids"].shape[1],
            group=self.group if self.size > 1 else None,
            is_token=self._is_token(sequences, local["position_ids"].device),
            kinds=self._kinds,
            adds_router_loss=bool(batch.get("output_router_logits")),
        )
        return {**sequences.others, **local, "use_cache": False, PLAN: shard}

    def prepare(self, batch: Mapping[str, Any]) -> None:
        """Make the plans of a batch ahead, such as the next one's while this one is computed.

        Its attention then neither plans nor starts a collective for it: digests of the plans travel meanwhile. Every
        rank prepares the same batches in the same order. Before the first forward pass there is nothing to prepare for.

        Args:
            batch: a whole one, as for :meth:`shard`.
        """
        sequences = batches.read(batch, self._multiple_of)
        rows, length = sequences.fields["position_ids"].shape
        for (softcap, window, chunk), facts in self._kinds.items():
            q, k, v = facts.like(length // self.size, rows)
            self.attention(softcap).prepare(sequences.mask(window, chunk), (q, k, v))

    def num_targets(self, batch: Mapping[str, Any]) -> int:
        """Targets of a whole batch, before or after :meth:`shard`: ``num_items_in_batch`` of a loop of one's own.

        With gradient accumulation and data parallelism, give the sum over all batches of the step.

        Raises:
            ConfigError: the batch has no labels.
        """
        shard = batch.get(PLAN)
        sequences = batches.read(batch, self._multiple_of) if shard is None else shard.sequences
        if "shift_labels" not in sequences.fields:
            raise ConfigError(
                explain(
                    got=f"a batch of {', '.join(sorted(batch))}",
                    rule="targets are counted in labels or shift_labels",
                    remedy="Give labels",
                )
            )
        return sequences.num_targets

    def gather(self, x: Tensor, batch: Mapping[str, Any] | None = None) -> Tensor:
        """What all ranks computed for a batch, in the order of its tokens. Collective and differentiable.

        Args:
            x: (B, S, ...) or (1, S, ...), such as logits: this rank's part.
            batch: what :meth:`shard` returned for it.

        Returns:
            (B, N, ...) as the batch was before it was cut, with zeros at padding; without ``batch`` the sequence that
            was cut, (B, T, ...). The gradient of a rank's part is the sum of what all ranks derive for it.
        """
        parts = (
            [x] if self.group is None or self.size == 1 else list(_Gather.apply(x.contiguous(), self.group))
        )
        whole = self.layout.unshard(parts, 1)
        if batch is None:
            return whole
        sequences: Sequences = batch[PLAN].sequences
        rows, length = sequences.shape
        if sequences.kept is None:
            return whole[:, :length]
        kept = sequences.kept.to(whole.device)
        flat = whole.new_zeros((rows * length, *whole.shape[2:]))
        places = kept.nonzero().flatten()
        return flat.index_copy(0, places, whole[0, : len(places)]).unflatten(0, (rows, length))

    def _is_token(self, sequences: Sequences, device: torch.device) -> Tensor | None:
        if sequences.tokens == sequences.length:
            return None
        return (
            self.layout.shard(torch.arange(sequences.length, device=device), self.rank, 0) < sequences.tokens
        )

    def _check_same(self, sequences: Sequences) -> None:
        """Every rank of a group must get the same batch: a loader that gives each its own would go unnoticed."""
        if self._transport is None:
            return
        digest = hashlib.sha256(repr((sequences.shape, sequences.documents)).encode())
        for name in sorted(sequences.fields):
            if name != "inputs_embeds":  # large, and floats of different devices may differ
                digest.update(sequences.fields[name].cpu().contiguous().numpy().tobytes())
        everyone = self._transport.gather_digests(digest.digest())
        others = [rank for rank, other in enumerate(everyone) if other != digest.digest()]
        if others:
            raise TransportError(
                explain(
                    got=f"rank {self.rank} of the context-parallel group has another batch than ranks {others}",
                    rule="all ranks of a group hold the same batch and each takes its part",
                    remedy="Give the sampler the data-parallel rank and size, not the rank among all processes",
                )
            )


class _Gather(torch.autograd.Function):
    """All ranks' parts; the gradient of a part is summed over what the ranks derive for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x, group=group)
        return tuple(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = torch.stack(gradients)
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.group.rank()], None
