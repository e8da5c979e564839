"""Our options in Megatron-LM: as flags, in the environment, and refused combinations."""

from __future__ import annotations

import argparse
import re
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lightseq.attention import AttentionStats
from megatron_lightseq.config.megatron_option import Option
from megatron_lightseq.config.megatron_options import launcher_options
from megatron_lightseq.errors import ConfigError
from megatron_lightseq.megatron.lm.options import (
    KEYS,
    LmOptions,
    add_flags,
    options_from_environment,
    options_from_flags,
)
from megatron_lightseq.megatron.lm.refusals import refusals


def parsed(*flags: str) -> LmOptions:
    return options_from_flags(add_flags(argparse.ArgumentParser(allow_abbrev=False)).parse_args(flags))


def settings(options: LmOptions, **arguments: Any) -> Any:
    from megatron_lightseq.megatron.lm.settings import core_attention_settings, violated_rules

    assert not violated_rules(options, SimpleNamespace(**arguments))
    return core_attention_settings(options, SimpleNamespace(**arguments), AttentionStats())


def test_the_keys_are_frozen() -> None:
    assert KEYS == (
        "cp_method",
        "cp_ulysses_size",
        "cp_network",
        "cp_layout",
        "cp_overlap",
        "cp_kernel",
        "cp_invariant",
        "cp_verify_transport",
        "keep_attention_on_recompute",
        "mlp_tile_tokens",
        "loss_tile_tokens",
    )


def test_flags_say_what_configuration_keys_say() -> None:
    assert parsed() == LmOptions()
    options = parsed(
        *("--cp-method", "usp", "--cp-ulysses-size", "2", "--cp-kernel", "reference"),
        *("--no-cp-overlap", "--no-keep-attention-on-recompute"),
    )
    assert options.context.method_name == "usp:2"
    assert (options.context.cp_kernel, options.context.cp_overlap) == ("reference", False)
    assert not options.keep_attention_on_recompute
    tiled = parsed("--mlp-tile-tokens", "512", "--loss-tile-tokens", "256")
    assert (tiled.mlp_tile_tokens, tiled.loss_tile_tokens) == (512, 256)
    assert not parsed("--cp-method", "megatron").active


@pytest.mark.parametrize(("given", "weighed"), [(None, ()), ((20, 0), (20, 0)), ((-1, 0), ())])
def test_auto_weighs_megatrons_windows(given: Any, weighed: tuple[int, ...]) -> None:
    from megatron_lightseq.megatron.lm.settings import as_config

    found = as_config(parsed("--cp-method", "auto"), SimpleNamespace(window_size=given))
    assert found.model.window_size == weighed


def test_a_wrong_word_is_refused_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--cp-method", "rings")
    assert "invalid choice: 'rings' (choose from" in capsys.readouterr().err


def test_flags_have_help_of_their_own() -> None:
    text = add_flags(argparse.ArgumentParser()).format_help()
    assert "LightSeq:" in text
    for key in KEYS:
        assert f"--{key.replace('_', '-')}" in text


