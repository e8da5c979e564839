"""A prepared corpus on disk: Megatron's `PREFIX.bin` and `PREFIX.idx`, and our facts in `PREFIX.json`.

Megatron maps an index into memory and trusts every number in it, so a damaged one causes a crash or wrong tokens.
:func:`check_index` reads the same bytes first and names what is wrong. Nothing here executes what it reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lightseq.errors import DataError, explain
from megatron_lightseq.training.data.pairs import first_parts
from megatron_lightseq.training.file_hash import hash_file
from megatron_lightseq.training.plain_files import read_plain_text

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
TOKEN_TYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""Megatron's codes of integer token types."""
_HEADER = struct.Struct("<9sQBQQ")
_PREPARE = "Prepare the corpus again with `lightseq prepare-data`"


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusFacts:
    """What `prepare-data` records about a corpus; stored as `PREFIX.json`."""

    fingerprint: str
    """SHA-256 over inputs (names and contents), tokenizer, options and format: equal means up to date."""
    content: str
    """SHA-256 over the tokens and the document lengths: equal means the same corpus."""
    tokenizer: dict[str, str]
    vocab_size: int
    documents: int
    tokens: int
    """Including end-of-document tokens."""
    entropy: float
    """Unigram entropy of the tokens in nats: the loss of a model that knows only their frequencies."""
    length_histogram: list[list[int]]
    """Rows of (shortest, longest, number of documents), in powers of two."""
    files: int
    skipped: dict[str, int]
    """Number of files that were left out, by reason."""
    skipped_records: dict[str, int] = field(default_factory=dict)
    """Number of lines, rows and items that were left out, by reason."""
    bin_bytes: int
    idx_bytes: int
    pack_length: int = 0
    """Of a corpus packed for fine-tuning: the tokens that each pack has room for; 0: not packed.

    Every document is then two sequences of the index, prompt and answer, and every pack is a document of the index.
    """
    packs: int = 0
    """Number of packs."""
    end_tokens: int = 0
    """Occurrences of the end-of-document token. As many as documents: one ends each, and none is inside of one."""
    bin_hash: str = ""
    """XXH3 of the `.bin` file; empty in facts that an older version has written."""

    @property
    def ends_are_borders(self) -> bool:
        """Whether the lengths in the index say where end-of-document tokens are."""
        return not self.pack_length and self.end_tokens == self.documents


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """The checked contents of an `.idx` file."""

    token_type: type[np.integer[Any]]
    lengths: npt.NDArray[np.int32]
    """Number of tokens of each sequence."""
    documents: npt.NDArray[np.int64]
    """First sequence of each document, then the number of sequences."""


def file_of(prefix: Path | str, suffix: str) -> Path:
    """`PREFIX.suffix`; the prefix may contain dots."""
    return Path(f"{prefix}.{suffix}")


def write_index(
    path: Path,
    lengths: npt.NDArray[np.int32],
    token_type: type[np.integer[Any]],
    documents: npt.NDArray[np.int64] | None = None,
) -> None:
    """Write an index, identical to the output of Megatron's IndexedDatasetBuilder.

    Args:
        path: of the `.idx` file.
        lengths: tokens of the sequences, one after the other in the `.bin` file.
        token_type: of the tokens.
        documents: first sequence of each document, then the number of sequences; default: one sequence each.
    """
    code = next(code for code, known in TOKEN_TYPES.items() if known is token_type)
    ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(token_type).itemsize
    pointers = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(lengths)]
    if documents is None:
        documents = np.arange(len(lengths) + 1, dtype=np.int64)
    with path.open("wb") as stream:
        stream.write(_HEADER.pack(MAGIC, VERSION, code, len(lengths), len(documents)))
        for array in (lengths.astype(np.int32), pointers, documents.astype(np.int64)):
            stream.write(array.tobytes())


def check_index(prefix: Path | str) -> Index:
    """Read `PREFIX.idx` and check it against `PREFIX.bin`; raises DataError that names the file and the fault."""
    path, data = file_of(prefix, "idx"), file_of(prefix, "bin")
    for file in (path, data):
        if not file.is_file():
            raise DataError(
                explain(
                    got=f"{file} is missing",
                    rule=f"data_path names a prefix of two files, {prefix}.bin and {prefix}.idx",
                    remedy=f"Run `lightseq prepare-data FOLDER --output {prefix}`, or correct data_path",
                )
            )
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    _require(len(header) == _HEADER.size, path, f"it has {size} bytes", "a header has 34")
    magic, version, code, num_sequences, num_documents = _HEADER.unpack(header)
    _require(magic == MAGIC, path, f"it begins with {magic!r}", f"an index begins with {MAGIC!r}")
    _require(version == VERSION, path, f"it has version {version}", f"this reader knows version {VERSION}")
    _require(code in TOKEN_TYPES, path, f"its token type code is {code}", f"codes are {sorted(TOKEN_TYPES)}")
    wanted = _HEADER.size + 12 * num_sequences + 8 * num_documents
    _require(
        size in (wanted, wanted + num_sequences),  # multimodal data adds one byte per sequence
        path,
        f"it has {size} bytes for {num_sequences} sequences and {num_documents} document marks",
        f"these need {wanted}",
    )
    lengths: npt.NDArray[np.int32] = _mapped(path, np.int32, _HEADER.size, num_sequences)
    pointers: npt.NDArray[np.int64] = _mapped(path, np.int64, _HEADER.size + 4 * num_sequences, num_sequences)
    documents: npt.NDArray[np.int64] = _mapped(
        path, np.int64, _HEADER.size + 12 * num_sequences, num_documents
    )
    token_type = TOKEN_TYPES[code]
    _check_sequences(path, lengths, pointers, np.dtype(token_type).itemsize, data.stat().st_size)
    _check_documents(path, documents, num_sequences)
    return Index(token_type=token_type, lengths=lengths, documents=documents)


