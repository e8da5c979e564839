"""The configuration of the model: its width and depth, its attention and its MLPs.

Keys have Megatron's names where Megatron has the option, and otherwise those under which public models publish theirs
(`query_pre_attn_scalar`, `attn_logit_softcapping`, ...). Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_lightseq.config.layer_pattern import LayerPattern, is_marked

PositionEmbedding = Literal["rope", "yarn", "learned_absolute", "none"]
SoftmaxType = Literal["vanilla", "off-by-one", "learnable"]
Normalization = Literal["RMSNorm", "LayerNorm"]
Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "quick_gelu", "squared_relu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder-only transformer."""

    num_layers: int = 4
    """Number of transformer layers."""
    hidden_size: int = 256
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Width of the MLP; null: 4 * hidden_size, or with swiglu 8/3 * hidden_size rounded down to a multiple of 64."""
    num_attention_heads: int = 8
    """Number of query heads."""
    num_query_groups: int | None = None
    """Number of key/value heads (GQA); null: one per query head (MHA), 1: multi-query."""
    kv_channels: int | None = None
    """Dimension of one head; null: hidden_size / num_attention_heads."""
    max_position_embeddings: int | None = None
    """Longest sequence that the position embedding supports; null: seq_length."""
    position_embedding_type: PositionEmbedding = "rope"
    """How the model is told about positions; yarn: RoPE with YaRN's scaling, by the yarn_* keys."""
    rotary_base: float = 10000.0
    """Base period of RoPE."""
    rotary_percent: float = 1.0
    """Fraction of each head's dimensions that RoPE is applied to."""
    normalization: Normalization = "RMSNorm"
    """Normalisation used in every layer."""
    norm_epsilon: float = 1e-5
    """Epsilon that normalisation layers add to the variance."""
    apply_layernorm_1p: bool = False
    """Zero-centred norms: the stored weight is what is added to 1 (Gemma, Qwen3-Next)."""
    post_self_attn_layernorm: bool = False
    """Normalise attention's output as well, before it is added to the residual stream (Gemma 2, GLM-4)."""
    post_mlp_layernorm: bool = False
    """Normalise the MLP's output as well, before it is added to the residual stream."""
    swiglu: bool = True
    """Use a gated MLP with SiLU (false: what the next keys say, or a plain MLP with GELU)."""
    squared_relu: bool = False
    """Use a plain MLP with the square of ReLU; needs swiglu false."""
    quick_geglu: bool = False
    """Use a gated MLP with quick GELU, x * sigmoid(1.702 x) (gpt-oss); needs swiglu false."""
    gated_linear_unit: bool = False
    """Gate the MLP with activation_func, e.g. gelu_tanh for Gemma's GeGLU; needs swiglu false."""
    activation_func: Activation | None = None
    """The MLP's activation; null: what swiglu, squared_relu or quick_geglu say, else gelu."""
    glu_linear_offset: float = 0.0
    """With a gated MLP: number added to the linear half."""
    activation_func_clamp_value: float | None = None
    """With a gated MLP: clamp the gate from above and the linear half from both sides to this value; null: no clamp."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer its own weights instead of sharing the embedding's."""
    add_bias_linear: bool = False
    """Add biases to all linear layers (Megatron-LM's --disable-bias-linear is --no-add-bias-linear)."""
    add_qkv_bias: bool = False
    """Add biases to the projection of queries, keys and values only (Qwen2)."""
    qk_layernorm: bool = False
    """Normalise queries and keys per head before attention."""
    qk_l2_norm: bool = False
    """Normalise queries and keys per head without weights, in the layers that have RoPE (Llama 4)."""
    softmax_scale: float | None = None
    """Factor of attention's scores; null: 1 / sqrt(head dimension), with MLA times YaRN's."""
    query_pre_attn_scalar: float | None = None
    """Gemma's way to write it: softmax_scale is 1 / sqrt of this number; null: not used."""
    attn_logit_softcapping: float | None = None
    """Bound attention's scores by c * tanh(score / c) with this c (Gemma 2); null: no bound."""
    final_logit_softcapping: float | None = None
    """Bound the output layer's logits in the same way; null: no bound."""
    attention_output_gate: bool = False
    """Multiply attention's output by the sigmoid of one more projection, with as many heads as queries."""
    embedding_multiplier: float | None = None
    """Factor of the embeddings, rounded to their dtype (Gemma: the square root of hidden_size); null: none."""
    window_size: tuple[int, ...] = ()
    """Sliding window: tokens back and ahead that a query sees, e.g. [1023, 0]; empty: all earlier tokens."""
    window_attn_skip_freq: LayerPattern | None = None
    """With window_size: every n-th layer has none, or a list with 1 for a window and 0 for none; null: all have it."""
    attention_chunk_size: int | None = None
    """Attention within chunks of this many tokens, in the layers that have RoPE (Llama 4); null: off."""
    attn_temperature_tuning: bool = False
    """Llama 4: scale queries without RoPE by 1 + attn_scale * log(1 + floor((position + 1) / floor_scale))."""
    attn_scale: float = 0.1
    """With attn_temperature_tuning: how much the scale grows."""
    floor_scale: float = 8192.0
    """With attn_temperature_tuning: tokens over which the scale stays the same."""
    softmax_type: SoftmaxType = "vanilla"
    """off-by-one: add a logit of 0 to every softmax row; learnable: one trained logit per head (attention sinks)."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities; must be 0 unless cp_method is megatron."""
    hidden_dropout: float = 0.0
    """Dropout on the residual stream."""
    init_method_std: float = 0.02
    """Standard deviation of the normal distribution that weights are drawn from."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this number and of tensor_model_parallel_size."""
    multi_latent_attention: bool = False
    """Multi-latent attention (MLA): project keys and values from a latent vector; RoPE uses separate dimensions."""
    q_lora_rank: int | None = None
    """With MLA: width of the latent vector of queries; null: project queries directly."""
    kv_lora_rank: int = 32
    """With MLA: width of the latent vector of keys and values."""
    qk_head_dim: int = 128
    """With MLA: dimensions of each head's queries and keys without RoPE."""
    qk_pos_emb_head_dim: int = 64
    """With MLA: dimensions of each head's queries and keys with RoPE; all heads share this part of the keys."""
    v_head_dim: int = 128
    """With MLA: dimension of each head's values."""
    mtp_num_layers: int | None = None
    """Multi-token prediction (MTP): number of layers that each predict one more token ahead; null: none."""
    mtp_loss_scaling_factor: float = 0.1
    """With MTP: weight of the mean MTP loss, which is added to the next-token loss."""

    @property
    def activation(self) -> tuple[Activation, bool]:
        """The MLP's activation function, and whether it is gated."""
        if self.swiglu:
            return "silu", True
        if self.quick_geglu:
            return "quick_gelu", True
        if self.squared_relu:
            return "squared_relu", False
        return self.activation_func or "gelu", self.gated_linear_unit

    @property
    def score_scale(self) -> float | None:
        """The factor of attention's scores; None for its default."""
        scalar = self.query_pre_attn_scalar
        return self.softmax_scale if scalar is None else scalar**-0.5

    def has_window(self, number: int) -> bool:
        """Whether a layer, counted from 1, has the sliding window."""
        skip = self.window_attn_skip_freq
        if not self.window_size or isinstance(skip, int):
            return bool(self.window_size) and not is_marked(skip, number, every=-1)
        return skip is None or is_marked(skip, number)

    @property
    def num_window_layers(self) -> int:
        """Number of layers with a sliding window."""
        return sum(self.has_window(number) for number in range(1, self.num_layers + 1))

    @property
    def head_dim(self) -> int:
        """Dimension of one query or key head, after defaults."""
        if self.multi_latent_attention:
            return self.qk_head_dim + self.qk_pos_emb_head_dim
        if self.kv_channels is not None:
            return self.kv_channels
        return self.hidden_size // self.num_attention_heads

    @property
    def value_head_dim(self) -> int:
        """Dimension of one value head, after defaults."""
        return self.v_head_dim if self.multi_latent_attention else self.head_dim

    @property
    def query_groups(self) -> int:
        """Number of key/value heads, after defaults."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def ffn_size(self) -> int:
        """Width of the MLP, after defaults (the same arithmetic as in Megatron-LM)."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.swiglu:
            return max(64, int(4 * self.hidden_size * 2 / 3) // 64 * 64)
        return 4 * self.hidden_size
