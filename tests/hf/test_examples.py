"""The examples for Hugging Face users give the same losses on any number of ranks."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness.ranks import run_ranks
from tests.hf.trained import launched


def run(name: str) -> Any:
    """``main`` of an example, in this rank."""
    with launched():
        return importlib.import_module(f"docs.examples.{name}").main()


def losses(name: str, ranks: int) -> Tensor:
    """What each rank returns, (ranks, ...)."""
    return torch.tensor(run_ranks(ranks, run, name), dtype=torch.float64)


@pytest.mark.parametrize("name", ["hf_loop", "hf_fsdp2"])
def test_loops(name: str) -> None:
    wanted = losses("hf_loop", 1)
    assert len(wanted[0].unique()) == 3  # weights change from step to step
    assert (losses(name, 2) - wanted).abs().max() <= 2e-6


def test_a_script_with_trainer() -> None:
    wanted, found = losses("hf_trainer", 1), losses("hf_trainer", 2)
    assert wanted.shape == (1, 4, 2)
    assert (found - wanted).abs().max() <= 5e-6


def test_packed_fine_tuning_with_lora() -> None:
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    wanted, found = losses("hf_trl", 1), losses("hf_trl", 2)
    assert wanted.shape == (1, 3, 2)
    assert (found - wanted).abs().max() <= 5e-6
