"""Distributed attention: a function, the object behind it, and what runs them.

* :mod:`distributed` is what users call; :mod:`autograd` makes it differentiable; :mod:`inputs` checks what it is given;
* :mod:`plan` holds how each direction is executed: :mod:`runtime` runs a schedule's program, with one of the
  :mod:`passes` flowing through it; :mod:`head_exchange` surrounds it with all-to-all exchanges (Ulysses, USP);
  :mod:`ring_self_attention` replaces it for RSA;
* :mod:`stash` keeps results over activation recomputation; :mod:`stats` counts.
"""

from megatron_lightseq.attention.distributed import DistAttention, dist_attention
from megatron_lightseq.attention.stats import AttentionStats

__all__ = ["AttentionStats", "DistAttention", "dist_attention"]
