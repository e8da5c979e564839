"""Bad input is named, and nothing half-written is left."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lightseq.cli import run
from megatron_lightseq.convert.exporting import export_hf
from megatron_lightseq.convert.importing import import_hf
from megatron_lightseq.errors import CheckpointError, ConfigError, LightSeqError, UnsupportedError
from tests.convert.models import make

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make("llama", folder)
    return folder


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _tokenizer(folder: Path, size: int) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {f"w{number}": number for number in range(size - 1)} | {"</s>": size - 1}
    Tokenizer(WordLevel(vocabulary, unk_token="w0")).save(str(folder / "tokenizer.json"))


def _missing_shard(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    table = {name: f"model-0000{1 + (i > 9)}-of-00002.safetensors" for i, name in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def _index_leads_away(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret"}}))


def _lying_header(folder: Path) -> None:
    """The header says that a tensor has another shape than its bytes."""
    content = (folder / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header["model.norm.weight"]["shape"] = [640]
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def _truncated(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1])


def _endless_header(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + content[8:])


def _norm_name() -> str:
    return "model.layers.2.input_layernorm.weight"


BROKEN: dict[str, tuple[Callable[[Path], Any], type[LightSeqError], str]] = {
    "unknown family": (
        lambda x: _config(x, model_type="lama"),
        UnsupportedError,
        r"model_type 'lama'.*Perhaps llama was meant",
    ),
    "unknown field": (
        lambda x: _config(x, attention_twist=3),
        UnsupportedError,
        r"attention_twist: 3.*honoured or refused.*--ignore-field",
    ),
    "quantised": (
        lambda x: _config(x, quantization_config={"quant_method": "fp8"}),
        UnsupportedError,
        "quantization_config",
    ),
    "a bias that recipes lack": (lambda x: _config(x, mlp_bias=True), UnsupportedError, "mlp_bias True"),
    "another activation": (lambda x: _config(x, hidden_act="relu"), UnsupportedError, "hidden_act 'relu'"),
    "an unknown scaling": (
        lambda x: _config(x, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        UnsupportedError,
        "rope_type 'dynamic'.*llama3",
    ),
    "llama3 with other numbers": (
        lambda x: _config(
            x,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        UnsupportedError,
        r"low_freq_factor 2\.0",
    ),
    "yarn with one of two scales": (
        lambda x: _config(
            x,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
                "mscale": 0.7,
            },
        ),
        UnsupportedError,
        r"mscale and mscale_all_dim .*0\.7.*both",
    ),
    "a text for a number": (lambda x: _config(x, hidden_size="64"), ConfigError, "hidden_size '64'.*whole"),
    "heads that do not divide": (
        lambda x: _config(x, num_key_value_heads=3),
        ConfigError,
        "multiple of num_query_groups",
    ),
    "no object": (
        lambda x: (x / "config.json").write_text("[]"),
        ConfigError,
        "config.json.*one JSON object",
    ),
    "no weights": (lambda x: (x / WEIGHTS).unlink(), CheckpointError, rf"without {WEIGHTS}.*no safetensors"),
    "missing shard": (_missing_shard, CheckpointError, "without model-00002-of-00002.safetensors"),
    "index that leads away": (_index_leads_away, CheckpointError, "secret.*same folder"),
    "lying header": (_lying_header, CheckpointError, WEIGHTS),
    "truncated": (_truncated, CheckpointError, WEIGHTS),
    "endless header": (_endless_header, CheckpointError, WEIGHTS),
    "a missing tensor": (
        lambda x: _weights(x, lambda t: t.pop(_norm_name())),
        CheckpointError,
        f"{_norm_name()} is missing",
    ),
    "a tensor too many": (
        lambda x: _weights(x, lambda t: t.update({"model.layers.0.extra": torch.ones(1)})),
        CheckpointError,
        "model.layers.0.extra.*no part",
    ),
    "another shape": (
        lambda x: _weights(x, lambda t: t.update({_norm_name(): torch.ones(63)})),
        CheckpointError,
        rf"{_norm_name()}.*\[63\].*\[64\]",
    ),
    "another dtype": (
        lambda x: _weights(x, lambda t: t.update({_norm_name(): t[_norm_name()].bfloat16()})),
        UnsupportedError,
        rf"{_norm_name()} is bfloat16.*--dtype",
    ),
    "whole numbers": (
        lambda x: _weights(x, lambda t: t.update({_norm_name(): torch.ones(64, dtype=torch.int8)})),
        UnsupportedError,
        rf"{_norm_name()} is I8.*quantisation",
    ),
    "a tokenizer larger than the embedding": (
        lambda x: _tokenizer(x, 385),
        CheckpointError,
        "ids up to 384, and vocab_size 384",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_is_named_and_leaves_nothing(name: str, copy: Path, tmp_path: Path) -> None:
    damage, error, pattern = BROKEN[name]
    damage(copy)
    with pytest.raises(error, match=re.compile(pattern, re.DOTALL)):
        import_hf(copy, save=tmp_path / "out", recipe=tmp_path / "recipe.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_an_unknown_field_may_be_ignored_and_dtypes_converted(copy: Path, tmp_path: Path) -> None:
    _config(copy, attention_twist=3)
    _tokenizer(copy, 384)
    _weights(copy, lambda t: t.update({_norm_name(): t[_norm_name()].half()}))
    flags = ["--save", str(tmp_path / "out"), "--recipe", str(tmp_path / "recipe.yaml")]
    assert (
        run(["import-hf", str(copy), *flags, "--ignore-field", "attention_twist", "--dtype", "bfloat16"]) == 0
    )
    assert "bf16: true" in (tmp_path / "recipe.yaml").read_text()
    assert run(["export-hf", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    exported = load_file(tmp_path / "back" / WEIGHTS)
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["attention_twist"] == 3
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()


def test_a_disk_that_fails_leaves_nothing(copy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from megatron_lightseq.convert.safetensors_files import HuggingFaceFolder

    read = HuggingFaceFolder.read

    def failing(self: HuggingFaceFolder, name: str, expert: int | None = None) -> torch.Tensor:
        if name.startswith("model.layers.3."):
            raise OSError(28, "No space left on device")
        return read(self, name, expert)

    monkeypatch.setattr(HuggingFaceFolder, "read", failing)
    with pytest.raises(CheckpointError, match="No space left"):
        import_hf(copy, save=tmp_path / "out", recipe=tmp_path / "recipe.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_existing_targets_are_left_alone(copy: Path, tmp_path: Path) -> None:
    import_hf(copy, save=tmp_path / "out", recipe=tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError, match="which holds iter_0000000"):
        import_hf(copy, save=tmp_path / "out", recipe=tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError, match="which exists"):
        export_hf(tmp_path / "out", copy)
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        export_hf(copy, tmp_path / "back")


def test_a_damaged_checkpoint_is_not_exported(copy: Path, tmp_path: Path) -> None:
    found = import_hf(copy, save=tmp_path / "out", recipe=tmp_path / "recipe.yaml")
    data = next(found.checkpoint.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{data.name} is damaged"):
        export_hf(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()