def _mapped(path: Path, kind: type[np.integer[Any]], offset: int, count: int) -> npt.NDArray[Any]:
    """Numbers in a file, memory-mapped; mmap does not accept an empty region."""
    return np.memmap(path, kind, "r", offset, (count,)) if count else np.zeros(0, kind)


def _check_sequences(
    path: Path,
    lengths: npt.NDArray[np.int32],
    pointers: npt.NDArray[np.int64],
    item_size: int,
    data_size: int,
) -> None:
    _require(len(lengths) > 0, path, "it has no sequences", "a corpus has documents")
    _require(
        bool((lengths >= 0).all()), path, f"a sequence has {lengths.min()} tokens", "lengths are not negative"
    )
    _require(bool((pointers >= 0).all()), path, f"a pointer is {pointers.min()}", "pointers are not negative")
    _require(
        bool((pointers % item_size == 0).all()),
        path,
        "a pointer is inside a token",
        "pointers are at the start of tokens",
    )
    _require(
        bool((pointers <= data_size - lengths.astype(np.int64) * item_size).all()),
        path,
        f"a sequence ends after byte {data_size}",
        "that is the end of the .bin file, which was truncated or belongs to another index",
    )


def _check_documents(path: Path, documents: npt.NDArray[np.int64], num_sequences: int) -> None:
    ordered = len(documents) > 0 and documents[0] == 0 and bool((np.diff(documents) >= 0).all())
    _require(ordered, path, "document marks are out of order", "they begin at 0 and never decrease")
    _require(
        int(documents[-1]) == num_sequences,
        path,
        f"the last document ends at sequence {documents[-1]}",
        f"there are {num_sequences} sequences",
    )


def _require(holds: bool, path: Path, got: str, rule: str) -> None:
    if not holds:
        raise DataError(explain(got=f"{path} is damaged, {got}", rule=rule, remedy=_PREPARE))


def read_facts(prefix: Path | str) -> CorpusFacts | None:
    """The facts of a corpus; None if it has none (Megatron's own tools write no such file)."""
    path = file_of(prefix, "json")
    if not path.is_file():
        return None
    try:
        facts = CorpusFacts(**json.loads(read_plain_text(path, follow=True)))
        numbers = facts.vocab_size, facts.end_tokens, facts.pack_length
        if not (isinstance(facts.entropy, float) and all(isinstance(number, int) for number in numbers)):
            raise TypeError("wrong types")
        if not (isinstance(facts.content, str) and isinstance(facts.bin_hash, str)):
            raise TypeError("wrong types")
        if not 0 <= facts.entropy < math.inf:
            raise ValueError("entropy out of range")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            explain(
                got=f"{path} is damaged ({type(error).__name__})",
                rule="it contains the facts that prepare-data wrote",
                remedy=_PREPARE,
            )
        ) from error
    return facts


def check_facts(prefix: Path | str, facts: CorpusFacts, index: Index) -> None:
    """Raises DataError where facts and files disagree, as when only one of them was replaced.

    Index caches are named after the facts: those of another corpus would point into the wrong tokens.
    """
    found = {
        "documents": len(first_parts(index.lengths)) if facts.pack_length else len(index.lengths),
        "tokens": int(index.lengths.sum(dtype=np.int64)),
        "bin_bytes": file_of(prefix, "bin").stat().st_size,
        "idx_bytes": file_of(prefix, "idx").stat().st_size,
    }
    for name, value in found.items():
        if getattr(facts, name) != value:
            raise DataError(
                explain(
                    got=f"{file_of(prefix, 'json')} says {name} = {getattr(facts, name)}, the files have {value}",
                    rule="the three files of a corpus are written together",
                    remedy=_PREPARE,
                )
            )


def verify_content(prefix: Path | str) -> None:
    """Read the whole `.bin` file; raises DataError unless it is the one that prepare-data has written."""
    facts, data = read_facts(prefix), file_of(prefix, "bin")
    if facts is None or not facts.bin_hash:
        raise DataError(
            explain(
                got=f"{prefix} has no recorded hash",
                rule="verify_data compares the data with what prepare-data has recorded",
                remedy=f"{_PREPARE}, or set verify_data to false",
            )
        )
    found = hash_file(data)
    _require(found == facts.bin_hash, data, f"its hash is {found}", f"prepare-data wrote {facts.bin_hash}")


def write_facts(path: Path, facts: CorpusFacts) -> None:
    """Write the facts as JSON with sorted keys."""
    path.write_text(json.dumps(asdict(facts), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def entropy_nats(counts: npt.NDArray[np.int64]) -> float:
    """Entropy of the distribution with these counts, in nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def length_histogram(lengths: npt.NDArray[np.int32]) -> list[list[int]]:
    """Rows (shortest, longest, count) of documents by length, in powers of two, up to the longest."""
    edges = 2 ** np.arange(int(lengths.max(initial=1)).bit_length() + 1)
    counts, _ = np.histogram(lengths, bins=np.concatenate([[0], edges]))
    rows = zip([0, *edges.tolist()], edges.tolist(), counts.tolist(), strict=False)
    return [[low, high - 1, count] for low, high, count in rows if count]


def content_digest(prefix: Path | str) -> str:
    """Identifies a corpus: the stored digest, or else one over sizes and modification times of the files."""
    facts = read_facts(prefix)
    if facts is not None:
        return facts.content
    stamps = [file_of(prefix, suffix).stat() for suffix in ("bin", "idx")]
    text = ",".join(f"{stamp.st_size}:{stamp.st_mtime_ns}" for stamp in stamps)
    return hashlib.sha256(text.encode()).hexdigest()
