"""`lightseq prepare-data`: documents to a corpus, repeatable and all or nothing.

Tokens go to temporary files beside the target, which take their names only when all are complete: an interrupted
run leaves either the corpus that was there before, or none, and never half an index.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_lightseq.errors import DataError, explain
from megatron_lightseq.training.data.corpus import (
    CorpusFacts,
    entropy_nats,
    file_of,
    length_histogram,
    read_facts,
    write_facts,
    write_index,
)
from megatron_lightseq.training.data.sources import ReadCounts, SourceFile, read_documents
from megatron_lightseq.training.data.tokenizers import Tokenizer

FORMAT = 1
"""Raised when the same inputs would give other files."""
BATCH = 256
"""Documents tokenized at once: enough for the tokenizer's threads, little enough for a live progress bar."""
MAX_TOKENS_PER_DOCUMENT = 2**31 - 1
"""Megatron stores lengths as int32."""

Advance = Callable[[int], None]
"""Called with the number of files read since the last call."""


@dataclass(slots=True)
class _Written:
    """What accumulates while tokens are written."""

    lengths: list[int] = field(default_factory=list)
    frequency: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.zeros(0, np.int64))
    digest: Any = field(default_factory=hashlib.sha256)


def fingerprint(files: Sequence[SourceFile], tokenizer: Tokenizer) -> str:
    """SHA-256 over everything that decides the corpus; reads no file."""
    digest = hashlib.sha256()
    identity = {
        "format": FORMAT,
        "tokenizer": tokenizer.unique_identifiers,
        "vocabulary": tokenizer.vocab_size,
    }
    digest.update(json.dumps(identity, sort_keys=True).encode())
    for file in files:
        digest.update(b"\n" + file.stamp().encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def up_to_date(prefix: Path, wanted: str) -> CorpusFacts | None:
    """The facts of the corpus at a prefix if it is whole and has the wanted fingerprint."""
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
    files: Sequence[SourceFile], tokenizer: Tokenizer, prefix: Path, *, advance: Advance = lambda _: None
) -> CorpusFacts:
    """Tokenize files into the corpus at `prefix`; raises DataError when they hold no document.

    Each document becomes one sequence that ends with the end-of-document token.
    """
    print_name = fingerprint(files, tokenizer)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    token_type: type[np.integer[Any]] = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    with _temporary(prefix) as staged:
        counts = ReadCounts()
        with file_of(staged, "bin").open("wb") as stream:
            written = _write_tokens(
                read_documents(_announced(files, advance), counts), tokenizer, token_type, stream
            )
            _flush(stream)
        if not written.lengths:
            raise _no_documents(counts)
        lengths = np.array(written.lengths, dtype=np.int32)
        write_index(file_of(staged, "idx"), lengths, token_type)
        written.digest.update(lengths.tobytes())
        facts = CorpusFacts(
            fingerprint=print_name,
            content=written.digest.hexdigest(),
            tokenizer=tokenizer.unique_identifiers,
            vocab_size=tokenizer.vocab_size,
            documents=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            entropy=entropy_nats(written.frequency),
            length_histogram=length_histogram(lengths),
            files=counts.files,
            skipped=counts.skipped,
            bin_bytes=file_of(staged, "bin").stat().st_size,
            idx_bytes=file_of(staged, "idx").stat().st_size,
        )
        write_facts(file_of(staged, "json"), facts)
        _publish(staged, prefix)
    return facts


def _write_tokens(
    documents: Iterator[str], tokenizer: Tokenizer, token_type: type[np.integer[Any]], stream: BinaryIO
) -> _Written:
    written = _Written(frequency=np.zeros(tokenizer.vocab_size, np.int64))
    while batch := list(islice(documents, BATCH)):
        for tokens in tokenizer.encode(batch):
            if len(tokens) >= MAX_TOKENS_PER_DOCUMENT:
                raise DataError(
                    explain(
                        got=f"document {len(written.lengths)} has {len(tokens)} tokens",
                        rule=f"a document has fewer than {MAX_TOKENS_PER_DOCUMENT}",
                        remedy="Cut it into several files or lines",
                    )
                )
            ended = np.append(tokens, tokenizer.eod).astype(token_type)
            content = ended.tobytes()
            stream.write(content)
            written.digest.update(content)
            written.lengths.append(len(ended))
            written.frequency += np.bincount(ended, minlength=tokenizer.vocab_size)
    return written


def _announced(files: Iterable[SourceFile], advance: Advance) -> Iterator[SourceFile]:
    for file in files:
        yield file
        advance(1)


@contextlib.contextmanager
def _temporary(prefix: Path) -> Iterator[Path]:
    """A prefix beside the target for files that are not complete; whatever is left there is removed.

    It names host and process: nodes that share the folder may all prepare the corpus at the start of a job.
    """
    own = f".{prefix.name}.tmp-{socket.gethostname()}-"
    for left in list(prefix.parent.iterdir()):  # by a run that was killed, on this host
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
    except PermissionError:  # somebody else's
        return True
    return True


def _publish(staged: Path, prefix: Path) -> None:
    """Give complete files their names. Three renames are not one: the index goes first and comes last but one, so
    that a cut in between leaves a corpus without index (which is refused), and the facts of no other corpus."""
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
    skipped = (
        ", ".join(f"{number} {reason}" for reason, number in sorted(counts.skipped.items())) or "none skipped"
    )
    return DataError(
        explain(
            got=f"{counts.files} files hold no document ({skipped})",
            rule="a corpus has at least one document with text",
            remedy="Give a folder of text files, or a .jsonl file",
        )
    )
