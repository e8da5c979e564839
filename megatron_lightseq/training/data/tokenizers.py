"""Text to token ids: bytes, a Hugging Face `tokenizers` file, or ids written as text.

A tokenizer also provides what Megatron's GPTDataset reads: `vocab_size`, `eod`, `unique_identifiers`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_lightseq.config import DataConfig
from megatron_lightseq.errors import DataError, explain

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HuggingFaceTokenizer

Tokens = npt.NDArray[np.integer[Any]]
_IS_NUMBER = re.compile(r"-?[0-9]+")

END_OF_DOCUMENT_NAMES = (
    "<|endoftext|>",  # GPT-2, gpt-oss, Qwen, OLMo, Phi, StarCoder
    "<|end_of_text|>",  # Llama 3
    "<｜end▁of▁sentence｜>",  # DeepSeek
    "</s>",  # Llama 1 and 2, Mistral, T5
    "<eos>",  # Gemma
    "<|eos|>",
    "[EOS]",
    "<EOS_TOKEN>",
    "<|im_end|>",
    "[SEP]",  # BERT
)
"""What published tokenizers call their end-of-document token, in the order in which the names are tried."""
SHOWN_NAMES = 20
"""Special tokens that an error message lists."""


class Tokenizer(Protocol):
    """What corpus preparation and datasets need."""

    @property
    def vocab_size(self) -> int:
        """The largest token id plus one, including the end-of-document token."""

    @property
    def eod(self) -> int:
        """The end-of-document token."""

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """What distinguishes this tokenizer from others; part of the fingerprints of corpora and index caches."""

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Token ids of each text, without the end-of-document token."""


@dataclass(frozen=True, slots=True)
class ByteTokenizer:
    """One token per byte of UTF-8."""

    vocab_size: int = 257
    eod: int = 256

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """Only the class: all byte tokenizers are the same."""
        return {"class": "ByteTokenizer"}

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """The UTF-8 bytes of each text."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]


@dataclass(frozen=True, slots=True)
class NullTokenizer:
    """For text that already is token ids, separated by whitespace; the largest id ends a document."""

    vocab_size: int

    @property
    def eod(self) -> int:
        """The last id of the vocabulary."""
        return self.vocab_size - 1

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """Class and vocabulary size."""
        return {"class": "NullTokenizer", "vocab_size": str(self.vocab_size)}

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """The ids written in each text; raises DataError for anything else."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> Tokens:
        words = text.split()
        try:
            if not all(map(_IS_NUMBER.fullmatch, words)):
                raise ValueError("not decimal digits")
            ids = np.array(list(map(int, words)), dtype=np.int64)
        except (ValueError, OverflowError) as error:
            raise DataError(
                explain(
                    got=f"the text {text[:40]!r}",
                    rule="the null tokenizer reads token ids separated by whitespace",
                    remedy="Use --tokenizer-type byte for text",
                )
            ) from error
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise DataError(
                explain(
                    got=f"token ids from {ids.min()} to {ids.max()} with vocab_size {self.vocab_size}",
                    rule="ids are between 0 and vocab_size - 1",
                    remedy=f"Set vocab_size to at least {ids.max() + 1}",
                )
            )
        return ids


@dataclass(frozen=True, slots=True)
class HFTokenizer:
    """A Hugging Face `tokenizers` JSON file."""

    digest: str
    vocab_size: int
    """The largest id plus one: published vocabularies have gaps, so the number of entries can be smaller."""
    eod: int
    tokenizer: HuggingFaceTokenizer = field(compare=False, repr=False)

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """Class, digest of the file and end-of-document token."""
        return {"class": "HFTokenizer", "sha256": self.digest, "eod": str(self.eod)}

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Ids of each text, using all cores; raises DataError where the library cannot encode one."""
        try:
            encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:  # the library raises Exception, and panics with less than that
            _reraise_interrupts(error)
            raise DataError(
                explain(
                    got=f"the tokenizer cannot encode this text ({error})",
                    rule="a tokenizer has ids for every text, if only an unknown token",
                    remedy="Add its unknown token to the tokenizer file, or remove the text",
                )
            ) from error
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tuple[Tokens, np.ndarray[Any, np.dtype[np.int64]]]:
        """Ids of a text, and (tokens, 2): the first character of each token, and the one behind its last."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.array(encoding.ids, dtype=np.int64), offsets


