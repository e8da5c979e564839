"""Layers that mix tokens along the sequence and are not ours: Megatron's attention, Mamba, gated delta nets.

Over context-parallel ranks such layers put tokens into order by Megatron's zigzag, whatever our attention does. On
shards of another layout they would compute with tokens in the wrong order, without an error.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterator
from types import FunctionType

import torch

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.megatron.fixes.rebind import code_names
from megatron_lightseq.megatron.notes import note_once
from megatron_lightseq.megatron.sequence_layer import SequenceLayer

ZIGZAG_FUNCTIONS = frozenset(
    {
        "MambaContextParallel",
        "GDPContextParallel",
        "_undo_attention_load_balancing",
        "_redo_attention_load_balancing",
        "tensor_a2a_cp2hp",
        "tensor_a2a_hp2cp",
        "build_zigzag_cp_local_positions",
        "build_zigzag_allgather_cp_key_reorder",
        "get_batch_on_this_cp_rank",
    }
)
"""What Megatron cuts or reorders tokens by zigzag with. Layers are found by it that use one, or call what uses one."""
_STATE_SPACE_LAYER = re.compile(r"Mixer$|^GatedDelta")
"""Classes of ``megatron.core.ssm`` that mix tokens, in versions that cannot do so over several ranks as well."""
_KNOWN_PACKAGES = frozenset({"torch", "megatron_lightseq", *sys.stdlib_module_names})
"""Packages whose functions are not searched."""


def other_mixers(model: torch.nn.Module) -> Counter[str]:
    """How many layers of each class below ``model`` mix tokens without being ours."""
    reordering = {kind for kind in {type(module) for module in model.modules()} if _reorders(kind)}
    found: Counter[str] = Counter()
    for module in model.modules():
        attention = module._modules.get("core_attention")
        if attention is not None and not isinstance(attention, SequenceLayer):
            found[type(attention).__name__] += 1
        if type(module) in reordering:
            found[type(module).__name__] += 1
    return found


def _reorders(kind: type) -> bool:
    """Whether a class, one that it derives from, or a function that they call reorders tokens by zigzag."""
    if any(
        base.__module__.startswith("megatron.core.ssm") and _STATE_SPACE_LAYER.search(base.__name__)
        for base in kind.__mro__
    ):
        return True
    seen: set[FunctionType | type] = set()
    waiting = list(_functions_of(kind))
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        names = code_names(function.__code__)
        if not ZIGZAG_FUNCTIONS.isdisjoint(names):
            return True
        for used in _globals_of(function, names):
            waiting += _followed(used, seen)
    return False


def _functions_of(kind: type) -> Iterator[FunctionType]:
    """The methods of a class and of the classes that it derives from, but for torch's."""
    for base in kind.__mro__:
        if _is_known(base.__module__):
            continue
        for member in vars(base).values():
            wrapped = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            function = inspect.unwrap(wrapped) if callable(wrapped) else None
            if isinstance(function, FunctionType):
                yield function


def _globals_of(function: FunctionType, names: set[str]) -> Iterator[object]:
    """What the names in a function's code stand for, in its module or in modules that it has imported."""
    for name in names:
        used = function.__globals__.get(name)
        if inspect.ismodule(used) and not _is_known(used.__name__):
            yield from (vars(used).get(attribute) for attribute in names)
        yield used


def _followed(used: object, seen: set[FunctionType | type]) -> Iterator[FunctionType]:
    """The functions behind a global name: itself, or the methods of a class that is no module."""
    if inspect.isclass(used) and not issubclass(used, torch.nn.Module) and used not in seen:
        seen.add(used)
        yield from _functions_of(used)
    elif inspect.isroutine(used):
        function = inspect.unwrap(used)
        if isinstance(function, FunctionType) and not _is_known(function.__module__):
            yield function


def _is_known(module: str) -> bool:
    """Whether code is part of torch or Python, which know nothing of zigzag."""
    return module.split(".", 1)[0] in _KNOWN_PACKAGES


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
