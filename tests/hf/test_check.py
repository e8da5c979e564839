"""The command that compares a user's own model on several ranks with one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lightseq.hf import check
from tests.harness.ranks import run_ranks
from tests.hf import tiny
from tests.hf.traps import ROPES


def saved(folder: Path, **changes: Any) -> str:
    tiny.model("gemma3", **changes).save_pretrained(folder)
    return str(folder)


def test_a_model_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([saved(tmp_path), "--cp", "2", "--length", "64", "--vocabulary", "96", "--whole"]) == 0
    said = capsys.readouterr().out
    assert said.endswith("PASS (loss within 1e-05, gradients 0.0001)\n")
    for kind in ("rows", "odd length", "padded left", "packed"):
        assert f"\n{kind}" in said
    assert "peak memory, GiB: one process " in said


def test_a_model_that_would_be_silently_wrong_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.model("llama", rope_parameters=ROPES["dynamic"]).save_pretrained(tmp_path)
    assert check.main([str(tmp_path), "--cp", "2"]) == 2
    assert "rope_type dynamic" in capsys.readouterr().err


REQUEST = check.Request(model="m", cp=2, whole=False, layers=2, vocabulary=96, length=64, method="lightseq")


def test_what_differs_fails_and_names_the_parameter() -> None:
    wanted = (1.0, {"a": torch.ones(2), "b": torch.ones(2)})
    right = check.row_of("rows", wanted, wanted)
    wrong = check.row_of("rows", (1.0, {"a": torch.ones(2), "b": torch.tensor([1.0, 1.1])}), wanted)
    broken = check.row_of(
        "rows", (math.nan, {"a": torch.tensor([1.0, math.nan]), "b": torch.ones(2)}), wanted
    )
    assert (right.passed, wrong.passed, broken.passed) == (True, False, False)
    assert (wrong.parameter, broken.parameter) == ("b", "a")
    said = check.report(REQUEST, [right, wrong], [1.0, 2.0, 2.0])
    assert "b  <- differs" in said
    assert said.splitlines()[-1].startswith("FAIL")


def test_a_model_is_cut_down_to_a_layer_of_each_type() -> None:
    config = tiny.model(
        "gemma3", num_hidden_layers=4, layer_types=["sliding_attention"] * 3 + ["full_attention"]
    ).config
    small = check.cut_down(config, REQUEST)
    assert small.get_text_config().layer_types == ["sliding_attention", "full_attention"]
    assert check.batches(96, 64).keys() == {"rows", "odd length", "padded left", "packed"}


def leaking() -> list[bool]:
    """A fault of the kind that the command is for: packed documents that see each other."""
    import torch.distributed as dist

    from megatron_lightseq import hf

    hf.register()
    cp, batch = hf.ContextParallel(dist.group.WORLD), check.batches(96, 64)["packed"]
    wanted = check.one_result(tiny.model("llama"), batch)
    right = check.row_of("packed", check.rank_result(tiny.model("llama", "lightseq"), batch, cp), wanted)
    blind = {**batch, "position_ids": torch.arange(64)[None]}
    wrong = check.row_of("packed", check.rank_result(tiny.model("llama", "lightseq"), blind, cp), wanted)
    return [right.passed, wrong.passed]


def test_documents_that_leak_are_seen() -> None:
    assert run_ranks(2, leaking) == [[True, False]] * 2
