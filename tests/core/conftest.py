from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Fills uninitialised tensors with NaN, so that reads of memory that was not written are detected."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
