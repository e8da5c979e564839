"""`lightseq prepare-data`: from documents to a corpus, reproducibly and atomically.

Tokens are written to temporary files next to the target and renamed when all of them are complete. An interrupted
run leaves the previous corpus, or none, but never an incomplete index.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_lightseq.errors import DataError, explain
from megatron_lightseq.training.data.best_fit import best_fit
from megatron_lightseq.training.data.chat import ChatTemplate
from megatron_lightseq.training.data.chat_pieces import chat_pieces
from megatron_lightseq.training.data.corpus import (
    CorpusFacts,
    entropy_nats,
    file_of,
    length_histogram,
    read_facts,
    write_facts,
    write_index,
)
from megatron_lightseq.training.data.document_limits import check_tokens, fits
from megatron_lightseq.training.data.documents import Document, ReadCounts, ReadOptions, read_documents
from megatron_lightseq.training.data.pairs import document_lengths, first_parts
from megatron_lightseq.training.data.sources import SourceFile
from megatron_lightseq.training.data.tokenizers import Tokenizer, Tokens
from megatron_lightseq.training.file_hash import hash_file

FORMAT = 2
"""Incremented when the same inputs give other files than before."""
BATCH = 256
"""Documents tokenized together: enough for the tokenizer's threads, and few enough for a live progress bar."""
LARGEST_ID = 2**31 - 1
"""Token ids are stored as uint16 or int32."""

Advance = Callable[[int], None]
"""Called with the number of files read since the last call."""


