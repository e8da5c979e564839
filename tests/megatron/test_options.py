"""The table of Megatron's options covers the installed Megatron, and does what it says."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch

from megatron_lightseq.errors import UnsupportedError
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.megatron.options import CONFIG, CONSTRUCTOR, FORWARD, RELATED, Option, first_refused
from tests.megatron.runs import on_ranks


def config_fields() -> dict[str, Any]:
    """Every field of Megatron's configurations, with its default."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    return {
        field.name: field.default
        for kind in (TransformerConfig, MLATransformerConfig)
        for field in dataclasses.fields(kind)
    }


def test_every_option_of_the_installed_megatron_is_classified() -> None:
    from megatron.core import __version__

    unknown = sorted(name for name in config_fields() if RELATED.search(name) and name not in CONFIG)
    assert not unknown, (
        f"megatron-core {__version__} has options whose names speak of attention and that are not in "
        f"megatron_lightseq/megatron/options.py: {', '.join(unknown)}. Say of each whether it is honoured "
        "(and test it), refused, or has its effect elsewhere"
    )


def test_the_pattern_finds_what_a_new_version_might_bring() -> None:
    for name in (
        "window_sink",
        "attention_temperature",
        "cp_overlap_mode",
        "fp6_attention",
        "max_seqlen_per_rank",
    ):
        assert RELATED.search(name)
    assert not RELATED.search("hidden_size")


@pytest.mark.parametrize("table", [CONSTRUCTOR, FORWARD], ids=["constructor", "forward"])
def test_every_argument_of_megatrons_attention_is_classified(table: dict[str, Option]) -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    method = DotProductAttention.__init__ if table is CONSTRUCTOR else DotProductAttention.forward
    arguments = set(inspect.signature(method).parameters) - {"self"}
    assert not arguments - table.keys(), "an argument that nobody has thought about"


def test_defaults_ask_for_nothing_but_dropout() -> None:
    from types import SimpleNamespace

    defaults = {name: value for name, value in config_fields().items() if value is not dataclasses.MISSING}
    assert first_refused(SimpleNamespace(**{**defaults, "attention_dropout": 0.0})) is None
    name, _ = first_refused(SimpleNamespace(**defaults)) or ("", None)
    assert name == "attention_dropout"


REFUSED = {name: option for name, option in CONFIG.items() if option.verdict == "refused"}
OTHER_VALUES: dict[str, Any] = {
    "cuda_graph_impl": "local",
    "attention_dropout": 0.5,
    "max_seqlen_per_dp_cp_rank": 8,
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_table_refuses_is_refused_by_name(name: str) -> None:
    from megatron.core.transformer.enums import AttnBackend

    from tests.megatron.test_core_attention import build, transformer_config

    config = transformer_config()
    setattr(config, name, AttnBackend.flash if name == "attention_backend" else OTHER_VALUES.get(name, True))
    with pytest.raises(UnsupportedError) as caught:
        build(config)
    assert name in str(caught.value)
    assert REFUSED[name].reason in str(caught.value)
    assert REFUSED[name].remedy in str(caught.value)


# --- sinks under context parallelism ----------------------------------------------------------------------------------

LENGTH = 16


def _with_sink(method: str, keep: bool) -> list[torch.Tensor]:
    """Output, and gradients of q, k, v and the sink, of this rank."""
    import torch.distributed as dist

    from megatron_lightseq.attention import DistAttention

    generator = torch.Generator().manual_seed(5)
    whole = [
        torch.randn(LENGTH, 1, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)
    ]
    size, rank = dist.get_world_size(), dist.get_rank()
    layout = SequenceLayout.contiguous(size)
    q, k, v, dout = (layout.shard(x, rank, 0).contiguous().requires_grad_() for x in whole)
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    attention = DistAttention(dist.group.WORLD if size > 1 else None, method=method, kernel="reference")
    if keep:
        with torch.no_grad():
            kept = attention.forward_with_lse(q, k, v, None, sink)
        out = attention.reattach(q, k, v, kept, None, sink)
    else:
        out = attention(q, k, v, None, sink)
    return [out.detach(), *torch.autograd.grad((out * dout).sum(), [q, k, v, sink])]


@pytest.mark.parametrize(
    ("method", "keep"), [("lightseq", False), ("ulysses", True), ("rsa", False), ("all_gather", True)]
)
def test_sinks_are_the_same_on_every_number_of_ranks(method: str, keep: bool) -> None:
    (expected,) = on_ranks(1, _with_sink, "ring", False)
    found = on_ranks(2, _with_sink, method, keep)
    for index in range(4):
        whole = torch.cat([part[index] for part in found])
        torch.testing.assert_close(whole, expected[index], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(part[4] for part in found), expected[4], rtol=1e-12, atol=1e-12)


# --- windows under context parallelism --------------------------------------------------------------------------------


def _windowed(layer_number: int) -> torch.Tensor:
    """This rank's output of a layer in a model whose every second layer sees four tokens back."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_lightseq.megatron import CoreAttentionSettings
    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from tests.megatron.test_core_attention import build, qkv, transformer_config

    cpu_platform.activate()
    size, rank = dist.get_world_size(), dist.get_rank()
    parallel_state.initialize_model_parallel(context_parallel_size=size, create_gloo_process_groups=False)
    try:
        config = transformer_config(window_size=(4, 0), window_attn_skip_freq=2, context_parallel_size=size)
        attention = build(
            config, layer_number, settings=CoreAttentionSettings(method="zigzag", layout="zigzag")
        )
        attention.layout_adopted = True
        out: torch.Tensor = attention(
            *(attention.layout.shard(x, rank, 0).contiguous() for x in qkv(length=16)), None
        )
    finally:
        parallel_state.destroy_model_parallel()
    return out.detach()


def test_windows_are_those_of_the_layer_on_every_number_of_ranks() -> None:
    whole = [on_ranks(1, _windowed, layer)[0] for layer in (1, 2)]
    assert not torch.allclose(whole[0], whole[1], atol=1e-3), "the second layer has no window"
    for layer, expected in enumerate(whole, start=1):
        found = SequenceLayout.zigzag(2).unshard(on_ranks(2, _windowed, layer), 0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
