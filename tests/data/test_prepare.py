"""From text to an indexed corpus: contents, counts, repetition and interruption."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lightseq.cli import run
from megatron_lightseq.config import DataConfig
from megatron_lightseq.errors import DataError
from megatron_lightseq.training.data.corpus import check_index, read_facts
from megatron_lightseq.training.data.documents import ReadCounts, read_documents
from megatron_lightseq.training.data.prepare import fingerprint, prepare, up_to_date
from megatron_lightseq.training.data.sources import find_files, find_stdlib_files
from megatron_lightseq.training.data.tokenizers import (
    ByteTokenizer,
    NullTokenizer,
    build_tokenizer,
    load_hf_tokenizer,
)
from tests.data.corpora import make_corpus, write_texts


def files_at(prefix: Path) -> list[str]:
    return sorted(path.name for path in prefix.parent.iterdir() if path.is_file())


def make_hf_tokenizer(path: Path, end: str = "<|endoftext|>") -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[end], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["document number one", "document number two"] * 5, trainer)
    tokenizer.save(str(path))
    return path


# --- contents -------------------------------------------------------------------------------------------------------


def test_megatron_reads_every_document_back(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix, facts = make_corpus(tmp_path)
    dataset = IndexedDataset(str(prefix))
    documents = read_documents(find_files([tmp_path / "corpus-texts"]), ReadCounts())
    texts = [document.text for document in documents]
    assert len(dataset) == len(texts) == facts.documents == 40
    for tokens, text in zip((dataset[index] for index in range(len(dataset))), texts, strict=True):
        assert tokens.tolist() == [*text.encode("utf-8"), 256]


@pytest.mark.parametrize("vocab_size", [257, 2**16, 2**16 + 1])
def test_files_equal_those_of_megatrons_own_builder(vocab_size: int, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    (tmp_path / "ids.jsonl").write_text('{"text": "1 2 3"}\n{"text": "200 0"}\n{"text": "7"}\n')
    tokenizer = NullTokenizer(vocab_size=vocab_size)
    prepare(find_files([tmp_path / "ids.jsonl"]), tokenizer, tmp_path / "ours")

    token_type = np.uint16 if vocab_size <= 2**16 else np.int32
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=token_type)
    for ids in ([1, 2, 3], [200, 0], [7]):
        builder.add_document(torch.tensor([*ids, vocab_size - 1]), [len(ids) + 1])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


def test_facts_count_tokens_entropy_and_lengths(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("aaab")
    (folder / "b.txt").write_text("b" * 9)
    facts = prepare(find_files([folder]), ByteTokenizer(), tmp_path / "corpus")
    shares = [3 / 15, 10 / 15, 2 / 15]  # a, b, end of document
    assert facts.entropy == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-12)
    assert (facts.documents, facts.tokens, facts.files, facts.vocab_size) == (2, 15, 2, 257)
    assert facts.length_histogram == [[4, 7, 1], [8, 15, 1]]
    assert read_facts(tmp_path / "corpus") == facts


def test_files_that_are_not_text_are_skipped_and_counted(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", count=3)
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_bytes(b"")
    (folder / ".hidden").write_text("secret")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.py").write_text("x")
    (folder / "link.txt").symlink_to(tmp_path / "nowhere.txt")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "more.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n{"text": ""}\n')
    facts = prepare(find_files([folder]), ByteTokenizer(), tmp_path / "corpus")
    assert facts.skipped == {"binary": 1, "not UTF-8": 1, "empty": 1, "broken link": 1}
    assert facts.skipped_records == {"empty": 1}
    assert facts.documents == 5


def test_order_depends_on_names_alone(tmp_path: Path) -> None:
    first = find_files([write_texts(tmp_path / "first")])
    second = find_files([write_texts(tmp_path / "second")])
    assert [file.name for file in first] == [file.name for file in second]
    assert [file.name for file in first] != sorted(file.name for file in first)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("not json", r"lines\.jsonl line 2 \(not JSON, JSONDecodeError\)"),
        ('{"body": "x"}', r"line 2 \(no key 'text', its keys are: body\).*--text-key.*--skip-bad-lines"),
        ('{"text": 3}', "text is of type int"),
        ('["text"]', r"line 2 \(of type list\)"),
        ("[" * 100_000, "not JSON, (RecursionError|JSONDecodeError)"),
        ('{"text": "\\ud800"}', "text is not valid Unicode, surrogates not allowed"),
    ],
)
def test_bad_json_line_is_named(line: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=text):
        prepare(find_files([tmp_path / "lines.jsonl"]), ByteTokenizer(), tmp_path / "corpus")
    assert files_at(tmp_path / "corpus") == ["lines.jsonl"]


def test_missing_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nowhere does not exist.*omit it to use the Python standard library"
    ):
        find_files([tmp_path / "nowhere"])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"1 files have no document \(1 empty\)"):
        prepare(find_files([tmp_path / "empty.txt"]), ByteTokenizer(), tmp_path / "corpus")


def test_standard_library_is_a_few_megabytes_of_its_own_python() -> None:
    files = find_stdlib_files()
    assert 200 < len(files) < 2000
    assert all(file.path.suffix == ".py" for file in files)
    names = {file.name for file in files}
    assert {"argparse.py", "asyncio/tasks.py"} <= names
    assert not any({"site-packages", "test", "tests"} & set(name.split("/")) for name in names)
    assert sum(file.path.stat().st_size for file in files) < 20e6


# --- tokenizers -----------------------------------------------------------------------------------------------------


def test_hf_tokenizer_writes_what_the_library_encodes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = make_hf_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = load_hf_tokenizer(path)
    library = Tokenizer.from_file(str(path))
    texts = ["document number three", "é\n\t x"]
    assert [ids.tolist() for ids in tokenizer.encode(texts)] == [library.encode(text).ids for text in texts]
    assert tokenizer.eod == library.token_to_id("<|endoftext|>")
    assert tokenizer.vocab_size == library.get_vocab_size()
    facts = prepare(find_files([write_texts(tmp_path / "texts")]), tokenizer, tmp_path / "corpus")
    tokens = np.fromfile(tmp_path / "corpus.bin", dtype=np.uint16)
    assert facts.documents == (tokens == tokenizer.eod).sum() == 40
    assert facts.tokenizer == {"class": "HFTokenizer", "sha256": tokenizer.digest, "eod": str(tokenizer.eod)}


def test_unusable_tokenizer_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json cannot be read as a tokenizer"):
        load_hf_tokenizer(tmp_path / "bad.json")
    with pytest.raises(DataError, match=r"none\.json cannot be read as a tokenizer"):
        load_hf_tokenizer(tmp_path / "none.json")
    path = make_hf_tokenizer(tmp_path / "other.json", end="[STOP]")
    with pytest.raises(DataError, match="documents need an end-of-document token"):
        load_hf_tokenizer(path)


def test_null_tokenizer_refuses_text_that_is_not_ids() -> None:
    tokenizer = build_tokenizer(DataConfig(tokenizer_type="null", vocab_size=10))
    assert (tokenizer.vocab_size, tokenizer.eod) == (10, 9)
    assert [ids.tolist() for ids in tokenizer.encode(["1 2", ""])] == [[1, 2], []]
    with pytest.raises(DataError, match="reads token ids separated by whitespace"):
        tokenizer.encode(["one"])
    with pytest.raises(DataError, match=r"token ids from 3 to 10 with vocab_size 10.*at least 11"):
        tokenizer.encode(["3 10"])
    with pytest.raises(DataError, match="ids from -1"):
        tokenizer.encode(["-1"])


# --- repetition -----------------------------------------------------------------------------------------------------


def test_fingerprint_changes_with_files_and_tokenizer(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    before = fingerprint(find_files([folder]), ByteTokenizer())
    assert fingerprint(find_files([folder]), ByteTokenizer()) == before
    assert fingerprint(find_files([folder]), NullTokenizer(vocab_size=257)) != before
    (folder / "000.txt").write_text("changed")
    changed = fingerprint(find_files([folder]), ByteTokenizer())
    (folder / "new.txt").write_text("new")
    assert len({before, changed, fingerprint(find_files([folder]), ByteTokenizer())}) == 3


@pytest.mark.parametrize("damage", ["bin", "idx", "json", "shorter"])
def test_incomplete_corpus_is_not_up_to_date(damage: str, tmp_path: Path) -> None:
    prefix, facts = make_corpus(tmp_path)
    assert up_to_date(prefix, facts.fingerprint) == facts
    assert up_to_date(prefix, "another") is None
    if damage == "shorter":
        os.truncate(f"{prefix}.bin", facts.bin_bytes - 1)
    else:
        Path(f"{prefix}.{damage}").unlink()
    assert up_to_date(prefix, facts.fingerprint) is None


def test_damaged_facts_are_refused_when_read_and_replaced_when_prepared(tmp_path: Path) -> None:
    prefix, facts = make_corpus(tmp_path)
    for text in ("{", "[]", '{"documents": 1}', "[" * 100_000):
        Path(f"{prefix}.json").write_text(text)
        with pytest.raises(DataError, match=r"corpus\.json is damaged"):
            read_facts(prefix)
        assert up_to_date(prefix, facts.fingerprint) is None


def test_command_does_nothing_the_second_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, prefix = write_texts(tmp_path / "texts"), tmp_path / "corpus"
    arguments = ["prepare-data", str(folder), "--output", str(prefix), "--seq-length", "100"]
    assert run(arguments) == 0
    first = capsys.readouterr().out
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    lengths = check_index(prefix).lengths
    for part in ("40", "unigram entropy", f"{(lengths < 100).mean():.1%}", "length 64-127"):
        assert part in first
    assert run(arguments) == 0
    assert "is up to date: 40 documents" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps


def test_command_refuses_bad_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prepare-data", str(tmp_path), "--tokenizer-type", "hf"]) == 2
    assert "Set tokenizer_model to a `tokenizers` JSON file" in capsys.readouterr().err
    assert run(["prepare-data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


# --- interruption ---------------------------------------------------------------------------------------------------

INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from megatron_lightseq.training.data import prepare as module
from megatron_lightseq.training.data.sources import find_files
from megatron_lightseq.training.data.tokenizers import ByteTokenizer

folder, prefix, stop = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
calls = 0
def counted(event, arguments):
    # The process may be killed at every file operation.
    global calls
    watched = event in ("open", "os.rename", "os.remove") and str(prefix.parent) in str(arguments[0])
    if watched and "corpus" in str(arguments[0]):
        calls += 1
        if calls == stop:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(counted)
module.prepare(find_files([folder]), ByteTokenizer(), prefix)
print(calls)
"""


