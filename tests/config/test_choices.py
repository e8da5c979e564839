"""Choices that other parts of the package define: flags, files and help accept a new method, layout or kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import pytest

from megatron_lightseq.config import Machine, parse_config, violations, with_values
from megatron_lightseq.config.choices import COMM_TYPES, default_layout, method_of_comm_type
from megatron_lightseq.config.sections import ContextParallelConfig, CPCommType
from megatron_lightseq.config.typed import choices, describe, field_docstrings, parser
from megatron_lightseq.errors import ConfigError
from megatron_lightseq.kernels.specs import KERNELS
from megatron_lightseq.layout import LAYOUTS
from megatron_lightseq.schedule import METHODS, Method, register


@pytest.fixture
def new_method() -> Iterator[Method]:
    """A method that is registered after a configuration has been read, so choices must not be cached."""
    parse_config(["--cp-method", "ring"])
    place = METHODS["ring"].place
    yield register(
        Method("mine", place, summary="what I say", default_layout="striped", only_layouts=("striped",))
    )
    del METHODS["mine"]


def test_a_registered_method_is_a_choice_with_its_layouts(new_method: Method) -> None:
    config = parse_config(["--cp-method", "mine", "--context-parallel-size", "2", "--data-path", "x"])
    assert config.context.layout_name == "striped"
    assert violations(config, Machine(world_size=2)) == []
    (message,) = violations(with_values(config, cp_layout="zigzag"))
    assert "mine works on striped shards" in message
    assert "mine" in describe("cp_method")
    text = " ".join(parser().format_help().split())
    assert "mine (what I say)" in text
    assert "striped for mine)" in text


def test_a_method_that_is_gone_is_refused() -> None:
    assert "mine" not in METHODS
    with pytest.raises(ConfigError, match=r"cp_method must be one of lightseq, .*, auto, megatron"):
        parse_config(["--cp-method", "mine"])


def test_layouts_and_kernels_are_those_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choices("cp_layout") == ("auto", *LAYOUTS)
    assert choices("cp_kernel") == ("auto", *KERNELS)
    monkeypatch.setitem(LAYOUTS, "backwards", LAYOUTS["contiguous"])
    monkeypatch.setitem(KERNELS, "quick", replace(KERNELS["cpu"], name="quick", summary="a quick one"))
    assert parse_config(["--cp-layout", "backwards"]).context.cp_layout == "backwards"
    assert parse_config(["--cp-kernel", "quick"]).context.cp_kernel == "quick"
    assert "quick (a quick one)" in field_docstrings(ContextParallelConfig)["cp_kernel"]


def test_the_help_says_what_auto_stands_for() -> None:
    texts = field_docstrings(ContextParallelConfig)
    for name, method in METHODS.items():
        assert default_layout(name) == method.default_layout
        assert f"{name} ({method.summary})" in texts["cp_method"]
    assert "contiguous for lightseq, ring, balanced, ulysses, usp and rsa;" in texts["cp_layout"]
    assert "the first of cuda, cpu and reference that supports the inputs" in texts["cp_kernel"]
    for name, spec in KERNELS.items():
        assert f"{name} ({spec.summary})" in texts["cp_kernel"]


def test_communication_types_are_megatrons() -> None:
    assert get_args(CPCommType) == COMM_TYPES
    assert [method_of_comm_type(name, "mine", 4) for name in (None, *COMM_TYPES)] == [
        "mine",
        "mine",
        "all_gather",
        "ulysses",
        "usp:4",
    ]
