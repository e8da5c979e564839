"""Text to token ids: bytes, a Hugging Face `tokenizers` file, or ids written as text.

A tokenizer also plays the part that Megatron's GPTDataset asks for: `vocab_size`, `eod`, `unique_identifiers`.
"""

from __future__ import annotations

import hashlib
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

END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
"""What published tokenizers call their end-of-document token, in the order in which they are tried."""


class Tokenizer(Protocol):
    """What preparation and datasets need to know."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the end-of-document token included."""

    @property
    def eod(self) -> int:
        """The end-of-document token."""

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """What tells this tokenizer from any other; part of the fingerprint of a corpus and of index caches."""

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Token ids of each text, without the end-of-document token."""


@dataclass(frozen=True, slots=True)
class ByteTokenizer:
    """One token per byte of UTF-8."""

    vocab_size: int = 257
    eod: int = 256

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """The class alone."""
        return {"class": "ByteTokenizer"}

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """The UTF-8 bytes of each text."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]


@dataclass(frozen=True, slots=True)
class NullTokenizer:
    """Text that already is token ids, separated by blanks; the largest id is the end of a document."""

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
        try:
            ids = np.array([int(word) for word in text.split()], dtype=np.int64)
        except (ValueError, OverflowError) as error:
            raise DataError(
                explain(
                    got=f"the text {text[:40]!r}",
                    rule="the null tokenizer reads token ids separated by blanks",
                    remedy="Use --tokenizer-type byte for text",
                )
            ) from error
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise DataError(
                explain(
                    got=f"token ids from {ids.min()} to {ids.max()} with vocab_size {self.vocab_size}",
                    rule="ids lie between 0 and vocab_size - 1",
                    remedy=f"Set vocab_size to at least {ids.max() + 1}",
                )
            )
        return ids


@dataclass(frozen=True, slots=True)
class HFTokenizer:
    """A Hugging Face `tokenizers` JSON file."""

    digest: str
    eod: int
    tokenizer: HuggingFaceTokenizer = field(compare=False, repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """Class and digest of the file."""
        return {"class": "HFTokenizer", "sha256": self.digest}

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Ids of each text; the library uses all cores."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]


def load_hf_tokenizer(path: Path) -> HFTokenizer:
    """Read a `tokenizers` JSON file; raises DataError when it is none or names no end-of-document token."""
    import tokenizers

    try:
        content = path.read_bytes()
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            explain(
                got=f"{path} cannot be read as a tokenizer ({error})",
                rule="tokenizer_model is a JSON file of the `tokenizers` library",
                remedy="Give the tokenizer.json that comes with a Hugging Face model",
            )
        ) from error
    eod = next(
        filter(lambda found: found is not None, map(tokenizer.token_to_id, END_OF_DOCUMENT_NAMES)), None
    )
    if eod is None:
        raise DataError(
            explain(
                got=f"{path} has none of {', '.join(END_OF_DOCUMENT_NAMES)}",
                rule="documents need an end-of-document token",
                remedy="Add one of them to the tokenizer's added tokens",
            )
        )
    return HFTokenizer(digest=hashlib.sha256(content).hexdigest(), eod=eod, tokenizer=tokenizer)


def build_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer of a configuration; raises DataError when its file is none."""
    if data.tokenizer_type == "hf":
        assert data.tokenizer_model is not None, "the rules let hf pass with a model only"
        return load_hf_tokenizer(Path(data.tokenizer_model))
    if data.tokenizer_type == "null":
        assert data.vocab_size is not None, "the rules let null pass with a vocabulary only"
        return NullTokenizer(vocab_size=data.vocab_size)
    return ByteTokenizer()
