"""Whether layers are built from Transformer Engine's modules or from Megatron's local ones."""

from __future__ import annotations

import importlib
import os

import torch

from megatron_lightseq.errors import ConfigError, explain

TRANSFORMER_IMPL_VARIABLE = "MLS_TRANSFORMER_IMPL"


def use_transformer_engine() -> bool:
    """Whether layers are built from Transformer Engine's modules: if it can be imported, unless told otherwise.

    The environment variable MLS_TRANSFORMER_IMPL (``transformer_engine``, ``local`` or ``auto``) decides; only this
    function reads it.

    Raises:
        ConfigError: the variable has another value, or asks for Transformer Engine where it cannot be imported.
    """
    wanted = os.environ.get(TRANSFORMER_IMPL_VARIABLE, "auto")
    if wanted not in ("auto", "local", "transformer_engine"):
        raise ConfigError(
            explain(
                got=f"{TRANSFORMER_IMPL_VARIABLE}={wanted!r}",
                rule="layers are built from transformer_engine or local modules",
                remedy="Set it to transformer_engine, local or auto, or unset it",
            )
        )
    if wanted == "local":
        return False
    problem = _transformer_engine_problem()
    if problem is not None and wanted == "transformer_engine":
        raise ConfigError(
            explain(
                got=f"{TRANSFORMER_IMPL_VARIABLE}=transformer_engine, which cannot be used: {problem}",
                rule="Transformer Engine must be importable to build layers from it",
                remedy=f"Install a transformer_engine that fits this torch, or set {TRANSFORMER_IMPL_VARIABLE}=local",
            )
        )
    return problem is None


def _transformer_engine_problem() -> str | None:
    """Why Transformer Engine cannot be used, or None. A broken installation may raise any exception."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        importlib.import_module("transformer_engine.pytorch")
        extension = importlib.import_module("megatron.core.extensions.transformer_engine")
    except Exception as error:  # noqa: BLE001 - whatever went wrong, the local modules work
        return f"{type(error).__name__}: {error}"
    if not getattr(extension, "HAVE_TE", True):
        return "Megatron did not find it when it was imported"
    return None
