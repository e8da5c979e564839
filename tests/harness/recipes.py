"""Keys of recipes that several tests use."""

from __future__ import annotations

from megatron_lightseq.tools.verify.cells import LATENT

__all__ = ["LATENT"]
