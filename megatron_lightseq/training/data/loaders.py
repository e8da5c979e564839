"""Batches for every rank: deterministic, and resumable from the number of consumed samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.errors import DataError, explain
from megatron_lightseq.megatron.packing import Packing
from megatron_lightseq.training.data.datasets import Datasets

Batch = dict[str, Any]
"""Tensors, and ``packing`` of packed data: the documents of all rows, joined."""

KEYS = ("tokens", "labels", "loss_mask", "position_ids")
"""Tensors of a batch, (micro_batch_size, seq_length): whole sequences."""
DOCUMENTS = "documents"
"""Key of a sample that was packed when the corpus was prepared: the length of each of its documents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataShare:
    """Which part of each global batch a rank reads: the same for all tensor, pipeline and context parallel ranks."""

    rank: int = 0
    """Data parallel rank."""
    size: int = 1
    """Number of data parallel ranks."""

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, f"data parallel rank {self.rank} of {self.size}"


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
    return _iterate(config, datasets, datasets.train, share, first=consumed_samples, last=needed)


def valid_iterator(config: PretrainConfig, datasets: Datasets, share: DataShare) -> Iterator[Batch]:
    """The `eval_iters` validation batches: the same at every evaluation, so that losses are comparable."""
    assert datasets.valid is not None, "eval_interval is null: there is no validation data"
    needed = config.training.eval_iters * config.training.global_batch_size
    return _iterate(config, datasets, datasets.valid, share, first=0, last=needed)


def _iterate(
    config: PretrainConfig, datasets: Datasets, dataset: Any, share: DataShare, *, first: int, last: int
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
        dataset,
        batch_sampler=sampler,
        num_workers=config.data.num_workers,
        generator=generator,
        collate_fn=Collator.of(config, datasets),
    )
    return iter(loader)


@dataclass(frozen=True, kw_only=True, slots=True)
class Collator:
    """Stacks samples, and finds the documents in them; drops the keys that only a blend adds."""

    eod: int
    """The token that ends a document, in samples that do not say where their documents end."""
    packs: bool
    """Whether documents do not attend to one another."""
    restarts_positions: bool
    """Whether positions are counted within documents."""

    @staticmethod
    def of(config: PretrainConfig, datasets: Datasets) -> Collator:
        """What a run does with its samples."""
        data = config.data
        return Collator(eod=datasets.eod, packs=data.packed, restarts_positions=data.restarts_positions)

    def __call__(self, samples: list[dict[str, Any]]) -> Batch:
        """A batch of :data:`KEYS`, (B, S); of packed data also ``packing``, with its mask made."""
        batch: Batch = default_collate([{key: sample[key] for key in KEYS} for sample in samples])
        if self.packs or self.restarts_positions:
            rows = [self._documents(sample) for sample in samples]
            if self.restarts_positions:
                batch["position_ids"] = torch.stack([row.positions() for row in rows])
            if self.packs:
                batch["packing"] = Packing.joined(rows)
                batch["packing"].mask  # noqa: B018 - made here, ahead of the step
        return batch

    def _documents(self, sample: dict[str, Any]) -> Packing:
        if DOCUMENTS in sample:
            return Packing.of_documents(sample[DOCUMENTS], len(sample["tokens"]))
        return Packing.of_tokens(sample["tokens"], self.eod)
