"""Our options inside Megatron-LM: as flags, in the environment, and what they refuse."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lightseq.attention import AttentionStats
from megatron_lightseq.errors import ConfigError, UnsupportedError
from megatron_lightseq.megatron.lm.options import (
    KEYS,
    LmOptions,
    add_flags,
    options_from_environment,
    options_from_flags,
)
from megatron_lightseq.megatron.lm.refusals import (
    LOSS_TILE_REFUSALS,
    MLP_TILE_REFUSALS,
    REFUSALS,
    check_arguments,
)


def parsed(*flags: str) -> LmOptions:
    return options_from_flags(add_flags(argparse.ArgumentParser(allow_abbrev=False)).parse_args(flags))


def settings(options: LmOptions, **arguments: Any) -> Any:
    from megatron_lightseq.megatron.lm.settings import core_attention_settings

    return core_attention_settings(options, SimpleNamespace(**arguments), AttentionStats())


def test_the_keys_are_frozen() -> None:
    assert KEYS == (
        "cp_method",
        "cp_ulysses_size",
        "cp_network",
        "cp_layout",
        "cp_overlap",
        "cp_kernel",
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
    with pytest.raises(ConfigError, match=r"--yaml-cfg.*cp_method.*cannot be read there.*as flags"):
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
    with pytest.raises(ConfigError, match=r"'num_layers' .*cp\.yaml.*MLS_CONFIG holds the keys cp_method"):
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
        (["--cp-layout", "zigzag"], {}, r"cp_layout zigzag.*: lightseq works on contiguous shards"),
        (
            ["--cp-method", "usp", "--cp-ulysses-size", "3"],
            {"context_parallel_size": 4},
            r"divides the number",
        ),
        (
            [],
            {"cp_comm_type": ["p2p", "a2a"], "num_layers": 3},
            r"one value for all layers, or one value per layer",
        ),
        ([], {"attention_dropout": 0.1}, r"attention_dropout 0\.1: .*dropout would apply"),
    ],
)
def test_rules_of_context_parallelism_hold(flags: list[str], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(parsed(*flags), **arguments)


# --- refusals -----------------------------------------------------------------------------------------------------

HARMLESS = {"attention_backend": "auto", "transformer_impl": "local", "cuda_graph_impl": "none"}


def test_an_ordinary_run_is_not_refused() -> None:
    check_arguments(
        SimpleNamespace(**HARMLESS, attention_dropout=0.0, reset_attention_mask=False, fp16=False)
    )
    check_arguments(SimpleNamespace(attention_backend=SimpleNamespace(name="auto")))


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.argument)
def test_every_argument_that_would_be_ignored_is_refused_by_name(refusal: Any) -> None:
    words = {"attention_backend": SimpleNamespace(name="flash"), "cuda_graph_impl": "local"}
    value = words.get(
        refusal.argument, "inference_optimized" if refusal.argument == "transformer_impl" else True
    )
    flag = refusal.argument.replace("_", "-")
    with pytest.raises(UnsupportedError, match=rf"--{flag}.*{refusal.remedy}"):
        check_arguments(SimpleNamespace(**{**HARMLESS, refusal.argument: value}))


@pytest.mark.parametrize(
    "refusal", [*LOSS_TILE_REFUSALS, *MLP_TILE_REFUSALS], ids=lambda refusal: refusal.argument
)
def test_what_tiles_cannot_honour_is_refused_with_them_only(refusal: Any) -> None:
    given = SimpleNamespace(**{refusal.argument: ["mlp"] if refusal.argument == "recompute_modules" else 1})
    check_arguments(given)
    flag = refusal.argument.replace("_", "-")
    with pytest.raises(UnsupportedError, match=rf"--{flag}.*{refusal.remedy}"):
        check_arguments(given, [refusal])
