"""Read and change one part of Megatron's layer specification.

A part is a class, or a class with arguments: a ModuleSpec, or from 0.18 on a functools.partial.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec


def part_class(part: Any) -> Any:
    """The class that a part builds."""
    if isinstance(part, ModuleSpec):
        return part.module
    return part.func if isinstance(part, partial) else part


def part_submodules(part: Any) -> Any:
    """The parts of a part, or None."""
    if isinstance(part, partial):
        return part.keywords.get("submodules")
    return getattr(part, "submodules", None)


def changed_part(part: Any, *, module: Any = None, submodules: Any = None, **arguments: Any) -> Any:
    """A copy with another class, other parts, or further arguments of the constructor; what is None stays."""
    module = part_class(part) if module is None else module
    submodules = part_submodules(part) if submodules is None else submodules
    if isinstance(part, ModuleSpec):
        return replace(part, module=module, submodules=submodules, params={**part.params, **arguments})
    given = {**getattr(part, "keywords", {}), **arguments}
    if submodules is not None:
        given["submodules"] = submodules
    return partial(module, *getattr(part, "args", ()), **given)
