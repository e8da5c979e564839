"""Which transformers models give the same result with their sequence cut; all others are refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_lightseq.errors import UnsupportedError, explain

IMPLEMENTATION = "lightseq"
"""The name in ``attn_implementation``."""

SHARES_ROUTER_LOSS = "_lightseq_shares_router_loss"
"""The attribute of models whose load balancing loss is that of the whole batch (:mod:`experts`)."""

SHARE_ROUTER_LOSS = (
    "Call megatron_lightseq.hf.share_router_loss_in(model), behind get_peft_model if you use it, "
    "or set output_router_logits=False"
)
"""The remedy for models in which it is not."""

LAYER_TYPES = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    # These say what the MLP of a layer is, not its attention.
    "dense",
    "sparse",
}
_WITHOUT = "Train this model without context parallelism"


@dataclass(frozen=True, slots=True)
class Rule:
    """Something that makes a cut sequence's result another one."""

    find: Callable[[Any, Any], str | None]
    """From the model and its text configuration to what was found; None if the rule is kept."""
    why: str
    remedy: str = _WITHOUT


def check_model(model: torch.nn.Module, *, cut: bool) -> None:
    """Raise :class:`UnsupportedError` if the model breaks a rule.

    Args:
        model: a transformers model, or one in the wrappers of PEFT, DDP or torch.compile.
        cut: whether sequences are cut; what is wrong only then is allowed otherwise.
    """
    inner = unwrapped(model)
    config = inner.config.get_text_config()
    for rule in (*_ALWAYS, *(_CUT if cut else ())):
        found = rule.find(inner, config)
        if found is not None:
            name = type(inner).__name__
            raise UnsupportedError(explain(got=f"{name} with {found}", rule=rule.why, remedy=rule.remedy))


def unwrapped(model: Any) -> Any:
    """The transformers model in wrappers of data parallelism, torch.compile and PEFT.

    Raises:
        UnsupportedError: there is none.
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif not hasattr(model, "config") and hasattr(model, "module"):
            model = model.module
        else:
            break
    if not hasattr(model, "config") or not hasattr(model.config, "get_text_config"):
        raise UnsupportedError(
            explain(
                got=f"a model of type {type(model).__name__}",
                rule="models of transformers are checked, which have a configuration",
                remedy="Give such a model; in others, call megatron_lightseq.dist_attention yourself",
            )
        )
    return model


def _another_implementation(model: Any, config: Any) -> str | None:
    found = config._attn_implementation
    return None if found == IMPLEMENTATION else f"attn_implementation={found!r}"


def _no_backend(model: Any, config: Any) -> str | None:
    return None if model._supports_attention_backend else "attention layers of its own"


def _other_layers(model: Any, config: Any) -> str | None:
    kinds = {kind for kind in getattr(config, "layer_types", None) or () if kind not in LAYER_TYPES}
    return f"layers of type {', '.join(sorted(map(str, kinds)))}" if kinds else None


def _stateful(model: Any, config: Any) -> str | None:
    if getattr(model, "_is_stateful", False):
        return "layers that carry a state along the sequence"
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv1d) and module.kernel_size[0] > 1:
            return f"a convolution over tokens ({name})"
    return None


def _positions_of_mask(model: Any, config: Any) -> str | None:
    """OPT counts positions in the padding mask, which a shard does not have."""
    for name, module in model.named_modules():
        arguments = inspect.signature(module.forward).parameters
        if isinstance(module, torch.nn.Embedding) and "attention_mask" in arguments:
            return f"positions that are counted in the attention mask ({name})"
    return None


def _rope_types(config: Any) -> Iterator[str]:
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rope in (ropes, *ropes.values()):
        if isinstance(rope, dict):
            kind = rope.get("rope_type", rope.get("type"))
            if kind is not None:
                yield str(kind)


def _growing_rope(model: Any, config: Any) -> str | None:
    kinds = sorted(set(_rope_types(config)) & {"dynamic", "longrope"})
    return f"rope_type {', '.join(kinds)}" if kinds else None


def _dropout(model: Any, config: Any) -> str | None:
    for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        if getattr(config, name, 0):
            return f"{name} {getattr(config, name)}"
    return None


def _bidirectional(model: Any, config: Any) -> str | None:
    if getattr(config, "use_bidirectional_attention", None):
        return f"use_bidirectional_attention {config.use_bidirectional_attention}"
    return "an encoder" if getattr(config, "is_encoder_decoder", False) else None


def _router_loss(model: Any, config: Any) -> str | None:
    asked = getattr(config, "output_router_logits", False) and not getattr(model, SHARES_ROUTER_LOSS, False)
    return "output_router_logits" if asked else None


_ALWAYS = (
    Rule(_no_backend, "transformers' AttentionInterface does not reach them"),
    Rule(
        _another_implementation,
        "a sequence that is cut needs attention over all ranks",
        f"Load the model with attn_implementation={IMPLEMENTATION!r}, or call "
        f"model.set_attn_implementation({IMPLEMENTATION!r})",
    ),
    Rule(_bidirectional, "attention is causal"),
    Rule(
        _dropout,
        "no kernel here drops attention weights",
        "Set it to 0 in the model's configuration",
    ),
)
_CUT = (
    Rule(_other_layers, "only layers with full, sliding or chunked attention see the other ranks' tokens"),
    Rule(_stateful, "it would begin anew on every rank"),
    Rule(_positions_of_mask, "padding is dropped before the model sees it"),
    Rule(
        _growing_rope,
        "its frequencies would follow the largest position of each rank's shard",
        "Choose rope_type 'yarn', 'llama3' or 'linear', or train without context parallelism",
    ),
    Rule(
        _router_loss,
        "the load balancing loss of a rank's tokens is no part of that of the batch",
        SHARE_ROUTER_LOSS,
    ),
)
