from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.harness.ranks import close_pool

# No timed tests: shared machines stall, and hypothesis would call that a failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _stop_rank_processes() -> Iterator[None]:
    yield
    close_pool()
