"""Fine-tuning data that `lightseq prepare-data --pack` has packed: prompts, and answers whose tokens are learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from megatron_lightseq.errors import DataError, explain
from megatron_lightseq.megatron.packing import Packing
from megatron_lightseq.training.data.checked_dataset import CheckedGPTDatasetConfig
from megatron_lightseq.training.data.pairs import document_lengths, first_parts
from megatron_lightseq.training.data.rows import Row, Stretch, tokens_and_labels


class PackedDataset(MegatronDataset):
    """Packs of a corpus, in another order in every epoch.

    What follows the documents of a pack is padding. The loss is that of answers, and of the end of each: never of a
    prompt, of padding, or of another document's first token.
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

    def read(self, number: int, positions: Sequence[range]) -> Row:
        """What a rank holds of a sample: its tokens at some positions, and what follows from them.

        Raises:
            DataError: the pack does not fit, or the rank's tokens have an id that the model does not know.
        """
        pack, stretches = self._pack(number)
        tokens, labels = tokens_and_labels(self.dataset, stretches, positions, fill=self.config.tokenizer.eod)
        self._check(pack, stretches, tokens, labels)
        at = np.concatenate([np.arange(each.start, each.stop, each.step) for each in (range(0), *positions)])
        learned = self._is_learned(stretches, at.astype(np.int64) + 1)
        return Row(tokens, labels, learned, tuple(stretches))

    def documents(self, number: int) -> Packing:
        """The documents of a sample, each of a prompt and an answer, and padding behind them."""
        _, stretches = self._pack(number)
        lengths = document_lengths(np.array([stretch.length for stretch in stretches]))
        return Packing.of_documents(lengths.tolist(), self.config.sequence_length)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """A whole sample."""
        length = self.config.sequence_length
        row = self.read(idx, [range(length)])
        return {
            "tokens": torch.from_numpy(row.tokens),
            "labels": torch.from_numpy(row.labels),
            "loss_mask": torch.from_numpy(row.loss_mask),
            "position_ids": torch.arange(length),
        }

    def _pack(self, number: int) -> tuple[int, list[Stretch]]:
        """The pack of a sample: prompt, answer, prompt, answer, ..., with joints between turns of a conversation."""
        epoch, at = divmod(number, len(self.indices))
        if self._order is None or self._order[0] != epoch:
            drawn = np.random.default_rng([self.config.random_seed, epoch]).permutation(len(self.indices))
            self._order = epoch, drawn
        pack = int(self.indices[self._order[1][at]])
        first, end = self.dataset.document_indices[pack : pack + 2].tolist()
        lengths = self.dataset.sequence_lengths
        return pack, [Stretch(part, 0, int(lengths[part])) for part in range(first, end)]

    def _is_learned(self, stretches: Sequence[Stretch], at: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """For labels at some positions of the text: 1 for answers, but not where a document begins."""
        lengths = np.array([stretch.length for stretch in stretches])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        part = np.searchsorted(starts, at, side="right") - 1
        in_answer = part % 2 == 1
        # Nothing of the same document predicts its first token, which belongs to the answer if there is no prompt.
        begins = np.isin(at, starts[first_parts(lengths)])
        learned: npt.NDArray[np.float32] = (in_answer & ~begins).astype(np.float32)
        return learned

    def _check(
        self,
        pack: int,
        stretches: Sequence[Stretch],
        tokens: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
    ) -> None:
        limit, length = self.config.model_vocab_size, self.config.sequence_length
        total = sum(stretch.length for stretch in stretches)
        ids = np.concatenate([tokens, labels])
        if 0 < total <= length and (not len(ids) or 0 <= ids.min() <= ids.max() < limit):
            return
        raise DataError(
            explain(
                got=f"pack {pack} of {self.dataset.path_prefix} has {total} tokens with ids up to "
                f"{ids.max(initial=0)}",
                rule=f"packs hold up to {length} tokens, whose ids are below the vocabulary's {limit}",
                remedy="Prepare the corpus again with `lightseq prepare-data --pack`",
            )
        )
