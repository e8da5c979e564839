"""Rules on packed data: documents that share a sequence and do not attend to one another."""

from __future__ import annotations

from megatron_lightseq.config.rules import Machine, RuleSet
from megatron_lightseq.config.sections import PretrainConfig

PACKED = RuleSet()


@PACKED.rule(
    "reset_position_ids",
    "reset_attention_mask",
    "position_embedding_type",
    remedy="Set reset_attention_mask to true, or reset_position_ids to false",
)
def restarted_angles_need_documents(c: PretrainConfig, _: Machine) -> bool:
    """with rope, positions that restart with every document make sense only where documents do not attend to one
    another.
    """
    alone = c.data.reset_position_ids and not c.data.packed
    return not alone or c.model.position_embedding_type != "rope"


@PACKED.rule(
    "sft",
    "reset_position_ids",
    "reset_attention_mask",
    "eod_mask_loss",
    remedy="Remove the other three, or set sft to false",
)
def sft_says_it_all(c: PretrainConfig, _: Machine) -> bool:
    """with sft, documents, positions and loss masks come from the packed corpus, not from end-of-document tokens."""
    data = c.data
    return not data.sft or not (data.reset_position_ids or data.reset_attention_mask or data.eod_mask_loss)


@PACKED.rule(
    "sft",
    "calculate_per_token_loss",
    remedy="Set calculate_per_token_loss to true",
)
def answers_are_counted(c: PretrainConfig, _: Machine) -> bool:
    """with sft, ranks have different numbers of loss tokens; only calculate_per_token_loss weights them correctly."""
    return not c.data.sft or c.training.calculate_per_token_loss


def _packed_by_megatron(c: PretrainConfig) -> bool:
    return c.data.packed and c.context.cp_method == "megatron"


@PACKED.rule(
    "reset_attention_mask",
    "sft",
    "cp_method",
    "context_parallel_size",
    remedy="Choose another cp_method, or set context_parallel_size to 1",
)
def megatron_packs_on_one_rank(c: PretrainConfig, _: Machine) -> bool:
    """cp_method megatron keeps documents apart by dense masks, which Transformer Engine does not cut over ranks."""
    return not _packed_by_megatron(c) or c.parallel.context_parallel_size == 1


@PACKED.rule(
    "reset_attention_mask",
    "sft",
    "cp_method",
    "window_size",
    "mtp_num_layers",
    "experimental_attention_variant",
    "micro_batch_size",
    remedy="Choose another cp_method",
)
def megatron_packs_plain_layers(c: PretrainConfig, _: Machine) -> bool:
    """cp_method megatron forgets the documents in layers with a sliding window, and in multi-token prediction; linear
    layers take one dense mask for all rows, and linear attention needs positions that restart.
    """
    plain = not c.model.window_size and c.model.mtp_num_layers is None
    alone = c.linear.experimental_attention_variant == "gated_delta_net" and c.training.micro_batch_size == 1
    plain = plain and (c.linear.experimental_attention_variant is None or alone)
    return not _packed_by_megatron(c) or plain


@PACKED.rule(
    "reset_attention_mask",
    "sft",
    "moe_router_load_balancing_type",
    "micro_batch_size",
    remedy="Set micro_batch_size to 1, or moe_router_load_balancing_type to aux_loss",
)
def rows_are_balanced_together(c: PretrainConfig, _: Machine) -> bool:
    """packed rows are joined into one sequence, over which seq_aux_loss would balance the experts."""
    joined = c.joined_seq_length > c.training.seq_length
    per_row = c.experts.num_experts is not None and c.experts.moe_router_load_balancing_type == "seq_aux_loss"
    return not (joined and per_row)
