"""Distributed attention: ``dist_attention``, the object behind it, and what executes it.

* :mod:`distributed` is what users call; :mod:`autograd` makes it differentiable; :mod:`inputs` checks its arguments.
* :mod:`planner` turns the inputs of a call into a plan, and :mod:`agreement` checks that all ranks plan the same.
* :mod:`plan` holds how each direction is executed: :mod:`runtime` executes a program on the data of one of the
  :mod:`passes`. :mod:`head_exchange` surrounds it with all-to-all exchanges (Ulysses, USP), and
  :mod:`ring_self_attention` replaces it for Ring Self-Attention.
* :mod:`compiled` is the same as one operator of torch, for ``torch.compile``.
* :mod:`stash` keeps results across activation recomputation; :mod:`stats` counts.
"""

from megatron_lightseq.attention.compiled import OperatorAttention
from megatron_lightseq.attention.distributed import DistAttention, dist_attention
from megatron_lightseq.attention.stats import AttentionStats

__all__ = ["AttentionStats", "DistAttention", "OperatorAttention", "dist_attention"]
