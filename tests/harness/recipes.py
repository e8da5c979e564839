"""Keys of recipes that several tests share."""

from __future__ import annotations

from typing import Any

LATENT: dict[str, Any] = {
    "multi_latent_attention": True,
    "num_query_groups": None,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 10,
}
"""Multi-latent attention with low-rank queries."""
