"""Tiny random models, made by transformers, with everything that a wrong mapping would show."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 384
LENGTH = 64
TOLERANCE = 1e-5
"""Of the largest logit."""

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,  # sharp attention: with small weights all positions look alike
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_SOFTCAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
_DELTA_NET = {
    # Where a query is almost at right angles to its keys, the norm of the result enlarges the last bits: with 1e-6,
    # transformers and this package are both 2e-5 of the largest logit away from the same model in fp64.
    "rms_norm_eps": 1e-2,
    "initializer_range": 0.1,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}
_LATENT = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "llama3": {"rope_type": "llama3", "rope_theta": 1e5, "factor": 32.0, **_LLAMA3},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32},
}
"""RoPE's parameters as config.json has them."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
    **{
        f"llama {kind}": ("llama", {"head_dim": 16, "rope_parameters": part})
        for kind, part in SCALINGS.items()
    },
    "mistral": ("mistral", {"sliding_window": 20, "head_dim": 8}),
    "mistral full": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2 full": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 windows": (
        "qwen3",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "phi3": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi3 longrope": (
        "phi3",
        {
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 2.0, 3.0, 4.0],
            },
        },
    ),
    "smollm3": ("smollm3", {"use_sliding_window": True, "sliding_window": 20, "no_rope_layer_interval": 2}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 20, "query_pre_attn_scalar": 32, **_SOFTCAPS}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 20,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 16,
            "sliding_window": 20,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "swiglu_limit": 1.0,
            "rope_parameters": {**SCALINGS["yarn"], "truncate": False},
        },
    ),
    "glm4": ("glm4", {"head_dim": 16, "attention_bias": True}),
    "glm4_moe": (
        "glm4_moe",
        {"head_dim": 16, "attention_bias": True, "use_qk_norm": True, "n_routed_experts": 4, **_EXPERTS},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {**_LATENT, "q_lora_rank": None, "n_routed_experts": 4, "first_k_dense_replace": 1, **_EXPERTS}
        | {
            "norm_topk_prob": False,
            "rope_parameters": {**SCALINGS["yarn"], "mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {**_LATENT, "q_lora_rank": 24, "n_routed_experts": 8, "first_k_dense_replace": 2, **_EXPERTS}
        | {"num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
    ),
    "qwen3_next": (
        "qwen3_next",
        {**_DELTA_NET, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 40},
    ),
    "qwen3_next irregular": (
        "qwen3_next",
        {**_DELTA_NET, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 40}
        | {
            "norm_topk_prob": False,
            "mlp_only_layers": [2],
            "layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"],
        },
    ),
    "qwen3_5_text": ("qwen3_5_text", {**_DELTA_NET, "linear_num_key_heads": 6, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, "num_experts": 4, **_EXPERTS}),
}
"""By name: the model_type, and what differs from the other families."""


def make(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Save a model with weights that do not hide anything, and return it."""
    transformers = quiet_transformers()
    model_type, values = CASES[name]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **{**_BASE, **values, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases are trivial at first
            mean = 1.0 if "norm" in parameter_name else 0.0
            torch.nn.init.normal_(parameter, mean, 0.2)
    model.eval().save_pretrained(folder)
    return model


def load(folder: Path, **options: Any) -> Any:
    """A model that was saved."""
    load_saved = quiet_transformers().AutoModelForCausalLM.from_pretrained
    return load_saved(folder, attn_implementation="eager", dtype=torch.float32, **options).eval()


def logits_of(model: Any) -> torch.Tensor:
    """(2, LENGTH, vocabulary), in fp32."""
    with torch.no_grad():
        found: torch.Tensor = model(tokens()).logits.float()
    return found


def tokens() -> torch.Tensor:
    """(2, LENGTH)."""
    return torch.randint(0, VOCAB_SIZE, (2, LENGTH), generator=torch.Generator().manual_seed(3))


@cache
def quiet_transformers() -> Any:
    """The package, without progress bars and advice."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
