"""The parity matrix: what is compared with a single process, and how closely it must agree."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.schedule import method_names

Values = Mapping[str, Any]
"""Configuration values by flat key."""

SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "make_vocab_size_divisible_by": 64,
    "init_method_std": 0.1,  # so that attention matters in a model this small
    "seq_length": 96,  # a multiple of 2 x 3 and 2 x 8
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "clip_grad": 1e9,  # gradient norms are compared, and gradients are not clipped
}
"""A model that trains one step in a fraction of a second, with grouped queries and four micro-batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Allowed relative differences between a cell and a single process."""

    loss: float = 1e-5
    grad_norm: float = 1e-5
    gradient: float = 2e-5
    """For the gradient of each parameter: norm of the difference over norm of the reference."""


BF16 = Tolerance(loss=1e-3, grad_norm=5e-3, gradient=1e-3)
"""In addition to Megatron's own rounding errors, see :func:`megatron_lightseq.tools.verify.parity.budget`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One entry of the matrix."""

    name: str
    world_size: int
    values: Values
    """Changes to :data:`SMALL` in how the model is run."""
    model: Values = field(default_factory=dict)
    """Changes to :data:`SMALL` in the model itself, also made in the reference."""
    tolerance: Tolerance = field(default_factory=Tolerance)
    dense_mask: bool = False
    """Whether the model, and the reference, is given a dense attention mask that keeps two documents apart."""
    evaluated_first: bool = False
    """Whether the model is evaluated before it is trained, in inference mode."""


def _cp(size: int, method: str, **more: Any) -> dict[str, Any]:
    return {"context_parallel_size": size, "cp_method": method, **more}


def _cell(
    name: str,
    values: Values,
    model: Values | None = None,
    data: int = 1,
    tolerance: Tolerance | None = None,
    **more: bool,
) -> Cell:
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    world_size = data
    for size in sizes:
        world_size *= values.get(size, 1)
    return Cell(
        name=name,
        world_size=world_size,
        values=values,
        model=model or {},
        tolerance=tolerance or Tolerance(),
        **more,
    )


_TP2 = {"tensor_model_parallel_size": 2}
_TP2_SP = {**_TP2, "sequence_parallel": True}
_PP2 = {"pipeline_model_parallel_size": 2}
_VPP = {**_PP2, "num_layers_per_virtual_pipeline_stage": 1}
_SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
_FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_BLOCK = {**_FULL, "recompute_method": "block"}
_SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ("core_attn",)}
_ALL_RECOMPUTED = {**_FULL, "keep_attention_on_recompute": False}

