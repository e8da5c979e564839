"""What follows a model through training: its files, and what the run has changed of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_lightseq.config import with_values
from megatron_lightseq.convert.exporting import export_hf
from megatron_lightseq.convert.importing import import_hf
from megatron_lightseq.convert.recipe import recipe_of, updated
from megatron_lightseq.errors import UnsupportedError
from megatron_lightseq.training.checkpoint.companions import COMPANIONS, take_over
from tests.convert.loaded import logits
from tests.convert.models import load, logits_of, make, tokens
from tests.convert.test_parity import assert_close, assert_same_tensors
from tests.harness.ranks import RankError, run_ranks


def test_a_run_with_another_base_is_exported_with_it(tmp_path: Path) -> None:
    make("llama tied", tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    import_hf(tmp_path / "model", save=tmp_path / "checkpoints", recipe=recipe)
    flags = ["--rotary-base", "50000", "--max-position-embeddings", "4096"]
    run_ranks(1, logits, str(recipe), flags, tokens(), str(tmp_path / "longer"))
    assert take_over(tmp_path / "checkpoints", tmp_path / "longer")
    assert not take_over(tmp_path / "checkpoints", tmp_path / "longer")
    export_hf(tmp_path / "longer", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", tmp_path / "model")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["max_position_embeddings"] == 4096
    assert config["rope_parameters"]["rope_theta"] == 50000
    assert sorted(path.name for path in (tmp_path / "longer" / COMPANIONS).iterdir()) == [
        "config.json",
        "generation_config.json",
    ]


LONGER: dict[str, list[str]] = {
    "base": ["--rotary-base", "50000"],
    "linear": ["--rotary-seq-len-interpolation-factor", "4"],
    "llama3": ["--use-rope-scaling", "--rope-scaling-factor", "32", "--rotary-base", "100000"],
    "yarn": [
        *("--position-embedding-type", "yarn", "--yarn-rotary-scaling-factor", "8"),
        *("--yarn-original-max-position-embeddings", "32", "--yarn-beta-fast", "16"),
    ],
    "longrope": [
        *("--rope-type", "longrope", "--original-max-position-embeddings", "32"),
        *("--longrope-short-factor", "1", "1", "1", "1"),
        *("--longrope-long-factor", "1", "2", "3", "4"),
    ],
}
"""Ways to reach further than a model was made for."""


@pytest.mark.parametrize("kind", LONGER)
@pytest.mark.parametrize("old_format", [False, True])
def test_transformers_computes_what_was_trained_with_another_rope(
    kind: str, old_format: bool, tmp_path: Path
) -> None:
    make("llama", tmp_path / "model")
    if old_format:  # of transformers 4
        config = json.loads((tmp_path / "model/config.json").read_text())
        config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
        (tmp_path / "model/config.json").write_text(json.dumps(config))
    recipe = tmp_path / "recipe.yaml"
    import_hf(tmp_path / "model", save=tmp_path / "checkpoints", recipe=recipe)
    flags = [*LONGER[kind], "--max-position-embeddings", "4096"]
    (ours,) = run_ranks(1, logits, str(recipe), flags, tokens(), str(tmp_path / "longer"))
    take_over(tmp_path / "checkpoints", tmp_path / "longer")
    export_hf(tmp_path / "longer", tmp_path / "back")
    assert_close(logits_of(load(tmp_path / "back")), ours, kind)
    if kind != "base":
        assert not torch.allclose(logits_of(load(tmp_path / "model")), ours, atol=1e-3)


def test_a_run_that_changed_the_model_is_refused(tmp_path: Path) -> None:
    make("llama", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    recipe = recipe_of(config, "config.json")
    assert updated(config, recipe, "config.json")["hidden_size"] == 64
    with pytest.raises(UnsupportedError, match=r"norm_epsilon 1e-06 .* and 0\.001 in the run"):
        updated(config, with_values(recipe, norm_epsilon=1e-3), "config.json")


def test_weights_alone_are_no_run_to_resume(tmp_path: Path) -> None:
    make("llama", tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    import_hf(tmp_path / "model", save=tmp_path / "checkpoints", recipe=recipe)
    with pytest.raises(RankError, match=r"weights only, without --finetune.*Start from the weights"):
        run_ranks(1, logits, str(recipe), ["--no-finetune"], tokens())
