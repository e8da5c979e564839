"""GGUF files become the model that they were made of; what is not understood in them is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lightseq.cli import run
from megatron_lightseq.convert.exporting import export_hf
from megatron_lightseq.convert.gguf_files import GgufFile
from megatron_lightseq.convert.importing import import_hf
from megatron_lightseq.errors import CheckpointError, ConfigError, LightSeqError, UnsupportedError
from megatron_lightseq.training.data.tokenizers import load_hf_tokenizer
from tests.convert.gguf_writer import write
from tests.convert.loaded import logits
from tests.convert.models import load, logits_of, make, tokens
from tests.convert.test_parity import assert_close, assert_same_tensors
from tests.harness.ranks import run_ranks

FAMILIES = ("llama tied", "llama llama3", "qwen2 full", "qwen3", "qwen3_moe")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_is_the_one_that_was_written(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path / "model")
    write(model, tmp_path / "model.gguf")
    recipe = tmp_path / "recipe.yaml"
    import_hf(tmp_path / "model.gguf", save=tmp_path / "checkpoints", recipe=recipe)
    (ours,) = run_ranks(1, logits, str(recipe), [], tokens())
    assert_close(ours, logits_of(model), name)
    export_hf(tmp_path / "checkpoints", tmp_path / "exported")
    assert_same_tensors(tmp_path / "exported", tmp_path / "model")
    assert_close(logits_of(load(tmp_path / "exported")), ours, name)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16"])
def test_quantised_weights_are_those_that_transformers_reads(kind: str, tmp_path: Path) -> None:
    write(make("llama", tmp_path / "model"), tmp_path / "model.gguf", kind=kind)
    theirs = load(tmp_path, gguf_file="model.gguf").state_dict()
    source = GgufFile(tmp_path / "model.gguf")
    for name, stored in source.tensors.items():
        found = source.read(name)
        assert tuple(found.shape) == stored.shape
        assert found.dtype == stored.dtype
        assert torch.equal(found.float(), theirs[name]), name


def test_half_precision_is_converted_when_asked(tmp_path: Path) -> None:
    write(make("llama", tmp_path / "model"), tmp_path / "model.gguf", kind="F16", tokenizer=True)
    arguments = [
        str(tmp_path / "model.gguf"),
        "--save",
        str(tmp_path / "out"),
        "--recipe",
        str(tmp_path / "r.yaml"),
    ]
    assert run(["import-hf", *arguments]) == 2
    assert run(["import-hf", *arguments, "--dtype", "float32"]) == 0
    (found,) = run_ranks(1, logits, str(tmp_path / "r.yaml"), [], tokens())
    expected = logits_of(load(tmp_path, gguf_file="model.gguf"))
    assert_close(found, expected, "float16")
    assert f"tokenizer_model: {tmp_path}/out/hf/tokenizer.json" in (tmp_path / "r.yaml").read_text()
    tokenizer = load_hf_tokenizer(tmp_path / "out/hf/tokenizer.json")
    (ids,) = tokenizer.encode(["the th e"])
    assert tokenizer.tokenizer.decode(ids.tolist()) == "the th e"
    assert len(ids) == 5
    assert tokenizer.eod == 0


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4000])


def _cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def _another_magic(path: Path) -> None:
    path.write_bytes(b"NOPE" + path.read_bytes()[4:])


BROKEN: dict[str, tuple[dict[str, Any], Callable[[Path], None] | None, type[LightSeqError], str]] = {
    "an unknown field": ({"attention.twist": 3}, None, UnsupportedError, r"attention\.twist: 3.*refused"),
    "experts of llama": ({"expert_count": 4}, None, UnsupportedError, "expert_count: 4"),
    "another scaling": (
        {"rope.scaling.type": "longrope"},
        None,
        UnsupportedError,
        "longrope.*linear and yarn",
    ),
    "part of RoPE": ({"rope.dimension_count": 4}, None, UnsupportedError, "rope.dimension_count 4"),
    "another vocabulary": ({"vocab_size": 400}, None, CheckpointError, "vocab_size 400 and 384 rows"),
    "another width": (
        {"feed_forward_length": 95},
        None,
        CheckpointError,
        r"gate_proj.*\[96, 64\].*\[95, 64\]",
    ),
    "a layer too few": ({"block_count": 5}, None, CheckpointError, "layers.4.*is missing"),
    "truncated": ({}, _truncate, CheckpointError, "model.gguf.*describes all"),
    "cut in its header": ({}, _cut_header, CheckpointError, "model.gguf.*describes all"),
    "no GGUF": ({}, _another_magic, CheckpointError, "model.gguf.*describes all"),
    "absent": ({}, Path.unlink, CheckpointError, "model.gguf.*No such file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_files_are_named_and_leave_nothing(name: str, tmp_path: Path) -> None:
    fields, damage, error, pattern = BROKEN[name]
    write(make("llama", tmp_path / "model"), tmp_path / "model.gguf", **fields)
    if damage is not None:
        damage(tmp_path / "model.gguf")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=re.compile(pattern, re.DOTALL)):
        import_hf(tmp_path / "model.gguf", save=tmp_path / "out", recipe=tmp_path / "recipe.yaml")
    assert sorted(tmp_path.iterdir()) == before


def test_an_architecture_without_a_family_is_named(tmp_path: Path) -> None:
    write(make("llama", tmp_path / "model"), tmp_path / "model.gguf", **{"x": 1})
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content.replace(b"llama", b"rwkv7"))
    with pytest.raises(UnsupportedError, match=r"general\.architecture 'rwkv7'.*qwen3moe"):
        GgufFile(tmp_path / "model.gguf")


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    write(make("llama", tmp_path / "model"), tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content.replace(b"llama.block_count", b"llama.clock_count"))
    with pytest.raises(ConfigError, match="without block_count"):
        GgufFile(tmp_path / "model.gguf")
