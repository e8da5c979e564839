"""What is derived from a configuration, once: layout, methods, masks, schedules and FLOPs."""

from __future__ import annotations

import pytest

from megatron_lightseq.config import Machine, PretrainConfig, resolve, with_values
from megatron_lightseq.config import resolved as resolved_module
from megatron_lightseq.config.accounting import step_flops
from megatron_lightseq.config.resolved import ResolvedAttention, attention_shape, main_mask, resolve_attention
from megatron_lightseq.errors import ConfigError
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import Direction, SchedulePair, build, rank_methods

AUTO = with_values(PretrainConfig(), cp_method="auto", context_parallel_size=4, num_query_groups=2, bf16=True)


def attention(config: PretrainConfig) -> ResolvedAttention:
    found = resolve_attention(config)
    assert found is not None
    return found


def only(found: ResolvedAttention) -> SchedulePair:
    (kind,) = found.kinds
    return kind.schedules


def test_auto_is_the_best_choice_over_all_layouts() -> None:
    best, *_ = rank_methods(4, attention_shape(AUTO), AUTO.training.seq_length)
    found = attention(AUTO)
    assert found.layout.name == best.layout
    assert only(found).name == best.name
    alone = attention(with_values(AUTO, context_parallel_size=1))
    assert str(alone.layout) == "contiguous(1)"


def test_a_layout_that_is_given_is_kept() -> None:
    striped = attention(with_values(AUTO, cp_layout="striped"))
    best, *_ = rank_methods(4, attention_shape(AUTO), AUTO.training.seq_length, layouts=["striped"])
    assert striped.layout.name == "striped"
    assert only(striped).name == best.name


def test_a_named_method_serves_both_directions() -> None:
    usp = only(attention(with_values(AUTO, cp_method="usp", cp_ulysses_size=2)))
    assert [usp.method(direction).name for direction in Direction] == ["usp:2", "usp:2"]
    assert resolve_attention(with_values(AUTO, cp_method="megatron")) is None


def test_schedules_are_those_of_the_whole_problem_and_built_once() -> None:
    config = with_values(
        AUTO, cp_method="lightseq", window_size=(511, 0), num_layers=4, window_attn_skip_freq=2
    )
    found = attention(config)
    assert [kind.layers for kind in found.kinds] == [(1, 3), (2, 4)]
    window = Mask.causal() & Mask.window(511, 0)
    for kind, mask in zip(found.kinds, (window, Mask.causal()), strict=True):
        for direction in Direction:
            schedule = kind.schedules.schedule(direction)
            expected = build(
                "lightseq",
                found.layout,
                mask=mask,
                direction=direction,
                seq_length=config.training.seq_length,
            )
            assert schedule == expected
            assert kind.schedules.schedule(direction) is schedule


def test_layers_with_other_methods_are_kinds_of_their_own() -> None:
    """Megatron-LM's cp_comm_type names a method per layer; multi-token prediction adds a layer."""
    comm_types = ("p2p", "a2a", "a2a+p2p", "p2p", "all_gather")
    config = with_values(AUTO, cp_method="ring", cp_ulysses_size=2, num_layers=4, mtp_num_layers=1)
    found = attention(with_values(config, cp_comm_type=comm_types))
    names = {kind.schedules.name: kind.layers for kind in found.kinds}
    assert names == {"ring": (1, 4), "ulysses": (2,), "usp:2": (3,), "all_gather": (5,)}
    assert found.of_layer(3) is found.kinds[2].schedules
    assert found.of_layer(6) is None
    assert {kind.layers for kind in attention(config).kinds} == {(1, 2, 3, 4, 5)}


def test_auto_is_chosen_for_every_mask_and_simulated_once_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    for module in (resolved_module, __import__("megatron_lightseq.schedule.pair", fromlist=["pair"])):
        monkeypatch.setattr(
            module, "rank_methods", lambda *a, **k: calls.append(k["mask"]) or rank_methods(*a, **k)
        )
    assert len(attention(with_values(AUTO, num_layers=6)).kinds) == 1
    assert calls == [Mask.causal()]
    calls.clear()
    some = with_values(AUTO, num_layers=6, window_size=(63, 0), window_attn_skip_freq=3)
    assert [kind.layers for kind in attention(some).kinds] == [(1, 2, 4, 5), (3, 6)]
    assert calls == [main_mask(some), Mask.causal()]


def test_resolving_checks_the_rules() -> None:
    with pytest.raises(ConfigError, match="lightseq works on contiguous shards"):
        resolve(with_values(AUTO, cp_method="lightseq", cp_layout="zigzag"), Machine())


def test_shapes_are_those_of_one_tensor_parallel_rank() -> None:
    shape = attention_shape(with_values(AUTO, tensor_model_parallel_size=2))
    assert (shape.num_heads, shape.num_query_groups, shape.element_bytes) == (4, 1, 2)


def test_the_network_decides() -> None:
    """Between slow nodes, methods with fewer transfers across nodes are faster."""
    config = with_values(AUTO, context_parallel_size=16, seq_length=2**16)
    fast, slow = (
        only(attention(with_values(config, cp_network=network)))
        for network in ("nvlink", "link=450GB/s, latency=5us, ranks_per_node=4, nic=100Mbit/s")
    )
    assert fast.problem.network != slow.problem.network
    default = only(attention(config))
    named = only(attention(with_values(config, cp_network="nvlink+100gbps")))
    assert (default.name, default.problem.layout) == (named.name, named.problem.layout), "the default"
    assert fast.name != slow.name


def test_windows_are_weighed_and_counted() -> None:
    windows = with_values(AUTO, window_size=(AUTO.training.seq_length // 64, 0))
    assert str(main_mask(windows)) == f"window({AUTO.training.seq_length // 64},0)"
    assert str(main_mask(AUTO)) == "causal"


def test_arithmetic_is_counted_layer_by_layer() -> None:
    values = {"num_layers": 4, "seq_length": 1024, "context_parallel_size": 1}
    plain, wide, narrow, some = (
        step_flops(with_values(PretrainConfig(), **values, **more), 64)
        for more in (
            {},
            {"window_size": (1023, 0)},
            {"window_size": (7, 0)},
            {"window_size": (7, 0), "window_attn_skip_freq": 2},
        )
    )
    assert plain == wide > narrow
    assert some == (plain + narrow) / 2
