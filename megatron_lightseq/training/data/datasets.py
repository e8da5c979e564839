"""Megatron's GPTDataset over checked corpora.

There are two steps because they fail differently: :func:`open_corpora` reads and checks files before any process group
exists, in the same way on every rank; :func:`build_datasets` then builds Megatron's index caches, rank 0 first.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.config.rules_run import split_shares
from megatron_lightseq.errors import DataError, explain
from megatron_lightseq.training.data.corpus import (
    CorpusFacts,
    Index,
    check_facts,
    check_index,
    content_digest,
    read_facts,
    verify_content,
)
from megatron_lightseq.training.data.safe_cache import CACHE_FORMAT, safe_index_caches
from megatron_lightseq.training.data.tokenizers import Tokenizer, build_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpora:
    """The corpora of a run, read and checked; needs no process group."""

    tokenizer: Tokenizer
    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None
    """Weight of each prefix; None for one prefix without a weight."""
    indexes: tuple[Index, ...]
    facts: tuple[CorpusFacts | None, ...]
    """None for data that Megatron's own tools prepared."""
    cache: Path
    """Folder of index caches; named after the contents, so that indexes are never used with other data."""
    vocab_size: int
    """Number of token ids before padding."""

    @property
    def entropy(self) -> float | None:
        """Unigram entropy in nats, weighted over corpora; None if a corpus has no facts."""
        weights = self.weights or (1.0,)
        known = [facts.entropy for facts in self.facts if facts is not None]
        if len(known) < len(self.facts):
            return None
        return sum(w * e for w, e in zip(weights, known, strict=True)) / sum(weights)

    @property
    def fingerprint(self) -> str:
        """Short hash of the contents that `prepare-data` recorded, or else of the lengths of all documents."""
        digest = hashlib.sha256()
        for facts, index in zip(self.facts, self.indexes, strict=True):
            digest.update(index.lengths.tobytes() if facts is None else facts.content.encode())
        return digest.hexdigest()[:16]

    @property
    def identity(self) -> dict[str, Any]:
        """What two runs must share for one to continue on the data of the other, by name, for JSON."""
        return {
            "corpus": self.fingerprint,
            "mixture": None if self.weights is None else list(self.weights),
            "tokenizer": dict(self.tokenizer.unique_identifiers),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Datasets:
    """Result of `build_datasets`: samples, of which :mod:`~megatron_lightseq.training.data.loaders` reads parts."""

    train: Any
    valid: Any | None
    """None if `eval_interval` is null."""


def open_corpora(config: PretrainConfig) -> Corpora:
    """Read and check everything that `data_path` names; raises DataError with file, fault and remedy."""
    tokenizer = build_tokenizer(config.data)
    prefixes, weights = split_blend(config.data.data_path)
    indexes = tuple(check_index(prefix) for prefix in prefixes)
    facts = tuple(read_facts(prefix) for prefix in prefixes)
    for prefix, known, index in zip(prefixes, facts, indexes, strict=True):
        if known is not None:
            _check_tokenizer(prefix, known, tokenizer)
            check_facts(prefix, known, index)
        _check_packing(prefix, known, config)
        _check_splits(prefix, index, config)
    contents = f"caches {CACHE_FORMAT} of {''.join(map(content_digest, prefixes))}"
    digest = hashlib.sha256(contents.encode()).hexdigest()[:16]
    folder = config.data.data_cache_path or str(Path(prefixes[0]).parent / "cache")
    return Corpora(
        tokenizer=tokenizer,
        prefixes=prefixes,
        weights=weights,
        indexes=indexes,
        facts=facts,
        cache=Path(folder) / digest,
        vocab_size=_vocabulary(config, tokenizer),
    )


def verify_contents(corpora: Corpora, *, part: int, num_parts: int) -> None:
    """Hash this rank's share of the data files; raises DataError for one that is not what prepare-data wrote."""
    for prefix in corpora.prefixes[part::num_parts]:
        verify_content(prefix)


def split_blend(data_path: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Prefixes and weights of `[prefix]` or `[weight, prefix, weight, prefix, ...]`."""
    if len(data_path) == 1:
        return data_path, None
    return data_path[1::2], tuple(map(float, data_path[::2]))


def build_datasets(config: PretrainConfig, corpora: Corpora) -> Datasets:
    """Training and validation datasets; with a process group, a collective call (rank 0 builds, others then read).

    The order of samples depends on `seed`, `seq_length`, `train_iters * global_batch_size` and `split`.

    Raises:
        DataError: The cache folder cannot be used, or an index cache in it is damaged. Reading a sample with a token
            id outside the model's vocabulary raises DataError, too.
    """
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    from megatron_lightseq.training.data.checked_dataset import (
        CheckedGPTDataset,
        CheckedGPTDatasetConfig,
        check_blend,
    )
    from megatron_lightseq.training.data.packed_dataset import PackedDataset

    _make_cache_folder(corpora.cache)
    blend = (list(corpora.prefixes), None if corpora.weights is None else list(corpora.weights))
    dataset_config = CheckedGPTDatasetConfig(
        random_seed=config.training.seed,
        sequence_length=config.training.seq_length,
        blend=blend,
        split=config.data.split,
        path_to_cache=str(corpora.cache),
        tokenizer=corpora.tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=config.data.eod_mask_loss,
        create_attention_mask=False,
        model_vocab_size=corpora.vocab_size,
        ends_are_borders=frozenset(
            prefix
            for prefix, facts in zip(corpora.prefixes, corpora.facts, strict=True)
            if facts is not None and facts.ends_are_borders
        ),
    )
    evaluates = config.training.eval_interval is not None
    assert dataset_config.split_matrix is not None
    dataset_config.split_matrix[1:] = [dataset_config.split_matrix[1] if evaluates else None, None]
    batch = config.training.global_batch_size
    sizes = [config.training.train_iters * batch, config.training.eval_iters * batch, 0]
    with safe_index_caches():
        kind = PackedDataset if config.data.sft else CheckedGPTDataset
        builder = BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, dataset_config)
        train, valid, _ = builder.build()
    for dataset in (train, valid):
        if isinstance(dataset, BlendedDataset):
            check_blend(dataset)
    return Datasets(train=train, valid=valid)


def _check_tokenizer(prefix: str, facts: CorpusFacts, tokenizer: Tokenizer) -> None:
    if facts.tokenizer != tokenizer.unique_identifiers:
        raise DataError(
            explain(
                got=f"{prefix} was prepared with {facts.tokenizer}, the run has {tokenizer.unique_identifiers}",
                rule="a run must use the tokenizer that wrote its corpus",
                remedy="Set tokenizer_type, tokenizer_model and eod_token as in prepare-data, or prepare it again",
            )
        )


def _check_packing(prefix: str, facts: CorpusFacts | None, config: PretrainConfig) -> None:
    """Fine-tuning reads packs of its sequence length; as plain text they would lack most of their meaning."""
    length, wanted = (0 if facts is None else facts.pack_length), config.training.seq_length
    if length == (wanted if config.data.sft else 0):
        return
    raise DataError(
        explain(
            got=f"{prefix} is {f'packed into sequences of {length} tokens' if length else 'not packed'}, and sft is "
            f"{str(config.data.sft).lower()} with seq_length {wanted}",
            rule="sft reads corpora that prepare-data has packed for the same seq_length, and nothing else reads them",
            remedy=f"Run `lightseq prepare-data FILE --pack {wanted} --output {prefix}`, or set seq_length to {length}"
            if config.data.sft and length
            else f"Run `lightseq prepare-data FILE --pack {wanted} --output {prefix}`"
            if config.data.sft
            else f"Set sft to true and seq_length to {length}, or prepare the corpus without --pack",
        )
    )


def _check_splits(prefix: str, index: Index, config: PretrainConfig) -> None:
    """Every split that is used must have at least one sequence: Megatron would look for one in an endless loop."""
    shares = split_shares(config.data.split)
    assert shares is not None, "a rule requires a valid split"
    packed = config.data.sft
    count = len(index.documents) - 1 if packed else len(index.lengths)
    bounds = [0.0, shares[0], shares[0] + shares[1]]
    wanted = {"training": (bounds[0], bounds[1])}
    if config.training.eval_interval is not None:
        wanted["validation"] = (bounds[1], bounds[2])
    for name, (start, end) in wanted.items():
        first, last = round(start * count), round(end * count)
        needed = 1 if packed else config.training.seq_length + 1
        found = last - first if packed else int(index.lengths[first:last].sum(dtype=np.int64))
        if found < needed:
            holds = f"{last - first} packs" if packed else f"{last - first} documents with {found} tokens"
            rule = (
                "training needs at least one" if packed else f"one sequence needs seq_length + 1 = {needed}"
            )
            raise DataError(
                explain(
                    got=f"the {name} split of {prefix} has {holds}",
                    rule=rule,
                    remedy="Prepare more text, change split, or lower seq_length",
                )
            )


def _vocabulary(config: PretrainConfig, tokenizer: Tokenizer) -> int:
    asked = config.data.vocab_size
    if asked is not None and asked < tokenizer.vocab_size:
        raise DataError(
            explain(
                got=f"vocab_size {asked} with a tokenizer of {tokenizer.vocab_size} tokens",
                rule="the vocabulary of the model includes every token",
                remedy=f"Set vocab_size to null or to at least {tokenizer.vocab_size}",
            )
        )
    return asked or tokenizer.vocab_size


def _make_cache_folder(folder: Path) -> None:
    """Create the folder on every rank before rank 0 writes: an error later would leave the other ranks waiting."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK)
        reason = "no permission to write"
    except OSError as error:
        usable, reason = False, str(error.strerror)
    if not usable:
        raise DataError(
            explain(
                got=f"the cache folder {folder} cannot be used ({reason})",
                rule="index caches are written next to the data unless data_cache_path is set",
                remedy="Set data_cache_path to a folder that all ranks share and can write to",
            )
        )
