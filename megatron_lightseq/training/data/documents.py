"""From files to documents: plain text, JSON lines, other JSON and Parquet, compressed or not.

Formats are recognised by content as well as by name. Otherwise a file of JSON records with an unusual name would
become one document of JSON syntax, which trains without any error.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_lightseq.errors import DataError, explain
from megatron_lightseq.training.data.compression import (
    inner_suffixes,
    naming_damage,
    open_decompressed,
    unsupported_format,
)
from megatron_lightseq.training.data.sources import SourceFile

JSON_LINES = frozenset({".jsonl", ".ndjson", ".jsonlines"})
"""Suffixes of files with one JSON object per line, in any case, also in front of other suffixes."""
_PARQUET_MAGIC = b"PAR1"
_BYTE_ORDER_MARK = "\ufeff"
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_SHOWN_KEYS = 8


class Document(NamedTuple):
    """A text and its origin."""

    text: str
    place: str
    """File, and line, row or item; for messages."""
    prompt: str = ""
    """What the text answers, for fine-tuning."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """A conversation, in place of a text."""
    tools: tuple[Any, ...] | None = None
    """What the assistant of a conversation may call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How records are read."""

    text_key: str = "text"
    """JSON key or Parquet column of the text."""
    skip_bad_lines: bool = False
    """Count records without a text and leave them out, instead of refusing the first one."""
    prompt_key: str | None = None
    """JSON key or Parquet column of the prompt that the text answers; None: there are no prompts."""

    messages_key: str | None = None
    """JSON key or Parquet column of a conversation, a list of messages with role and content, in place of a text."""

    @property
    def keys(self) -> tuple[str, ...]:
        """What every record has."""
        if self.messages_key is not None:
            return (self.messages_key,)
        return (self.text_key,) if self.prompt_key is None else (self.prompt_key, self.text_key)


@dataclass(kw_only=True, slots=True)
class ReadCounts:
    """What became of the files and their records."""

    files: int = 0
    documents: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of files by reason."""
    skipped_records: dict[str, int] = field(default_factory=dict)
    """Number of lines, rows and items by reason."""

    def skip(self, reason: str) -> None:
        """Count one file that is left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def skip_record(self, reason: str) -> None:
        """Count one record that is left out."""
        self.skipped_records[reason] = self.skipped_records.get(reason, 0) + 1


class _Bad(NamedTuple):
    """Why a record cannot be used."""

    reason: str
    """For the count."""
    detail: str
    """For the message."""


class _UnusableFileError(Exception):
    """A file is left out as a whole; the text is the reason."""


def read_documents(
    files: Iterable[SourceFile], counts: ReadCounts, options: ReadOptions | None = None
) -> Iterator[Document]:
    """The documents of all files, in order. Files without text are counted and left out.

    Raises:
        DataError: A record has no text (unless ``skip_bad_lines``), a compressed file is damaged, a Parquet file
            cannot be read, or a file that the user named has records of an unknown form.
    """
    options = options or ReadOptions()
    for file in files:
        counts.files += 1
        try:
            with naming_damage(file.path):
                for document in _open(file, counts, options):
                    counts.documents += 1
                    yield document
        except _UnusableFileError as reason:
            counts.skip(str(reason))
            if file.explicit and str(reason) not in _CLEAR_REASONS:
                raise _unusable(file.path, str(reason), options) from None


def _open(file: SourceFile, counts: ReadCounts, options: ReadOptions) -> Iterable[Document]:
    """The documents of one file; raises _UnusableFileError if it is left out."""
    if file.problem is not None:
        raise _UnusableFileError(file.problem)
    path = file.path
    try:
        path.open("rb").close()
    except OSError as error:
        raise _UnusableFileError(f"unreadable ({error.strerror})") from error
    if (unsupported := unsupported_format(path)) is not None:
        raise _UnusableFileError(unsupported)
    suffixes = inner_suffixes(path)
    with path.open("rb") as stream:
        is_parquet = stream.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC
    if is_parquet:
        return _texts(_parquet_rows(path, options), f"{path} row", counts, options)
    if JSON_LINES.intersection(suffixes) or _has_text(_first_line_object(path), options):
        return _texts(_json_lines(path), f"{path} line", counts, options)
    text = _decoded(path)
    records = _json_records(text, options)
    if records is not None:
        return _texts(enumerate(records, start=1), f"{path} item", counts, options)
    if ".json" in suffixes:
        raise _UnusableFileError(f"JSON without the key {options.keys[-1]!r}")
    if options.prompt_key is not None or options.messages_key is not None:
        raise _UnusableFileError("no records with prompts or messages")
    return [Document(text, str(path))]


# --- plain text -------------------------------------------------------------------------------------------------

_CLEAR_REASONS = ("empty", "binary", "not UTF-8")
"""Files without text: left out and counted even if the user has named them."""


def _decoded(path: Path) -> str:
    """The text of a file without its byte order mark."""
    with open_decompressed(path) as stream:
        content = stream.read()
    if content.startswith(_UTF_16_MARKS):
        raise _UnusableFileError("not UTF-8")
    if b"\0" in content:
        raise _UnusableFileError("binary")
    try:
        text = content.decode("utf-8").removeprefix(_BYTE_ORDER_MARK)
    except UnicodeDecodeError:
        raise _UnusableFileError("not UTF-8") from None
    if not text:
        raise _UnusableFileError("empty")
    return text


# --- records ----------------------------------------------------------------------------------------------------


def _texts(
    records: Iterable[tuple[int, Any]], place: str, counts: ReadCounts, options: ReadOptions
) -> Iterator[Document]:
    for number, record in records:
        bad = record if isinstance(record, _Bad) else _problem(record, options)
        if bad is None and options.messages_key is not None:
            yield _conversation(record, options.messages_key, f"{place} {number}")
        elif bad is None and record[options.text_key]:
            prompt = "" if options.prompt_key is None else record[options.prompt_key]
            yield Document(record[options.text_key], f"{place} {number}", prompt)
        elif bad is None:
            counts.skip_record("empty")
        elif options.skip_bad_lines:
            counts.skip_record(bad.reason)
        else:
            raise _bad_record(f"{place} {number}", bad, options)


def _conversation(record: dict[str, Any], key: str, place: str) -> Document:
    tools = record.get("tools")
    return Document(
        "", place, messages=tuple(record[key]), tools=tuple(tools) if isinstance(tools, list) else None
    )


def _problem(record: Any, options: ReadOptions) -> _Bad | None:
    """Why a record has no text or conversation under the keys; None if it has."""
    if not isinstance(record, dict):
        return _Bad("not an object", f"of type {type(record).__name__}")
    if options.messages_key is not None:
        return _problem_of_messages(record, options.messages_key)
    return next((bad for key in options.keys if (bad := _problem_under(record, key)) is not None), None)


def _problem_of_messages(record: dict[str, Any], key: str) -> _Bad | None:
    messages = record.get(key)
    if not isinstance(messages, list) or not messages:
        return _Bad(f"no list {key!r}", f"no list of messages under {key!r}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return _Bad("message without a role", f"message {number} without a role")
    return None


def _problem_under(record: dict[str, Any], key: str) -> _Bad | None:
    if key not in record:
        keys = ", ".join(list(record)[:_SHOWN_KEYS]) or "none"
        return _Bad(f"no key {key!r}", f"no key {key!r}, its keys are: {keys}")
    text = record[key]
    if not isinstance(text, str):
        return _Bad(f"{key!r} is not a string", f"{key} is of type {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        return _Bad("not Unicode", f"{key} is not valid Unicode, {error.reason}")
    return None


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with open_decompressed(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, _parsed(line)


def _parsed(line: bytes) -> Any:
    """A JSON value, or why the line has none; a byte order mark is ignored."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return _Bad("not JSON", f"not JSON, {type(error).__name__}")