def documents_at(prefix: Path) -> int:
    """Number of documents in an index that passes all checks; 0 without an index."""
    if not Path(f"{prefix}.idx").exists():
        return 0
    return len(check_index(prefix).lengths)


def test_only_what_killed_processes_of_this_host_left_is_removed(tmp_path: Path) -> None:
    """Other nodes may be preparing the same corpus, with process IDs that are not in use here."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    kept = [
        f".corpus.tmp-other-node-{ended.pid}.bin",
        f".corpus.tmp-{host}-{os.getppid()}.bin",
        f".corpus.tmp-{host}-mine.bin",
        f".corpus.old.tmp-{host}-{ended.pid}.bin",
    ]
    for name in [*kept, f".corpus.tmp-{host}-{ended.pid}.bin", f".corpus.tmp-{host}-{ended.pid}.idx"]:
        (tmp_path / name).touch()
    prepare(find_files([write_texts(tmp_path / "texts")]), ByteTokenizer(), tmp_path / "corpus")
    assert files_at(tmp_path / "corpus") == sorted([*kept, "corpus.bin", "corpus.idx", "corpus.json"])


def test_kill_at_every_file_operation_leaves_no_half_index(tmp_path: Path) -> None:
    """The old corpus stays complete until the new one is. In between there is none, but never a mixture."""
    texts, other = write_texts(tmp_path / "texts"), write_texts(tmp_path / "other", count=25, size=300)
    outcomes = set()
    for stop in range(1, 40):
        prefix = tmp_path / f"run{stop}" / "corpus"
        old = prepare(find_files([other]), ByteTokenizer(), prefix)
        arguments = [sys.executable, "-c", INTERRUPTED, str(texts), str(prefix), str(stop)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
        if done.returncode == 0:
            assert int(done.stdout) < stop
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        found = documents_at(prefix)
        outcomes.add(found)
        facts = read_facts(prefix)
        assert facts is None or facts.documents == found
        assert found != 25 or facts in (None, old)
        again = prepare(find_files([texts]), ByteTokenizer(), prefix)
        assert again.documents == 40 == documents_at(prefix)
        assert files_at(prefix) == ["corpus.bin", "corpus.idx", "corpus.json"]
    else:
        pytest.fail("there are more file operations than expected")
    assert outcomes == {25, 0, 40}


def test_exception_removes_temporary_files(tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text('{"text": "1 2"}\n{"text": "x"}\n')
    with pytest.raises(DataError):
        prepare(
            find_files([tmp_path / "ids.jsonl"]), NullTokenizer(vocab_size=9), tmp_path / "out" / "corpus"
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_facts_are_json_without_surprises(tmp_path: Path) -> None:
    prefix, facts = make_corpus(tmp_path)
    stored = json.loads(Path(f"{prefix}.json").read_text())
    assert stored["documents"] == facts.documents
    assert list(stored) == sorted(stored)
