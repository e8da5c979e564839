"""LightSeq attention in an unmodified checkout of NVIDIA's Megatron-LM.

Two ways in:

* the launcher, which adds our flags to Megatron-LM's own (:mod:`megatron_lightseq.megatron.lm.launcher`)::

      torchrun ... -m megatron_lightseq megatron-lm PATH/TO/pretrain_gpt.py [Megatron-LM's flags] --cp-method lightseq

* Megatron-LM's ``--spec``, with our options in environment variables
  (:mod:`megatron_lightseq.megatron.lm.options`)::

      torchrun ... PATH/TO/pretrain_gpt.py [Megatron-LM's flags] --spec megatron_lightseq.megatron.lm layers

Importing this package does nothing. Reading its name ``layers``, which is what ``--spec`` does, switches LightSeq
on in the running process and gives the layer specification.
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    # Megatron reads vars(module)[name] after `__import__(module, fromlist=[name])`; a package is asked for the name
    # in between, which is the moment to make it.
    if name != "layers":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = importlib.import_module(f"{__name__}.layers_spec").switch_on()
    globals()[name] = made
    return made
