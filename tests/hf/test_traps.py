"""Every trap of docs/huggingface.md is seen where a step is left out, and what is taken care of does no harm."""

from __future__ import annotations

import math

import pytest

from tests.harness.ranks import run_ranks
from tests.hf import traps
from tests.hf.test_parity import GRADIENTS, LOSS


def right(apart: traps.Apart) -> bool:
    return apart[0] <= LOSS and apart[1] <= GRADIENTS


@pytest.mark.parametrize("kind", ["batches", "models"])
def test_a_step_that_is_left_out_is_seen(kind: str) -> None:
    found = run_ranks(2, getattr(traps, kind))[0]
    for name, apart in found.items():
        if name == "nothing" or name.startswith("("):
            assert right(apart), (name, apart)
        else:  # a gradient is off by several percent at least
            assert not apart[1] <= 0.03, (name, apart)
    assert len(found) >= 4


def test_a_rank_without_targets_makes_a_mean_of_means_nan() -> None:
    found = run_ranks(2, traps.batches)[0]
    assert math.isnan(found["targets counted over the group"][0])


def test_transformers_itself_loses_documents_with_a_cache_or_a_mask() -> None:
    found = traps.one_process()
    assert right(found.pop("nothing"))
    assert all(apart[1] > 0.1 for apart in found.values()), found