_MHA = {"num_query_groups": 4}
_MQA = {"num_query_groups": 1}
_ONE_HEAD = {"num_attention_heads": 1, "num_query_groups": 1}
_ODD_HEADS = {"num_attention_heads": 3, "num_query_groups": 3, "hidden_size": 48}
_QK_NORM = {"qk_layernorm": True, "rotary_percent": 0.5}
_WINDOW = {"window_size": (20, 0)}  # with 96 tokens, windows reach across 2 of 2 ranks, and 3 of 4
_SOME_WINDOWS = {"window_size": (40, 0), "window_attn_skip_freq": 2, "num_query_groups": 4}
_OFF_BY_ONE = {"softmax_type": "off-by-one"}
_SINKS = {"softmax_type": "learnable"}
_GPT2 = {
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
}
_EXPERTS = {
    "num_experts": 4,
    "moe_ffn_hidden_size": 48,
    "moe_aux_loss_coeff": 0.05,
    "moe_router_load_balancing_type": "aux_loss",
}
_DELTA_NETS = {
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_STRONG_DECAYS = Tolerance(gradient=1e-4)
"""What a head forgets at once leaves its decay a gradient of rounding errors, which differ with matrix products."""
_LINEAR_ATTENTION = {"experimental_attention_variant": "linear", "linear_attention_freq": 2}
_ALL_EXPERTS = {**_EXPERTS, "moe_router_topk": 4}
_ONE_OF_FOUR = {**_EXPERTS, "moe_router_load_balancing_type": "seq_aux_loss", "moe_router_topk": 1}
_BY_SEQUENCE = {**_EXPERTS, "moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.5}
_Z_LOSS = {**_EXPERTS, "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.5}
_TWO_SEQUENCES = {"micro_batch_size": 2}
_SHARED_EXPERT = {**_EXPERTS, "moe_shared_expert_intermediate_size": 32}
_EP2 = {"expert_model_parallel_size": 2}
_EP4 = {"expert_model_parallel_size": 4}
_EP2_ETP1 = {**_EP2, "expert_tensor_parallel_size": 1}
_GATHERED = {"moe_token_dispatcher_type": "allgather"}
LATENT: dict[str, Any] = {
    "multi_latent_attention": True,
    "num_query_groups": None,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 10,
}
_DIRECT_QUERIES = {**LATENT, "q_lora_rank": None, "qk_layernorm": True}
_MULTI_TOKEN = {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.3}
_MEAN_PER_BATCH = {"calculate_per_token_loss": False}
_PACKED: dict[str, Any] = {"reset_attention_mask": True, "reset_position_ids": True}
_TWO_ROWS = {"micro_batch_size": 2}
_PADDED: dict[str, Any] = {"sft": True}
_LEARNED_POSITIONS = {**_GPT2, **_PACKED}
_MULTI_TOKEN_AVERAGE = {**_MULTI_TOKEN, **_MEAN_PER_BATCH}
_EVERYTHING = {**_MULTI_TOKEN, **LATENT, **_EXPERTS}

_METHODS = method_names()

CELLS: tuple[Cell, ...] = (
    *(_cell(f"cp2 {method}", _cp(2, method)) for method in (*_METHODS, "auto")),
    *(_cell(f"cp3 {method}", _cp(3, method)) for method in _METHODS),
    *(_cell(f"cp4 {method}", _cp(4, method)) for method in _METHODS),
    _cell("cp4 usp, heads over 2", _cp(4, "usp", cp_ulysses_size=2)),
    _cell("cp4 usp on zigzag", _cp(4, "usp", cp_layout="zigzag")),
    _cell("cp4 ring on striped", _cp(4, "ring", cp_layout="striped")),
    _cell("cp4 one type per layer", _cp(4, "lightseq", cp_comm_type=("p2p", "all_gather", "a2a", "a2a+p2p"))),
    _cell("cp2 lightseq without overlap", _cp(2, "lightseq", cp_overlap=False)),
    *(_cell(f"cp8 {method}", _cp(8, method)) for method in ("lightseq", "mesh", "usp")),
    _cell("cp8 ulysses, twice as many ranks as heads", _cp(8, "ulysses")),
    *(
        _cell(f"cp{size} {method}, invariant", _cp(size, method, cp_invariant=12))
        for size, method in ((2, "lightseq"), (4, "balanced"), (4, "zigzag"), (2, "ulysses"))
    ),
    _cell("tp2", {**_TP2}),
    _cell("tp2 cp2 lightseq", {**_TP2, **_cp(2, "lightseq")}),
    _cell("tp2 sp cp2 ulysses", {**_TP2_SP, **_cp(2, "ulysses")}),
    _cell("tp2 sp cp4 usp", {**_TP2_SP, **_cp(4, "usp")}),
    _cell("pp2 cp2 lightseq", {**_PP2, **_cp(2, "lightseq")}),
    _cell("pp2 interleaved cp2 mesh", {**_VPP, **_cp(2, "mesh")}),
    _cell("pp2 interleaved cp4 ulysses", {**_VPP, **_cp(4, "ulysses")}),
    _cell("tp2 sp pp2 cp2 lightseq", {**_TP2_SP, **_PP2, **_cp(2, "lightseq")}),
    _cell("dp2 cp2 lightseq", _cp(2, "lightseq"), data=2),
    _cell("dp2 cp4 zigzag, sharded optimizer", {**_SHARDED, **_cp(4, "zigzag")}, data=2),
    _cell("dp2 pp2 cp2 all_gather, sharded optimizer", {**_SHARDED, **_PP2, **_cp(2, "all_gather")}, data=2),
    _cell("dp2 tp2 cp2 auto", {**_TP2, **_cp(2, "auto")}, data=2),
    _cell("cp2 lightseq, full recompute", {**_FULL, **_cp(2, "lightseq")}),
    _cell("cp2 lightseq, full recompute with attention", {**_ALL_RECOMPUTED, **_cp(2, "lightseq")}),
    _cell("cp2 ulysses, full recompute", {**_FULL, **_cp(2, "ulysses")}),
    _cell("cp4 mesh, block recompute", {**_BLOCK, **_cp(4, "mesh")}),
    _cell("cp2 rsa, selective recompute", {**_SELECTIVE, **_cp(2, "rsa")}),
    _cell("pp2 cp2 usp, full recompute", {**_FULL, **_PP2, **_cp(2, "usp")}),
    _cell("mha cp4 mesh", _cp(4, "mesh"), _MHA),
    _cell("mqa cp4 ulysses", _cp(4, "ulysses"), _MQA),
    _cell("mqa cp2 lightseq", _cp(2, "lightseq"), _MQA),
    _cell("one head cp3 lightseq", _cp(3, "lightseq"), _ONE_HEAD),
    _cell("one head cp2 ulysses", _cp(2, "ulysses"), _ONE_HEAD),
    _cell("three heads cp2 ulysses", _cp(2, "ulysses"), _ODD_HEADS),
    _cell("qk norm cp2 zigzag", _cp(2, "zigzag"), _QK_NORM),
    _cell("gpt-2 tp2 cp2 lightseq", {**_TP2, **_cp(2, "lightseq")}, _GPT2),
    _cell("gpt-2 pp2 cp2 usp", {**_PP2, **_cp(2, "usp")}, _GPT2),
    *(_cell(f"window cp2 {method}", _cp(2, method), _WINDOW) for method in (*_METHODS, "auto")),
    _cell("window cp4 zigzag, full recompute", {**_FULL, **_cp(4, "zigzag")}, _WINDOW),
    _cell("window cp4 ring on striped", _cp(4, "ring", cp_layout="striped"), _WINDOW),
    _cell(
        "windows except in every second layer, pp2 cp3 lightseq",
        {**_PP2, **_cp(3, "lightseq")},
        _SOME_WINDOWS,
    ),
    _cell("off-by-one cp2 mesh", _cp(2, "mesh"), _OFF_BY_ONE),
    _cell("sinks cp2 lightseq, full recompute", {**_FULL, **_cp(2, "lightseq")}, _SINKS),
    _cell("sinks tp2 sp cp2 ulysses", {**_TP2_SP, **_cp(2, "ulysses")}, _SINKS),
    _cell("sinks cp4 usp", _cp(4, "usp"), _SINKS),
    _cell("sinks cp2 rsa", _cp(2, "rsa"), _SINKS),
    _cell("sinks and windows pp2 cp2 zigzag", {**_PP2, **_cp(2, "zigzag")}, {**_SINKS, **_SOME_WINDOWS}),
    _cell("loss averaged per micro-batch, dp2 cp2 mesh", _cp(2, "mesh"), _MEAN_PER_BATCH, data=2),
    _cell("experts cp2 lightseq", _cp(2, "lightseq"), _EXPERTS),
    _cell("experts ep2", _EP2, _EXPERTS, data=2),
    _cell("experts ep2 cp2 lightseq", {**_EP2, **_cp(2, "lightseq")}, _EXPERTS),
    _cell(
        "experts ep4 cp2 zigzag, sharded optimizer",
        {**_EP4, **_SHARDED, **_cp(2, "zigzag")},
        _EXPERTS,
        data=2,
    ),
    _cell("experts tp2 sp cp2 ep2 lightseq", {**_TP2_SP, **_EP2, **_cp(2, "lightseq")}, _EXPERTS, data=2),
    _cell("experts tp2 sp cp2 ep2 etp1 ulysses", {**_TP2_SP, **_EP2_ETP1, **_cp(2, "ulysses")}, _EXPERTS),
    _cell("experts pp2 cp2 ep2 ring, full recompute", {**_PP2, **_EP2, **_FULL, **_cp(2, "ring")}, _EXPERTS),
    _cell("experts, gathered tokens, ep2 cp2 mesh", {**_EP2, **_GATHERED, **_cp(2, "mesh")}, _ONE_OF_FOUR),
    _cell(
        "experts, loss averaged per micro-batch, cp2 lightseq",
        _cp(2, "lightseq"),
        {**_EXPERTS, **_MEAN_PER_BATCH},
    ),
    _cell(
        "experts, loss by sequence, micro-batches of 2, cp2 lightseq",
        {**_TWO_SEQUENCES, **_cp(2, "lightseq")},
        _BY_SEQUENCE,
    ),
    _cell("experts, z-loss, cp2 lightseq", _cp(2, "lightseq"), _Z_LOSS),
    _cell("experts, z-loss, tp2 sp ep2 cp2 ring", {**_TP2_SP, **_EP2, **_cp(2, "ring")}, _Z_LOSS),
    _cell(
        "experts, z-loss, loss averaged per micro-batch, pp2 cp2 lightseq",
        {**_PP2, **_cp(2, "lightseq")},
        {**_Z_LOSS, **_MEAN_PER_BATCH},
    ),
    _cell("shared expert tp2 sp ep2 cp2 lightseq", {**_TP2_SP, **_EP2, **_cp(2, "lightseq")}, _SHARED_EXPERT),
    *(_cell(f"latent cp2 {method}", _cp(2, method), LATENT) for method in _METHODS),
    _cell("latent cp3 lightseq", _cp(3, "lightseq"), LATENT),
    _cell("latent cp4 mesh, full recompute", {**_FULL, **_cp(4, "mesh")}, LATENT),
    _cell("latent tp2 cp2 ring", {**_TP2, **_cp(2, "ring")}, LATENT),
    _cell("latent tp2 sp cp2 lightseq, full recompute", {**_TP2_SP, **_FULL, **_cp(2, "lightseq")}, LATENT),
    _cell("latent, direct queries, pp2 cp2 zigzag", {**_PP2, **_cp(2, "zigzag")}, _DIRECT_QUERIES),
    _cell("latent, sinks and windows, cp2 zigzag", _cp(2, "zigzag"), {**LATENT, **_SINKS, **_WINDOW}),
    _cell("latent experts ep2 cp2 lightseq", {**_EP2, **_cp(2, "lightseq")}, {**LATENT, **_EXPERTS}),
    *(
        _cell(f"multi-token cp2 {layout}", _cp(2, "ring", cp_layout=layout), _MULTI_TOKEN)
        for layout in ("contiguous", "zigzag", "striped")
    ),
    _cell("multi-token cp4 lightseq", _cp(4, "lightseq"), _MULTI_TOKEN),
    _cell("multi-token pp2 cp2 zigzag, full recompute", {**_PP2, **_FULL, **_cp(2, "zigzag")}, _MULTI_TOKEN),
    _cell("multi-token tp2 sp cp2 striped", {**_TP2_SP, **_cp(2, "ring", cp_layout="striped")}, _MULTI_TOKEN),
    _cell(
        "multi-token, loss averaged per micro-batch, dp2 cp2 lightseq",
        _cp(2, "lightseq"),
        _MULTI_TOKEN_AVERAGE,
        data=2,
    ),
    _cell("multi-token latent experts ep2 cp2 lightseq", {**_EP2, **_cp(2, "lightseq")}, _EVERYTHING),
    *(
        _cell(f"documents by a dense mask, cp2 {method}", _cp(2, method), dense_mask=True)
        for method in ("lightseq", "balanced", "ulysses")
    ),
    _cell("documents by a dense mask, cp4 zigzag", _cp(4, "zigzag"), dense_mask=True),
    _cell("documents by a dense mask, tp2 sp cp2 ring", {**_TP2_SP, **_cp(2, "ring")}, dense_mask=True),
    *(
        _cell(f"evaluated first, cp2 {method}", _cp(2, method), evaluated_first=True)
        for method in ("lightseq", "usp", "rsa")
    ),
    _cell(
        "evaluated first, experts ep2 cp2 ring", {**_EP2, **_cp(2, "ring")}, _EXPERTS, evaluated_first=True
    ),
    *(_cell(f"packed cp2 {method}", _cp(2, method), _PACKED) for method in (*_METHODS, "auto")),
    _cell("packed cp3 lightseq, two rows", _cp(3, "lightseq"), {**_PACKED, **_TWO_ROWS}),
    _cell("packed cp4 balanced, two rows", _cp(4, "balanced"), {**_PACKED, **_TWO_ROWS}),
    _cell("packed cp4 usp", _cp(4, "usp"), _PACKED),
    _cell("packed cp3 ring on striped", _cp(3, "ring", cp_layout="striped"), _PACKED),
    _cell("packed cp1", _cp(1, "lightseq"), {**_PACKED, **_TWO_ROWS}),
    _cell("packed, positions go on, cp2 balanced", _cp(2, "balanced"), {"reset_attention_mask": True}),
    _cell("packed tp2 sp cp2 balanced, full recompute", {**_TP2_SP, **_FULL, **_cp(2, "balanced")}, _PACKED),
    _cell("packed pp2 cp2 lightseq", {**_PP2, **_cp(2, "lightseq")}, {**_PACKED, **_TWO_ROWS}),
    _cell("packed pp2 interleaved cp2 balanced", {**_VPP, **_cp(2, "balanced")}, _PACKED),
    _cell(
        "packed latent cp2 balanced, full recompute", {**_FULL, **_cp(2, "balanced")}, {**_PACKED, **LATENT}
    ),
    _cell("packed gpt-2 tp2 cp2 balanced", {**_TP2, **_cp(2, "balanced")}, _LEARNED_POSITIONS),
    _cell("delta nets cp2 lightseq", _cp(2, "lightseq"), _DELTA_NETS),
    _cell("delta nets cp3 ring", _cp(3, "ring"), _DELTA_NETS),
    _cell("delta nets cp4 balanced, full recompute", {**_FULL, **_cp(4, "balanced")}, _DELTA_NETS),
    _cell("delta nets tp2", _TP2, _DELTA_NETS, tolerance=_STRONG_DECAYS),
    _cell(
        "delta nets tp2 sp cp2 lightseq",
        {**_TP2_SP, **_cp(2, "lightseq")},
        _DELTA_NETS,
        tolerance=_STRONG_DECAYS,
    ),
    _cell("delta nets pp2 cp2 lightseq", {**_PP2, **_cp(2, "lightseq")}, _DELTA_NETS),
    _cell(
        "delta nets pp2 interleaved cp2 lightseq, sharded optimizer, dp2",
        {**_VPP, **_SHARDED, **_cp(2, "lightseq")},
        _DELTA_NETS,
        data=2,
    ),
    _cell("delta nets experts ep2 cp2 lightseq", {**_EP2, **_cp(2, "lightseq")}, {**_DELTA_NETS, **_EXPERTS}),
    _cell("packed delta nets cp2 lightseq", _cp(2, "lightseq"), {**_PACKED, **_DELTA_NETS}),
    _cell(
        "packed delta nets cp3 lightseq, full recompute",
        {**_FULL, **_cp(3, "lightseq")},
        {**_PACKED, **_DELTA_NETS},
    ),
    _cell("linear attention cp2 lightseq", _cp(2, "lightseq"), _LINEAR_ATTENTION),
    _cell("linear attention tp2 sp cp2 lightseq", {**_TP2_SP, **_cp(2, "lightseq")}, _LINEAR_ATTENTION),
    _cell("packed experts ep2 cp2 lightseq", {**_EP2, **_cp(2, "lightseq")}, {**_PACKED, **_EXPERTS}),
    _cell("padded cp2 lightseq", _cp(2, "lightseq"), _PADDED),
    _cell("padded cp3 balanced, two rows", _cp(3, "balanced"), {**_PADDED, **_TWO_ROWS}),
    _cell("padded cp4 zigzag, full recompute", {**_FULL, **_cp(4, "zigzag")}, _PADDED),
    _cell("padded dp2 cp2 lightseq", _cp(2, "lightseq"), _PADDED, data=2),
    _cell("padded tp2 pp2 cp2 balanced", {**_TP2, **_PP2, **_cp(2, "balanced")}, _PADDED),
    _cell("bf16 packed cp2 balanced", _cp(2, "balanced"), {**_PACKED, "bf16": True}, tolerance=BF16),
    _cell("bf16 cp2 lightseq", _cp(2, "lightseq"), {"bf16": True}, tolerance=BF16),
    _cell("bf16 cp2 ulysses", _cp(2, "ulysses"), {"bf16": True}, tolerance=BF16),
    _cell("bf16 latent cp2 zigzag", _cp(2, "zigzag"), {"bf16": True, **LATENT}, tolerance=BF16),
    # If two experts are nearly tied for a token, a rounding error can change its expert, and gradients jump. There are
    # no ties if all tokens use all experts; otherwise Megatron's own gradients jump by as much.
    _cell(
        "bf16 all experts ep2 cp2 lightseq",
        {**_EP2, **_cp(2, "lightseq")},
        {"bf16": True, **_ALL_EXPERTS},
        tolerance=BF16,
    ),
    _cell(
        "bf16 experts ep2 cp2 zigzag",
        {**_EP2, **_cp(2, "zigzag")},
        {"bf16": True, **_EXPERTS},
        tolerance=BF16,
    ),
)
"""The matrix that `lightseq verify` runs."""


def select(pattern: str | None, most_ranks: int, cells: Sequence[Cell] = CELLS) -> list[Cell]:
    """The cells whose names contain a match of the pattern, and that need at most ``most_ranks`` ranks.

    Raises:
        ConfigError: The pattern is not a valid regular expression, or no cell is left.
    """
    try:
        wanted = re.compile(pattern or "")
    except re.error as error:
        raise ConfigError(
            explain(
                got=f"--cells {pattern!r} ({error})",
                rule="it is a regular expression that is searched for in the names of cells",
                remedy="Use, for example, --cells 'cp2|ulysses'",
            )
        ) from error
    chosen = [cell for cell in cells if wanted.search(cell.name) and cell.world_size <= most_ranks]
    if not chosen:
        raise ConfigError(
            explain(
                got=f"--cells {pattern!r} on at most {most_ranks} processes",
                rule="no cell is left to verify",
                remedy="See lightseq verify --list for their names and sizes",
            )
        )
    return chosen
