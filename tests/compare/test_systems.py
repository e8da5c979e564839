"""Systems as changes to a configuration, and the messages of those that cannot run."""

from __future__ import annotations

import math

import pytest

from megatron_lightseq.cli.compare import run
from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.config.accounting import step_flops
from megatron_lightseq.errors import ConfigError, UnsupportedError
from megatron_lightseq.schedule import METHODS
from megatron_lightseq.tools.compare.link import scheduled_bytes
from megatron_lightseq.tools.compare.run import common_config
from megatron_lightseq.tools.compare.systems import SYSTEMS, choose
from megatron_lightseq.tools.compare.worker import resent_payload, sent_payload

COMMON = with_values(PretrainConfig(), num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=256)


def test_every_method_is_a_system() -> None:
    assert set(METHODS) <= set(SYSTEMS)
    for method in METHODS:
        assert SYSTEMS[method].configure(COMMON, 2).context.cp_method == method


def test_megatron_is_set_up_as_its_users_would() -> None:
    tensor = SYSTEMS["megatron-tp-sp"].configure(COMMON, 4)
    assert tensor.parallel.tensor_model_parallel_size == 4
    assert tensor.parallel.sequence_parallel
    assert tensor.parallel.context_parallel_size == 1
    mixed = SYSTEMS["megatron-tp-pp"].configure(with_values(COMMON, num_layers=4), 8)
    assert (mixed.parallel.tensor_model_parallel_size, mixed.parallel.pipeline_model_parallel_size) == (4, 2)
    two_heads = with_values(COMMON, num_layers=4, num_attention_heads=2)
    mixed = SYSTEMS["megatron-tp-pp"].configure(two_heads, 8)
    assert (mixed.parallel.tensor_model_parallel_size, mixed.parallel.pipeline_model_parallel_size) == (2, 4)
    assert mixed.model.num_attention_heads == 2, "no padding if pipeline parallelism uses the other ranks"


def test_heads_are_padded_as_in_the_paper() -> None:
    model = with_values(COMMON, num_attention_heads=33, hidden_size=33 * 4)
    assert SYSTEMS["megatron-tp-sp"].configure(model, 8).model.num_attention_heads == 40
    padded = SYSTEMS["megatron-tp-sp"].configure(model, 16).model
    assert (padded.num_attention_heads, padded.head_dim, padded.hidden_size) == (48, 4, 132)
    grouped = with_values(COMMON, num_attention_heads=12, num_query_groups=6, hidden_size=48)
    padded = SYSTEMS["megatron-tp-sp"].configure(grouped, 4).model
    assert (padded.num_attention_heads, padded.query_groups) == (16, 8)
    assert SYSTEMS["lightseq"].configure(model, 8).model.num_attention_heads == 33


def test_megatrons_context_parallelism_is_refused_with_its_reason() -> None:
    with pytest.raises(UnsupportedError, match="is implemented in Transformer Engine"):
        SYSTEMS["megatron-cp"].configure(COMMON, 2)


def test_too_few_ranks_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="megatron-tp-pp on 2 rank"):
        SYSTEMS["megatron-tp-pp"].configure(COMMON, 2)


def test_a_broken_rule_is_a_refusal() -> None:
    with pytest.raises(
        UnsupportedError, match="num_layers must be a multiple of pipeline_model_parallel_size"
    ):
        SYSTEMS["megatron-pp"].configure(with_values(COMMON, num_layers=3), 2)


def test_unknown_systems_are_named() -> None:
    with pytest.raises(ConfigError, match="the systems are megatron-tp-sp"):
        choose("lightseq,warp", 2)
    assert [system.name for system in choose("ring, lightseq", 2)] == ["ring", "lightseq"]
    assert "megatron-tp-pp" not in [system.name for system in choose("all", 2)]
    assert "megatron-tp-pp" in [system.name for system in choose("all", 4)]


def test_megatron_has_slices_only_in_the_system_that_is_named_after_them() -> None:
    asked = with_values(COMMON, mlp_tile_tokens=64, loss_tile_tokens=64, num_layers=4)

    def slices(name: str) -> tuple[int | None, int | None]:
        recompute = SYSTEMS[name].configure(asked, 4).recompute
        return recompute.mlp_tile_tokens, recompute.loss_tile_tokens

    assert slices("lightseq") == (64, 64)
    assert slices("lightseq-slices") == slices("megatron-tp-pp-slices") == (512, 512)
    for name in ("megatron-tp-sp", "megatron-tp-sp-stored", "megatron-tp", "megatron-pp", "megatron-tp-pp"):
        assert slices(name) == (None, None)
    assert not [system.name for system in choose("all", 4) if system.name.endswith("-slices")]


@pytest.mark.parametrize("arguments", [["--ranks", "0"], ["--steps", "0"], ["--baseline", "warp"]])
def test_wrong_flags_are_refused(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="counts are 1 or more"):
        run(["--systems", "lightseq", *arguments])


def test_padding_of_the_vocabulary_is_common() -> None:
    for ranks in (2, 3, 8):
        padded = common_config(COMMON, ranks).model.make_vocab_size_divisible_by
        assert padded % ranks == 0
        assert padded == math.lcm(128, ranks)


def test_flops_by_hand() -> None:
    """One layer, one head of 2, hidden 2, MLP 4, 8 tokens, vocabulary 10."""
    tiny = with_values(
        PretrainConfig(), num_layers=1, hidden_size=2, num_attention_heads=1, ffn_hidden_size=4, seq_length=8
    )
    projections, mlp, logits = 4 * 2 * 2, 3 * 2 * 4, 2 * 10
    attention = 2 * 2 * 8 * 8 * 2 // 2
    assert step_flops(tiny, 10) == 3 * (2 * 8 * (projections + mlp + logits) + attention)


def test_scheduled_bytes_by_hand() -> None:
    """The ring on two ranks, fp32: forward sends K and V; backward sends K and V, and returns their gradients."""
    config = SYSTEMS["ring"].configure(COMMON, 2)
    key_values = 128 * 4 * (16 + 16) * 4
    # By the causal mask rank 0 sees nothing of rank 1. It sends K and V twice, and rank 1 sends gradients once.
    assert scheduled_bytes(config) == 2 * key_values * 2
    assert scheduled_bytes(SYSTEMS["megatron-tp-sp"].configure(COMMON, 2)) is None
    assert scheduled_bytes(SYSTEMS["ulysses"].configure(COMMON, 2)) is None


NET_DEV = """Inter-|   Receive                            |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier
    lo:     640      10    0    0    0     0          0         0      640      10    0    0    0     0       0
 link0:     500       5    0    0    0     0          0         0     2198       3    0    0    0     0       0
"""


def test_payload_on_the_link_has_no_headers() -> None:
    """Two packets of 1000 bytes, and an acknowledgement."""
    assert sent_payload(NET_DEV, "link0") == 2000
    assert sent_payload(NET_DEV, "link1") is None


def test_retransmissions_are_counted() -> None:
    snmp = "Ip: Forwarding\nIp: 1\nTcp: ActiveOpens RetransSegs InErrs\nTcp: 7 3 0\nUdp: NoPorts\nUdp: 0\n"
    assert resent_payload(snmp) == 3 * 1448
