"""Megatron's GPTDataset with every number checked that it would otherwise use as an index.

A token id outside the vocabulary raises IndexError on one rank. With tensor parallelism there is not even an error:
every rank assumes that the id belongs to another rank, and its embedding is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_lightseq.errors import DataError, explain
from megatron_lightseq.megatron.packing import Packing
from megatron_lightseq.training.data.rows import Row, Stretch, read_text, tokens_and_labels

SEARCHED_TOKENS = 2**16
"""Tokens that are in memory at a time while documents are looked for."""


@dataclass
class CheckedGPTDatasetConfig(GPTDatasetConfig):
    """Megatron's configuration and the vocabulary of the model."""

    model_vocab_size: int = 0
    """Number of token ids before padding."""
    ends_are_borders: frozenset[str] = frozenset()
    """Prefixes of corpora in which end-of-document tokens are where the index says that documents end."""


class CheckedGPTDataset(GPTDataset):
    """Samples whose token ids the model knows, whole or in parts; otherwise a DataError names file, document and id."""

    config: CheckedGPTDatasetConfig

    def read(self, number: int, positions: Sequence[range]) -> Row:
        """What a rank holds of a sample.

        Args:
            number: of the sample.
            positions: those of the rank's tokens, from 0 to sequence_length.

        Raises:
            DataError: the rank's tokens have an id that the model does not know, or the index cache is wrong.
        """
        stretches = self._stretches(number)
        tokens, labels = tokens_and_labels(self.dataset, stretches, positions)
        if not (self._are_known(tokens) and self._are_known(labels)):
            raise self._unknown_tokens(number, stretches)
        loss_mask = np.ones(len(tokens), dtype=np.float32)
        if self.config.eod_mask_loss:
            loss_mask[tokens == self.config.tokenizer.eod] = 0
        return Row(tokens, labels, loss_mask, tuple(stretches))

    def documents(self, number: int) -> Packing:
        """The documents of a sample, each of which ends with the end-of-document token, but maybe the last.

        They follow from the lengths in the index where `prepare-data` says so. Otherwise the tokens are searched, some
        at a time.
        """
        length, eod = self.config.sequence_length, self.config.tokenizer.eod
        stretches = self._stretches(number)
        ends: list[int] = []
        if self.dataset.path_prefix in self.config.ends_are_borders:
            starts = accumulate((stretch.length for stretch in stretches), initial=0)
            for start, (sequence, offset, count) in zip(starts, stretches, strict=False):
                if offset + count == self.dataset.sequence_lengths[sequence]:
                    ends.append(start + count)
        else:
            for start in range(0, length, SEARCHED_TOKENS):
                searched = range(start, min(start + SEARCHED_TOKENS, length))
                found = read_text(self.dataset, stretches, searched, fill=-1)
                ends += (start + 1 + np.flatnonzero(found == eod)).tolist()
        inside = (end for end in ends if end <= length)
        return Packing.of_borders(tuple(dict.fromkeys((0, *inside, length))))

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        """A whole sample, as Megatron's."""
        row = self.read(idx, [range(self.config.sequence_length)])
        return {
            "tokens": torch.from_numpy(row.tokens),
            "labels": torch.from_numpy(row.labels),
            "loss_mask": torch.from_numpy(row.loss_mask),
            "position_ids": torch.arange(self.config.sequence_length),
        }

    def _stretches(self, number: int) -> list[Stretch]:
        """What makes up the text of a sample, with its last label."""
        at = self.shuffle_index[number]
        (first, offset), (last, end) = self.sample_index[at].tolist(), self.sample_index[at + 1].tolist()
        stretches = []
        for document in range(first, last + 1):
            sequence = int(self.document_index[document])
            begin = offset if document == first else 0
            stop = end + 1 if document == last else int(self.dataset.sequence_lengths[sequence])
            stretches.append(Stretch(sequence, begin, stop - begin))
        fits = all(
            stretch.length >= 0
            and stretch.offset + stretch.length <= self.dataset.sequence_lengths[stretch.sequence]
            for stretch in stretches
        )
        if not fits or sum(stretch.length for stretch in stretches) != self.config.sequence_length + 1:
            raise self._wrong_cache(f"sample {number} does not have {self.config.sequence_length} tokens")
        return stretches

    def _are_known(self, tokens: npt.NDArray[np.integer]) -> bool:
        return not len(tokens) or bool(0 <= tokens.min() <= tokens.max() < self.config.model_vocab_size)

    def _unknown_tokens(self, sample: int, stretches: Sequence[Stretch]) -> DataError:
        """Names the first bad id in the documents of a sample."""
        for document in (stretch.sequence for stretch in stretches):
            content = np.asarray(self.dataset.get(document))
            if len(content) and not self._are_known(content):
                known = (content >= 0) & (content < self.config.model_vocab_size)
                place = int(np.argmin(known))
                return DataError(
                    explain(
                        got=f"{self.dataset.path_prefix}.bin has the token id {content[place]} in document {document} "
                        f"at token {place}",
                        rule=f"the vocabulary of the model has the ids 0 to {self.config.model_vocab_size - 1}",
                        remedy="Use the tokenizer that wrote the corpus, or set vocab_size to more than its largest id",
                    )
                )
        raise AssertionError(f"sample {sample} has a token that is nowhere in its documents")

    def _build_document_sample_shuffle_indices(
        self,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.integer], npt.NDArray[np.integer]]:
        """The three indexes of GPTDataset, built or read from the cache; raises DataError if they point nowhere."""
        documents, samples, order = super()._build_document_sample_shuffle_indices()
        lengths = self.dataset.sequence_lengths
        if documents.ndim != 1 or not _below(documents, len(lengths)):
            raise self._wrong_cache(f"document_index is beyond the {len(lengths)} documents of the corpus")
        if (
            samples.ndim != 2
            or samples.shape[1] != 2
            or len(samples) < 2
            or not _below(samples[:, 0], len(documents))
        ):
            raise self._wrong_cache(f"sample_index is beyond the {len(documents)} entries of document_index")
        if bool((samples[:, 1] > lengths[documents[samples[:, 0]]]).any()) or bool(
            (np.diff(samples[:, 0]) < 0).any()
        ):
            raise self._wrong_cache("sample_index has offsets outside their documents")
        if order.shape != (len(samples) - 1,) or not _below(order, len(samples) - 1):
            raise self._wrong_cache(f"shuffle_index does not fit {len(samples) - 1} samples")
        return documents, samples, order

    def _wrong_cache(self, got: str) -> DataError:
        return _wrong_cache(self.config, f"{got}, {self.dataset.path_prefix}, {self.index_split.name}")


def check_blend(dataset: BlendedDataset) -> None:
    """Raises DataError if the cached indexes of a blend point to corpora or samples that do not exist."""
    chosen, samples = dataset.dataset_index, dataset.dataset_sample_index
    if chosen.ndim != 1 or chosen.shape != samples.shape or not _below(chosen, len(dataset.datasets)):
        raise _wrong_cache(
            dataset.config, f"dataset_index is beyond the {len(dataset.datasets)} corpora of the blend"
        )
    sizes = np.array([len(one) for one in dataset.datasets])
    if bool((samples >= sizes[chosen]).any()):
        raise _wrong_cache(dataset.config, "dataset_sample_index is beyond the samples of its corpus")


def _below(indexes: npt.NDArray[np.integer], end: int) -> bool:
    return bool(len(indexes) == 0 or indexes.max() < end)


def _wrong_cache(config: GPTDatasetConfig, got: str) -> DataError:
    return DataError(
        explain(
            got=f"the index cache in {config.path_to_cache} is wrong: {got}",
            rule="an index cache belongs to one corpus and one configuration",
            remedy="Remove that folder; it will be rebuilt",
        )
    )
