"""Every causal language model of transformers, tiny and with random weights, on several ranks."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

import torch
import torch.distributed as dist
import transformers

from megatron_lightseq import hf
from megatron_lightseq.errors import ConfigError, UnsupportedError
from tests.hf import tiny

KINDS = ("causal", "packed", "padded left")
LOSS, GRADIENTS = 1e-4, 1e-3
"""Some of these models round more than those of the parity test; what is cut wrongly is off by percents."""
MOST_PARAMETERS = 8_000_000
SIZES: dict[int, str] = {
    0: "pad_token_id hidden_size_per_layer_input",
    1: "bos_token_id n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace n_group "
    "topk_group decoder_sparse_step moe_layer_start_index",
    2: "eos_token_id num_hidden_layers num_layers n_layer n_layers num_key_value_heads num_experts_per_tok moe_topk "
    "moe_top_k",
    4: "num_attention_heads n_head n_heads num_local_experts num_experts n_routed_experts moe_num_experts",
    8: "qk_rope_head_dim qk_nope_head_dim",
    16: "head_dim v_head_dim q_lora_rank kv_lora_rank rotary_dim",
    20: "sliding_window",
    32: "moe_intermediate_size shared_expert_intermediate_size",
    64: "hidden_size n_embd d_model intermediate_size ffn_dim word_embed_proj_dim",
    96: "vocab_size vocab_size_per_layer_input",
    256: "max_position_embeddings n_positions",
}
NO_DROPOUT = (
    "attention_dropout dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout resid_dropout embedding_dropout "
    "residual_dropout router_jitter_noise input_jitter_noise"
)
LATENT = {"num_key_value_heads": 4, "head_dim": 8}
"""Latent attention has as many key heads as query heads, and rotates part of them."""
OPTIONAL = ("sliding_window", "q_lora_rank", "head_dim")
"""Sizes that stay None where a family's default is None."""


def run(only: list[str] | None = None) -> dict[str, str]:
    """What becomes of each architecture: ``equal``, or the reason why not."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    hf.register()
    cp = hf.ContextParallel(dist.group.WORLD)
    found = {}
    for name, kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        if only is None or name in only:
            with contextlib.redirect_stdout(io.StringIO()):
                found[name] = verdict(name, kind if isinstance(kind, str) else kind[0], cp)
    return found


def verdict(name: str, kind: str, cp: hf.ContextParallel) -> str:
    try:
        model = built(name, getattr(transformers, kind))
    except Exception as error:  # noqa: BLE001  a configuration that does not fit to these sizes
        return f"not tried: no tiny configuration ({type(error).__name__})"
    if model is None:
        return "not tried: no tiny configuration"
    try:
        if model._supports_attention_backend:
            model.set_attn_implementation("lightseq")
        cp.check(model)
        wrong = [batch for batch in KINDS if not equal(model, batch, cp)]
    except UnsupportedError as error:
        return f"refused: {str(error).partition(': ')[0].partition(' with ')[2]}"
    except ConfigError as error:
        return f"refused: {str(error).partition(': ')[0]}"
    except Exception as error:  # noqa: BLE001  the same on all ranks, because they compute the same
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
    return f"differs: {', '.join(wrong)}" if wrong else "equal"


def equal(model: Any, kind: str, cp: hf.ContextParallel) -> bool:
    batch = tiny.batches()[kind]
    model.set_attn_implementation("eager")
    wanted = tiny.reference(model, batch)
    model.set_attn_implementation("lightseq")
    before = cp.stats.forwards
    found = tiny.step(model, cp.shard(batch), cp.num_targets(batch))
    if cp.stats.forwards == before:
        raise RuntimeError("attention was never called")
    loss, gradients = tiny.difference(tiny.summed(found, dist.all_reduce), wanted)
    return loss <= LOSS and gradients <= GRADIENTS


def built(name: str, kind: Any) -> Any:
    """A tiny model; None if these sizes leave it large."""
    family = type(transformers.AutoConfig.for_model(name))
    default = family()
    sizes = {option: size for size, options in SIZES.items() for option in options.split()}
    sizes |= dict.fromkeys(NO_DROPOUT.split(), 0.0)
    if hasattr(default, "kv_lora_rank"):
        sizes |= LATENT
    used = {
        option: size
        for option, size in sizes.items()
        if hasattr(default, option) and not (option in OPTIONAL and getattr(default, option) is None)
    }
    types = getattr(default, "layer_types", None)
    if types:
        used["layer_types"] = (list(dict.fromkeys(types)) * 2)[:2]
    try:
        config = family(**used)
    except Exception:  # noqa: BLE001  families that derive their types of layers
        used.pop("layer_types", None)
        config = family(**used)
    with torch.device("meta"):
        if sum(p.numel() for p in kind(config).parameters()) > MOST_PARAMETERS:
            return None
    torch.manual_seed(1)
    model = kind._from_config(config, attn_implementation="eager").train()
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.std() < 0.1:
            torch.nn.init.normal_(parameter, 0, 0.1)
    return model
