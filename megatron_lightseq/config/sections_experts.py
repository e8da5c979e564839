"""The configuration of mixtures of experts.

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_lightseq.config.layer_pattern import LayerPattern, is_marked

LoadBalancing = Literal["none", "aux_loss", "seq_aux_loss"]
TokenDispatcher = Literal["alltoall", "allgather"]
ScoreFunction = Literal["softmax", "sigmoid"]
RouterDtype = Literal["fp32", "fp64"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """A mixture of experts (MoE), which replaces the MLP of all layers or of some."""

    num_experts: int | None = None
    """Number of experts per layer; null: no experts, one MLP for all tokens."""
    moe_layer_freq: LayerPattern = 1
    """Layers with experts: the first of every n, or a list with 1 for experts and 0 for a plain MLP: ([0]+[1]*26)."""
    moe_ffn_hidden_size: int | None = None
    """Width of each expert; null: ffn_hidden_size."""
    moe_router_topk: int = 2
    """Number of experts that each token is routed to."""
    moe_router_score_function: ScoreFunction = "softmax"
    """What turns the router's logits into scores."""
    moe_router_pre_softmax: bool | None = None
    """Compute the softmax over all experts, before the best are chosen; null: only with moe_router_topk 1."""
    moe_router_num_groups: int | None = None
    """Group-limited routing: number of groups that the experts are divided into; null: no groups."""
    moe_router_group_topk: int | None = None
    """With moe_router_num_groups: number of groups that a token's experts are chosen from."""
    moe_router_topk_scaling_factor: float | None = None
    """Factor of the chosen experts' weights; null: none."""
    moe_router_enable_expert_bias: bool = False
    """Choose experts by score + bias, where the bias balances their load without a loss; needs sigmoid scores."""
    moe_router_bias_update_rate: float = 1e-3
    """With moe_router_enable_expert_bias: step of the bias after each batch; 0 keeps it as it is."""
    moe_router_dtype: RouterDtype | None = None
    """Precision of the router; null: that of the activations."""
    moe_apply_probs_on_input: bool = False
    """Multiply an expert's input by its weight instead of its output; needs moe_router_topk 1 (Llama 4)."""
    moe_router_load_balancing_type: LoadBalancing = "aux_loss"
    """How the load of experts is balanced: by a loss over the micro-batch, by a loss over each sequence, or not."""
    moe_aux_loss_coeff: float = 0.0
    """Weight of the load balancing loss; 0: none."""
    moe_z_loss_coeff: float | None = None
    """Weight of the loss that keeps the router's logits small; null: none."""
    moe_token_dispatcher_type: TokenDispatcher = "alltoall"
    """How tokens are sent to the ranks that hold their experts."""
    moe_shared_expert_intermediate_size: int | None = None
    """Width of a shared expert that every token is routed to; null: no shared expert."""
    moe_shared_expert_gate: bool = False
    """Multiply the shared expert's output by the sigmoid of one more logit."""
    moe_grouped_gemm: bool = False
    """Compute all local experts in one grouped GEMM; needs Transformer Engine."""

    def is_in(self, number: int) -> bool:
        """Whether a layer, counted from 1, has experts."""
        return self.num_experts is not None and is_marked(self.moe_layer_freq, number)
