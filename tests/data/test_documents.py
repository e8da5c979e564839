"""Formats of text files: recognised by content and by name, refused if ambiguous, counted if skipped."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_lightseq.cli import run
from megatron_lightseq.errors import DataError
from megatron_lightseq.training.data.corpus import read_facts
from megatron_lightseq.training.data.documents import ReadCounts, ReadOptions, read_documents
from megatron_lightseq.training.data.prepare import fingerprint
from megatron_lightseq.training.data.sources import find_files
from megatron_lightseq.training.data.tokenizers import ByteTokenizer

LINES = '{"text": "one"}\n{"text": "two"}\n'
ARRAY = json.dumps([{"text": "one"}, {"text": "two"}], indent=1)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, **options: Any) -> list[str]:
    return [
        document.text for document in read_documents(find_files([path]), ReadCounts(), ReadOptions(**options))
    ]


# --- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.JSONL",
        "a.Ndjson",
        "a.jsonl.txt",
        "a.JSONL.TXT",
        "a.json",
        "a.JSON",
        "a.json.txt",
        "a.txt",
        "part-0",
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff", "\n\n"])
def test_json_lines_are_records_under_every_name(name: str, mark: str, tmp_path: Path) -> None:
    assert read(write(tmp_path / name, mark + LINES)) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.json", "a.Json", "a.json.txt", "a.txt"])
def test_json_arrays_and_single_objects_are_records(name: str, tmp_path: Path) -> None:
    assert read(write(tmp_path / name, ARRAY)) == ["one", "two"]
    assert read(write(tmp_path / name, "\ufeff" + ARRAY)) == ["one", "two"]
    assert read(write(tmp_path / name, json.dumps({"id": 1, "text": "one"}, indent=1))) == ["one"]


UNCLEAR = {
    "settings": json.dumps({"name": "x", "version": 1}, indent=1),
    "other key": '{"content": "one"}\n{"content": "two"}\n',
    "strings": '["one", "two"]',
    "nested": json.dumps({"train": [{"text": "one"}]}),
    "broken": "{",
}


@pytest.mark.parametrize("content", UNCLEAR.values(), ids=UNCLEAR)
def test_json_of_another_form_is_refused_by_name_and_counted_in_a_folder(
    content: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "texts" / "a.JSON", content)
    with pytest.raises(
        DataError, match=r"a\.JSON cannot be used \(JSON without the key 'text'\): .*--text-key"
    ):
        read(path)
    write(tmp_path / "texts" / "b.txt", "b")
    counts = ReadCounts()
    assert [d.text for d in read_documents(find_files([tmp_path / "texts"]), counts)] == ["b"]
    assert counts.skipped == {"JSON without the key 'text'": 1}


def test_text_that_only_begins_like_json_stays_text(tmp_path: Path) -> None:
    for text in (
        "{x} is a set\n",
        '["a link"](there)\n',
        '{"key": "no text"}\n',
        "[section]\nkey = 1\n",
        " ",
    ):
        assert read(write(tmp_path / "a.txt", text)) == [text]


def test_byte_order_mark_is_removed(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", "\ufeffone\ufeff")) == ["one\ufeff"]
    counts = ReadCounts()
    files = [write(tmp_path / "only.txt", "\ufeff"), write(tmp_path / "utf16.txt", "one".encode("utf-16"))]
    assert list(read_documents(find_files(files), counts)) == []
    assert counts.skipped == {"empty": 1, "not UTF-8": 1}


# --- compression ----------------------------------------------------------------------------------------------------

PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_files_are_read(suffix: str, tmp_path: Path) -> None:
    packed = {content: PACK[suffix](content.encode()) for content in (LINES, ARRAY, "plain")}
    assert read(write(tmp_path / f"a.jsonl{suffix.upper()}", packed[LINES])) == ["one", "two"]
    assert read(write(tmp_path / f"a.json{suffix}", packed[ARRAY])) == ["one", "two"]
    assert read(write(tmp_path / f"a.txt{suffix}", packed["plain"])) == ["plain"]
    assert read(write(tmp_path / "a.jsonl", packed[LINES])) == ["one", "two"], "by its first bytes"
    assert read(write(tmp_path / f"a.jsonl{suffix}", LINES)) == ["one", "two"], (
        "decompressed, under the old name"
    )
    with pytest.raises(DataError, match=r"cannot be used \(JSON without"):
        read(write(tmp_path / f"b.json{suffix}", PACK[suffix](b'{"a": 1}')))


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_damaged_compression_is_named(name: str, suffix: str, tmp_path: Path) -> None:
    content = PACK[suffix]((LINES * 5000).encode())
    middle = len(content) // 2
    for damaged in (content[:middle], content[:middle] + b"\xff" * 16 + content[middle + 16 :]):
        with pytest.raises(DataError, match=rf"{name}{suffix} is damaged \(.+Download or compress it again"):
            read(write(tmp_path / f"{name}{suffix}", damaged))


@pytest.mark.parametrize(
    ("name", "magic", "text"),
    [("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "Zstandard file"), ("a.zip", b"PK\x03\x04", "ZIP archive")],
)
def test_other_archives_are_refused_by_name(name: str, magic: bytes, text: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, magic + b"\0" * 20)
    with pytest.raises(DataError, match=rf"cannot be used \({text}\).*decompress or convert the file"):
        read(path)


# --- keys, bad lines, counts ----------------------------------------------------------------------------------------


def test_another_key_is_read_and_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '{"content": "one", "text": 3}\n')
    assert read(path, text_key="content") == ["one"]
    files = find_files([path])
    assert fingerprint(files, ByteTokenizer()) != fingerprint(
        files, ByteTokenizer(), ReadOptions(text_key="content")
    )


def test_bad_lines_are_skipped_and_counted_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [
        "not json",
        '{"body": "x"}',
        '{"text": null}',
        '["text"]',
        '{"text": "\\ud800"}',
        '{"text": ""}',
        "{",
    ]
    path = write(tmp_path / "a.jsonl", LINES + "\n".join(bad) + '\n{"text": "three"}\n')
    arguments = ["prepare-data", str(path), "--output", str(tmp_path / "c")]
    assert run(arguments) == 2
    assert "a.jsonl line 3 (not JSON" in capsys.readouterr().err
    assert run([*arguments, "--skip-bad-lines"]) == 0
    facts = read_facts(tmp_path / "c")
    assert facts is not None
    assert facts.documents == 3
    assert facts.skipped_records == {
        "not JSON": 2,
        "no key 'text'": 1,
        "'text' is not a string": 1,
        "not an object": 1,
        "not Unicode": 1,
        "empty": 1,
    }
    printed = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "documents 3 (records skipped: 1 'text' is not a string, 1 empty" in printed


def test_only_bad_lines_are_no_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", "x\ny\n")
    assert run(["prepare-data", str(path), "--output", str(tmp_path / "c"), "--skip-bad-lines"]) == 2
    assert "1 files have no document (2 records: not JSON)" in capsys.readouterr().err


# --- Parquet --------------------------------------------------------------------------------------------------------

PARQUET = b"PAR1 and so on PAR1"


def test_parquet_without_pyarrow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a folder: silently preparing only the other files would be worse than an error."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    write(tmp_path / "texts" / "a.parquet", PARQUET)
    write(tmp_path / "texts" / "README.md", "readme")
    with pytest.raises(
        DataError, match=r"a\.parquet is a Parquet file, and pyarrow cannot .*pip install pyarrow"
    ):
        read(tmp_path / "texts")


class FakeColumn(list[Any]):
    def to_pylist(self) -> list[Any]:
        return list(self)


class FakeParquet(ModuleType):
    """The part of pyarrow.parquet that is used."""

    class ParquetFile:
        def __init__(self, path: Path) -> None:
            self.schema_arrow = self
            self.names = ["id", "content"]

        def iter_batches(self, columns: list[str]) -> Iterator[Any]:
            assert columns == ["content"]
            for texts in (["one", "two"], ["three", None]):
                column = FakeColumn(texts)
                yield type("Batch", (), {"column": lambda self, number, column=column: column})()


def test_parquet_rows_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", FakeParquet("pyarrow.parquet"))
    path = write(tmp_path / "a.parquet", PARQUET)
    with pytest.raises(DataError, match=r"a\.parquet has the columns id, content: .*'text'.*--text-key"):
        read(path)
    with pytest.raises(DataError, match=r"a\.parquet row 4 \(content is of type NoneType\)"):
        read(path, text_key="content")
    assert read(path, text_key="content", skip_bad_lines=True) == ["one", "two", "three"]


def test_parquet_with_the_real_library(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "texts" / "a.PARQUET"
    path.parent.mkdir()
    parquet.write_table(
        arrow.table({"content": ["one", "é", "three"], "id": [1, 2, 3]}), path, row_group_size=2
    )
    assert read(path.parent, text_key="content") == ["one", "é", "three"]
    with pytest.raises(DataError, match="has the columns content, id"):
        read(path)
    write(path, path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"a\.PARQUET is damaged"):
        read(path, text_key="content")
