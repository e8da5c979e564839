"""Loads the compiled kernels (``megatron_lightseq._C``) on first use.

Loading registers ``torch.ops.mls.attention_forward``, ``attention_backward``, ``attention_delta``, ``merge_partials``
and ``linear_*``. The fake implementations registered here let torch.compile and FakeTensor trace through them.
"""

from __future__ import annotations

import functools
import importlib
import logging
from pathlib import Path
from types import ModuleType

import torch

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.kernels.source_hash import source_hash

SOURCES = Path(__file__).parents[2] / "csrc"
"""Of the kernels; only in a checkout."""
BUILD_COMMAND = "python setup.py build_ext --inplace"


@functools.cache
def _import_extension() -> ModuleType | str:
    """The module, or why it cannot be imported."""
    try:
        module = importlib.import_module("megatron_lightseq._C")
    except ModuleNotFoundError:
        return "the compiled kernels (megatron_lightseq._C) have not been built"
    except ImportError as error:  # built for another torch or machine, or MLS_CPU_ISA names an absent variant
        return f"the compiled kernels (megatron_lightseq._C) cannot be loaded: {error}"
    if SOURCES.is_dir() and getattr(module, "source_hash", None) != source_hash(SOURCES):
        reason = (
            "the compiled kernels (megatron_lightseq._C) were built from other sources than those in csrc"
        )
        logging.getLogger(__name__).warning("%s: they are not used (build them: %s)", reason, BUILD_COMMAND)
        return reason
    _register_fakes()
    return module


def missing_extension() -> str | None:
    """Why the compiled kernels cannot be used, with the command that builds them; None if they can."""
    module = _import_extension()
    return f"{module} (build them: {BUILD_COMMAND})" if isinstance(module, str) else None


def load_extension(kernel: str = "cpu") -> ModuleType:
    """The compiled kernels; ``kernel`` is the name that error messages show.

    Raises:
        UnsupportedError: the compiled kernels were not built, or cannot be loaded here.
    """
    module = _import_extension()
    if isinstance(module, str):
        raise UnsupportedError(
            explain(
                got=f"kernel {kernel!r}",
                rule=module,
                remedy=f"Build them in the repository with `{BUILD_COMMAND}`, or choose kernel='reference'",
            )
        )
    return module


_OPERATORS = (
    "attention_forward",
    "attention_backward",
    "attention_delta",
    "merge_partials",
    "linear_summarise",
    "linear_forward",
    "linear_summarise_backward",
    "linear_backward",
)


def _register_fakes() -> None:
    for op in _OPERATORS:
        torch.library.register_fake(f"mls::{op}", _write_into_arguments)


def _write_into_arguments(*_: object) -> None:
    """The ops only write into tensors that they are given, so there is no output to allocate or infer."""
