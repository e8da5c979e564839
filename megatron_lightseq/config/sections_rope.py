"""The configuration of rotary position embeddings (RoPE), beyond `rotary_base` and `rotary_percent`.

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_lightseq.config.layer_pattern import LayerPattern, is_marked

RopeType = Literal["rope", "yarn", "longrope"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Scaling of rotary position embeddings for longer contexts, and layers without them."""

    rotary_interleaved: bool = False
    """Rotate neighbouring dimensions instead of the two halves of a head."""
    rotary_base_local: float | None = None
    """Base period of RoPE in the layers with a window, without any scaling (Gemma 3); null: as in the others."""
    no_rope_freq: LayerPattern | None = None
    """Layers without RoPE: every n-th, or a list with 1 for each layer that has none; null: no layer."""
    rotary_seq_len_interpolation_factor: float | None = None
    """Linear scaling: divide positions by this number; null: no scaling."""
    use_rope_scaling: bool = False
    """Scale RoPE as Llama 3 does (low frequency factor 1, high 4, original context 8192)."""
    rope_scaling_factor: float = 8.0
    """With use_rope_scaling: factor of the low frequencies."""
    yarn_rotary_scaling_factor: float | None = None
    """With yarn: how many times the context is extended."""
    yarn_original_max_position_embeddings: int | None = None
    """With yarn: context length before the extension."""
    yarn_beta_fast: float = 32.0
    """With yarn: rotations within the original context above which a frequency is not scaled."""
    yarn_beta_slow: float = 1.0
    """With yarn: rotations below which a frequency is scaled entirely."""
    yarn_mscale: float | None = None
    """With yarn: weight of the logarithm in the factor of cosines and sines; null: 1, the factor of the paper."""
    yarn_mscale_all_dim: float | None = None
    """With yarn: the same weight in the divisor of that factor; null: no divisor."""
    yarn_correction_range_round_to_int: bool = True
    """With yarn: round the dimensions between which frequencies are mixed."""
    rope_type: RopeType | None = None
    """longrope: scale by longrope_*_factor; with MLA also rope or yarn; null: rope, yarn by rotary_scaling_factor."""
    rotary_scaling_factor: float = 1.0
    """With MLA and YaRN: how many times the context is extended."""
    original_max_position_embeddings: int = 4096
    """With longrope, or MLA and YaRN: context length before the extension."""
    beta_fast: float = 32.0
    """With MLA and YaRN: as yarn_beta_fast."""
    beta_slow: float = 1.0
    """With MLA and YaRN: as yarn_beta_slow."""
    mscale: float = 1.0
    """With MLA and YaRN: as yarn_mscale."""
    mscale_all_dim: float = 0.0
    """With MLA and YaRN: as yarn_mscale_all_dim; attention's scores are scaled by the square of what it gives."""
    longrope_short_factor: tuple[float, ...] = ()
    """With longrope: divisor of each frequency while seq_length is within original_max_position_embeddings."""
    longrope_long_factor: tuple[float, ...] = ()
    """With longrope: divisor of each frequency for a longer seq_length."""

    def is_in(self, number: int) -> bool:
        """Whether a layer, counted from 1, has RoPE."""
        return not is_marked(self.no_rope_freq, number, every=-1)
