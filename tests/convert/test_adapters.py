"""Adapters trained on an imported model: resumed, merged, and loaded by peft."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from megatron_lightseq.cli import run
from megatron_lightseq.convert.exporting import export_adapter, export_hf
from megatron_lightseq.convert.importing import import_hf
from megatron_lightseq.errors import ConfigError, UnsupportedError
from megatron_lightseq.training.checkpoint.companions import take_over
from tests.convert.loaded import logits
from tests.convert.models import load, logits_of, make, tokens
from tests.convert.test_parity import assert_close
from tests.convert.tuned import train_adapters
from tests.harness.ranks import RankError, run_ranks

STEPS = 3
ATTENTION = ["--lora-target-modules", "linear_qkv", "linear_proj"]
FAMILIES = {"llama": [], "qwen2": [], "phi3": [], "gemma2": [], "qwen3_moe": ATTENTION}


def trained(name: str, folder: Path, flags: list[str], ranks: int = 1) -> torch.Tensor:
    """Import a model of a family and train its adapters; the logits afterwards."""
    make(name, folder / "model")
    recipe = folder / "recipe.yaml"
    import_hf(folder / "model", save=folder / "imported", recipe=recipe)
    found = run_ranks(ranks, train_adapters, str(recipe), flags, tokens(), str(folder / "tuned"), STEPS)
    take_over(folder / "imported", folder / "tuned")
    assert all(torch.isfinite(torch.tensor(losses)).all() for _, losses in found)
    return found[0][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_merged_and_loaded_by_peft(family: str, tmp_path: Path) -> None:
    ours = trained(family, tmp_path, FAMILIES[family])
    base = logits_of(load(tmp_path / "model"))
    assert (ours - base).abs().max() > 1e-2 * base.abs().max(), "training has changed the model"
    export_hf(tmp_path / "tuned", tmp_path / "merged")
    assert_close(logits_of(load(tmp_path / "merged")), ours, "merged")
    assert run(["export-hf", str(tmp_path / "tuned"), str(tmp_path / "adapter"), "--adapter"]) == 0
    model = PeftModel.from_pretrained(load(tmp_path / "model"), tmp_path / "adapter")
    assert_close(logits_of(model), ours, "peft")
    assert not (tmp_path / "adapter/config.json").exists()


def test_adapters_resume_bitwise_and_on_other_ranks(tmp_path: Path) -> None:
    ours = trained("llama", tmp_path, [])
    recipe, flags = str(tmp_path / "recipe.yaml"), list[str]()
    run_ranks(1, train_adapters, recipe, flags, tokens(), str(tmp_path / "half"), STEPS - 1)
    shutil.copytree(tmp_path / "half", tmp_path / "other")
    half = str(tmp_path / "half")
    ((resumed, _),) = run_ranks(1, train_adapters, recipe, flags, tokens(), half, STEPS, half)
    assert torch.equal(resumed, ours)
    export_like = tmp_path / "imported/hf"
    two = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    other = str(tmp_path / "other")
    run_ranks(2, train_adapters, recipe, two, tokens(), other, STEPS, other)
    export_hf(tmp_path / "other", tmp_path / "back", like=export_like)
    assert_close(logits_of(load(tmp_path / "back")), ours, "two ranks")


def test_a_run_without_adapters_refuses_a_checkpoint_that_has_them(tmp_path: Path) -> None:
    trained("llama", tmp_path, [])
    with pytest.raises(RankError, match="lora_dim is 4 in the checkpoint and None here"):
        run_ranks(1, logits, str(tmp_path / "recipe.yaml"), ["--load", str(tmp_path / "tuned")], tokens())
    with pytest.raises(ConfigError, match="which has no adapters"):
        export_adapter(tmp_path / "imported", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_adapters_of_a_model_with_another_rope_are_merged_only(tmp_path: Path) -> None:
    ours = trained("llama", tmp_path, ["--rotary-base", "50000"])
    with pytest.raises(UnsupportedError, match="Merge the adapters: leave --adapter out"):
        export_adapter(tmp_path / "tuned", tmp_path / "adapter")
    export_hf(tmp_path / "tuned", tmp_path / "merged")
    assert_close(logits_of(load(tmp_path / "merged")), ours, "merged")
