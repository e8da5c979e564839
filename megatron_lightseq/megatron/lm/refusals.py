"""Arguments of Megatron-LM that our attention would have to ignore: each is refused by its own name.

What depends on the model's configuration alone is refused where the attention is built
(:mod:`megatron_lightseq.megatron.core_attention`); here is what only Megatron-LM's command line knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_lightseq.errors import UnsupportedError, explain


@dataclass(frozen=True, slots=True)
class Refusal:
    """An argument, when it is refused, why, and what to do."""

    argument: str
    rule: str
    remedy: str
    refused: Callable[[Any], bool] = bool
    """Of the argument's value; one that this Megatron-LM does not have is None."""


def _other_than(*names: str) -> Callable[[Any], bool]:
    return lambda value: value is not None and getattr(value, "name", value) not in names


_PACKED = "attention and layouts here are those of one unpacked sequence"
_ELSEWHERE = "its layers do not take their attention from where LightSeq's is put"
_OFF = "Switch it off, or use --cp-method megatron"

REFUSALS = (
    Refusal("attention_dropout", "LightSeq attention has no dropout", "Give --attention-dropout 0"),
    Refusal("reset_attention_mask", "attention takes masks by type, and would see across documents", _OFF),
    Refusal("sft", _PACKED, _OFF),
    Refusal("dataloader_inter_document_masking", _PACKED, _OFF),
    Refusal("hybrid_context_parallel", _PACKED, _OFF),
    Refusal("fp16", "LightSeq attention computes in fp32 and bf16", "Use --bf16"),
    Refusal(
        "attention_backend",
        "the kernels it names are not used",
        "Leave it at auto, and choose with --cp-kernel",
        _other_than("auto"),
    ),
    Refusal("use_flash_attn", "the kernel it names is not used", "Remove it, and choose with --cp-kernel"),
    Refusal("use_legacy_models", _ELSEWHERE, "Remove it"),
    Refusal("heterogeneous_layers_config_path", _ELSEWHERE, "Remove it"),
    Refusal("experimental_attention_variant", _ELSEWHERE, _OFF),
    Refusal("use_kitchen_attention", _ELSEWHERE, _OFF),
    Refusal(
        "mla_down_proj_fusion",
        "the gradient of its shared keys would have to be summed over tensor-parallel ranks, which is not done there",
        "Switch it off",
    ),
    Refusal(
        "transformer_impl",
        _ELSEWHERE,
        "Use local or transformer_engine",
        _other_than("local", "transformer_engine"),
    ),
    Refusal("enable_cuda_graph", "transfers between ranks are not captured in CUDA graphs", _OFF),
    Refusal("external_cuda_graph", "transfers between ranks are not captured in CUDA graphs", _OFF),
    Refusal(
        "cuda_graph_impl",
        "transfers between ranks are not captured in CUDA graphs",
        _OFF,
        _other_than("none"),
    ),
)

_OTHER_LOGITS = "losses in tiles need the output layer's own logits, and no others"
_WITHOUT_TILES = "Switch it off, or leave --loss-tile-tokens out"

LOSS_TILE_REFUSALS = (
    Refusal("use_mup", _OTHER_LOGITS, _WITHOUT_TILES),
    Refusal("defer_embedding_wgrad_compute", _OTHER_LOGITS, _WITHOUT_TILES),
    Refusal("mtp_num_layers", _OTHER_LOGITS, _WITHOUT_TILES),
)
MLP_TILE_REFUSALS = (
    Refusal(
        "recompute_modules",
        "an MLP in tiles is recomputed by its tiles, and would be once more as a module",
        "Take mlp out of it, or leave --mlp-tile-tokens out",
        lambda modules: "mlp" in (modules or ()),
    ),
    Refusal(
        "tp_comm_overlap",
        "its buffers hold a whole micro-batch, and tiles are shorter",
        "Switch it off, or leave --mlp-tile-tokens out",
    ),
    Refusal(
        "num_experts",
        "tiles are of dense MLPs",
        "Leave --mlp-tile-tokens out; --loss-tile-tokens works with experts",
    ),
)


def check_arguments(arguments: Any, refusals: Iterable[Refusal] = REFUSALS) -> None:
    """Refuse what would be ignored.

    Args:
        arguments: Megatron-LM's namespace of arguments.
        refusals: what is refused.

    Raises:
        UnsupportedError: names the first argument that is refused, its value and the remedy.
    """
    for refusal in refusals:
        value = getattr(arguments, refusal.argument, None)
        if refusal.refused(value):
            shown = "" if value is True else f" {getattr(value, 'name', value)}"
            raise UnsupportedError(
                explain(
                    got=f"--{refusal.argument.replace('_', '-')}{shown}",
                    rule=refusal.rule,
                    remedy=refusal.remedy,
                )
            )
