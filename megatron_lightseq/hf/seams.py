"""What this package relies on in transformers, tried on a tiny model when it is registered.

Versions say little about what has changed, so the behaviour itself is looked at: which calls reach a registered
function, with which arguments, and what the loss makes of shifted labels.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_lightseq.errors import UnsupportedError, explain

TESTED = ("4.57.6", "5.16.1", "5.24.0")
"""Releases of transformers that the design was tried with; the tests run with the one in constraints.txt."""

_PROBE = "lightseq_probe"


@dataclass
class _Seen:
    """What reached the functions that were registered for the trial."""

    plans: list[object] = field(default_factory=list)
    masks: list[object] = field(default_factory=list)
    mask_calls: list[dict[str, Any]] = field(default_factory=list)


def check_seams() -> None:
    """Raise :class:`UnsupportedError` unless transformers is installed and behaves as this package needs it."""
    if importlib.util.find_spec("transformers") is None:
        raise UnsupportedError(
            explain(
                got="transformers, which is not installed",
                rule="megatron_lightseq.hf trains its models",
                remedy="Install it with `pip install 'megatron-lightseq[hf]'`",
            )
        )
    transformers = importlib.import_module("transformers")
    try:
        problem = _problem(transformers)
    except Exception as error:  # noqa: BLE001  whatever a changed library raises, in words
        problem = f"a tiny Llama fails with {type(error).__name__}: {str(error)[:200]}"
    if problem is not None:
        raise UnsupportedError(
            explain(
                got=f"transformers {transformers.__version__}: {problem}",
                rule="megatron_lightseq.hf relies on it",
                remedy=f"Install a release that was tried: {', '.join(TESTED)}",
            )
        )


def _problem(transformers: Any) -> str | None:
    """What has changed; None if nothing has."""
    seen, plan = _Seen(), object()
    with torch.random.fork_rng(devices=[]), _registered(transformers, seen):
        model = _tiny_model(transformers)
        tokens = torch.tensor([[1, 2, 3, 4]])
        shifted = torch.tensor([[5, 6, -100, 7]])
        found = model(
            input_ids=tokens,
            position_ids=torch.tensor([[4, 5, 0, 1]]),
            labels=shifted,
            shift_labels=shifted,
            num_items_in_batch=6,
            use_cache=False,
            lightseq=plan,
        )
    wanted = torch.nn.functional.cross_entropy(found.logits[0].float(), shifted[0], reduction="sum") / 6
    if not seen.plans or any(seen_plan is not plan for seen_plan in seen.plans):
        return "keyword arguments of a model do not reach the functions of AttentionInterface"
    if not seen.mask_calls or any(mask is not None for mask in seen.masks):
        return "the functions of AttentionMaskInterface do not decide which mask attention gets"
    if "attention_mask" not in seen.mask_calls[0] or "mask_function" not in seen.mask_calls[0]:
        return "the functions of AttentionMaskInterface are called with other arguments"
    if not torch.allclose(found.loss, wanted, atol=1e-6):
        return "the loss of a causal language model does not take shift_labels and num_items_in_batch"
    return None


def _tiny_model(transformers: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=_PROBE)


@contextlib.contextmanager
def _registered(transformers: Any, seen: _Seen) -> Iterator[None]:
    """The trial's functions, registered for as long as it takes."""

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **others: Any
    ) -> tuple[Tensor, None]:
        seen.plans.append(others.get("lightseq"))
        seen.masks.append(mask)
        return v.transpose(1, 2).contiguous(), None

    def mask(*_: Any, **arguments: Any) -> None:
        seen.mask_calls.append(arguments)

    tables = (transformers.AttentionInterface, transformers.AttentionMaskInterface)
    for table, function in zip(tables, (attention, mask), strict=True):
        table.register(_PROBE, function)
    try:
        yield
    finally:
        for table in tables:
            table._global_mapping.pop(_PROBE, None)
