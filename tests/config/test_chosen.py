from __future__ import annotations

from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.config.accounting import step_flops
from megatron_lightseq.config.resolved import (
    attention_mask,
    attention_shape,
    methods,
    ranked,
    with_chosen_layout,
)
from megatron_lightseq.schedule import Direction

AUTO = with_values(PretrainConfig(), cp_method="auto", context_parallel_size=4, num_query_groups=2, bf16=True)


def test_auto_takes_the_layout_of_the_best_choice_and_leaves_the_rest_alone() -> None:
    chosen = with_chosen_layout(AUTO)
    assert chosen.context.cp_layout == ranked(AUTO)[0].layout
    assert chosen.context.cp_method == "auto"
    assert with_chosen_layout(chosen) == chosen
    for config in (with_values(AUTO, cp_method="ring"), with_values(AUTO, context_parallel_size=1)):
        assert with_chosen_layout(config) == config


def test_a_layout_that_is_given_is_kept() -> None:
    striped = with_values(AUTO, cp_layout="striped")
    assert {choice.layout for choice in ranked(striped)} == {"striped"}
    assert set(methods(striped)) == set(Direction)


def test_a_named_method_serves_both_directions() -> None:
    usp = with_values(AUTO, cp_method="usp", cp_ulysses_size=2)
    assert methods(usp) == {Direction.FORWARD: "usp:2", Direction.BACKWARD: "usp:2"}


def test_shapes_are_those_of_one_tensor_parallel_rank() -> None:
    shape = attention_shape(with_values(AUTO, tensor_model_parallel_size=2))
    assert (shape.num_heads, shape.num_query_groups, shape.element_bytes) == (4, 1, 2)


def test_the_network_decides() -> None:
    """A slow link costs time; without a word about it, NVLink and one card a node are assumed."""
    slow = with_values(AUTO, cp_network="link=1Gbit/s")
    assert ranked(slow)[0].seconds > 2 * ranked(with_values(AUTO, cp_network="nvlink"))[0].seconds
    assert ranked(AUTO) == ranked(with_values(AUTO, cp_network="nvlink+100gbps")), "the default"


def test_windows_are_weighed_and_counted() -> None:
    """A window makes most tiles empty: less is predicted, and less arithmetic is counted."""
    windows = with_values(AUTO, window_size=(AUTO.training.seq_length // 64, 0))
    assert str(attention_mask(windows)) == f"window({AUTO.training.seq_length // 64},0)"
    assert str(attention_mask(AUTO)) == "causal"
    assert ranked(windows)[0].seconds < 0.5 * ranked(AUTO)[0].seconds


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
