"""What transformers calls: an attention function and a mask function, registered as ``lightseq``.

Shape letters: B = rows, S = local tokens, H = query heads, G = key/value heads (query groups), D = head dim of queries
and keys, Dv = head dim of values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lightseq.attention.inputs import autocast_inputs
from megatron_lightseq.errors import ConfigError, UnsupportedError, explain
from megatron_lightseq.hf.context import PLAN, Facts, Shard
from megatron_lightseq.hf.recompute import current_run
from megatron_lightseq.hf.seams import check_seams
from megatron_lightseq.hf.supported import IMPLEMENTATION, SHARE_ROUTER_LOSS

_HARMLESS = {
    "cache_position",
    "labels",
    "layer_idx",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "shift_labels",
    "use_cache",
}
"""Keyword arguments that models hand down to attention and that do not change its result."""

_MASKS = (
    "causal_mask_function",
    "sliding_window_overlay.",
    "chunked_overlay.",
    "packed_sequence_mask_function.",
)
"""Functions of transformers' masks whose work the plan of a batch does."""

_COMBINED = ("and_masks.", "remap_positions_for_packed_sequence.", "add_offsets_to_mask_function.")
"""Functions of transformers that are made of these."""

_registered: list[bool] = []


def register() -> None:
    """Make ``attn_implementation="lightseq"`` known to transformers; a second call does nothing.

    Raises:
        UnsupportedError: transformers is missing, or is a version in which something that this package relies on has
            changed.
    """
    if _registered:
        return
    check_seams()
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, lightseq_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lightseq_mask)
    _registered.append(True)


def lightseq_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    lightseq: Shard | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: the layer.
        query, key, value: (B, H, S, D), (B, G, S, D) and (B, G, S, Dv).
        attention_mask: None; masks are in the plan.
        scaling: factor of the scores; default 1 / sqrt(D).
        dropout: not supported.
        sliding_window: tokens that a query of this layer sees, itself among them.
        softcap: bound of the scores (Gemma 2).
        s_aux: (H,), logits of sinks.
        is_causal: default that of the layer.
        lightseq: the plan of the batch.
        others: what models hand down besides.

    Returns:
        (B, S, H, Dv), and None in place of attention weights.

    Raises:
        UnsupportedError: something that would have to be ignored.
        ConfigError: the batch was not cut.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _refuse(
        {"dropout": dropout or None, "attention_mask": attention_mask}
        | {"is_causal=False": None if causal else True}
        | {name: value for name, value in others.items() if name not in _HARMLESS and value is not False}
    )
    shard = _plan(lightseq, query, key)
    _check_router_loss(module, shard)
    chunk = _chunk_of(module)
    mask, attention = shard.sequences.mask(sliding_window, chunk), shard.attention(softcap)
    q, k, v = autocast_inputs(*(x.permute(2, 0, 1, 3) for x in (query, key, value)))
    heads = tuple((x.shape[2], x.shape[3]) for x in (q, k, v))
    shard.kinds[softcap, sliding_window, chunk] = Facts(q.dtype, q.device, heads)
    run = current_run()
    if run is not None and run.replaying:
        kept = run.stash.pop(tuple(q.shape))
        out = attention.reattach(q, k, v, kept, scaling, s_aux, mask)
    else:
        out, lse = attention.forward_with_lse(q, k, v, scaling, s_aux, mask)
        if run is not None:
            run.stash.push(out, lse)
    return out.permute(1, 0, 2, 3).contiguous(), None


def lightseq_mask(
    *_: Any, attention_mask: Tensor | None = None, use_vmap: bool = False, **others: Any
) -> None:
    """No tensor: the plan of a batch says what may be seen. What a tensor would have said besides is refused.

    Raises:
        UnsupportedError: a mask with functions of its own.
        ConfigError: padding in a batch that was not cut.
    """
    if use_vmap or adds_functions(others.get("mask_function")):
        raise UnsupportedError(
            explain(
                got="a model that adds functions to its attention mask",
                rule="causal masks, windows, chunks and documents are known",
                remedy="Use another attn_implementation for this model, without context parallelism",
            )
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ConfigError(
            explain(
                got="an attention_mask with padding",
                rule="padding is dropped when a batch is cut",
                remedy="Give the model what ContextParallel.shard returns",
            )
        )


def adds_functions(mask: Any) -> bool:
    """Whether a mask function of transformers has parts other than causal masks, windows, chunks and documents.

    Releases before 5.0 do not tell it otherwise. Functions made of others have them in their closures.
    """
    if mask is None:
        return False
    name = getattr(mask, "__qualname__", "")
    if getattr(mask, "__module__", "") != "transformers.masking_utils":
        return True
    if not name.startswith(_COMBINED):
        return not name.startswith(_MASKS)
    cells = [cell.cell_contents for cell in mask.__closure__]
    parts = [part for cell in cells for part in (cell if isinstance(cell, tuple) else (cell,))]
    return any(adds_functions(part) for part in parts if callable(part))


def _refuse(what: dict[str, Any]) -> None:
    given = sorted(name for name, value in what.items() if value is not None)
    if given:
        raise UnsupportedError(
            explain(
                got=f"attention with {', '.join(given)}",
                rule="it would have to be ignored",
                remedy="Take it out of the batch or the configuration, or use another attn_implementation for this "
                "model, without context parallelism",
            )
        )


def _plan(shard: Shard | None, query: Tensor, key: Tensor) -> Shard:
    if shard is None:
        raise ConfigError(
            explain(
                got=f"attention without the keyword argument {PLAN!r}",
                rule="batches are cut before the model sees them, and the model hands the plan down",
                remedy="Give the model what ContextParallel.shard returns; to generate, call "
                "model.set_attn_implementation('sdpa')",
            )
        )
    if not query.shape[2] == key.shape[2] == shard.length:
        raise ConfigError(
            explain(
                got=f"{query.shape[2]} queries and {key.shape[2]} keys with a shard of {shard.length} tokens",
                rule="every layer attends from all tokens of the shard to themselves, without a cache",
                remedy="Give the model all of what ContextParallel.shard returns; to generate, call "
                "model.set_attn_implementation('sdpa')",
            )
        )
    return shard


def _check_router_loss(module: torch.nn.Module, shard: Shard) -> None:
    """A model that was wrapped behind ``check``, or asked for the loss behind it, is noticed here."""
    config = getattr(module, "config", None)
    asked = shard.adds_router_loss or getattr(config, "output_router_logits", False)
    if asked and shard.group is not None and shard.router_loss_of is None:
        raise UnsupportedError(
            explain(
                got="output_router_logits with a model that knows the tokens of one rank",
                rule="the load balancing loss of a rank's tokens is no part of that of the batch",
                remedy=SHARE_ROUTER_LOSS,
            )
        )


def _chunk_of(module: torch.nn.Module) -> int | None:
    """The chunk size of a layer with chunked attention (Llama 4), which no argument tells."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    if kinds is None or index is None or kinds[index] != "chunked_attention":
        return None
    return int(config.attention_chunk_size)  # type: ignore[union-attr]
