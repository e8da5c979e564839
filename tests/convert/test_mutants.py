"""Mistakes in the mapping are seen: each of these loads without complaint and computes something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lightseq.convert.importing import import_hf
from megatron_lightseq.convert.safetensors_files import HuggingFaceFolder
from tests.convert.loaded import logits
from tests.convert.models import TOLERANCE, logits_of, make, tokens
from tests.harness.ranks import run_ranks

Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.1."


class Changed(HuggingFaceFolder):
    """A folder whose tensors are read as a wrong mapping would read them."""

    def __init__(self, folder: Path, mutate: Callable[[Tensors], None]) -> None:
        super().__init__(folder)
        self._changed = {name: super(Changed, self).read(name) for name in self.tensors}
        mutate(self._changed)

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        found = self._changed[name]
        return found if expert is None else found[expert]


def _gate_is_up(found: Tensors) -> None:
    gate, up = LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"
    found[gate], found[up] = found[up], found[gate]


def _heads_not_by_group(found: Tensors) -> None:
    name = LAYER + "self_attn.q_proj.weight"
    found[name] = found[name].reshape(2, 4, 8, 64).transpose(0, 1).reshape(64, 64)


def _queries_interleaved(found: Tensors) -> None:
    for x in "qk":
        name = f"{LAYER}self_attn.{x}_proj.weight"
        found[name] = found[name].reshape(-1, 2, 4, 64).transpose(1, 2).reshape(-1, 64)
    # Both alike would cancel without positions; RoPE is what shows it.


def _norms_swapped(found: Tensors) -> None:
    before, after = LAYER + "input_layernorm.weight", LAYER + "post_attention_layernorm.weight"
    found[before], found[after] = found[after], found[before]


def _gates_behind_all_queries(found: Tensors) -> None:
    name = "model.layers.3.self_attn.q_proj.weight"
    found[name] = found[name].reshape(8, 2, 16, 64).transpose(0, 1).reshape(256, 64)


def _sections_not_by_key_head(found: Tensors) -> None:
    for name in ("qkvz", "ba"):
        name = f"{LAYER}linear_attn.in_proj_{name}.weight"
        found[name] = found[name].unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def _beta_is_alpha(found: Tensors) -> None:
    name = f"{LAYER}linear_attn.in_proj_ba.weight"
    found[name] = found[name].reshape(2, 2, 3, 64).flip(1).reshape(12, 64)


def _output_norm_is_centred(found: Tensors) -> None:
    found[f"{LAYER}linear_attn.norm.weight"] -= 1


HYBRID = (_gates_behind_all_queries, _sections_not_by_key_head, _beta_is_alpha, _output_norm_is_centred)


@pytest.mark.parametrize("mutate", HYBRID)
def test_a_wrong_mapping_of_hybrid_layers_changes_the_logits(
    mutate: Callable[[Tensors], None], tmp_path: Path
) -> None:
    _check_seen("qwen3_next", mutate, tmp_path)


@pytest.mark.parametrize("mutate", [_gate_is_up, _heads_not_by_group, _queries_interleaved, _norms_swapped])
def test_a_wrong_mapping_changes_the_logits(mutate: Callable[[Tensors], None], tmp_path: Path) -> None:
    _check_seen("llama", mutate, tmp_path)


def _check_seen(name: str, mutate: Callable[[Tensors], None], tmp_path: Path) -> None:
    expected = logits_of(make(name, tmp_path / "model"))
    source = Changed(tmp_path / "model", mutate)
    import_hf(source, save=tmp_path / "checkpoints", recipe=tmp_path / "recipe.yaml")
    (found,) = run_ranks(1, logits, str(tmp_path / "recipe.yaml"), [], tokens())
    assert (found - expected).abs().max() > 1000 * TOLERANCE * expected.abs().max()


def _other_base(part: dict[str, Any]) -> None:
    part["rope_theta"] *= 2


def _unscaled(part: dict[str, Any]) -> None:
    base = part["rope_theta"]
    part.clear()
    part |= {"rope_type": "default", "rope_theta": base}


def _other_factor(part: dict[str, Any]) -> None:
    part["factor"] *= 2


def _other_length(part: dict[str, Any]) -> None:
    part["original_max_position_embeddings"] *= 2


@pytest.mark.parametrize(
    ("kind", "mutate"),
    [
        ("llama", _other_base),
        ("llama llama3", _unscaled),
        ("llama linear", _unscaled),
        ("llama linear", _other_factor),
        ("llama yarn", _unscaled),
        ("llama yarn", _other_factor),
        ("llama yarn", _other_length),
    ],
)
def test_another_rope_changes_the_logits(
    kind: str, mutate: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    expected = logits_of(make(kind, tmp_path / "model"))
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    mutate(config["rope_parameters"])
    path.write_text(json.dumps(config))
    import_hf(tmp_path / "model", save=tmp_path / "checkpoints", recipe=tmp_path / "recipe.yaml")
    (found,) = run_ranks(1, logits, str(tmp_path / "recipe.yaml"), [], tokens())
    assert (found - expected).abs().max() > 1000 * TOLERANCE * expected.abs().max()
