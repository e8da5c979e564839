from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.ranks import close_pool


@pytest.fixture(scope="session", autouse=True)
def _stop_rank_processes() -> Iterator[None]:
    yield
    close_pool()
