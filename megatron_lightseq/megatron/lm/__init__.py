"""LightSeq attention in an unmodified checkout of NVIDIA's Megatron-LM.

There are two ways to use it:

* the launcher, which adds our flags to Megatron-LM's own (:mod:`megatron_lightseq.megatron.lm.launcher`)::

      torchrun ... -m megatron_lightseq megatron-lm PATH/TO/pretrain_gpt.py [Megatron-LM's flags] --cp-method lightseq

* Megatron-LM's ``--spec``, with our options in environment variables
  (:mod:`megatron_lightseq.megatron.lm.options`)::

      torchrun ... PATH/TO/pretrain_gpt.py [Megatron-LM's flags] --spec megatron_lightseq.megatron.lm layers

Importing this package changes nothing. Reading its attribute ``layers``, as ``--spec`` does, switches LightSeq on in
the running process and returns the layer specification.
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    # Megatron calls `__import__(module, fromlist=[name])` and then reads vars(module)[name]. The import system asks a
    # package for the name in between, so it is made here.
    if name != "layers":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = importlib.import_module(f"{__name__}.layers_spec").switch_on()
    globals()[name] = made
    return made
