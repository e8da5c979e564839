"""What is imported: a model's configuration, its tensors and the files that travel with it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files that are carried from a model to its checkpoints and back, by name or pattern."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as a file says that it is."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    """A dtype of torch, or the file's name of one that torch lacks."""
    file: str


def carry_files(source: Path, target: Path, *, leave_out: tuple[str, ...] = ()) -> None:
    """Copy the files that travel with a model from one folder to another, but not those of some names."""
    for pattern in CARRIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.name not in leave_out:
                shutil.copyfile(path, target / path.name)


class Source(Protocol):
    """A model to import."""

    @property
    def origin(self) -> str:
        """Where the configuration comes from, for errors."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The fields of config.json."""

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor by its Hugging Face name."""

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """One tensor, or with ``expert`` one slice of its first dimension."""

    def tokenizer_size(self) -> int | None:
        """The largest id of tokenizer.json plus one; None if there is no such file."""

    def carry(self, folder: Path) -> None:
        """Write the files that travel with the model, config.json among them, into an existing folder."""
