"""Megatron-Core without torch's compiler, until something is compiled.

Megatron decorates a few dozen functions with ``torch.compile``, and the decorator loads Inductor: almost a second of
CPU time in every rank at every start, also where fusions are switched off and nothing is ever compiled.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

_compile = torch.compile


def import_megatron() -> None:
    """Import ``megatron.core``, whose functions are then compiled when they are first called."""
    if "megatron.core" in sys.modules:
        return
    torch.compile = compiled_when_called  # type: ignore[assignment]
    try:
        importlib.import_module("megatron.core")
    finally:
        torch.compile = _compile


def compiled_when_called(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """``torch.compile`` as a decorator, with or without options, which compiles at the first call."""
    if function is None:
        return functools.partial(compiled_when_called, **options)
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling():  # part of something larger that is being compiled
            return function(*arguments, **keywords)
        if not compiled:
            compiled.append(_compile(function, **options))
        return compiled[0](*arguments, **keywords)

    return call
