"""The table of Megatron's options covers the installed Megatron, and does what it says."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lightseq.config.flat import keys
from megatron_lightseq.config.megatron_option import Kind
from megatron_lightseq.config.megatron_options import OPTIONS, recipe_spellings
from megatron_lightseq.errors import UnsupportedError
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.megatron.options import ARGUMENTS, FIELDS, RELATED, refused_fields
from tests.megatron.runs import on_ranks

HOW_TO_CLASSIFY = (
    "has options whose names speak of attention and that are not in config/megatron_options.py: {}. State for each "
    "whether it is honoured (and test it), refused, replaced, or acts outside of attention"
)


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

    unknown = sorted(name for name in config_fields() if RELATED.search(name) and name not in FIELDS)
    assert not unknown, f"megatron-core {__version__} {HOW_TO_CLASSIFY.format(', '.join(unknown))}"


@pytest.mark.skipif(
    "MEGATRON_LM_PATH" not in os.environ, reason="MEGATRON_LM_PATH names no checkout of Megatron-LM"
)
def test_every_option_of_a_checkout_is_classified() -> None:
    core = Path(os.environ["MEGATRON_LM_PATH"]) / "megatron" / "core"
    fields = {
        statement.target.id
        for path in (core / "transformer" / "transformer_config.py", core / "model_parallel_config.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
    unknown = sorted(name for name in fields if RELATED.search(name) and name not in FIELDS)
    assert len(fields) > 200
    assert not unknown, f"{core} {HOW_TO_CLASSIFY.format(', '.join(unknown))}"


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


@pytest.mark.parametrize("kind", ["constructor", "forward"])
def test_every_argument_of_megatrons_attention_is_classified(kind: Kind) -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    method = DotProductAttention.__init__ if kind == "constructor" else DotProductAttention.forward
    arguments = set(inspect.signature(method).parameters) - {"self"}
    assert not arguments - ARGUMENTS[kind].keys(), "an argument that is not classified"


def test_the_table_is_consistent() -> None:
    for kind in ("field", "constructor", "forward"):
        names = [
            name for option in OPTIONS if option.attention and option.kind == kind for name in option.names
        ]
        assert len(names) == len(set(names)), "each option must be listed once"
    own = {name for option in OPTIONS if option.recipe == "key" for name in option.names}
    assert own <= set(keys())
    assert not recipe_spellings().keys() & set(keys())
    for option in OPTIONS:
        if "refused" in (option.attention, option.launcher):
            assert option.reason
            assert not option.remedy.endswith("."), "messages add the full stop"


def test_defaults_ask_for_nothing_but_dropout() -> None:
    defaults = {name: value for name, value in config_fields().items() if value is not dataclasses.MISSING}
    for size in (1, 2):
        config = {**defaults, "context_parallel_size": size}
        assert not list(refused_fields(SimpleNamespace(**{**config, "attention_dropout": 0.0})))
        (message,) = refused_fields(SimpleNamespace(**config))
        assert message.startswith("attention_dropout = 0.1: ")


REFUSED = {name: option for name, option in FIELDS.items() if option.attention == "refused"}
OTHER_VALUES: dict[str, Any] = {
    "cuda_graph_impl": "local",
    "attention_dropout": 0.5,
    "max_seqlen_per_dp_cp_rank": 8,
}
CONDITIONS: dict[str, dict[str, Any]] = {
    "moe_expert_capacity_factor": {"moe_token_drop_policy": "position"},
}
"""What else must be given for an option to be refused, beside context parallelism."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_table_refuses_is_refused_by_name(name: str) -> None:
    option = REFUSED[name]
    config = SimpleNamespace(**{name: OTHER_VALUES.get(name, True)})
    if option.condition is not None:
        assert not list(refused_fields(config)), "unless its condition holds"
        vars(config).update(context_parallel_size=2, **CONDITIONS.get(name, {}))
    (message,) = refused_fields(config)
    assert message.startswith(f"{name} = ")
    assert f": LightSeq attention refuses it, because {option.reason}. {option.remedy}." in message


@pytest.mark.usefixtures("one_rank")
def test_attention_is_not_built_with_refused_options_and_names_them_all() -> None:
    from tests.megatron.test_core_attention import build, transformer_config

    config = transformer_config()
    config.qk_clip, config.flash_decode, config.cuda_graph_impl = True, True, "local"
    with pytest.raises(UnsupportedError) as caught:
        build(config, attention_dropout=0.1, num_splits=4)
    first, *problems = str(caught.value).splitlines()
    assert first == "5 options are not supported:"
    named = ("qk_clip", "cuda_graph_impl", "flash_decode", "constructor argument attention_dropout = 0.1")
    assert all(any(name in problem for problem in problems) for name in (*named, "num_splits = 4"))


@pytest.mark.usefixtures("one_rank")
def test_options_that_select_a_kernel_are_replaced_with_one_line_of_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from megatron.core.transformer.enums import AttnBackend

    from megatron_lightseq.megatron import notes
    from tests.megatron.test_core_attention import build, transformer_config

    notes.note_once.cache_clear()
    config = transformer_config()
    build(config)
    assert not caplog.records
    config.attention_backend = AttnBackend.flash
    for layer in (1, 2):
        build(config, layer)
    (record,) = caplog.records
    assert record.message.endswith(
        "runs its own kernels, which cp_kernel selects; replaced: attention_backend flash"
    )


# --- sinks under context parallelism ----------------------------------------------------------------------------------

LENGTH = 16


def _with_sink(method: str, keep: bool) -> list[torch.Tensor]:
    """This rank's output and gradients of q, k, v and the sink."""
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
    """This rank's output of a layer, in a model whose every second layer has a window of four tokens."""
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
    assert not torch.allclose(whole[0], whole[1], atol=1e-3), "one of the two has a window"
    for layer, expected in enumerate(whole, start=1):
        found = SequenceLayout.zigzag(2).unshard(on_ranks(2, _windowed, layer), 0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
