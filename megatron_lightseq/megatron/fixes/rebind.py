"""Replace a global function in the methods of one module, and nowhere else in the process."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch


def rebind(module: torch.nn.Module, name: str, replacement: Any) -> int:
    """Make the methods of ``module`` that call the global function ``name`` call ``replacement`` instead.

    The methods are copied and bound to this module alone; its class and its Python module do not change. What was
    replaced in them before stays replaced.

    Returns:
        The number of such methods.
    """
    found = 0
    for attribute, function in _methods_calling(module, name):
        setattr(module, attribute, MethodType(with_globals(function, **{name: replacement}), module))
        found += 1
    return found


def with_globals(function: FunctionType, **replaced: Any) -> FunctionType:
    """A copy of a function for which these global names mean something else."""
    own = FunctionType(
        function.__code__,
        {**function.__globals__, **replaced},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def _methods_calling(module: torch.nn.Module, name: str) -> Iterator[tuple[str, FunctionType]]:
    for attribute, function in inspect.getmembers(type(module), inspect.isfunction):
        own = vars(module).get(attribute)
        if isinstance(own, MethodType) and isinstance(own.__func__, FunctionType):
            function = own.__func__
        if name in function.__globals__ and name in code_names(function.__code__):
            yield attribute, function


def code_names(code: CodeType) -> set[str]:
    """The global names and attributes that a function uses, functions inside of it included."""
    inner = (code_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)
