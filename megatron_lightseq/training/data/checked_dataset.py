"""Megatron's GPTDataset with every number checked that it would otherwise use as an index.

A token id outside the vocabulary raises IndexError on one rank. With tensor parallelism there is not even an error:
every rank assumes that the id belongs to another rank, and its embedding is zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_lightseq.errors import DataError, explain


@dataclass
class CheckedGPTDatasetConfig(GPTDatasetConfig):
    """Megatron's configuration and the vocabulary of the model."""

    model_vocab_size: int = 0
    """Number of token ids before padding."""


class CheckedGPTDataset(GPTDataset):
    """Samples whose token ids the model knows; raises DataError with file, document and id otherwise."""

    config: CheckedGPTDatasetConfig

    def _query_document_sample_shuffle_indices(
        self, idx: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Token ids of a sample, and its documents. Overrides a method that GPTDataset calls for every sample."""
        tokens, documents = super()._query_document_sample_shuffle_indices(idx)
        if len(tokens) != self.config.sequence_length + 1 or not self._are_known(tokens):
            raise self._unknown_tokens(idx, documents)
        return tokens, documents

    def _are_known(self, tokens: npt.NDArray[np.integer]) -> bool:
        return bool(0 <= tokens.min() <= tokens.max() < self.config.model_vocab_size)

    def _unknown_tokens(self, sample: int, documents: npt.NDArray[np.int64]) -> DataError:
        """Names the first bad id; where there is none, the index cache has led to a sample of another length."""
        for document in documents:
            content = np.asarray(self.dataset.get(int(document)))
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
        return self._wrong_cache(f"sample {sample} does not have {self.config.sequence_length} tokens")

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
