"""Published tokenizer files: stored truncation, gaps in the ids, and names of the end-of-document token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from megatron_lightseq.cli import run
from megatron_lightseq.errors import DataError
from megatron_lightseq.training.data.prepare import fingerprint, prepare
from megatron_lightseq.training.data.sources import find_files
from megatron_lightseq.training.data.tokenizers import NullTokenizer, Tokens, load_hf_tokenizer

SMALL = {"[UNK]": 0, "</s>": 1, "one": 2, "two": 3}


def words(vocabulary: dict[str, int], unknown: str = "[UNK]") -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def corpus(folder: Path, tokenizer: Tokenizer, text: str, *flags: str) -> list[int]:
    """The tokens that the command writes for the documents "one" and ``text``."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "a.jsonl").write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": text}))
    arguments = [
        "prepare-data",
        str(folder / "a.jsonl"),
        "--output",
        str(folder / "c"),
        "--tokenizer-type",
        "hf",
    ]
    assert run([*arguments, "--tokenizer-model", str(folder / "tokenizer.json"), "--quiet", *flags]) == 0
    facts = json.loads((folder / "c.json").read_text())
    token_type = np.uint16 if facts["vocab_size"] <= 2**16 else np.int32
    return list(map(int, np.fromfile(folder / "c.bin", token_type)))


def test_stored_truncation_padding_and_dropout_are_switched_off(tmp_path: Path) -> None:
    tokenizer = words(SMALL)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=6, pad_id=0)
    assert corpus(tmp_path, tokenizer, "one two one two one") == [2, 1, 2, 3, 2, 3, 2, 1]
    vocabulary = {"a": 0, "b": 1, "ab": 2, "</s>": 3}
    Tokenizer(models.BPE(vocabulary, [("a", "b")], dropout=0.9)).save(str(tmp_path / "bpe.json"))
    (ids,) = load_hf_tokenizer(tmp_path / "bpe.json").encode(["ab" * 200])
    assert ids.tolist() == [2] * 200


def test_ids_beyond_the_number_of_entries_are_kept(tmp_path: Path) -> None:
    assert corpus(tmp_path, words(SMALL | {"far": 90}), "one far") == [2, 1, 2, 90, 1]
    assert load_hf_tokenizer(tmp_path / "tokenizer.json").vocab_size == 91
    large = {f"w{i}": i for i in (*range(2, 60000), *range(66000, 70000))} | {
        "[UNK]": 0,
        "</s>": 1,
        "one": 60002,
    }
    assert corpus(tmp_path, words(large), "w7 w69999") == [60002, 1, 7, 69999, 1]


@dataclass(frozen=True)
class FixedTokenizer:
    """Gives every text the same ids."""

    ids: tuple[int, ...]
    vocab_size: int
    eod: int = 0
    unique_identifiers: Any = None

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        return [np.array(self.ids, dtype=np.int64) for _ in texts]


