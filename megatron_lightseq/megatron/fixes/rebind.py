"""Giving one module's methods another function under a global name, and nothing else in the process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch


def rebind(module: torch.nn.Module, name: str, replacement: Callable[..., Any]) -> int:
    """Have the methods of ``module`` that call the global function ``name`` call ``replacement`` instead.

    They are bound anew on this module alone; its class, and the Python module it comes from, stay as they are.

    Returns:
        How many methods there were.
    """
    found = 0
    for attribute, function in _methods_calling(type(module), name):
        own = FunctionType(
            function.__code__,
            {**function.__globals__, name: replacement},
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        own.__kwdefaults__ = function.__kwdefaults__
        setattr(module, attribute, MethodType(own, module))
        found += 1
    return found


def _methods_calling(kind: type, name: str) -> Iterator[tuple[str, FunctionType]]:
    for attribute, function in inspect.getmembers(kind, inspect.isfunction):
        if name in function.__globals__ and _names(function.__code__, name):
            yield attribute, function


def _names(code: CodeType, name: str) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return name in code.co_names or any(_names(constant, name) for constant in inner)
