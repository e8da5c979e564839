"""LightSeq / DistFlashAttn context parallelism for Megatron-Core.

Importing the package is cheap and silent: torch is loaded when a name that needs it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_lightseq import schedule
    from megatron_lightseq.attention import dist_attention
    from megatron_lightseq.layout import SequenceLayout
    from megatron_lightseq.linear import dist_causal_conv1d, dist_linear_attention
    from megatron_lightseq.mask import Mask
    from megatron_lightseq.megatron.spec import gpt_layer_spec

__version__ = "0.1.0"
__all__ = [
    "Mask",
    "SequenceLayout",
    "dist_attention",
    "dist_causal_conv1d",
    "dist_linear_attention",
    "gpt_layer_spec",
    "schedule",
]

_HOME = {
    "Mask": "megatron_lightseq.mask",
    "SequenceLayout": "megatron_lightseq.layout",
    "dist_attention": "megatron_lightseq.attention",
    "dist_causal_conv1d": "megatron_lightseq.linear",
    "dist_linear_attention": "megatron_lightseq.linear",
    "gpt_layer_spec": "megatron_lightseq.megatron.spec",
}


def __getattr__(name: str) -> Any:
    if name == "schedule":
        return importlib.import_module("megatron_lightseq.schedule")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
