"""How a kernel is chosen, by its name or by ``auto``: one mechanism for every kind of kernel."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.kernels.specs import AUTO


class NamedSpec(Protocol):
    """What the choice reads of a kernel's specification."""

    @property
    def name(self) -> str:
        """The word for ``kernel=``."""

    @property
    def implementation(self) -> str:
        """``module:Class``."""

    @property
    def in_auto(self) -> bool:
        """Whether ``auto`` may choose it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A kernel, and why those before it were not chosen."""

    kernel: Any
    reasons: dict[str, str]


Spec = TypeVar("Spec", bound=NamedSpec)


def choose_kernel(
    name: str,
    specs: Mapping[str, Spec],
    *,
    what: str,
    reason: Callable[[Spec, Any], str | None],
    refused: Callable[[str], UnsupportedError],
) -> Choice:
    """The kernel of that name, or with ``auto`` the first that takes the inputs.

    Args:
        name: of a kernel, or ``auto``.
        specs: all kernels of a kind by name, in the order in which ``auto`` tries them.
        what: the kind, in messages.
        reason: why a kernel, given with its spec, cannot take the inputs; None if it can.
        refused: the error for such reasons.

    Raises:
        UnsupportedError: no kernel has that name, or the one named cannot take the inputs.
    """
    if name != AUTO and name not in specs:
        raise _unknown(name, (AUTO, *specs), what)
    reasons: dict[str, str] = {}
    for spec in specs.values():
        if spec.name == name or (name == AUTO and spec.in_auto):
            kernel = _load(spec)
            refusal = reason(spec, kernel)
            if refusal is None:
                return Choice(kernel, reasons)
            reasons[spec.name] = refusal
    raise refused(listed(reasons) if name == AUTO else reasons[name])


def listed(reasons: Mapping[str, str]) -> str:
    """Why kernels were not chosen, in one line."""
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _load(spec: NamedSpec) -> Any:
    module, _, attribute = spec.implementation.partition(":")
    return getattr(importlib.import_module(module), attribute)()


def _unknown(name: str, names: tuple[str, ...], what: str) -> UnsupportedError:
    near = difflib.get_close_matches(name, names, n=1)
    return UnsupportedError(
        explain(
            got=f"{what} {name!r}",
            rule=f"the kernels are {', '.join(names)}",
            remedy=f"The nearest name is {near[0]!r}" if near else "Choose one of them",
        )
    )