@dataclass(slots=True)
class _Written:
    """What accumulates while tokens are written."""

    lengths: list[int] = field(default_factory=list)
    frequency: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Occurrences by token id, up to the largest id so far."""
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, tokens: Sequence[np.ndarray[Any, Any]], stream: BinaryIO) -> None:
        """Write sequences."""
        together = np.concatenate(tokens)
        content = together.tobytes()
        stream.write(content)
        self.digest.update(content)
        self.lengths.extend(map(len, tokens))
        counts = np.bincount(together, minlength=len(self.frequency))
        counts[: len(self.frequency)] += self.frequency
        self.frequency = counts


def fingerprint(
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    options: ReadOptions | None = None,
    pack_length: int | None = None,
    chat: ChatTemplate | None = None,
) -> str:
    """SHA-256 over everything that decides the corpus, including the content of every file."""
    digest = hashlib.sha256()
    identity = {
        "format": FORMAT,
        "tokenizer": tokenizer.unique_identifiers,
        "vocabulary": tokenizer.vocab_size,
        "options": asdict(options or ReadOptions()),
        "pack_length": pack_length,
        "chat": None if chat is None else asdict(chat),
    }
    digest.update(json.dumps(identity, sort_keys=True).encode())
    for file in files:
        digest.update(b"\n" + file.stamp().encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def up_to_date(prefix: Path, wanted: str) -> CorpusFacts | None:
    """The facts of the corpus at a prefix if it is complete and has the wanted fingerprint, else None."""
    try:
        facts = read_facts(prefix)
    except DataError:
        return None
    if facts is None or facts.fingerprint != wanted:
        return None
    sizes = {"bin": facts.bin_bytes, "idx": facts.idx_bytes}
    whole = all(
        file_of(prefix, suffix).is_file() and file_of(prefix, suffix).stat().st_size == size
        for suffix, size in sizes.items()
    )
    return facts if whole else None


def prepare(
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    prefix: Path,
    *,
    options: ReadOptions | None = None,
    pack_length: int | None = None,
    chat: ChatTemplate | None = None,
    advance: Advance = lambda _: None,
) -> CorpusFacts:
    """Tokenize files into the corpus at `prefix`.

    Each document ends with the end-of-document token. It becomes one sequence; or, with `pack_length`, two sequences,
    prompt and answer, and documents are put into packs of so many tokens, without cutting any (:func:`best_fit`).

    Args:
        files: From :func:`find_files`.
        tokenizer: Its ids must be below its ``vocab_size``.
        prefix: Of the files `.bin`, `.idx` and `.json`; its folder is created.
        options: How records are read; with `pack_length` it names the key of prompts.
        pack_length: Tokens of a pack, the `seq_length` of fine-tuning; None: documents are not packed.
        chat: Renders conversations, which are packed; `options` names their key.
        advance: Called with the number of files that have been read since the last call.

    Raises:
        DataError: The files have no document, or one that cannot be read or tokenized, or that no pack has room for.
    """
    inputs = fingerprint(
        files, tokenizer, options, pack_length, chat
    )  # before reading: a file that changes meanwhile is then out of date
    options = options or ReadOptions()
    prefix.parent.mkdir(parents=True, exist_ok=True)
    token_type = _token_type(tokenizer)
    with _temporary(prefix) as staged:
        counts = ReadCounts()
        with file_of(staged, "bin").open("wb") as stream:
            documents = read_documents(_announced(files, advance), counts, options)
            if chat is None:
                pieces = _pieces(documents, tokenizer, options, pack_length, counts)
            else:
                assert pack_length is not None, "conversations are packed"
                pieces = chat_pieces(documents, tokenizer, chat, options, pack_length, counts)
            written = _write_tokens(pieces, token_type, stream)
            _flush(stream)
        if not written.lengths:
            raise _no_documents(counts)
        lengths = np.array(written.lengths, dtype=np.int32)
        marks = None
        if pack_length is not None:
            lengths, marks = _pack(file_of(staged, "bin"), lengths, token_type, pack_length)
        write_index(file_of(staged, "idx"), lengths, token_type, marks)
        written.digest.update(lengths.tobytes())
        if marks is not None:
            lengths = document_lengths(lengths).astype(np.int32)
        facts = CorpusFacts(
            fingerprint=inputs,
            content=written.digest.hexdigest(),
            tokenizer=tokenizer.unique_identifiers,
            vocab_size=tokenizer.vocab_size,
            documents=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            entropy=entropy_nats(written.frequency),
            length_histogram=length_histogram(lengths),
            files=counts.files,
            skipped=counts.skipped,
            skipped_records=counts.skipped_records,
            bin_bytes=file_of(staged, "bin").stat().st_size,
            bin_hash=hash_file(file_of(staged, "bin")),
            idx_bytes=file_of(staged, "idx").stat().st_size,
            pack_length=pack_length or 0,
            packs=0 if marks is None else len(marks) - 1,
            end_tokens=int(written.frequency[tokenizer.eod]) if tokenizer.eod < len(written.frequency) else 0,
        )
        write_facts(file_of(staged, "json"), facts)
        _publish(staged, prefix)
    return facts


def _pack(
    path: Path, lengths: npt.NDArray[np.int32], token_type: type[np.integer[Any]], pack_length: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Put the documents of a `.bin` file into the order of their packs, so that a pack is read in one piece.

    Args:
        path: of the file, which is rewritten.
        lengths: of prompt, answer, prompt, answer, ..., with joints (:mod:`pairs`).
        token_type: of the tokens.
        pack_length: tokens of a pack.

    Returns:
        The lengths in the new order, and the first sequence of each pack, then the number of sequences.
    """
    documents, firsts = document_lengths(lengths), first_parts(lengths)
    packs = best_fit(documents.tolist(), pack_length)
    order = np.array([number for pack in packs for number in pack], dtype=np.int64)
    starts = np.cumsum([0, *documents], dtype=np.int64)
    tokens = np.fromfile(path, dtype=token_type)
    with path.open("wb") as stream:
        for number in order:
            stream.write(tokens[starts[number] : starts[number + 1]].tobytes())
        _flush(stream)
    parts = np.split(lengths, firsts[1:])
    numbers = [sum(len(parts[number]) for number in pack) for pack in packs]
    return np.concatenate([parts[number] for number in order]), np.cumsum([0, *numbers], dtype=np.int64)


