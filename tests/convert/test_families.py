"""config.json as it is published, against the recipes of configs/models; and what families refuse by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lightseq.config import with_values
from megatron_lightseq.config.flat import section_of_key, to_flat
from megatron_lightseq.config.layer_pattern import spelled_out
from megatron_lightseq.config.load import from_yaml
from megatron_lightseq.convert.exporting import export_hf
from megatron_lightseq.convert.importing import import_hf
from megatron_lightseq.convert.recipe import recipe_of, updated
from megatron_lightseq.errors import LightSeqError, UnsupportedError
from tests.convert.models import make, quiet_transformers
from tests.convert.test_parity import assert_same_tensors
from tests.models.scaled import FOLDER

YARN = {"rope_type": "yarn", "rope_theta": 10000, "factor": 40, "original_max_position_embeddings": 4096}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma_2_9b": (
        "gemma2",
        {
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
        },
    ),
    "gpt_oss_20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "glm_4_5_air": ("glm4_moe", {"attention_bias": True, "head_dim": 128, "rope_theta": 1000000}),
    "deepseek_v3": ("deepseek_v3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "qwen3_next_80b_a3b": (
        "qwen3_next",
        {
            "intermediate_size": 5120,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000000,
                "partial_rotary_factor": 0.25,
            },
        },
    ),
    "deepseek_v2_lite": (
        "deepseek_v2",
        {
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 6,
            "n_routed_experts": 64,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
}
"""What a published model changes of the defaults of its class."""
ELSEWHERE = {
    *("attention_dropout", "init_method_std", "make_vocab_size_divisible_by", "max_position_embeddings"),
    *("mtp_num_layers", "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_router_dtype"),
    *("kv_channels", "num_query_groups", "rope_type", "linear_plain_output_norm"),
}
"""Keys of training, keys that files of this kind do not say, keys without effect with latent attention, and the form
of a norm's weight."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_fields_give_the_recipe(name: str) -> None:
    model_type, changes = PUBLISHED[name]
    config = quiet_transformers().AutoConfig.for_model(model_type, **changes).to_dict()
    found = recipe_of(config, "config.json")
    wanted = from_yaml((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    ours, theirs = _architecture(found), _architecture(wanted)
    assert ours == theirs


def _architecture(config: Any) -> dict[str, Any]:
    """Keys of the model, with patterns of layers spelled out and numbers as they are rounded in recipes."""
    layers = config.model.num_layers
    found = {
        key: value
        for key, value in to_flat(config).items()
        if section_of_key()[key] in ("model", "experts", "linear", "rope") and key not in ELSEWHERE
    }
    for key, every in (("window_attn_skip_freq", 1), ("moe_layer_freq", 1)):
        if found[key] is not None:
            found[key] = spelled_out(found[key], layers, every=every)
    found["moe_router_topk_scaling_factor"] = found["moe_router_topk_scaling_factor"] or 1.0
    if found["embedding_multiplier"] is not None:
        found["embedding_multiplier"] = round(found["embedding_multiplier"], 2)
    return found


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "groups rated by others": ("deepseek_v3", {"num_experts_per_tok": 4}, "topk_group 4.*best 2"),
    "grouped softmax": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "num_experts_per_tok": 6},
        "topk_group 3.*best 1",
    ),
    "an unknown routing": ("deepseek_v2", {"topk_method": "lottery"}, "topk_method 'lottery'"),
    "latent norms": ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05"),
    "RoPE by halves": ("deepseek_v3", {"rope_interleave": False}, "rope_interleave False"),
    "sums of scores": ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
    "one expert": ("glm4_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok 1"),
    "biases beside output gates": ("qwen3_next", {"attention_bias": True}, "attention_bias True"),
    "another kind of layers": (
        "qwen3_next",
        {"layer_types": ["sliding_attention"] * 48},
        "sliding_attention",
    ),
    "both directions": (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention True",
    ),
    "another activation": ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
    "another steepness": ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha 1.5"),
    "no biases": ("gpt_oss", {"attention_bias": False}, "attention_bias False"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_recipes_cannot_say_is_refused_by_name(what: str) -> None:
    model_type, changes, pattern = REFUSED[what]
    config = quiet_transformers().AutoConfig.for_model(model_type).to_dict() | changes
    with pytest.raises(UnsupportedError, match=pattern):
        recipe_of(config, "config.json")


def test_an_explicit_null_is_no_softcap() -> None:
    config = quiet_transformers().AutoConfig.for_model("gemma2").to_dict()
    assert recipe_of(config, "config.json").model.attn_logit_softcapping == 50
    assert recipe_of({**config, "attn_logit_softcapping": None}, "").model.attn_logit_softcapping is None
    del config["attn_logit_softcapping"]
    assert recipe_of(config, "config.json").model.attn_logit_softcapping == 50


def test_older_fields_of_two_ropes_mean_the_same_and_are_written_back() -> None:
    config = quiet_transformers().AutoConfig.for_model("gemma3_text").to_dict()
    new = config.pop("rope_parameters")
    scaled = {"rope_type": "linear", "factor": 8.0}
    new["full_attention"] |= scaled
    old = {"rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": scaled}
    one = recipe_of({**config, "rope_parameters": new}, "config.json")
    assert one == recipe_of({**config, **old}, "config.json")
    assert one.rope.rotary_seq_len_interpolation_factor == 8
    for form in ({"rope_parameters": new}, old):
        longer = with_values(one, rotary_base=4e6, rotary_seq_len_interpolation_factor=16.0)
        assert recipe_of(updated({**config, **form}, longer, "config.json"), "") == longer


def test_a_bias_of_experts_stays_in_float32_and_extra_layers_are_left_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make("glm4_moe", tmp_path / "model", dtype=torch.bfloat16)
    path = tmp_path / "model/model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name in tensors:
        if name.endswith("mlp.gate.weight"):
            tensors[name] = tensors[name].bfloat16()
        elif name.endswith("correction_bias"):
            assert tensors[name].dtype == torch.float32
            tensors[name] = torch.randn(4)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["model.layers.4.eh_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, path, metadata={"format": "pt"})
    import_hf(tmp_path / "model", save=tmp_path / "out", recipe=tmp_path / "recipe.yaml")
    export_hf(tmp_path / "out", tmp_path / "back")
    save_file(kept, path, metadata={"format": "pt"})
    assert_same_tensors(tmp_path / "back", tmp_path / "model")
    tensors["model.layers.5.eh_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(LightSeqError, match=r"layers\.5\.eh_proj.*no part"):
        import_hf(tmp_path / "model", save=tmp_path / "two", recipe=tmp_path / "two.yaml")
    assert "moe_router_enable_expert_bias: true" in (tmp_path / "recipe.yaml").read_text()
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == "glm4_moe"
