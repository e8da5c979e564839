"""Layers that mix tokens along the sequence and are not ours: Megatron's attention, Mamba, gated delta nets.

Over context-parallel ranks such layers put tokens into order by Megatron's zigzag, whatever our attention does. On
shards of another layout they would compute with tokens in the wrong order, without an error.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter

import torch

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.megatron.core_attention import LightSeqCoreAttention
from megatron_lightseq.megatron.fixes.rebind import code_names
from megatron_lightseq.megatron.notes import note_once

ZIGZAG_FUNCTIONS = frozenset(
    {
        "MambaContextParallel",
        "GDPContextParallel",
        "_undo_attention_load_balancing",
        "_redo_attention_load_balancing",
        "tensor_a2a_cp2hp",
        "tensor_a2a_hp2cp",
        "get_batch_on_this_cp_rank",
    }
)
"""What Megatron cuts or reorders tokens by zigzag with; layers whose methods use one of them are found by it."""
_STATE_SPACE_LAYER = re.compile(r"Mixer$|^GatedDelta")
"""Classes of ``megatron.core.ssm`` that mix tokens, in versions that cannot do so over several ranks as well."""


def other_mixers(model: torch.nn.Module) -> Counter[str]:
    """How many layers of each class below ``model`` mix tokens without being ours."""
    reordering = {kind for kind in {type(module) for module in model.modules()} if _reorders(kind)}
    found: Counter[str] = Counter()
    for module in model.modules():
        attention = module._modules.get("core_attention")
        if attention is not None and not isinstance(attention, LightSeqCoreAttention):
            found[type(attention).__name__] += 1
        if type(module) in reordering:
            found[type(module).__name__] += 1
    return found


def _reorders(kind: type) -> bool:
    for base in kind.__mro__:
        if base.__module__.startswith("megatron.core.ssm") and _STATE_SPACE_LAYER.search(base.__name__):
            return True
        functions = (inspect.unwrap(member) for member in vars(base).values() if inspect.isfunction(member))
        if any(not ZIGZAG_FUNCTIONS.isdisjoint(code_names(function.__code__)) for function in functions):
            return True
    return False


def check_other_mixers(model: torch.nn.Module, layout: SequenceLayout) -> None:
    """Refuse a model whose other layers need zigzag shards while ours are cut otherwise; note them on one rank.

    Raises:
        UnsupportedError: names the layers.
    """
    found = other_mixers(model)
    if not found:
        return
    shown = ", ".join(f"{count} {name}" for name, count in found.items())
    if layout.cp_size > 1 and layout.name != "zigzag":
        raise UnsupportedError(
            explain(
                got=f"a model with {shown} next to LightSeq attention on layout {layout}",
                rule="these layers order tokens by Megatron's zigzag, so that they would compute with the wrong ones",
                remedy="Use cp_method zigzag, whose layout is zigzag, or context_parallel_size 1",
            )
        )
    note_once(f"LightSeq attention is used in this model's attention layers; {shown} stay Megatron's own")
