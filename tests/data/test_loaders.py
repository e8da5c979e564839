"""Megatron's datasets and our loaders: contents, order, shares, resumption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.errors import DataError
from megatron_lightseq.training.data.datasets import (
    Corpora,
    Datasets,
    build_datasets,
    open_corpora,
    split_blend,
)
from megatron_lightseq.training.data.loaders import ShareSampler, train_iterator, valid_iterator
from megatron_lightseq.training.data.prepare import prepare
from megatron_lightseq.training.data.rows import DataShare
from megatron_lightseq.training.data.safe_cache import save_index_cache
from megatron_lightseq.training.data.sources import find_files
from megatron_lightseq.training.data.tokenizers import ByteTokenizer
from tests.data.corpora import config_for, make_corpus, write_texts
from tests.harness.ranks import run_ranks


def open_and_build(config: PretrainConfig) -> tuple[Corpora, Datasets]:
    corpora = open_corpora(config)
    return corpora, build_datasets(config, corpora)


def rows(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [row for batch in batches for row in batch["tokens"].tolist()]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"))[0]


@pytest.fixture(scope="module")
def config(prefix: Path) -> PretrainConfig:
    return config_for(str(prefix), eval_interval=5, eval_iters=2, micro_batch_size=2)


@pytest.fixture(scope="module")
def built(config: PretrainConfig) -> tuple[Corpora, Datasets]:
    return open_and_build(config)


# --- samples --------------------------------------------------------------------------------------------------------


def test_batches_hold_whole_shifted_sequences_of_the_corpus(
    config: PretrainConfig, built: tuple[Corpora, Datasets], prefix: Path
) -> None:
    corpus = np.fromfile(f"{prefix}.bin", dtype=np.uint16).astype(np.int64)
    windows = {tuple(w) for w in np.lib.stride_tricks.sliding_window_view(corpus, 8).tolist()}
    batches = list(train_iterator(config, built[1], DataShare()))
    assert len(batches) == 12 * 2
    for batch in batches:
        assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids", "origin"}
        assert all(tensor.shape == (2, 32) for name, tensor in batch.items() if name != "origin")
        assert {batch[key].dtype for key in ("tokens", "labels", "position_ids")} == {torch.int64}
        assert batch["loss_mask"].dtype == torch.float32
        assert batch["loss_mask"].eq(1).all()
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        assert torch.equal(batch["position_ids"], torch.arange(32).expand(2, 32))
    found = [tuple(row[start : start + 8]) for row in rows(batches) for start in range(0, 24, 8)]
    inside = [window for window in found if 256 not in window]
    assert len(inside) > 50
    assert set(inside) <= windows


def test_facts_reach_the_run(built: tuple[Corpora, Datasets], prefix: Path) -> None:
    corpora, _ = built
    assert corpora.vocab_size == 257
    assert corpora.entropy is not None
    counts = np.bincount(np.fromfile(f"{prefix}.bin", dtype=np.uint16))
    shares = counts[counts > 0] / counts.sum()
    assert corpora.entropy == pytest.approx(-(shares * np.log(shares)).sum())


def test_fingerprint_depends_on_contents_and_not_on_paths(tmp_path: Path) -> None:
    """Ranks compare it, because hosts may have prepared different texts under the same name."""

    def fingerprint(prefix: Path) -> str:
        return open_corpora(config_for(str(prefix))).fingerprint

    texts, other = write_texts(tmp_path / "texts"), write_texts(tmp_path / "other", count=41)
    found = []
    for name, folder in (("a", texts), ("b", texts), ("c", other)):
        prepare(find_files([folder]), ByteTokenizer(), tmp_path / name)
        found.append(fingerprint(tmp_path / name))
    for name in "abc":
        (tmp_path / f"{name}.json").unlink()  # as if Megatron's own tools had prepared it
        found.append(fingerprint(tmp_path / name))
    assert found[0] == found[1] != found[2]
    assert found[3] == found[4] != found[5]


def test_masked_loss_ends_documents(prefix: Path) -> None:
    config = config_for(str(prefix), eod_mask_loss=True)
    batches = list(train_iterator(config, open_and_build(config)[1], DataShare()))
    masks = torch.cat([batch["loss_mask"] for batch in batches])
    tokens = torch.cat([batch["tokens"] for batch in batches])
    assert torch.equal(masks == 0, tokens == 256)
    assert (masks == 0).any()


@pytest.mark.parametrize("workers", [0, 1])
def test_documents_and_their_positions_reach_the_batch(prefix: Path, workers: int) -> None:
    values = {
        "reset_attention_mask": True,
        "reset_position_ids": True,
        "micro_batch_size": 2,
        "num_workers": workers,
    }
    config = config_for(str(prefix), **values)
    ends = 0
    for batch in train_iterator(config, open_and_build(config)[1], DataShare()):
        packing, tokens = batch["packing"], batch["tokens"].flatten()
        packing.check_tokens(64)
        document = torch.tensor([sum(border <= at for border in packing.cu_seqlens[1:]) for at in range(64)])
        after_end = torch.cat([torch.tensor([False]), tokens[:-1] == 256])
        assert torch.equal(document.diff() > 0, (after_end | (torch.arange(64) == 32))[1:])
        assert torch.equal(batch["position_ids"].flatten(), packing.positions())
        ends += int(after_end[:32].sum())
    assert ends > 3
    plain = next(
        train_iterator(config_for(str(prefix)), open_and_build(config_for(str(prefix)))[1], DataShare())
    )
    assert "packing" not in plain


def test_seed_changes_the_order_and_nothing_else_does(config: PretrainConfig, tmp_path: Path) -> None:
    def order(**values: object) -> list[list[int]]:
        changed = with_values(config, **values)
        return rows(list(train_iterator(changed, open_and_build(changed)[1], DataShare())))

    first = order()
    assert order() == first
    assert order(data_cache_path=str(tmp_path / "elsewhere")) == first
    assert order(eval_interval=None) == first
    assert order(num_workers=1) == first
    assert order(seed=7) != first


def test_validation_is_the_same_every_time_and_disjoint_from_training(
    config: PretrainConfig, built: tuple[Corpora, Datasets]
) -> None:
    first = rows(list(valid_iterator(config, built[1], DataShare())))
    assert len(first) == 2 * 4
    assert rows(list(valid_iterator(config, built[1], DataShare()))) == first
    seen = {tuple(row[:16]) for row in rows(list(train_iterator(config, built[1], DataShare())))}
    assert not seen & {tuple(row[:16]) for row in first if 256 not in row}


# --- shares and resumption ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2])
def test_shares_are_disjoint_and_together_the_whole(
    size: int, config: PretrainConfig, built: tuple[Corpora, Datasets]
) -> None:
    whole = rows(list(train_iterator(config, built[1], DataShare())))
    shares = [list(train_iterator(config, built[1], DataShare(rank=rank, size=size))) for rank in range(size)]
    together = [row for batches in zip(*shares, strict=True) for row in rows(list(batches))]
    assert together == whole


@pytest.mark.parametrize("steps", [1, 5, 12])
def test_resuming_continues_where_the_run_stopped(
    steps: int, config: PretrainConfig, built: tuple[Corpora, Datasets]
) -> None:
    whole = rows(list(train_iterator(config, built[1], DataShare(rank=1, size=2))))
    resumed = train_iterator(config, built[1], DataShare(rank=1, size=2), consumed_samples=4 * steps)
    assert rows(list(resumed)) == whole[2 * steps :]


def test_making_iterators_leaves_the_global_generators_alone(
    config: PretrainConfig, built: tuple[Corpora, Datasets]
) -> None:
    state, legacy = torch.get_rng_state(), np.random.get_state()
    for _ in range(2):
        next(train_iterator(config, built[1], DataShare()))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], legacy[1])


def test_sampler_leaves_out_an_incomplete_group() -> None:
    sampler = ShareSampler(
        num_samples=11, consumed_samples=4, micro_batch_size=1, share=DataShare(rank=1, size=3)
    )
    assert list(sampler) == [[5], [8]]
    assert len(sampler) == 2


def test_dataset_of_another_run_is_refused(config: PretrainConfig, built: tuple[Corpora, Datasets]) -> None:
    longer = with_values(config, train_iters=10_000)
    with pytest.raises(DataError, match=r"the training data has \d+ samples: .*= 40000"):
        train_iterator(longer, built[1], DataShare())


# --- several ranks --------------------------------------------------------------------------------------------------


def _build_and_read(paths: tuple[str, ...], cache: str) -> tuple[list[list[int]], list[str]]:
    config = config_for(*paths, eval_interval=5, eval_iters=2, data_cache_path=cache)
    corpora, datasets = open_and_build(config)
    batches = list(train_iterator(config, datasets, DataShare()))
    return rows(batches), sorted(path.name for path in corpora.cache.iterdir())


def test_ranks_build_once_and_read_the_same(tmp_path: Path) -> None:
    prefix, _ = make_corpus(tmp_path)
    results = run_ranks(2, _build_and_read, (str(prefix),), str(tmp_path / "cache"))
    assert results[0] == results[1]
    alone = config_for(str(prefix), eval_interval=5, eval_iters=2, data_cache_path=str(tmp_path / "cache"))
    assert rows(list(train_iterator(alone, open_and_build(alone)[1], DataShare()))) == results[0][0]
    assert not [name for name in results[0][1] if ".tmp-" in name]


def test_blend_draws_by_weight(tmp_path: Path) -> None:
    paths: list[str] = []
    for name, letter, weight in (("a", "a", 0.25), ("b", "b", 0.75)):
        folder = write_texts(tmp_path / name)
        for path in folder.iterdir():
            path.write_text(letter * 100)
        prepare(find_files([folder]), ByteTokenizer(), tmp_path / f"corpus-{name}")
        paths += [str(weight), str(tmp_path / f"corpus-{name}")]
    results = run_ranks(2, _build_and_read, tuple(paths), str(tmp_path / "cache"))
    assert results[0] == results[1]
    letters = [max(set(row) - {256}, key=row.count) for row in results[0][0]]
    assert letters.count(ord("b")) == 36
    assert letters.count(ord("a")) == 12


# --- numbers that are used as indexes ---------------------------------------------------------------------------------


def write_foreign_corpus(prefix: Path, documents: list[list[int]]) -> Path:
    """A corpus as Megatron's own tools prepare it, without facts about its token ids."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("number", [257, 2**31 - 1, -1, -7])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_token_that_the_model_does_not_know_is_named(number: int, workers: int, tmp_path: Path) -> None:
    documents = [[7] * 40 for _ in range(30)]
    good = write_foreign_corpus(tmp_path / "good", documents)
    documents[11][3] = number
    bad = write_foreign_corpus(tmp_path / "bad", documents)

    def read(prefix: Path, **values: object) -> int:
        config = config_for(str(prefix), train_iters=20, num_workers=workers, **values)
        return len(list(train_iterator(config, open_and_build(config)[1], DataShare())))

    assert read(good) == 80
    with pytest.raises(
        DataError,
        match=rf"bad\.bin has the token id {number} in document 11 at token 3: .*has the ids 0 to 256",
    ):
        read(bad)
    if number == 257:
        assert read(bad, vocab_size=258) == 80