@pytest.mark.parametrize("number", [-1, 10, 2**40])
def test_an_id_outside_the_vocabulary_is_named_with_file_and_document(number: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text('\n{"text": "x"}\n')
    files = find_files([tmp_path / "b.jsonl"])
    with pytest.raises(
        DataError, match=rf"b\.jsonl line 2 \(document 0\) has the token id {number}: .*between 0 and 9"
    ):
        prepare(files, FixedTokenizer((1, number), vocab_size=10), tmp_path / "c")
    assert not list(tmp_path.glob("c.*"))


def test_ids_that_no_stored_type_holds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(
        DataError, match=r"the largest token id of the vocabulary is 2147483648: .*up to 2147483647"
    ):
        prepare(find_files([tmp_path / "a.txt"]), FixedTokenizer((1,), vocab_size=2**31 + 1), tmp_path / "c")
    prepare(find_files([tmp_path / "a.txt"]), FixedTokenizer((1, 2**20), vocab_size=2**31), tmp_path / "c")
    assert np.fromfile(tmp_path / "c.bin", np.int32).tolist() == [1, 2**20, 0]


def test_text_that_cannot_be_encoded_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        corpus(tmp_path, words({"one": 0, "</s>": 1}), "one three")
    message = capsys.readouterr().err
    assert "a.jsonl line 2: the tokenizer cannot encode this text" in message
    (tmp_path / "ids.jsonl").write_text('{"text": "1"}\n{"text": "1_0"}\n')
    with pytest.raises(DataError, match=r"ids\.jsonl line 2: the text '1_0'"):
        prepare(find_files([tmp_path / "ids.jsonl"]), NullTokenizer(vocab_size=99), tmp_path / "c")


# --- the end of a document ------------------------------------------------------------------------------------------


def byte_pairs(path: Path, special: Sequence[str], ordinary: Sequence[str] = ()) -> dict[str, int]:
    """A byte-level tokenizer like those of large models; returns the ids of its special tokens.

    Args:
        path: Where to write it.
        special: Its special tokens.
        ordinary: Entries that were learned.
    """
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet | {name: 256 + i for i, name in enumerate(ordinary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    begin = special[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    tokenizer.save(str(path))
    return {name: tokenizer.token_to_id(name) for name in special}


KINDS = {
    "deepseek": (
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"],
        "<｜end▁of▁sentence｜>",
    ),
    "llama 3": (["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], "<|end_of_text|>"),
    "gpt-oss": (["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|call|>"], "<|endoftext|>"),
    "qwen": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>"),
    "gemma": (["<bos>", "<eos>", "<pad>"], "<eos>"),
    "kimi": (["[BOS]", "[EOS]", "<|im_end|>"], "[EOS]"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_published_kinds_of_tokenizers_end_documents(kind: str, tmp_path: Path) -> None:
    special, end = KINDS[kind]
    ids = byte_pairs(tmp_path / "tokenizer.json", special, ordinary=["</s>"])
    tokenizer = load_hf_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.eod == ids[end]
    assert tokenizer.vocab_size == max(ids.values()) + 1
    (encoded,) = tokenizer.encode(["é x"])
    assert len(encoded) == 4, "one token per byte, and no beginning-of-sequence token"


def test_ids_that_the_library_changes_are_refused(tmp_path: Path) -> None:
    """The library numbers added tokens consecutively, so a token after a gap gets another id than in the file."""
    path = tmp_path / "tokenizer.json"
    byte_pairs(path, KINDS["llama 3"][0])
    stored = json.loads(path.read_text())
    stored["added_tokens"][1]["id"] += 1000
    path.write_text(json.dumps(stored))
    with pytest.raises(DataError, match=r"'<\|end_of_text\|>' with id 1257, and the library loads it as 257"):
        load_hf_tokenizer(path)


def test_another_end_is_chosen_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tokenizer.json"
    ids = byte_pairs(path, KINDS["llama 3"][0])
    default, chosen = load_hf_tokenizer(path), load_hf_tokenizer(path, "<|eot_id|>")
    assert (default.eod, chosen.eod) == (ids["<|end_of_text|>"], ids["<|eot_id|>"])
    assert fingerprint([], default) != fingerprint([], chosen)
    assert corpus(tmp_path, words(SMALL | {"END": 7}), "two", "--eod-token", "END") == [2, 7, 3, 7]
    (tmp_path / "a.txt").write_text("x")
    assert run(["prepare-data", str(tmp_path / "a.txt"), "--eod-token", "</s>"]) == 2
    assert "only the hf tokenizer has named tokens" in capsys.readouterr().err


def test_a_missing_end_lists_the_special_tokens(tmp_path: Path) -> None:
    byte_pairs(tmp_path / "t.json", ["<start>", "<stop>"])
    with pytest.raises(
        DataError, match=r"has none of <\|endoftext\|>.*Set --eod-token .* are: <start>, <stop>\.$"
    ):
        load_hf_tokenizer(tmp_path / "t.json")
    with pytest.raises(DataError, match=r"t\.json has no token '<end>': .* are: <start>, <stop>\.$"):
        load_hf_tokenizer(tmp_path / "t.json", "<end>")
    assert load_hf_tokenizer(tmp_path / "t.json", "<stop>").eod == 257
