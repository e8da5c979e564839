"""Batches for every rank: deterministic, and resumable from the number of consumed samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from torch.utils.data import DataLoader

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.errors import DataError, explain
from megatron_lightseq.megatron.batch import Shard
from megatron_lightseq.megatron.packing import Packing
from megatron_lightseq.training.data.datasets import Datasets
from megatron_lightseq.training.data.rows import DataShare, part_of

Batch = dict[str, Any]
"""Tensors; ``packing`` of packed data, the documents of all rows, joined; and ``shard`` where a rank holds a part."""


class ShareSampler:
    """Indexes of one rank's micro-batches, in order, from `consumed_samples` to `num_samples`.

    Rank r takes the r-th micro_batch_size of every micro_batch_size * size consecutive samples; an incomplete last
    group is left out.
    """

    def __init__(
        self, *, num_samples: int, consumed_samples: int, micro_batch_size: int, share: DataShare
    ) -> None:
        self._group = micro_batch_size * share.size
        self._offset = micro_batch_size * share.rank
        self._micro_batch_size = micro_batch_size
        self._range = range(consumed_samples, num_samples - self._group + 1, self._group)

    def __len__(self) -> int:
        return len(self._range)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._range:
            first = start + self._offset
            yield list(range(first, first + self._micro_batch_size))


def train_iterator(
    config: PretrainConfig, datasets: Datasets, share: DataShare, *, consumed_samples: int = 0
) -> Iterator[Batch]:
    """Micro-batches of training data after `consumed_samples` sequences (over all ranks), up to `train_iters`.

    Raises:
        DataError: The dataset is shorter than the run.
    """
    needed = config.training.train_iters * config.training.global_batch_size
    if len(datasets.train) < needed:
        raise DataError(
            explain(
                got=f"the training data has {len(datasets.train)} samples",
                rule=f"train_iters * global_batch_size = {needed}",
                remedy="Remove the index cache, which belongs to another run",
            )
        )
    return _iterate(config, datasets.train, share, first=consumed_samples, last=needed)


def valid_iterator(config: PretrainConfig, datasets: Datasets, share: DataShare) -> Iterator[Batch]:
    """The `eval_iters` validation batches: the same at every evaluation, so that losses are comparable."""
    assert datasets.valid is not None, "eval_interval is null: there is no validation data"
    needed = config.training.eval_iters * config.training.global_batch_size
    return _iterate(config, datasets.valid, share, first=0, last=needed)


def _iterate(
    config: PretrainConfig, dataset: Any, share: DataShare, *, first: int, last: int
) -> Iterator[Batch]:
    sampler = ShareSampler(
        num_samples=last,
        consumed_samples=first,
        micro_batch_size=config.training.micro_batch_size,
        share=share,
    )
    # Without a generator argument, the loader draws from the global generator whenever an iterator is made. A resumed
    # run makes one more iterator, so all of its dropout masks would differ.
    generator = torch.Generator().manual_seed(config.training.seed)
    loader = DataLoader(
        MicroBatches.of(config, dataset, share),
        batch_sampler=sampler,
        num_workers=config.data.num_workers,
        generator=generator,
        collate_fn=_as_it_is,
    )
    return iter(loader)


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclass(frozen=True, kw_only=True)
class MicroBatches(torch.utils.data.Dataset[Batch]):
    """The micro-batches of a rank, of which it reads the tokens that it holds."""

    dataset: Any
    """Ours, or Megatron's blend of several."""
    share: DataShare
    length: int
    """Tokens of a row."""
    joins_rows: bool
    """Whether the rows of a micro-batch are cut as one sequence."""
    packs: bool
    """Whether documents do not attend to one another."""
    restarts_positions: bool
    """Whether positions are counted within documents."""

    @staticmethod
    def of(config: PretrainConfig, dataset: Any, share: DataShare) -> MicroBatches:
        """What a run reads."""
        data, length = config.data, config.training.seq_length
        return MicroBatches(
            dataset=dataset,
            share=share,
            length=length,
            joins_rows=config.joined_seq_length > length,
            packs=data.packed,
            restarts_positions=data.restarts_positions,
        )

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        """A micro-batch; torch's DataLoader calls this with the numbers of its samples.

        Returns:
            ``tokens``, ``labels``, ``position_ids`` (int64) and ``loss_mask`` (fp32), each (B, local tokens), or
            (1, local tokens) of joined rows; and ``origin``, which says where the rows come from. Of packed data also
            ``packing``, with its mask made; and over context-parallel ranks ``shard``, which layout and rank the
            tensors are cut for.
        """
        held = self._held(len(numbers))
        sources = [_source(self.dataset, number) for number in numbers]
        rows = [
            source.read(number, positions) for (source, number), positions in zip(sources, held, strict=True)
        ]
        join = torch.cat if self.joins_rows else torch.stack
        batch: Batch = {
            name: join([torch.from_numpy(getattr(row, name)) for row in rows])
            for name in ("tokens", "labels", "loss_mask")
        }
        at = [_numbers(positions) for positions in held]
        if self.packs or self.restarts_positions:
            documents = [source.documents(number) for source, number in sources]
            if self.restarts_positions:
                at = [row.positions(places) for row, places in zip(documents, at, strict=True)]
            if self.packs:
                batch["packing"] = Packing.joined(documents)
                batch["packing"].mask  # noqa: B018 - made here, ahead of the step
        batch["position_ids"] = join(at)
        batch["origin"] = repr([(number, row.stretches) for number, row in zip(numbers, rows, strict=True)])
        if self.joins_rows:
            batch = {name: x[None] if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        if self.share.layout.cp_size > 1:
            batch["shard"] = Shard(self.share.layout, self.share.cp_rank)
        return batch

    def _held(self, rows: int) -> list[list[range]]:
        """For each row of a micro-batch, the positions of this rank's tokens in it."""
        if not self.joins_rows:
            return [self.share.positions(self.length)] * rows
        whole = self.share.positions(rows * self.length)
        starts = range(0, rows * self.length, self.length)
        return [
            [
                range(part.start - start, part.stop - start, part.step)
                for part, _ in (part_of(each, start, start + self.length) for each in whole)
            ]
            for start in starts
        ]


def _source(dataset: Any, number: int) -> tuple[Any, int]:
    """The dataset that a sample comes from, and its number there."""
    if not isinstance(dataset, BlendedDataset):
        return dataset, number
    return dataset.datasets[dataset.dataset_index[number]], int(dataset.dataset_sample_index[number])


def _numbers(positions: Sequence[range]) -> torch.Tensor:
    """(local tokens,) int64: ranges as numbers."""
    parts = [torch.arange(each.start, each.stop, each.step) for each in positions]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])
