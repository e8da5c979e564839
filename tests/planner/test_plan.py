"""`lightseq plan`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_lightseq.cli import run
from megatron_lightseq.errors import ConfigError, UnsupportedError
from megatron_lightseq.tools.planner.cluster import GPUS, Cluster, gpu_named
from megatron_lightseq.tools.planner.footprint import footprint, longest_sequence
from megatron_lightseq.tools.planner.request import Request, read_config

RECIPE = """
num_layers: 8
hidden_size: 512
num_attention_heads: 8
num_query_groups: 2
seq_length: 8192
bf16: true
global_batch_size: 8
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def request_of(recipe: str, cluster: str, *settings: str) -> Request:
    return Request(config=read_config([recipe], settings), cluster=Cluster.parse(cluster), vocab_size=257)


def test_plan_says_what_is_held_and_that_it_fits(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["context_parallel_size=2", "pipeline_model_parallel_size=2"]
    assert (
        run(["plan", recipe, "--cluster", "h100:4", "--set", *settings, "--no-longest", "--json", "-"]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    first, last = told["memory"]["stages"]
    assert told["memory"]["fits"]
    assert told["layout"].startswith("TP 1 x PP 2 x CP 2 x DP 1, lightseq")
    assert first["total_bytes"] == sum(first["bytes"].values())
    assert first["bytes"]["activations of MLPs"] > 1.5 * last["bytes"]["activations of MLPs"], "two in flight"
    assert "logits and loss" in last["bytes"]


def test_longest_sequence_is_the_longest(recipe: str) -> None:
    request = request_of(recipe, "l40s:2", "context_parallel_size=2", "recompute_granularity=selective")
    found = footprint(request)
    longest = longest_sequence(request, found)
    assert longest is not None
    assert longest > request.config.training.seq_length
    assert footprint(request.but(seq_length=longest)).fits
    assert not footprint(request.but(seq_length=int(longest * 1.05) // 1024 * 1024)).fits


def test_all_broken_rules_are_reported_at_once(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["tensor_model_parallel_size=3", "num_layers=7", "pipeline_model_parallel_size=2"]
    assert run(["plan", recipe, "--gpus", "16", "--set", *settings]) == 2
    told = capsys.readouterr().err
    assert "problems in the configuration" in told
    for rule in ("num_attention_heads must be a multiple", "num_layers must be a multiple", "world size 16"):
        assert rule in told, rule


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "0 GPUs in nodes of 8"),
        (["--gpus", "12"], "12 GPUs in nodes of 8.* positive multiple"),
        (["--cluster", "h10:8x2"], "GPU 'h10': the known GPUs are .*nearest name is h100"),
        (["--cluster", "h100"], "GPU:GPUS_PER_NODExNODES"),
        ([], "Give --cluster"),
        (["--gpus", "8", "--set", "num_layer=4"], "num_layers was meant"),
        (["--gpus", "8", "--set", "num_layers"], "a setting is KEY=VALUE"),
        (
            ["--gpus", "8", "--set", "tokenizer_type=hf", "tokenizer_model=none.json"],
            "--set vocab_size=128256",
        ),
        (["--gpus", "8", "--network", "fast"], "network 'fast'"),
    ],
)
def test_bad_input_is_refused_in_words(
    recipe: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", recipe, *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_cluster_that_cannot_hold_the_weights_ends_with_status_2(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", recipe, "--gpus", "1", "--set", "hidden_size=16384", "num_attention_heads=128"]) == 2
    assert "No sequence fits: weights, gradients and optimizer state need" in capsys.readouterr().out


def test_what_cannot_be_planned_is_refused(recipe: str) -> None:
    with pytest.raises(UnsupportedError, match="Transformer Engine"):
        request_of(recipe, "h100:2", "context_parallel_size=2", "cp_method=megatron")
    with pytest.raises(UnsupportedError, match="only alltoall is planned"):
        request_of(recipe, "h100:1", "num_experts=4", "moe_token_dispatcher_type=allgather")
    with pytest.raises(UnsupportedError, match="linear layers are not planned"):
        request_of(recipe, "h100:1", "experimental_attention_variant=linear", "linear_attention_freq=2")
    with pytest.raises(ConfigError):
        request_of(recipe, "h100:3", "context_parallel_size=2")


def test_gpus_are_plausible() -> None:
    for gpu in GPUS.values():
        assert 20 < gpu.memory_bytes / 2**30 < 200
        assert gpu.nic_bytes_per_s < 8 * gpu.link_bytes_per_s
    assert gpu_named("H100_80").name == "h100"
    assert Cluster.parse("h200:8x4").network.nic_bytes_per_s == 400e9
