"""Conversations as sequences of a packed corpus: what is given and what is learned."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from megatron_lightseq.errors import DataError, explain
from megatron_lightseq.training.data.chat import ChatTemplate
from megatron_lightseq.training.data.document_limits import check_tokens, fits
from megatron_lightseq.training.data.documents import Document, ReadCounts, ReadOptions
from megatron_lightseq.training.data.pairs import pairs_of
from megatron_lightseq.training.data.tokenizers import HFTokenizer, Tokenizer, Tokens


def chat_pieces(
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    chat: ChatTemplate,
    options: ReadOptions,
    pack_length: int,
    counts: ReadCounts,
) -> Iterator[list[Tokens]]:
    """The sequences of each conversation. No end-of-document token is added: templates end turns themselves.

    Raises:
        DataError: a conversation cannot be rendered or is too long, unless such records are left out.
    """
    assert isinstance(tokenizer, HFTokenizer), "a template belongs to a tokenizer file"
    for number, document in enumerate(documents):
        try:
            tokens, learned = encode_chat(document, tokenizer, chat)
        except DataError as error:
            if not options.skip_bad_lines:
                raise DataError(f"{document.place}: {error}") from error
            counts.skip_record("conversation that cannot be used")
            continue
        check_tokens(tokens, document, number, tokenizer)
        if fits([tokens], document, pack_length, options, counts):
            yield list(pairs_of(tokens, learned))


def encode_chat(
    document: Document, tokenizer: HFTokenizer, chat: ChatTemplate
) -> tuple[Tokens, npt.NDArray[np.bool_]]:
    """Ids of a conversation, and which of them the assistant says.

    Raises:
        DataError: the conversation cannot be rendered, or the assistant says nothing in it.
    """
    text, spans = chat.answers(document.messages, document.tools)
    tokens, offsets = tokenizer.encode_with_offsets(text)
    learned = np.zeros(len(tokens), dtype=np.bool_)
    for start, stop in spans:
        learned |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
    if not learned.any():
        raise DataError(
            explain(
                got="a conversation in which the assistant says nothing",
                rule="the loss is that of the assistant's turns",
                remedy="Correct it, or leave it out with --skip-bad-lines",
            )
        )
    return tokens, learned
