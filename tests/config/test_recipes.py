"""Every recipe in configs/ is read, obeys all rules on the machine it names, and its schedule can be built."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_lightseq.config import Machine, PretrainConfig, from_yaml, load_config, to_yaml, with_values
from megatron_lightseq.config.rules_run import BYTE_VOCABULARY
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.schedule import build

FOLDER = Path(__file__).parents[2] / "configs"

MACHINES = {
    # ranks, GPUs per host
    "gpt_stdlib": (2, 0),
    "laptop_cp1": (1, 0),
    "cpu_tp2_cp2": (4, 0),
    "cpu_experts_cp2": (2, 0),
    "llama7b_8gpu_64k": (8, 8),
    "gqa8b_2x8gpu_128k": (16, 8),
    "gqa8b_4x8gpu_256k_pp2": (32, 8),
    "zigzag_gpu_32k": (4, 4),
}


def load(name: str) -> PretrainConfig:
    world_size, num_gpus = MACHINES[name]
    machine = Machine(world_size=world_size, num_gpus=num_gpus, has_transformer_engine=False)
    return load_config([str(FOLDER / f"{name}.yaml")], machine=machine)


def num_parameters(config: PretrainConfig) -> int:
    model = config.model
    attention = model.hidden_size * model.head_dim * (2 * model.num_attention_heads + 2 * model.query_groups)
    mlp = (3 if model.swiglu else 2) * model.hidden_size * model.ffn_size
    return model.num_layers * (attention + mlp)


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(MACHINES)
    assert not list(FOLDER.glob("*.yml"))


@pytest.mark.parametrize("name", MACHINES)
def test_recipe_obeys_every_rule_and_prints_back(name: str) -> None:
    config = load(name)
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize("name", MACHINES)
def test_schedule_of_the_recipe_exists(name: str) -> None:
    config = load(name)
    size = config.parallel.context_parallel_size
    layout = SequenceLayout(config.context.layout_name, size)
    for direction in ("forward", "backward"):
        schedule = build(
            config.context.cp_method, layout, direction=direction, seq_length=config.training.seq_length
        )
        assert schedule.layout.cp_size == size


@pytest.mark.parametrize("name", MACHINES)
def test_recipe_says_how_to_start_it_and_what_was_not_run(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert re.search(r"#   (bash|sbatch|lightseq) .*", text)
    assert f"runs/{name}/" in text
    if "gpu" in name:
        assert "NOT RUN by us" in text


def test_the_default_recipe_is_what_the_documents_promise() -> None:
    config = load("gpt_stdlib")
    assert config.parallel.context_parallel_size == 2
    assert config.training.seq_length >= 4096
    assert config.context.cp_method == "lightseq"
    assert config.model.position_embedding_type == "rope"
    assert config.model.query_groups < config.model.num_attention_heads
    assert 2e6 < num_parameters(config) < 8e6
    assert config.data.data_path == ("data/stdlib",)
    assert config.data.vocab_size in (None, BYTE_VOCABULARY)


@pytest.mark.parametrize(
    ("name", "billions"), [("llama7b_8gpu_64k", 6.5), ("gqa8b_2x8gpu_128k", 7.0), ("zigzag_gpu_32k", 1.1)]
)
def test_sizes_in_the_comments_are_those_of_the_models(name: str, billions: float) -> None:
    assert num_parameters(load(name)) / 1e9 == pytest.approx(billions, rel=0.1)


def test_a_recipe_takes_flags() -> None:
    path = str(FOLDER / "gpt_stdlib.yaml")
    assert load_config([path, "--train-iters", "70"]) == with_values(load("gpt_stdlib"), train_iters=70)