def test_a_namespace_without_our_flags_comes_from_a_yaml_file() -> None:
    with pytest.raises(
        ConfigError, match=r"--yaml-cfg.*cp_method.*can only be read from the command line.*as flags"
    ):
        options_from_flags(argparse.Namespace(num_layers=2))


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    assert options_from_environment({}) == LmOptions()
    file = tmp_path / "cp.yaml"
    file.write_text("cp_method: ring\ncp_overlap: false\nkeep_attention_on_recompute: false\n")
    options = options_from_environment({"MLS_CONFIG": str(file), "MLS_CP_METHOD": "zigzag", "OTHER": "1"})
    assert (options.context.cp_method, options.context.cp_overlap) == ("zigzag", False)
    assert not options.keep_attention_on_recompute


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLS_CP_METHOD", "mesh")
    assert options_from_environment().context.cp_method == "mesh"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"MLS_CP_METHOD": "rings"},
            r"cp_method 'rings' \(environment variable MLS_CP_METHOD\).*Perhaps ring",
        ),
        ({"MLS_CP_OVERLAP": "2"}, r"cp_overlap '2'.*true or false"),
    ],
)
def test_wrong_variables_are_named(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options_from_environment(variables)


def test_megatrons_own_arguments_do_not_belong_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "cp.yaml"
    file.write_text("num_layers: 2\n")
    with pytest.raises(ConfigError, match=r"'num_layers' .*cp\.yaml.*MLS_CONFIG may hold the keys cp_method"):
        options_from_environment({"MLS_CONFIG": str(file)})


# --- settings -----------------------------------------------------------------------------------------------------


def test_settings_follow_method_and_megatrons_kinds() -> None:
    assert settings(parsed()).layout == "contiguous"
    zigzag = settings(parsed("--cp-method", "zigzag"), cp_comm_type=["p2p"])
    assert (zigzag.method, zigzag.layout, zigzag.comm_types) == ("zigzag", "zigzag", ())
    mixed = settings(
        parsed("--cp-method", "ring"),
        cp_comm_type=["p2p", "a2a+p2p"],
        num_layers=2,
        context_parallel_size=4,
        hierarchical_context_parallel_sizes=[2, 2],
        seq_length=64,
    )
    assert [mixed.method_of(kind) for kind in mixed.comm_types] == ["ring", "usp:2"]


def test_auto_chooses_a_layout_from_megatrons_arguments() -> None:
    shape = {"hidden_size": 8192, "num_attention_heads": 64, "bf16": True, "context_parallel_size": 16}
    grouped = {**shape, "group_query_attention": True, "num_query_groups": 8, "seq_length": 2**20}
    from megatron_lightseq.schedule import default_layouts

    assert settings(parsed("--cp-method", "auto"), **grouped).layout in default_layouts()
    assert settings(parsed("--cp-method", "auto", "--cp-layout", "striped"), **grouped).layout == "striped"


@pytest.mark.parametrize(
    ("flags", "arguments", "message"),
    [
        (["--cp-layout", "zigzag"], {}, r"cp_layout zigzag, .*lightseq works on contiguous shards"),
        (
            ["--cp-method", "usp", "--cp-ulysses-size", "3"],
            {"context_parallel_size": 4},
            r"cp_ulysses_size 3, .*divides the number of ranks",
        ),
        (
            [],
            {"cp_comm_type": ["p2p", "a2a"], "num_layers": 3},
            r"one value for all layers, or one value per layer",
        ),
    ],
)
def test_rules_of_context_parallelism_hold(flags: list[str], arguments: dict[str, Any], message: str) -> None:
    from megatron_lightseq.megatron.lm.settings import violated_rules

    (problem,) = violated_rules(parsed(*flags), SimpleNamespace(**arguments))
    assert re.search(message, problem)


# --- refusals -----------------------------------------------------------------------------------------------------

REFUSED = [(name, option) for name, option in launcher_options() if option.in_launcher == "refused"]
DEFAULTS = {"transformer_impl": "local", "cuda_graph_impl": "none"}
"""Defaults of refused arguments that are not None or False."""
CUT = {
    "context_parallel_size": 2,
    "tensor_model_parallel_size": 2,
    "micro_batch_size": 2,
    "moe_token_drop_policy": "position",
    "mlp_tile_tokens": 8,
    "loss_tile_tokens": 8,
}
"""Arguments that make the conditions of refusals true."""


class Choice(Enum):
    """The value of an argument that is an enumeration."""

    auto = 1
    flash = 2


def test_an_ordinary_run_is_not_refused() -> None:
    ordinary = {**dict.fromkeys((name for name, _ in REFUSED)), **DEFAULTS, "attention_dropout": 0.0}
    assert refusals(SimpleNamespace(**ordinary), {}) == []
    assert refusals(SimpleNamespace(), {}) == [], "arguments that an older version lacks are not refused"


@pytest.mark.parametrize(("name", "option"), REFUSED, ids=[name for name, _ in REFUSED])
def test_every_argument_that_would_be_ignored_is_refused_by_name(name: str, option: Option) -> None:
    value = option.only[0] if option.only else Choice.flash
    given = {**DEFAULTS, name: value}
    always = [other for names, other in REFUSED if names == name and other.condition is None]
    assert len(refusals(SimpleNamespace(**given), {})) == len(always)
    messages = refusals(SimpleNamespace(**given, **CUT), {"mlp_tile_tokens": 8})
    (message,) = [each for each in messages if option.reason in each]
    assert message.startswith(f"--{name.replace('_', '-')} {getattr(value, 'name', value)}")
    condition = "" if option.condition is None else option.condition.text.split("_")[0]
    assert condition in message.replace("--", "")


def test_what_slices_cannot_honour_is_refused_with_them_only() -> None:
    arguments = SimpleNamespace(mtp_num_layers=1, recompute_modules=["mlp", "core_attn"], num_experts=4)
    assert refusals(arguments, {"mlp_tile_tokens": None, "loss_tile_tokens": None}) == []
    both = refusals(arguments, {"mlp_tile_tokens": 5, "loss_tile_tokens": 5})
    assert [message.split(":")[0] for message in both] == [
        "--recompute-modules mlp core_attn with --mlp-tile-tokens",
        "--num-experts 4 with --mlp-tile-tokens",
        "--mtp-num-layers 1 with --loss-tile-tokens",
    ]
    assert "Leave --mlp-tile-tokens out" in both[1]


def test_no_remedy_removes_what_changes_the_model() -> None:
    """Remedies advise dropping an argument only for our own options, or if results stay the same."""
    same = {"mla_down_proj_fusion", "tp_comm_overlap", "recompute_modules"}
    for name, option in REFUSED:
        removes = option.remedy.lower().startswith(("remove", "leave", "switch"))
        ours = "_tile_tokens out" in option.remedy
        assert not removes or ours or name in same, f"{name}: {option.remedy}"
