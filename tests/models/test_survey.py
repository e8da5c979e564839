"""Recipes of public models obey the rules, and train alike on one rank and on several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_lightseq.config import Machine, from_yaml, load_config, to_yaml, validate
from megatron_lightseq.config.sections_linear import LinearConfig
from megatron_lightseq.config.validate import TRAINING_RULES
from megatron_lightseq.errors import ConfigError
from tests.models.runs import on_ranks
from tests.models.scaled import DELTA_NETS, FOLDER, NAMES, read, scaled

HERE = Path(__file__).parent
PATHS = {name: FOLDER / f"{name}.yaml" for name in NAMES} | {
    name: HERE / f"{name}.yaml" for name in ("longrope", "gated")
}
TOLERANCE = 1e-5
"""Of losses in nats, and of gradient norms relative to themselves."""


@pytest.mark.parametrize("name", PATHS)
def test_recipe_obeys_the_rules_and_prints_back(name: str) -> None:
    config = read(PATHS[name])
    validate(config, Machine(), rule_sets=TRAINING_RULES)
    assert from_yaml(to_yaml(config)) == config
    validate(scaled(config), Machine(world_size=1, num_gpus=0), rule_sets=TRAINING_RULES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_says_how_to_start_it_and_what_was_not_run(name: str) -> None:
    text = PATHS[name].read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"lightseq pretrain configs/models/{name}.yaml" in text
    assert "NOT RUN by us" in text


@pytest.mark.parametrize("name", PATHS)
def test_several_ranks_train_like_one(name: str) -> None:
    alone = on_ranks(1, PATHS[name], {})
    assert alone[0][0] > 1
    assert alone[1][0] > 0
    for ranks in (2, 3):
        assert_same(alone, on_ranks(ranks, PATHS[name], {"context_parallel_size": ranks}))


EVERYTHING_OF_SCORES = {"init_method_std": 0.3, "train_iters": 2}
"""Sharp attention, so that bounds, chunks and scales of positions matter."""


@pytest.mark.parametrize("name", ["gemma_2_9b", "llama_4_scout"])
def test_every_method_trains_like_one_rank(name: str) -> None:
    values: dict[str, Any] = {**EVERYTHING_OF_SCORES, "attn_logit_softcapping": 2.0}
    alone = on_ranks(1, PATHS[name], values)
    for method in ("ring", "zigzag", "all_gather", "ulysses", "rsa", "balanced"):
        several = on_ranks(2, PATHS[name], {**values, "context_parallel_size": 2, "cp_method": method})
        assert_same(alone, several, 1e-4 if method == "rsa" else 3e-5)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("gemma_2_9b", {"tensor_model_parallel_size": 2, "sequence_parallel": True, "loss_tile_tokens": 40}),
        ("llama_4_scout", {"pipeline_model_parallel_size": 2}),
        ("deepseek_v3", {"expert_model_parallel_size": 2, "context_parallel_size": 2}),
        ("gpt_oss_20b", {"expert_model_parallel_size": 2, "context_parallel_size": 2}),
        ("qwen3_next_80b_a3b", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        ("qwen3_next_80b_a3b", {"pipeline_model_parallel_size": 2, "loss_tile_tokens": 40}),
        ("qwen3_next_80b_a3b", {"expert_model_parallel_size": 2, "context_parallel_size": 2}),
        (
            "gemma_3_4b",
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
                "context_parallel_size": 2,
            },
        ),
    ],
)
def test_other_parallelism_trains_like_one_rank(name: str, values: dict[str, Any]) -> None:
    # Some decays of gated delta nets forget at once. Adam divides the rounding errors of their gradients by themselves.
    tolerance = 5e-5 if name == "qwen3_next_80b_a3b" else TOLERANCE
    assert_same(on_ranks(1, PATHS[name], {}), on_ranks(2, PATHS[name], values), tolerance)


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    # what each key does to the model is seen in the loss
    "softcap": ("gemma_2_9b", {"attn_logit_softcapping": None}),
    "final softcap": ("gemma_2_9b", {"final_logit_softcapping": 0.5}),
    "scale": ("gemma_2_9b", {"query_pre_attn_scalar": 4.0}),
    "post norms": ("gemma_2_9b", {"post_mlp_layernorm": False}),
    "embedding": ("gemma_2_9b", {"embedding_multiplier": 5.0}),
    "activation": ("gemma_2_9b", {"activation_func": "gelu"}),
    "zero-centred": ("gemma_2_9b", {"apply_layernorm_1p": False, "norm_epsilon": 1.0}),
    "local base": ("gemma_3_4b", {"rotary_base_local": 100.0}),
    "linear": ("gemma_3_4b", {"rotary_seq_len_interpolation_factor": 2.0}),
    "windows": ("gemma_3_4b", {"window_attn_skip_freq": (1, 1, 0, 1, 1, 0)}),
    "llama3": ("llama_4_scout", {"use_rope_scaling": False, "rope_scaling_factor": 8.0}),
    "interleaved": ("llama_4_scout", {"rotary_interleaved": False}),
    "no rope": ("llama_4_scout", {"no_rope_freq": (0, 1, 0, 0)}),
    "chunks": ("llama_4_scout", {"attention_chunk_size": 40}),
    "temperature": ("llama_4_scout", {"attn_scale": 2.0, "floor_scale": 8.0}),
    "L2 norm": ("llama_4_scout", {"qk_l2_norm": False}),
    "input weight": ("llama_4_scout", {"moe_apply_probs_on_input": False}),
    "yarn": ("gpt_oss_20b", {"yarn_rotary_scaling_factor": 2.0}),
    "clamp": ("gpt_oss_20b", {"activation_func_clamp_value": 0.05}),
    "offset": ("gpt_oss_20b", {"glu_linear_offset": 0.0}),
    "longrope": ("longrope", {"original_max_position_embeddings": 6}),
    "gate": ("gated", {"attention_output_gate": False}),
    "layer frequency": ("gated", {"moe_layer_freq": (0, 1)}),
    "groups": ("gated", {"moe_router_num_groups": None, "moe_router_group_topk": None}),
    "scaled experts": ("deepseek_v3", {"moe_router_topk_scaling_factor": 1.0}),
    "scores": (
        "glm_4_5_air",
        {"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False},
    ),
    "linear layers": ("qwen3_next_80b_a3b", {"linear_attention_freq": 2}),
    "kind of linear layer": (
        "qwen3_next_80b_a3b",
        {
            "experimental_attention_variant": "linear",
            **{key: getattr(LinearConfig(), key) for key in DELTA_NETS},
        },
    ),
    "short convolution": ("qwen3_next_80b_a3b", {"linear_conv_kernel_dim": 2}),
    "linear heads": ("qwen3_next_80b_a3b", {"linear_num_key_heads": 4}),
    "linear head dim": ("qwen3_next_80b_a3b", {"linear_value_head_dim": 16}),
    "MLA scale": ("deepseek_v3", {"mscale_all_dim": 0.0}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_key_reaches_the_model(what: str) -> None:
    name, change = CHANGES[what]
    values = {
        "init_method_std": 0.3,
        "train_iters": 1,
        "num_layers": scaled(read(PATHS[name])).model.num_layers,
    }
    assert on_ranks(1, PATHS[name], values)[0] != on_ranks(1, PATHS[name], {**values, **change})[0]


def test_padded_rows_take_no_part_in_the_softmax() -> None:
    path, tied = PATHS["qwen3_8b"], {"untie_embeddings_and_output_weights": False}
    plain = on_ranks(1, path, {"make_vocab_size_divisible_by": 1, **tied})
    for multiple in (128, 1024):
        assert_same(plain, on_ranks(1, path, {"make_vocab_size_divisible_by": multiple, **tied}))
    split = {"make_vocab_size_divisible_by": 1024, "tensor_model_parallel_size": 2, "loss_tile_tokens": 32}
    assert_same(plain, on_ranks(2, path, {**split, **tied}))


@pytest.mark.parametrize(
    "line",
    [
        "hybrid_layer_pattern: M-M*",
        "mamba_head_dim: 64",
        "mamba_state_dim: 128",
    ],
)
def test_mamba_layers_are_refused_by_name(line: str, tmp_path: Path) -> None:
    (tmp_path / "hybrid.yaml").write_text(f"data_path: x\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{line.split(':')[0]} .*an argument of Megatron-LM"):
        load_config([str(tmp_path / "hybrid.yaml")])


def assert_same(expected: Any, found: Any, tolerance: float = TOLERANCE) -> None:
    """The same losses and gradient norms."""
    for one, other in zip(expected[0], found[0], strict=True):
        assert abs(one - other) <= tolerance, (expected, found)
    for one, other in zip(expected[1], found[1], strict=True):
        assert abs(one - other) <= tolerance * one, (expected, found)
