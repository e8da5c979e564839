"""Configuration keys whose words other parts of the package own: methods, layouts and attention kernels.

A key's annotation carries a :class:`DerivedChoices`; flags, files, help and documents read the words from it when they
need them, so that a method registered before the configuration is read can be chosen by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.kernels.linear.specs import LINEAR_KERNELS, linear_kernel_names
from megatron_lightseq.kernels.specs import AUTO as AUTO_KERNEL
from megatron_lightseq.kernels.specs import KERNELS, kernel_names
from megatron_lightseq.layout import LAYOUTS
from megatron_lightseq.schedule import METHODS, SCANS, method_names

AUTO = "auto"
MEGATRON = "megatron"
"""The `cp_method` that leaves attention to Megatron."""

METHOD_OF_COMM_TYPE: Mapping[str, str] = {"all_gather": "all_gather", "a2a": "ulysses", "a2a+p2p": "usp"}
"""The method that each of Megatron-LM's communication types stands for; p2p, its default, stands for `cp_method`."""
COMM_TYPES = ("p2p", *METHOD_OF_COMM_TYPE)

OTHER_DEFAULT_LAYOUTS: Mapping[str, str] = {
    AUTO: "contiguous",
    MEGATRON: "zigzag",  # what Transformer Engine's context parallelism expects
}
"""The default layout of each `cp_method` that is not a method of the schedule package."""


@dataclass(frozen=True, slots=True)
class DerivedChoices:
    """The words that a key may be set to, where another part of the package owns them."""

    words: Callable[[], tuple[str, ...]]
    explanation: Callable[[], str]
    """What they mean: added to the key's help."""


def default_layout(cp_method: str) -> str:
    """The layout that `cp_layout: auto` stands for; raises KeyError for an unknown method."""
    method = METHODS.get(cp_method)
    return OTHER_DEFAULT_LAYOUTS[cp_method] if method is None else method.default_layout


def sized_name(method: str, ulysses_size: int | None) -> str:
    """The name of a method, with `cp_ulysses_size` where that applies."""
    return f"usp:{ulysses_size}" if method == "usp" and ulysses_size is not None else method


def method_of_comm_type(comm_type: str | None, method: str, ulysses_size: int | None) -> str:
    """The method that a communication type of Megatron-LM stands for.

    Args:
        comm_type: Megatron-LM's cp_comm_type of one layer; None, as p2p, is its default.
        method: what p2p stands for.
        ulysses_size: with a2a+p2p, the ranks that exchange heads; None for usp's default.

    Raises:
        UnsupportedError: there is no such type.
    """
    if comm_type in (None, "p2p"):
        return method
    if comm_type not in METHOD_OF_COMM_TYPE:
        raise UnsupportedError(
            explain(
                got=f"cp_comm_type {comm_type!r}",
                rule=f"the types are {', '.join(COMM_TYPES)}",
                remedy="Choose one of them, or leave it out and set cp_method",
            )
        )
    return sized_name(METHOD_OF_COMM_TYPE[comm_type], ulysses_size)


def _methods() -> tuple[str, ...]:
    return (*method_names(), AUTO, MEGATRON)


def _explain_methods() -> str:
    methods = _listed({name: method.summary for name, method in METHODS.items()})
    return (
        f"Methods, by what a rank computes: {methods}. auto: for each direction, the fastest in simulation. megatron: "
        "Megatron's own attention, which needs Transformer Engine for CP."
    )


def _layouts() -> tuple[str, ...]:
    return (AUTO, *LAYOUTS)


def _explain_layouts() -> str:
    users: dict[str, list[str]] = {}
    for name in (*method_names(), MEGATRON):
        users.setdefault(default_layout(name), []).append(name)
    defaults = "; ".join(f"{layout} for {_and(names)}" for layout, names in users.items())
    return f"auto: the method's default layout ({defaults}), or with cp_method auto the one that is chosen with it."


def _explain_kernels() -> str:
    automatic = _and([name for name, spec in KERNELS.items() if spec.in_auto])
    kernels = _listed({name: spec.summary for name, spec in KERNELS.items()})
    return f"{AUTO_KERNEL}: the first of {automatic} that supports the inputs. Kernels: {kernels}."


def _explain_linear_kernels() -> str:
    automatic = _and([name for name, spec in LINEAR_KERNELS.items() if spec.in_auto])
    kernels = _listed({name: spec.summary for name, spec in LINEAR_KERNELS.items()})
    return f"{AUTO_KERNEL}: the first of {automatic} that supports the inputs. Kernels: {kernels}."


def _scans() -> tuple[str, ...]:
    return (AUTO, *SCANS)


def _explain_scans() -> str:
    scans = _listed({name: scan.summary for name, scan in SCANS.items()})
    return f"Scans: {scans}. auto: the fastest in simulation."


def _listed(items: Mapping[str, str]) -> str:
    """`a (what it is), b (what it is)`."""
    return ", ".join(f"{name} ({text})" if text else name for name, text in items.items())


def _and(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


CPMethod = Annotated[str, DerivedChoices(_methods, _explain_methods)]
CPLayout = Annotated[str, DerivedChoices(_layouts, _explain_layouts)]
CPKernel = Annotated[str, DerivedChoices(kernel_names, _explain_kernels)]
LinearKernelName = Annotated[str, DerivedChoices(linear_kernel_names, _explain_linear_kernels)]
LinearScan = Annotated[str, DerivedChoices(_scans, _explain_scans)]
