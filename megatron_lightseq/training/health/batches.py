"""The batches of a step: kept, so that the step can be repeated, and compared over the ranks that must share them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
import xxhash

from megatron_lightseq.errors import DataError, explain
from megatron_lightseq.training.collective import all_largest, largest
from megatron_lightseq.training.job.words import ranges
from megatron_lightseq.training.setup import Training
from megatron_lightseq.training.step import Batch
from megatron_lightseq.transport.group import rank_in

COMPARED = ("tokens", "labels", "loss_mask")
"""What of a batch is compared."""
_UNREAD = -(1 << 63)
"""In place of the digest of a rank that reads no batch: a stage in the middle of a pipeline."""


class RecordedBatches:
    """An iterator that keeps what it has returned."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.kept: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.kept.append(batch)
        return batch


def digests_of(reads: Sequence[RecordedBatches]) -> tuple[int, int]:
    """Digests (62 bits) of where the rows that this rank has read come from, and of the tokens that it holds of them.

    Every chunk of its model reads the same, or nothing.
    """
    origin, content = xxhash.xxh3_64(), xxhash.xxh3_64()
    kept = next((read.kept for read in reads if read.kept), None)
    if kept is None:
        return _UNREAD, _UNREAD
    for batch in kept:
        origin.update(str(batch.get("origin", "")).encode())
        for name in COMPARED:
            if name in batch:
                content.update(batch[name].cpu().contiguous().view(torch.uint8).numpy().data)
    return origin.intdigest() >> 2, content.intdigest() >> 2


def agree(training: Training, verdict: int, reads: Sequence[RecordedBatches], step: int) -> int:
    """The largest verdict of all ranks. Collective: one reduction of a few numbers per data parallel replica.

    Raises:
        DataError: ranks have read different batches that must share one; all ranks raise it.
    """
    sizes = training.sizes
    if sizes.world_size == 1:
        return verdict
    if sizes.world_size == sizes.data:
        return largest(verdict, training.device)
    replica = rank_in(training.groups.dp)
    shard = replica * sizes.context + rank_in(training.groups.cp)
    origin, content = digests_of(reads)
    # The largest of x and the largest of -x: they are opposite if all ranks have the same x.
    slots = [_UNREAD] * (2 * sizes.data * (1 + sizes.context))
    for slot, digest in ((replica, origin), (sizes.data + shard, content)):
        if digest != _UNREAD:
            slots[2 * slot : 2 * slot + 2] = digest, -digest
    worst, *found = all_largest([verdict, *slots], training.device)
    if any(high not in (_UNREAD, -low) for high, low in zip(found[0::2], found[1::2], strict=True)):
        raise _different({f"rows of replica {replica}": origin, f"tokens of shard {shard}": content}, step)
    return worst


def _different(own: dict[str, int], step: int) -> DataError:
    """Names the ranks by what they have read. Collective."""
    known: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(known, own)
    groups: dict[str, dict[int, list[int]]] = {}
    for rank, entry in enumerate(known):
        for what, digest in entry.items():
            if digest != _UNREAD:
                groups.setdefault(what, {}).setdefault(digest, []).append(rank)
    shown = "; ".join(
        f"{what}: " + ", ".join(f"ranks {ranges(ranks)} read {read:016x}" for read, ranks in readers.items())
        for what, readers in groups.items()
        if len(readers) > 1
    )
    return DataError(
        explain(
            got=f"the batches of step {step} differ: {shown}",
            rule="all ranks of a data parallel replica train on the same rows, and tensor and pipeline parallel ranks "
            "on the same tokens",
            remedy="Check that the data and its index cache are the same on all hosts, and the memory of the hosts",
        )
    )