def _first_line_object(path: Path) -> Any:
    """The first line as a JSON object; None if it is something else."""
    with open_decompressed(path) as stream:
        first = next((line for line in stream if line.strip()), b"")
    looks_right = first.removeprefix(_BYTE_ORDER_MARK.encode()).lstrip().startswith(b"{")
    return _parsed(first) if looks_right else None


def _has_text(record: Any, options: ReadOptions) -> bool:
    if options.messages_key is not None:
        return isinstance(record, dict) and isinstance(record.get(options.messages_key), list)
    return isinstance(record, dict) and isinstance(record.get(options.text_key), str)


def _json_records(text: str, options: ReadOptions) -> list[Any] | None:
    """The records of a JSON array, or a single record; None if the text is neither."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    records = value if isinstance(value, list) else [value]
    return records if records and _has_text(records[0], options) else None


def _parquet_rows(path: Path, options: ReadOptions) -> Iterator[tuple[int, Any]]:
    """Rows of the columns that are read. Raises DataError without pyarrow, or if the file or a column is not there."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(
            explain(
                got=f"{path} is a Parquet file, and pyarrow cannot be imported ({error})",
                rule="Parquet is read with the optional package pyarrow",
                remedy="Install it with `pip install pyarrow`, or convert the file to .jsonl",
            )
        ) from error
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        keys = options.keys
        missing = next((key for key in keys if key not in names), None)
        number = 0
        for batch in file.iter_batches(columns=list(keys)) if missing is None else ():
            for texts in zip(*(batch.column(key).to_pylist() for key in keys), strict=True):
                number += 1
                yield number, dict(zip(keys, texts, strict=True))
    except (ValueError, OSError) as error:  # ArrowInvalid is a ValueError
        raise DataError(
            explain(
                got=f"{path} is damaged ({error})",
                rule="a file that begins with PAR1 is a Parquet file",
                remedy="Download or write it again, or remove it",
            )
        ) from error
    if missing is not None:
        raise DataError(
            explain(
                got=f"{path} has the columns {', '.join(names[:_SHOWN_KEYS])}",
                rule=f"the text is in the column {missing!r}",
                remedy=f"Give the name of the column with {_key_flags(options)}",
            )
        )


# --- messages ---------------------------------------------------------------------------------------------------


def _shown_keys(options: ReadOptions) -> str:
    return " and ".join(map(repr, options.keys))


def _kind(options: ReadOptions) -> str:
    return "a string" if options.messages_key is None else "a list of messages"


def _key_flags(options: ReadOptions) -> str:
    if options.messages_key is not None:
        return "--messages-key"
    return "--text-key" if options.prompt_key is None else "--prompt-key or --text-key"


def _bad_record(place: str, bad: _Bad, options: ReadOptions) -> DataError:
    return DataError(
        explain(
            got=f"{place} ({bad.detail})",
            rule=f"every record is an object with {_kind(options)} under the key {_shown_keys(options)}",
            remedy=f"Correct it, give the name of the key with {_key_flags(options)}, or leave such records out with "
            "--skip-bad-lines",
        )
    )


def _unusable(path: Path, reason: str, options: ReadOptions) -> DataError:
    return DataError(
        explain(
            got=f"{path} cannot be used ({reason})",
            rule="an input is text, JSON lines, a JSON array of objects, or Parquet; compressed with gzip, bzip2 or "
            f"xz if at all; the text of a record is under the key {_shown_keys(options)}",
            remedy=f"Give the name of the key with {_key_flags(options)}, decompress or convert the file, or rename it "
            "to .txt if its JSON syntax is the text to learn",
        )
    )
