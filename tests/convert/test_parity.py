"""Hugging Face to recipe to Hugging Face: the same logits on any number of ranks, and the same bits back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lightseq.convert.exporting import export_hf
from megatron_lightseq.convert.importing import import_hf
from megatron_lightseq.layout import SequenceLayout
from tests.convert.loaded import logits
from tests.convert.models import CASES, TOLERANCE, logits_of, make, tokens
from tests.harness.ranks import run_ranks

PARALLEL = {
    "TP 2": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "CP 2": ["--context-parallel-size", "2"],
    "PP 2": ["--pipeline-model-parallel-size", "2"],
    "EP 2": ["--context-parallel-size", "2", "--expert-model-parallel-size", "2"],
}


WHOLE_EXPERTS = ["--expert-tensor-parallel-size", "1", "--expert-model-parallel-size", "2"]
"""Experts with biases cannot be cut."""


@pytest.mark.parametrize("name", CASES)
def test_logits_on_any_ranks_and_the_same_bits_back(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path / "model")
    expected = logits_of(model)
    recipe = tmp_path / "recipe.yaml"
    import_hf(tmp_path / "model", save=tmp_path / "checkpoints", recipe=recipe)
    (alone,) = run_ranks(1, logits, str(recipe), [], tokens())
    assert_close(alone, expected, name)
    for kind, flags in PARALLEL.items():
        text = recipe.read_text()
        if kind == "EP 2" and "num_experts" not in text:
            continue
        whole = WHOLE_EXPERTS if kind == "TP 2" and "add_bias_linear: true" in text else []
        found = run_ranks(2, logits, str(recipe), [*flags, *whole], tokens())
        assert_close(_whole(kind, found), expected, f"{name}, {kind}")
    export_hf(tmp_path / "checkpoints", tmp_path / "exported", max_shard_bytes=70_000)
    assert_same_tensors(tmp_path / "exported", tmp_path / "model")


def test_a_checkpoint_saved_by_two_tensor_parallel_ranks_is_exported_the_same(tmp_path: Path) -> None:
    make("qwen3_moe", tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    import_hf(tmp_path / "model", save=tmp_path / "checkpoints", recipe=recipe)
    run_ranks(2, logits, str(recipe), PARALLEL["TP 2"], tokens(), str(tmp_path / "trained"))
    export_hf(tmp_path / "trained", tmp_path / "exported", like=tmp_path / "model")
    assert_same_tensors(tmp_path / "exported", tmp_path / "model")


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE, f"{what}: logits differ by {error:.1e} of the largest"


def assert_same_tensors(folder: Path, other: Path) -> None:
    ours, theirs = _tensors(folder), _tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


def _whole(kind: str, found: list[Any]) -> torch.Tensor:
    if kind == "TP 2":
        return torch.cat(found, -1)
    if kind == "PP 2":
        assert found[0] is None
        whole: torch.Tensor = found[1]
        return whole
    return SequenceLayout.contiguous(2).unshard(found, 1)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found
