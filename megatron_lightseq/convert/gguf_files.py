"""GGUF files of llama.cpp: read one tensor at a time, dequantised, under the names of Hugging Face.

Opening and dequantising is the `gguf` package's work, the tokenizer that of transformers. A GGUF file says in its own
words what config.json says; here they are put into those of config.json, which the families of
:mod:`megatron_lightseq.convert.families` then read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from megatron_lightseq.convert.gguf_fields import LLAMA3_TENSOR, config_of
from megatron_lightseq.convert.source import Stored
from megatron_lightseq.errors import CheckpointError, ConfigError, UnsupportedError, explain

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS = {f"ffn_{x}_exps": f"{x}_proj" for x in ("gate", "up", "down")}
_OTHERS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
PLAIN = MappingProxyType({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16})
"""Types that are not quantised."""
DAMAGE = (ValueError, IndexError, KeyError, OverflowError, OSError, MemoryError)
"""What the package raises for files that are none, or are cut off."""


class _Part(NamedTuple):
    """Where a tensor of Hugging Face's name lies in the file."""

    tensor: Any
    """Of the package: name, type and data."""
    expert: int | None = None
    heads: int | None = None
    """llama.cpp stores rotated pairs of dimensions next to each other: in so many heads."""


class GgufFile:
    """A model in one GGUF file.

    Quantised weights become float32; others keep their dtype.

    Args:
        path: of the file.

    Raises:
        ConfigError: the `gguf` package is not installed.
        CheckpointError: the file is none, or is damaged.
        UnsupportedError: an architecture, a field or a type that cannot be converted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        reader = self._open()
        self._fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        factors = tensors.pop(LLAMA3_TENSOR, None)
        self.config: Mapping[str, Any] = config_of(
            self._fields,
            str(path),
            vocab_size=self._rows(tensors),
            tied="output.weight" not in tensors,
            rope_factors=None if factors is None else self._dequantised(factors.data, factors.tensor_type),
        )
        self._parts = dict(self._list(tensors))
        self.tensors: Mapping[str, Stored] = {name: self._stored(part) for name, part in self._parts.items()}

    @property
    def origin(self) -> str:
        """The path of the file."""
        return str(self._path)

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """One tensor, dequantised."""
        assert expert is None, "experts have names of their own"
        part = self._parts[name]
        data = part.tensor.data if part.expert is None else part.tensor.data[part.expert]
        found = self._dequantised(data, part.tensor.tensor_type)
        if part.heads is not None:
            by_pair = found.reshape(part.heads, -1, 2, *found.shape[1:])
            found = by_pair.transpose(1, 2).reshape(found.shape)
        return found.contiguous()

    def tokenizer_size(self) -> int | None:
        """The number of tokens that the file lists; None if it has no tokenizer."""
        tokens = self._fields.get("tokenizer.ggml.tokens")
        return None if tokens is None else len(tokens)

    def carry(self, folder: Path) -> None:
        """Write config.json and the tokenizer, as transformers converts it."""
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        if self.tokenizer_size() is None:
            return
        try:
            import transformers

            load = transformers.AutoTokenizer.from_pretrained
            load(str(self._path.parent), gguf_file=self._path.name).save_pretrained(folder)
        except (ImportError, *DAMAGE) as error:
            raise UnsupportedError(
                explain(
                    got=f"the tokenizer of {self._path} ({error})",
                    rule="transformers converts it to a tokenizer.json",
                    remedy="Install transformers 5 or later, or import the model from its safetensors files",
                )
            ) from error

    # ---- tensors ------------------------------------------------------------------------------------------

    def _open(self) -> Any:
        package = _package()
        try:
            return package.GGUFReader(self._path)
        except DAMAGE as error:
            raise CheckpointError(
                explain(
                    got=f"{self._path} ({error})",
                    rule="a GGUF file describes all that it holds",
                    remedy="Download the file again",
                )
            ) from error

    def _rows(self, tensors: Mapping[str, Any]) -> int:
        embedding = tensors.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError(
                explain(
                    got=f"{self._path} without token_embd.weight",
                    rule="the embedding says how large the vocabulary is",
                    remedy="Give the file of a whole model",
                )
            )
        return int(embedding.shape[-1])

    def _list(self, tensors: Mapping[str, Any]) -> list[tuple[str, _Part]]:
        found: list[tuple[str, _Part]] = []
        for name, tensor in tensors.items():
            match = _BLOCK.fullmatch(name)
            if match is None:
                found.append((_OTHERS.get(name, name), _Part(tensor)))
            elif match[2] in _EXPERTS:
                prefix = f"model.layers.{match[1]}.mlp.experts"
                for expert in range(int(tensor.shape[-1])):
                    found.append(
                        (f"{prefix}.{expert}.{_EXPERTS[match[2]]}.{match[3]}", _Part(tensor, expert))
                    )
            elif match[2] in _LAYER:
                name = f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
                found.append((name, _Part(tensor, heads=self._paired_heads(match[2]))))
            else:
                found.append((name, _Part(tensor)))
        return found

    def _paired_heads(self, name: str) -> int | None:
        """Heads of queries or keys whose dimensions are paired; only the llama architecture is stored so."""
        if self.config["model_type"] != "llama":
            return None
        keys = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        return self.config[keys[name]] if name in keys else None

    def _stored(self, part: _Part) -> Stored:
        shape = tuple(int(size) for size in reversed(part.tensor.shape))
        kind = part.tensor.tensor_type
        dtype = PLAIN.get(kind.name) or (torch.float32 if _dequantises(kind) else kind.name)
        return Stored(shape if part.expert is None else shape[1:], dtype, self._path.name)

    @staticmethod
    def _dequantised(data: Any, kind: Any) -> torch.Tensor:
        found = torch.tensor(_package().dequantize(data, kind))
        return found.to(PLAIN.get(kind.name, torch.float32))


@cache
def _dequantises(kind: Any) -> bool:
    """Whether the package can turn blocks of a type into numbers."""
    import numpy as np

    package = _package()
    _, size = package.GGML_QUANT_SIZES[kind]
    try:
        package.dequantize(np.zeros((1, size), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _package() -> Any:
    """The `gguf` package; raises ConfigError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            explain(
                got="no gguf package",
                rule="it reads and dequantises GGUF files",
                remedy="pip install 'megatron-lightseq[hf]'",
            )
        ) from error
    return gguf
