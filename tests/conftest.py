from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.harness.ranks import close_pool

try:
    from hypothesis import settings
except ModuleNotFoundError:  # on machines of scripts/gpu_check.sh, whose tests do not need it
    pass
else:  # No timed tests: shared machines stall, and hypothesis would call that a failure. The same examples in every
    # run: a change is judged by what it changes. Others: pytest --hypothesis-profile=default
    settings.register_profile("untimed", deadline=None, derandomize=True)
    settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _stop_rank_processes() -> Iterator[None]:
    yield
    close_pool()


@pytest.fixture(scope="session", autouse=True)
def _hang_up() -> Iterator[None]:
    """Tests send SIGHUP to processes that they start, which would ignore it if this one was started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
