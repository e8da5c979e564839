"""Linear attention and causal convolutions over a cut sequence: what travels between ranks has no token dimension.

* :mod:`distributed` is what users call; :mod:`autograd` makes it differentiable; :mod:`inputs` checks its arguments.
* :mod:`plan` says what one rank does for one kind of inputs; :mod:`grid` cuts the sequence, and :mod:`visible` reads
  which tokens see each other from a mask.
* :mod:`exchange` passes states between ranks.
* :mod:`conv` is the short convolution before such layers: the last tokens of a shard go to the next rank.
"""

from megatron_lightseq.linear.conv import dist_causal_conv1d
from megatron_lightseq.linear.distributed import DistLinearAttention, LinearResult, dist_linear_attention

__all__ = ["DistLinearAttention", "LinearResult", "dist_causal_conv1d", "dist_linear_attention"]
