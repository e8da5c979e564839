from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch

from megatron_lightseq.megatron.lazy_compile import compiled_when_called

STARTS_A_RANK = """
import sys, torch
from megatron_lightseq.megatron.lazy_compile import import_megatron
compile = torch.compile
import_megatron()
assert torch.compile is compile
import megatron_lightseq.training.loop
import megatron_lightseq.training.reporting.report
heavy = {"torch._inductor.compile_fx", "matplotlib", "rich", "transformers", "networkx"} & set(sys.modules)
sys.exit(", ".join(heavy) or 0)
"""


def test_a_rank_starts_without_the_compiler() -> None:
    """It costs a second of CPU time in every rank, at every restart."""
    command = [sys.executable, "-W", "ignore", "-c", STARTS_A_RANK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_functions_are_compiled_when_they_are_first_called() -> None:
    compiled: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    @compiled_when_called(backend=backend)
    def double(x: torch.Tensor) -> torch.Tensor:
        """Twice."""
        return x + x

    assert double.__doc__ == "Twice."
    assert not compiled
    assert double(torch.ones(2)).tolist() == [2.0, 2.0]
    assert double(torch.ones(2)).tolist() == [2.0, 2.0]
    assert len(compiled) == 1

    @torch.compile(backend=backend, fullgraph=True)
    def four(x: torch.Tensor) -> torch.Tensor:
        return double(double(x))

    assert four(torch.ones(2)).tolist() == [4.0, 4.0]
    assert len(compiled) == 2, "inside something larger it is compiled with it"
