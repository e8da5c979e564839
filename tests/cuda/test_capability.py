"""Which GPUs a build supports, and the errors on others."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_lightseq.kernels.cuda import cannot_run, runs_on

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = "80+PTX;90a"


@dataclass
class Device:
    major: int
    minor: int
    shared_memory_per_multiprocessor: int
    name: str = "Some GPU"


A100, A10, H100 = Device(8, 0, 164 << 10), Device(8, 6, 100 << 10), Device(9, 0, 228 << 10)
B200, RTX5090, V100 = Device(10, 0, 228 << 10), Device(12, 0, 100 << 10), Device(7, 0, 96 << 10)


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),
        ("80", (9, 0), False),
        ("86", (8, 0), False),
        ("80+PTX", (9, 0), True),
        ("80+PTX", (12, 1), True),
        ("86+PTX", (8, 0), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("100f", (10, 3), True),
        ("100f", (12, 0), False),
    ],
)
def test_code_runs_where_cuda_says(arch: str, capability: tuple[int, int], runs: bool) -> None:
    assert runs_on(arch, capability) is runs


@pytest.mark.parametrize("device", [A100, H100, B200], ids=lambda device: f"{device.major}.{device.minor}")
@pytest.mark.parametrize("head_dim", [64, 256])
def test_the_default_build_serves_what_came_after_it(device: Device, head_dim: int) -> None:
    assert cannot_run(device, DEFAULT, head_dim) is None


@pytest.mark.parametrize("device", [A10, RTX5090], ids=lambda device: f"{device.major}.{device.minor}")
def test_little_shared_memory_serves_small_heads(device: Device) -> None:
    assert cannot_run(device, DEFAULT, 64) is None
    reason = cannot_run(device, DEFAULT, 128)
    assert reason == ("head dims above 64 need 164 KiB of shared memory per multiprocessor, Some GPU has 100")


def test_gpus_without_code_are_told_what_to_build() -> None:
    assert cannot_run(V100, DEFAULT, 64) == "it needs compute capability 8.0, Some GPU has 7.0"
    for archs, device in (("80;90a", B200), ("90a", A100)):
        reason = cannot_run(device, archs, 64)
        assert reason is not None
        assert f"built for compute capabilities {archs}, Some GPU has {device.major}.0" in reason
        assert "MLS_CUDA_ARCHS='80+PTX;90a' python setup.py build_ext --inplace" in reason


@pytest.mark.parametrize("archs", ["75", "80;", "80+ptx"])
def test_the_build_refuses_what_is_no_architecture(archs: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={**os.environ, "MLS_CUDA_ARCHS": archs},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "is not a compute capability of 80 or later. Write, for example, 80+PTX;90a" in done.stderr