def _token_type(tokenizer: Tokenizer) -> type[np.integer[Any]]:
    """The type that holds the largest id; raises DataError if none does."""
    largest = tokenizer.vocab_size - 1
    if largest > LARGEST_ID:
        raise DataError(
            explain(
                got=f"the largest token id of the vocabulary is {largest}",
                rule=f"a corpus stores ids up to {LARGEST_ID}",
                remedy="Use a tokenizer with smaller ids",
            )
        )
    return np.uint16 if largest < 2**16 else np.int32


def _write_tokens(
    batches: Iterable[list[Tokens]], token_type: type[np.integer[Any]], stream: BinaryIO
) -> _Written:
    written = _Written()
    for batch in batches:
        written.add([tokens.astype(token_type) for tokens in batch], stream)
    return written


def _pieces(
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    options: ReadOptions,
    pack_length: int | None,
    counts: ReadCounts,
) -> Iterator[list[Tokens]]:
    """Token ids of the sequences of many documents at a time; the last one of a document ends with its end token."""
    number = 0
    while batch := list(islice(documents, BATCH)):
        texts = _encoded(batch, tokenizer)
        prompts = (
            _encoded([each._replace(text=each.prompt) for each in batch], tokenizer) if pack_length else ()
        )
        pieces: list[Tokens] = []
        for index, (document, text) in enumerate(zip(batch, texts, strict=True)):
            found = [prompts[index]] if prompts else []
            found.append(np.append(text, tokenizer.eod))
            for tokens in found:
                check_tokens(tokens, document, number, tokenizer)
            if pack_length is None or fits(found, document, pack_length, options, counts):
                pieces += found
                number += 1
        if pieces:
            yield pieces


def _encoded(batch: Sequence[Document], tokenizer: Tokenizer) -> Sequence[Tokens]:
    """Token ids of each document; raises DataError with the place of a document that has none."""
    try:
        return tokenizer.encode([document.text for document in batch])
    except DataError:
        for document in batch:  # one by one, to find it
            try:
                tokenizer.encode([document.text])
            except DataError as error:
                raise DataError(f"{document.place}: {error}") from error
        raise


def _announced(files: Iterable[SourceFile], advance: Advance) -> Iterator[SourceFile]:
    for file in files:
        yield file
        advance(1)


@contextlib.contextmanager
def _temporary(prefix: Path) -> Iterator[Path]:
    """A prefix next to the target for incomplete files, which are removed on exit.

    It contains host and process: nodes that share the folder may all prepare the corpus at the start of a job.
    """
    own = f".{prefix.name}.tmp-{socket.gethostname()}-"
    for left in list(prefix.parent.iterdir()):  # left by a process of this host that was killed
        process = left.name.removeprefix(own).partition(".")[0]
        if left.name.startswith(own) and process.isdecimal() and not _is_running(int(process)):
            left.unlink(missing_ok=True)
    staged = prefix.with_name(f"{own}{os.getpid()}")
    try:
        yield staged
    finally:
        for suffix in ("bin", "idx", "json"):
            file_of(staged, suffix).unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        return True
    return True


def _publish(staged: Path, prefix: Path) -> None:
    """Rename complete files. Three renames are not atomic: the old facts and index are removed first, and the new ones
    appear after the tokens, so that an interruption leaves a corpus without an index, which is refused."""
    for suffix in ("json", "idx"):
        file_of(prefix, suffix).unlink(missing_ok=True)
    for suffix in ("bin", "idx", "json"):
        with file_of(staged, suffix).open("rb+") as stream:
            _flush(stream)
        file_of(staged, suffix).replace(file_of(prefix, suffix))
    descriptor = os.open(prefix.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _no_documents(counts: ReadCounts) -> DataError:
    left_out = {**counts.skipped, **{f"records: {why}": n for why, n in counts.skipped_records.items()}}
    return DataError(
        explain(
            got=f"{counts.files} files have no document ({counted(left_out) or 'none skipped'})",
            rule="a corpus has at least one document with text",
            remedy="Give a folder of text files, or a .jsonl file",
        )
    )


def counted(reasons: Mapping[str, int]) -> str:
    """Counts by reason as text, such as "1 binary, 2 empty"."""
    return ", ".join(f"{number:,} {reason}" for reason, number in sorted(reasons.items()))
