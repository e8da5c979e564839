"""Ranks read only their own tokens: what they read is what a whole batch would have been cut into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lightseq.cli import run
from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.errors import DataError, LayoutError
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.megatron.batch import Shard, adopt_shard
from megatron_lightseq.training.data.corpus import read_facts
from megatron_lightseq.training.data.datasets import Datasets, build_datasets, open_corpora
from megatron_lightseq.training.data.loaders import train_iterator
from megatron_lightseq.training.data.rows import DataShare, part_of
from tests.data.corpora import config_for, make_corpus
from tests.data.test_loaders import write_foreign_corpus
from tests.data.test_packed_data import RECORDS, write
from tests.harness.ranks import run_ranks

LENGTH = 48
LAYOUTS = [SequenceLayout(name, size) for name in ("contiguous", "zigzag", "striped") for size in (2, 3, 4)]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("local"))[0]


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    pairs = str(write(folder, RECORDS))
    assert run(["prepare-data", pairs, "--pack", str(LENGTH), "--output", str(folder / "sft")]) == 0
    return folder / "sft"


def opened(prefix: Path, **values: object) -> tuple[PretrainConfig, Datasets]:
    small = {"seq_length": LENGTH, "micro_batch_size": 2, "train_iters": 6}
    config = config_for(str(prefix), **{**small, **values})
    return config, build_datasets(config, open_corpora(config))


def read(config: PretrainConfig, datasets: Datasets, **share: Any) -> list[dict[str, Any]]:
    return list(train_iterator(config, datasets, DataShare(**share)))


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """The bytes of every read of a corpus file, tokens of a strided read that are skipped included."""
    from megatron.core.datasets import indexed_dataset

    found: list[int] = []
    original = indexed_dataset._MMapBinReader.read

    def counted(reader: Any, dtype: Any, count: int, offset: int) -> Any:
        content = original(reader, dtype, count, offset)
        found.append(content.nbytes)
        return content

    indexed_dataset._MMapBinReader.read = counted
    try:
        yield found
    finally:
        indexed_dataset._MMapBinReader.read = original


KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "masked ends": {"eod_mask_loss": True},
    "restarted positions": {"reset_position_ids": True, "position_embedding_type": "learned_absolute"},
    "packed": {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True},
    "packed, positions of rows": {"reset_attention_mask": True},
    "prompts": {"sft": True},
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_those_of_whole_batches(
    kind: str, layout: SequenceLayout, prefix: Path, packs: Path
) -> None:
    config, datasets = opened(packs if kind == "prompts" else prefix, **KINDS[kind])
    whole = read(config, datasets)
    for rank in range(layout.cp_size):
        parts = read(config, datasets, layout=layout, cp_rank=rank)
        assert len(parts) == len(whole) > 10
        for part, batch in zip(parts, whole, strict=True):
            assert part.pop("shard") == (layout, rank)
            assert part.keys() == batch.keys()
            assert part.get("packing") == batch.get("packing")
            for name in ("tokens", "labels", "loss_mask", "position_ids"):
                assert torch.equal(part[name], layout.shard(batch[name], rank, 1)), (name, rank)
                assert part[name].dtype == batch[name].dtype


@pytest.mark.parametrize("masked", [False, True])
def test_whole_samples_are_megatrons(masked: bool, prefix: Path) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset

    train = opened(prefix, eod_mask_loss=masked)[1].train
    for number in range(len(train)):
        ours, theirs = train[number], GPTDataset.__getitem__(train, number)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert number > 20


@pytest.mark.parametrize("kind", ["plain", "packed", "prompts"])
@pytest.mark.parametrize("name", ["contiguous", "zigzag"])
def test_the_bytes_that_a_rank_reads_are_those_of_its_tokens(
    kind: str, name: str, prefix: Path, packs: Path
) -> None:
    """One label more for each piece that it holds; also of packed data, whose borders are in the index."""
    config, datasets = opened(packs if kind == "prompts" else prefix, **KINDS[kind])
    with counted_bytes() as whole:
        batches = len(read(config, datasets))
    for size in (2, 4):
        layout = SequenceLayout(name, size)
        for rank in range(size):
            with counted_bytes() as found:
                read(config, datasets, layout=layout, cp_rank=rank)
            pieces = len(layout.chunks_of(rank))
            most = batches * 2 * (2 * LENGTH // size + 2 * pieces)  # uint16, two rows
            assert 0 < sum(found) <= most
            assert sum(found) < 0.7 * sum(whole)
            assert kind == "prompts" or sum(found) >= most - batches * 4


def test_borders_of_corpora_from_elsewhere_are_looked_for(tmp_path: Path, prefix: Path) -> None:
    """Their documents may hold the end token inside, or lack it at the end."""
    facts = read_facts(prefix)
    assert facts is not None
    assert facts.end_tokens == facts.documents == 40
    assert facts.ends_are_borders
    documents = [[3] * 11 + [256] * (number % 3) + [4] * 7 for number in range(60)]
    foreign = write_foreign_corpus(tmp_path / "foreign", documents)
    config, datasets = opened(foreign, reset_attention_mask=True, micro_batch_size=1)
    ends = 0
    for batch in read(config, datasets):
        expected = [0, *((batch["tokens"][0] == 256).nonzero().flatten() + 1).tolist(), LENGTH]
        assert batch["packing"].cu_seqlens == tuple(dict.fromkeys(expected))
        ends += len(expected) - 2
    assert ends > 20


def test_an_unknown_token_is_named_by_the_rank_that_holds_it(tmp_path: Path) -> None:
    documents = [[7] * LENGTH for _ in range(60)]
    documents[11][40] = 999
    values = {"micro_batch_size": 1, "train_iters": 20, "split": "1,0,0"}
    config, datasets = opened(write_foreign_corpus(tmp_path / "bad", documents), **values)
    layout = SequenceLayout.contiguous(4)
    for rank in range(3):
        assert len(read(config, datasets, layout=layout, cp_rank=rank)) == 80
    with pytest.raises(DataError, match=r"bad\.bin has the token id 999 in document 11 at token 40"):
        read(config, datasets, layout=layout, cp_rank=3)


@pytest.mark.parametrize("cut", [Shard(SequenceLayout.zigzag(2), 1), Shard(SequenceLayout.contiguous(2), 0)])
def test_batches_of_another_cut_are_refused(cut: Shard) -> None:
    layout = SequenceLayout.contiguous(2)
    batch = {"tokens": torch.zeros(1, 4)}
    with pytest.raises(
        LayoutError, match=rf"cut by {cut.layout.name}\(2\) for rank {cut.rank}, on rank 1 of"
    ):
        adopt_shard(batch, cut, layout, 1)
    assert adopt_shard(batch, Shard(layout, 1), layout, 1)["tokens"] is batch["tokens"]


def test_parts_of_ranges() -> None:
    for positions in (range(0, 12), range(3, 30, 3), range(5, 5), range(2, 40, 7)):
        for first, end in pairwise(range(0, 45, 4)):
            part, before = part_of(positions, first, end)
            assert list(part) == [at for at in positions if first <= at < end]
            assert not part or positions[before] == part[0]


def _losses(prefix: str, values: dict[str, Any], whole: bool) -> list[tuple[float, float, int]]:
    from megatron.core import parallel_state

    from megatron_lightseq.megatron.cpu import platform
    from megatron_lightseq.training.setup import build_training
    from megatron_lightseq.training.step import train_step
    from megatron_lightseq.transport.group import rank_in
    from tests.megatron.runs import TINY

    if not torch.cuda.is_available():
        platform.activate()
    given = {**TINY, "data_path": (prefix,), "train_iters": 3, "split": "1,0,0", **values}
    config = with_values(PretrainConfig(), **given)
    datasets = build_datasets(config, open_corpora(config))
    training = build_training(config, vocab_size=257)
    cut = {} if whole else {"layout": training.layout, "cp_rank": rank_in(training.groups.cp)}
    iterator = train_iterator(config, datasets, DataShare(**cut))
    try:
        results = [train_step(training, [iterator]) for _ in range(3)]
        return [(result.loss, result.grad_norm, result.num_tokens) for result in results]
    finally:
        parallel_state.destroy_model_parallel()


TRAINED: dict[str, dict[str, Any]] = {
    "averages of micro-batches": {"calculate_per_token_loss": False},
    "zigzag": {"cp_method": "zigzag", "eod_mask_loss": True},
    "packed": {"reset_attention_mask": True, "eod_mask_loss": True, "micro_batch_size": 2},
    "further tokens": {"mtp_num_layers": 1, "reset_attention_mask": True, "reset_position_ids": True},
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_on_parts_has_the_bits_of_training_on_whole_sequences(name: str, prefix: Path) -> None:
    values = {"context_parallel_size": 2, **TRAINED[name]}
    whole = run_ranks(2, _losses, str(prefix), values, True, timeout_s=240)
    parts = run_ranks(2, _losses, str(prefix), values, False, timeout_s=240)
    assert parts == whole
    assert parts[0] == parts[1]