def load_hf_tokenizer(path: Path, eod_token: str | None = None) -> HFTokenizer:
    """Read a `tokenizers` JSON file.

    Truncation, padding and dropout are often stored in published files. They are meant for inference and fine-tuning,
    and would cut, lengthen or randomise documents, so they are switched off.

    Args:
        path: The JSON file.
        eod_token: Name of the end-of-document token; None for the first of END_OF_DOCUMENT_NAMES in the file, special
            tokens before ordinary ones.

    Raises:
        DataError: The file cannot be read, its added tokens get other ids than it says, or it has no such
            end-of-document token.
    """
    content, tokenizer = _read(path)
    _check_stored_ids(path, content, tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return HFTokenizer(
        digest=hashlib.sha256(content).hexdigest(),
        vocab_size=_largest_id(tokenizer) + 1,
        eod=_end_of_document(path, tokenizer, eod_token),
        tokenizer=tokenizer,
    )


def vocabulary_size(path: Path) -> int:
    """The largest id of a `tokenizers` JSON file plus one; raises DataError if it cannot be read."""
    return _largest_id(_read(path)[1]) + 1


def _read(path: Path) -> tuple[bytes, HuggingFaceTokenizer]:
    import tokenizers

    try:
        content = path.read_bytes() if path.is_file() else b""
        return content, tokenizers.Tokenizer.from_buffer(content)
    except BaseException as error:  # the library raises Exception, and panics with less than that
        _reraise_interrupts(error)
        raise DataError(
            explain(
                got=f"{path} cannot be read as a tokenizer ({error})",
                rule="tokenizer_model is a JSON file of the `tokenizers` library",
                remedy="Give the tokenizer.json that comes with a Hugging Face model",
            )
        ) from error


def _reraise_interrupts(error: BaseException) -> None:
    """Ctrl-C and exits are not errors of the tokenizer."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
        raise error


def _largest_id(tokenizer: HuggingFaceTokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def _check_stored_ids(path: Path, content: bytes, tokenizer: HuggingFaceTokenizer) -> None:
    """Raises DataError where the library numbers an added token differently from the file: it closes gaps silently."""
    for token in json.loads(content).get("added_tokens") or ():
        name, stored = token["content"], token["id"]
        loaded = tokenizer.token_to_id(name)
        if loaded != stored:
            raise DataError(
                explain(
                    got=f"{path} has the added token {name!r} with id {stored}, and the library loads it as {loaded}",
                    rule="ids of added tokens continue the vocabulary without a gap, or repeat an entry of it",
                    remedy="Add entries for the missing ids to the vocabulary of the file",
                )
            )


def _end_of_document(path: Path, tokenizer: HuggingFaceTokenizer, name: str | None) -> int:
    """Id of the end-of-document token; raises DataError where there is none."""
    special = {
        token.content: number
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    }
    ordinary = tokenizer.get_vocab(with_added_tokens=True)
    # Special tokens first: an ordinary "</s>" can be a fragment of HTML that was learned as one token.
    for candidates in (special, ordinary):
        for known in END_OF_DOCUMENT_NAMES if name is None else (name,):
            if known in candidates:
                return candidates[known]
    shown = ", ".join(list(special)[:SHOWN_NAMES]) or "none"
    raise DataError(
        explain(
            got=f"{path} has no token {name!r}"
            if name
            else f"{path} has none of {', '.join(END_OF_DOCUMENT_NAMES)}",
            rule="documents need an end-of-document token",
            remedy=f"Set --eod-token to the one that ends a text; the special tokens of the file are: {shown}",
        )
    )


def build_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer of a configuration; raises DataError when its file cannot be used."""
    if data.tokenizer_type == "hf":
        assert data.tokenizer_model is not None, "a rule requires tokenizer_model with hf"
        return load_hf_tokenizer(Path(data.tokenizer_model), data.eod_token)
    if data.tokenizer_type == "null":
        assert data.vocab_size is not None, "a rule requires vocab_size with null"
        return NullTokenizer(vocab_size=data.vocab_size)
    return ByteTokenizer()
