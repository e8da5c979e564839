"""What a document may be: ids of the vocabulary, and short enough for the index and for a pack."""

from __future__ import annotations

from megatron_lightseq.errors import DataError, explain
from megatron_lightseq.training.data.documents import Document, ReadCounts, ReadOptions
from megatron_lightseq.training.data.tokenizers import Tokenizer, Tokens

MAX_TOKENS_PER_DOCUMENT = 2**31 - 1
"""Megatron stores lengths as int32."""


def fits(
    found: list[Tokens], document: Document, pack_length: int, options: ReadOptions, counts: ReadCounts
) -> bool:
    """Whether a document fits into a pack; one that does not is refused, or left out and counted."""
    tokens = sum(map(len, found))
    if tokens <= pack_length:
        return True
    if not options.skip_bad_lines:
        raise DataError(
            explain(
                got=f"{document.place} has {tokens} tokens",
                rule=f"a document is not cut, and --pack makes sequences of {pack_length} tokens",
                remedy=f"Pack sequences of at least {tokens} tokens, or leave such records out with --skip-bad-lines",
            )
        )
    counts.skip_record(f"longer than {pack_length} tokens")
    return False


def check_tokens(tokens: Tokens, document: Document, number: int, tokenizer: Tokenizer) -> None:
    """Raises DataError where a document is too long or has an id outside the vocabulary."""
    if len(tokens) >= MAX_TOKENS_PER_DOCUMENT:
        raise DataError(
            explain(
                got=f"{document.place} (document {number}) has {len(tokens)} tokens",
                rule=f"a document has fewer than {MAX_TOKENS_PER_DOCUMENT}",
                remedy="Divide it into several files or lines",
            )
        )
    outside = tokens[(tokens < 0) | (tokens >= tokenizer.vocab_size)]
    if len(outside):
        raise DataError(
            explain(
                got=f"{document.place} (document {number}) has the token id {outside[0]}",
                rule=f"ids of this tokenizer are between 0 and {tokenizer.vocab_size - 1}",
                remedy="Use a tokenizer file whose vocabulary has all of its ids",
            )
        )