def shifted(samples: np.ndarray) -> np.ndarray:
    """Every other sample is one token longer, and the next one a token shorter."""
    return samples + (np.arange(len(samples)) % 2)[:, None] * np.array([0, 1])


CACHES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], str]] = {
    "unknown documents": ("document", lambda a: a + 40, "document_index is beyond the 40 documents"),
    "columns of documents": ("document", lambda a: a[:, None], "document_index is beyond"),
    "unknown samples": ("sample", lambda a: a + 1000, "sample_index is beyond"),
    "flat samples": ("sample", lambda a: a.reshape(-1), "sample_index is beyond"),
    "long offsets": (
        "sample",
        lambda a: a + np.array([0, 1000]),
        "sample_index has offsets outside their doc",
    ),
    "backwards": ("sample", lambda a: a[::-1], "sample_index has offsets outside their documents"),
    "uneven samples": ("sample", shifted, r"sample \d+ does not have 32 tokens"),
    "unknown order": ("shuffle", lambda a: a + 1, "shuffle_index does not fit"),
    "short order": ("shuffle", lambda a: a[:-1], "shuffle_index does not fit"),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_points_elsewhere_is_named(name: str, tmp_path: Path) -> None:
    """Megatron would read wrong tokens, pad with -1 or raise IndexError in the middle of the run."""
    prefix, _ = make_corpus(tmp_path)
    config = config_for(str(prefix), split="1,0,0")
    corpora, _ = open_and_build(config)
    kind, change, text = CACHES[name]
    (path,) = corpora.cache.glob(f"*-{kind}_index.npy")
    save_index_cache(path, change(np.load(path)).astype(np.load(path).dtype))
    with pytest.raises(DataError, match=rf"the index cache in .* is wrong: {text}.*Remove that folder"):
        list(train_iterator(config, open_and_build(config)[1], DataShare()))


def test_a_sample_of_another_length_is_refused_whether_shorter_or_longer(tmp_path: Path) -> None:
    prefix, _ = make_corpus(tmp_path)
    config = config_for(str(prefix), split="1,0,0")
    corpora, _ = open_and_build(config)
    (path,) = corpora.cache.glob("*-sample_index.npy")
    save_index_cache(path, shifted(np.load(path)).astype(np.load(path).dtype))
    train = open_and_build(config)[1].train
    for number in range(len(train)):
        with pytest.raises(DataError, match=rf"sample {number} does not have 32 tokens"):
            train[number]


@pytest.mark.parametrize(
    ("kind", "text"), [("dataset", "beyond the 2 corpora"), ("dataset_sample", "beyond the samples")]
)
def test_a_blend_that_points_elsewhere_is_named(kind: str, text: str, tmp_path: Path) -> None:
    first, second = (str(make_corpus(tmp_path, name)[0]) for name in ("a", "b"))
    paths, cache = ("1", first, "2", second), str(tmp_path / "cache")
    results = run_ranks(1, _build_and_read, paths, cache)
    assert len(results[0][0]) == 48
    (path,) = Path(cache).glob(f"*/*train-{kind}_index.npy")
    save_index_cache(path, np.load(path) + 1000)
    config = config_for(*paths, eval_interval=5, eval_iters=2, data_cache_path=cache)
    with pytest.raises(DataError, match=text):
        open_and_build(config)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_missing_corpus_is_refused_before_any_process_group() -> None:
    with pytest.raises(DataError, match=r"nowhere\.idx is missing.*--output nowhere"):
        open_corpora(config_for("nowhere"))


def test_corpus_of_another_tokenizer_is_refused(prefix: Path) -> None:
    other = config_for(str(prefix), tokenizer_type="null", vocab_size=300)
    with pytest.raises(
        DataError,
        match=r"was prepared with.*ByteTokenizer.*Set tokenizer_type, tokenizer_model and eod_token",
    ):
        open_corpora(other)


def test_vocabulary_smaller_than_the_tokenizer_is_refused(prefix: Path) -> None:
    with pytest.raises(DataError, match="vocab_size 100 with a tokenizer of 257 tokens"):
        open_corpora(config_for(str(prefix), vocab_size=100))
    assert open_corpora(config_for(str(prefix), vocab_size=300)).vocab_size == 300


def test_split_without_a_sequence_is_refused(prefix: Path) -> None:
    """Megatron 0.16.1 would count epochs without tokens in an endless loop."""
    with pytest.raises(
        DataError, match=r"the training split of .* has 40 documents with 4528 tokens.* = 8193"
    ):
        open_corpora(config_for(str(prefix), seq_length=8192, split="1,0,0"))
    with pytest.raises(DataError, match=r"the validation split of .* has 0 documents with 0 tokens"):
        open_corpora(config_for(str(prefix), split="999,1,0", eval_interval=1))
    assert open_corpora(config_for(str(prefix), split="999,1,0")).vocab_size == 257


def test_cache_folder_that_cannot_be_used_is_refused(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = config_for(str(prefix), data_cache_path=str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be used \(Not a directory\).*Set data_cache_path"):
        build_datasets(config, open_corpora(config))


def test_a_corpus_that_was_prepared_again_is_not_used_with_old_indexes(tmp_path: Path) -> None:
    prefix, _ = make_corpus(tmp_path)
    before, _ = open_and_build(config_for(str(prefix)))
    (tmp_path / "corpus-texts" / "new.txt").write_text("something new" * 40)
    prepare(find_files([tmp_path / "corpus-texts"]), ByteTokenizer(), prefix)
    after, _ = open_and_build(config_for(str(prefix)))
    assert before.cache != after.cache
    assert before.cache.parent == after.cache.parent


@pytest.mark.parametrize(
    ("data_path", "blend"),
    [
        (("a",), (("a",), None)),
        (("1", "a"), (("a",), (1.0,))),
        (("0.3", "a", "0.7", "b"), (("a", "b"), (0.3, 0.7))),
    ],
)
def test_split_blend(data_path: tuple[str, ...], blend: object) -> None:
    assert split_blend(data_path) == blend
