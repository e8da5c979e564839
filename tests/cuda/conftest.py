"""One emulated GPU, shared by all tests in this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda.emulator import cached_library, missing


@pytest.fixture(scope="session")
def library() -> Path:
    """The kernels compiled for the emulated GPU."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    return cached_library()
