"""Folders of safetensors files: read one tensor at a time, and written at places that are known beforehand.

Opening, checking and reading is the `safetensors` library's work. It can only write what is in memory, so files are
written here: a header that says where each tensor will be, then each tensor at its place.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_lightseq.convert.source import Stored, carry_files
from megatron_lightseq.errors import CheckpointError, ConfigError, explain
from megatron_lightseq.training.checkpoint.manifest import check_relative
from megatron_lightseq.training.data.tokenizers import vocabulary_size

SINGLE_NAME, INDEX_NAME, CONFIG_NAME = "model.safetensors", "model.safetensors.index.json", "config.json"
REOPEN_AFTER_BYTES = 256 << 20
"""A file is mapped into memory, where what was read stays resident until the file is closed."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HuggingFaceFolder:
    """A model as ``save_pretrained`` writes it.

    Args:
        folder: with config.json and one or several safetensors files.

    Raises:
        ConfigError: safetensors is not installed, or config.json is missing or no JSON object.
        CheckpointError: a file is missing, truncated or lies about what it holds.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open_file: tuple[str, Any] | None = None
        self._read_bytes = 0
        self.config: Mapping[str, Any] = read_object(folder / CONFIG_NAME)
        self.tensors: Mapping[str, Stored] = self._list()

    @property
    def origin(self) -> str:
        """The path of config.json."""
        return str(self._folder / CONFIG_NAME)

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """A copy of one tensor, or of one slice of its first dimension."""
        stored = self.tensors[name]
        file = self._open(stored.file)
        found: torch.Tensor = file.get_tensor(name) if expert is None else file.get_slice(name)[expert]
        self._read_bytes += found.nbytes
        return found.clone()

    def tokenizer_size(self) -> int | None:
        """The largest id of tokenizer.json plus one; None if there is no such file."""
        path = self._folder / "tokenizer.json"
        return vocabulary_size(path) if path.is_file() else None

    def carry(self, folder: Path) -> None:
        """Copy the small files of the model."""
        carry_files(self._folder, folder)

    # ---- files --------------------------------------------------------------------------------------------

    def _list(self) -> dict[str, Stored]:
        index = self._index()
        found: dict[str, Stored] = {}
        for name in sorted(set(index.values())) if index is not None else [SINGLE_NAME]:
            for tensor, stored in self._list_file(name):
                if tensor in found:
                    raise self._fault(
                        f"tensor {tensor} in {found[tensor].file} and in {name}", "a tensor is stored once"
                    )
                found[tensor] = stored
        for tensor, name in (index or {}).items():
            if tensor not in found or found[tensor].file != name:
                raise self._fault(
                    f"{INDEX_NAME} says that {tensor} is in {name}, and it is not there",
                    "the index must agree with the files",
                )
        return found

    def _index(self) -> dict[str, str] | None:
        path = self._folder / INDEX_NAME
        if not path.is_file():
            return None
        table = read_object(path).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise self._fault(f"{path} without a weight_map", "it maps tensors to files")
        for name in set(table.values()):
            try:
                check_relative(name)
            except ValueError as error:
                raise self._fault(f"{path}: {error}", "its files are in the same folder") from None
        return table

    def _list_file(self, name: str) -> Iterator[tuple[str, Stored]]:
        if not (self._folder / name).is_file():
            others = sorted(path.name for path in self._folder.glob("*.safetensors"))
            raise self._fault(
                f"{self._folder} without {name} (it has {', '.join(others) or 'no safetensors file'})",
                "all safetensors files of a model must be there",
            )
        file = self._open(name)
        for tensor in file.keys():  # noqa: SIM118 - not a mapping
            piece = file.get_slice(tensor)
            dtype = piece.get_dtype()
            yield tensor, Stored(tuple(piece.get_shape()), DTYPES.get(dtype, dtype), name)

    def _open(self, name: str) -> Any:
        if (
            self._open_file is not None
            and self._open_file[0] == name
            and self._read_bytes < REOPEN_AFTER_BYTES
        ):
            return self._open_file[1]
        library = safetensors_library()
        self._open_file, self._read_bytes = None, 0
        path = self._folder / name
        try:
            opened = library.safe_open(path, framework="pt")
        except (library.SafetensorError, OSError) as error:
            raise self._fault(
                f"{path} ({error})", "the header of a safetensors file describes all of it"
            ) from error
        self._open_file = (name, opened)
        return opened

    def _fault(self, got: str, rule: str) -> CheckpointError:
        return CheckpointError(explain(got=got, rule=rule, remedy="Download or save the model again"))


class SafetensorsWriter:
    """One safetensors file whose tensors are written in any order, whole or by slices of their first dimension.

    Args:
        path: of the new file.
        tensors: shape and dtype of each, in the order in which they are to lie in the file.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Stored]) -> None:
        self._starts: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        names = {dtype: name for name, dtype in DTYPES.items()}
        end = 0
        for name, stored in tensors.items():
            assert isinstance(stored.dtype, torch.dtype), "torch made the tensor"
            start, end = end, end + stored.dtype.itemsize * torch.Size(stored.shape).numel()
            self._starts[name] = start
            header[name] = {
                "dtype": names[stored.dtype],
                "shape": list(stored.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
        self._base = 8 + len(text)
        self._left = end
        self._file = path.open("xb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: torch.Tensor, expert: int | None = None) -> None:
        """Write one tensor, or one slice of its first dimension."""
        start = self._base + self._starts[name] + (0 if expert is None else expert * tensor.nbytes)
        self._file.seek(start)
        content = tensor.contiguous().view(-1).view(torch.uint8)
        self._file.write(content.numpy().data)
        self._left -= tensor.nbytes

    def close(self) -> None:
        """Finish the file, of which every byte must have been written."""
        self._file.close()
        assert self._left == 0, f"{self._left} bytes of {self._file.name} were not written"


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object; raises ConfigError, with its name."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _no_object(path, str(error)) from error
    if not isinstance(value, dict):
        raise _no_object(path, f"it is a {type(value).__name__}")
    return value


def _no_object(path: Path, why: str) -> ConfigError:
    return ConfigError(
        explain(
            got=f"{path} ({why})",
            rule="it holds one JSON object",
            remedy="Give the folder of a Hugging Face model, as save_pretrained writes it",
        )
    )


def safetensors_library() -> Any:
    """The `safetensors` package; raises ConfigError where it is not installed."""
    try:
        import safetensors
    except ImportError as error:
        raise ConfigError(
            explain(
                got="no safetensors package",
                rule="it reads the models of Hugging Face",
                remedy="pip install 'megatron-lightseq[hf]'",
            )
        ) from error
    return safetensors
