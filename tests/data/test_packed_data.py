"""Fine-tuning data: prompts and answers, packed without cutting any, with the loss on answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lightseq.cli import run
from megatron_lightseq.errors import ConfigError, DataError
from megatron_lightseq.training.data.best_fit import best_fit
from megatron_lightseq.training.data.corpus import check_index, read_facts
from megatron_lightseq.training.data.datasets import build_datasets, open_corpora
from megatron_lightseq.training.data.loaders import train_iterator, valid_iterator
from megatron_lightseq.training.data.rows import DataShare
from tests.data.corpora import config_for

EOD = 256
RECORDS = [
    {"prompt": f"question {number}: " * (number % 3), "answer": f"answer {number}!" * (1 + number % 2)}
    for number in range(24)
]


def write(folder: Path, records: list[dict[str, str]], name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    assert (
        run(["prepare-data", str(write(folder, RECORDS)), "--pack", "64", "--output", str(folder / "sft")])
        == 0
    )
    return folder / "sft"


# --- packing ----------------------------------------------------------------------------------------------------------


def test_every_document_is_in_one_pack_that_has_room_for_it() -> None:
    generator = np.random.default_rng(3)
    for capacity in (7, 50, 1000):
        lengths = generator.integers(1, capacity + 1, 400).tolist()
        packs = best_fit(lengths, capacity)
        assert sorted(number for pack in packs for number in pack) == list(range(400))
        filled = [sum(lengths[number] for number in pack) for pack in packs]
        assert max(filled) <= capacity
        assert len(packs) <= 11 / 9 * -(-sum(lengths) // capacity) + 1 or max(lengths) > capacity / 2
        assert packs == best_fit(lengths, capacity)


def test_the_fullest_pack_with_room_is_taken() -> None:
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([3, 7, 3], 10) == [[1, 0], [2]]
    assert best_fit([], 10) == []


# --- corpus -----------------------------------------------------------------------------------------------------------


def test_packs_are_documents_of_megatrons_index(prefix: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    facts, index, dataset = read_facts(prefix), check_index(prefix), IndexedDataset(str(prefix))
    assert facts is not None
    assert (facts.documents, facts.pack_length, len(dataset)) == (24, 64, 48)
    assert facts.packs == len(index.documents) - 1 < 24
    found = set()
    for pack in range(facts.packs):
        first, end = index.documents[pack : pack + 2]
        parts = [bytes(part[part < EOD].astype(np.uint8)).decode() for part in dataset[int(first) : int(end)]]
        assert int(index.lengths[first:end].sum()) <= 64
        found |= set(zip(parts[0::2], parts[1::2], strict=True))
    assert found == {(record["prompt"], record["answer"]) for record in RECORDS}


def test_the_same_options_do_nothing_and_other_lengths_pack_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prepare-data", str(write(tmp_path, RECORDS)), "--output", str(tmp_path / "sft"), "--pack"]
    assert run([*arguments, "64"]) == 0
    assert "% full; no document is cut" in capsys.readouterr().out
    assert run([*arguments, "64"]) == 0
    assert "is up to date: 24 documents" in capsys.readouterr().out
    assert run([*arguments, "80"]) == 0
    assert "packs of 80" in capsys.readouterr().out


def test_other_keys_and_records_that_fit_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [{"q": "1", "a": "short"}, {"q": "2" * 40, "a": "long"}]
    arguments = [
        "prepare-data",
        str(write(tmp_path, pairs)),
        "--pack",
        "32",
        "--output",
        str(tmp_path / "sft"),
    ]
    keys = ["--prompt-key", "q", "--text-key", "a"]
    assert run([*arguments, *keys]) != 0
    assert "line 2 has 45 tokens" in (message := capsys.readouterr().err)
    assert "at least 45 tokens, or leave such records out" in " ".join(message.split())
    assert run([*arguments, *keys, "--skip-bad-lines"]) == 0
    assert "1 longer than 32 tokens" in capsys.readouterr().out
    assert run(arguments) != 0
    assert "a string under the key 'prompt' and 'answer'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-key", "q"], "--prompt-key q without --pack"),
        (["--pack", "64"], "--pack 64 with 0 inputs"),
        (["FILE", "--pack", "1"], "--pack 1 with 1 inputs"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    from megatron_lightseq.cli.prepare_data import run as prepare_data

    named = [str(write(tmp_path, RECORDS)) if word == "FILE" else word for word in arguments]
    with pytest.raises(ConfigError, match=message):
        prepare_data([*named, "--output", str(tmp_path / "sft")])


def test_plain_text_has_no_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book.txt").write_text("once upon a time", encoding="utf-8")
    assert (
        run(["prepare-data", str(tmp_path / "book.txt"), "--pack", "32", "--output", str(tmp_path / "x")])
        != 0
    )
    assert "no records with prompts" in " ".join(capsys.readouterr().err.split())


# --- batches ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_answers(prefix: Path) -> None:
    config = config_for(
        str(prefix), sft=True, seq_length=64, micro_batch_size=2, eval_interval=5, eval_iters=1
    )
    datasets = build_datasets(config, open_corpora(config))
    learned: set[str] = set()
    for batch in train_iterator(config, datasets, DataShare()):
        packing, tokens, labels = (batch["packing"], batch["tokens"].flatten(), batch["labels"].flatten())
        packing.check_tokens(128)
        kept = batch["loss_mask"].flatten().bool()
        assert not bool((kept & packing.lasts()).any())
        assert torch.equal(labels[:63], tokens[1:64])
        assert torch.equal(batch["position_ids"].flatten(), packing.positions())
        for first, length in zip(packing.cu_seqlens, packing.lengths, strict=False):
            if length:
                text = bytes(
                    labels[first : first + length][kept[first : first + length]][:-1].tolist()
                ).decode()
                prompt_and_answer = bytes(tokens[first : first + length - 1].tolist()).decode()
                assert tokens[first + length - 1] == EOD
                assert prompt_and_answer.endswith(text)
                learned.add(text)
    answers = {record["answer"] for record in RECORDS}
    alone = {
        record["answer"][1:] for record in RECORDS if not record["prompt"]
    }  # nothing predicts a first token
    assert learned <= answers | alone
    assert len(learned) > 15
    assert len(list(valid_iterator(config, datasets, DataShare()))) == 2


def test_every_epoch_has_every_pack_once_in_another_order(prefix: Path) -> None:
    facts = read_facts(prefix)
    assert facts is not None
    config = config_for(
        str(prefix), sft=True, seq_length=64, split="1,0,0", train_iters=3 * facts.packs, global_batch_size=1
    )
    rows = [
        tuple(batch["tokens"][0].tolist())
        for batch in train_iterator(config, build_datasets(config, open_corpora(config)), DataShare())
    ]
    epochs = [rows[at : at + facts.packs] for at in range(0, len(rows), facts.packs)]
    assert len(epochs) == 3
    assert all(set(epoch) == set(epochs[0]) and len(set(epoch)) == facts.packs for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sft": True, "seq_length": 32}, r"packed into sequences of 64 tokens.*set seq_length to 64"),
        ({"seq_length": 32}, r"sft is false .*Set sft to true and seq_length to 64"),
    ],
)
def test_packs_are_read_as_they_were_made(prefix: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_corpora(config_for(str(prefix), **values))


def test_plain_corpora_are_no_packs(tmp_path: Path) -> None:
    from tests.data.corpora import make_corpus

    plain, _ = make_corpus(tmp_path)
    with pytest.raises(DataError, match=r"is not packed, and sft is true .*--pack 32 --output"):
        open_corpora(config_for(str(plain), sft=True))
