"""Fine-tuning data that `lightseq prepare-data --pack` has packed: prompts, and answers whose tokens are learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from megatron_lightseq.errors import DataError, explain
from megatron_lightseq.training.data.checked_dataset import CheckedGPTDatasetConfig


class PackedDataset(MegatronDataset):
    """Packs of a corpus, in another order in every epoch.

    A sample has ``tokens``, ``labels``, ``position_ids`` (int64, (seq_length,)), ``loss_mask`` (fp32, (seq_length,))
    and ``documents``, the lengths of its documents; what follows them is padding. The loss is that of answers, and of
    the end of each: never of a prompt, of padding, or of another document's first token.
    """

    config: CheckedGPTDatasetConfig

    def __init__(
        self,
        dataset: IndexedDataset,
        dataset_path: str | None,
        indices: npt.NDArray[np.int32],
        num_samples: int | None,
        index_split: Split,
        config: CheckedGPTDatasetConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None
        """The epoch whose order was drawn last, and that order."""

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """The number of packs, which Megatron divides among training, validation and test."""
        return len(low_level_dataset.document_indices) - 1

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: CheckedGPTDatasetConfig) -> IndexedDataset:
        """The corpus at a prefix."""
        return IndexedDataset(dataset_path, multimodal=False, mmap=config.mmap_bin_files)

    def __len__(self) -> int:
        return len(self.indices) if self.num_samples is None else int(self.num_samples)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        epoch, at = divmod(idx, len(self.indices))
        if self._order is None or self._order[0] != epoch:
            drawn = np.random.default_rng([self.config.random_seed, epoch]).permutation(len(self.indices))
            self._order = epoch, drawn
        pack = int(self.indices[self._order[1][at]])
        first, end = self.dataset.document_indices[pack : pack + 2]
        parts = [np.asarray(self.dataset.get(number)) for number in range(int(first), int(end))]
        return self._sample(pack, parts)

    def _sample(self, pack: int, parts: list[npt.NDArray[np.integer[Any]]]) -> dict[str, Any]:
        """One pack, from prompt, answer, prompt, answer, ..."""
        length, eod = self.config.sequence_length, self.config.tokenizer.eod
        documents = [
            len(prompt) + len(answer) for prompt, answer in zip(parts[0::2], parts[1::2], strict=True)
        ]
        text = np.concatenate(parts).astype(np.int64)
        self._check(pack, text)
        tokens = np.full(length + 1, eod, dtype=np.int64)
        tokens[: len(text)] = text
        answers = np.zeros(length + 1, dtype=np.float32)
        starts = np.cumsum([0, *map(len, parts)])
        for start, stop in zip(starts[1::2], starts[2::2], strict=True):
            answers[start:stop] = 1
        answers[np.cumsum([0, *documents])[:-1]] = 0  # nothing of the same document predicts its first token
        return {
            "tokens": torch.from_numpy(tokens[:-1]),
            "labels": torch.from_numpy(tokens[1:]),
            "loss_mask": torch.from_numpy(answers[1:]),
            "position_ids": torch.arange(length),
            "documents": documents,
        }

    def _check(self, pack: int, text: npt.NDArray[np.int64]) -> None:
        limit, length = self.config.model_vocab_size, self.config.sequence_length
        if 0 < len(text) <= length and 0 <= text.min() <= text.max() < limit:
            return
        raise DataError(
            explain(
                got=f"pack {pack} of {self.dataset.path_prefix} has {len(text)} tokens with ids up to "
                f"{text.max(initial=0)}",
                rule=f"packs hold up to {length} tokens, whose ids are below the vocabulary's {limit}",
                remedy="Prepare the corpus again with `lightseq prepare-data --pack`",
            )
        )
