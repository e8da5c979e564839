"""The configuration of linear layers: layers whose memory of the past is a state of fixed size.

Keys have the names of Megatron's options. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_lightseq.config.choices import LinearKernelName, LinearScan
from megatron_lightseq.config.layer_pattern import LayerPattern, is_marked

LinearVariant = Literal["gated_delta_net", "linear"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """Linear layers in the place of attention, in all layers or, in hybrid models, in most."""

    experimental_attention_variant: LinearVariant | None = None
    """Linear layers: gated delta nets (Qwen3-Next), or normalised linear attention in attention's place; null: none."""
    linear_attention_freq: LayerPattern | None = None
    """Which layers: all but every n-th, or a list with 1 for a linear layer and 0 for attention: ([1]*3+[0])*12."""
    linear_conv_kernel_dim: int = 4
    """With gated_delta_net: tokens that the short convolution sees."""
    linear_key_head_dim: int = 128
    """With gated_delta_net: dimension of each head's queries and keys."""
    linear_value_head_dim: int = 128
    """With gated_delta_net: dimension of each head's values."""
    linear_num_key_heads: int = 16
    """With gated_delta_net: number of heads of queries and keys."""
    linear_num_value_heads: int = 32
    """With gated_delta_net: number of heads of values, a multiple of the other."""
    linear_plain_output_norm: bool = False
    """With gated_delta_net: the output norm's factor is its weight, whatever apply_layernorm_1p says of other norms."""
    cp_linear_scan: LinearScan = "ring"
    """How the states of linear layers travel between context-parallel ranks."""
    cp_linear_kernel: LinearKernelName = "auto"
    """Kernel of linear layers."""

    def is_in(self, number: int) -> bool:
        """Whether a layer, counted from 1, is linear; layers of multi-token prediction are like the last one."""
        freq = self.linear_attention_freq
        if self.experimental_attention_variant is None or freq is None:
            return False
        return not is_marked(freq, number, every=-1) if isinstance(freq, int) else is_marked(freq, number)

    def layers(self, num_layers: int) -> list[int]:
        """The numbers of the linear layers, counted from 1."""
        return [number for number in range(1, num_layers + 1) if self.is_in(number)]
