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
def _heard_signals() -> Iterator[None]:
    """Tests send signals to processes that they start, which would ignore those that this one was started without.

    That is SIGHUP where pytest was started by nohup, and SIGINT where a script started it in the background.
    """
    heard = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
