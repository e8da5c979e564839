"""Megatron-LM's training program on a machine without a GPU, over gloo.

:mod:`megatron_lightseq.megatron.cpu.platform` makes megatron.core run there; this does the same for the training
modules of a checkout and for its script. It happens only where torch sees no CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import CodeType, SimpleNamespace
from typing import Any

import torch

from megatron_lightseq.errors import explain
from megatron_lightseq.megatron.cpu import platform as cpu_platform

TRAINING_MODULES: dict[str, str] = {
    "megatron.training.arguments": "reads the compute capability of the device",
    "megatron.training.checkpointing": "saves the CUDA random state; agrees on the iteration through a CUDA tensor",
    "megatron.training.dist_signal_handler": "gathers signals through a CUDA tensor",
    "megatron.training.initialize": "asserts that CUDA is available, sets the device",
    "megatron.training.models.dist_utils": "moves the model to the current device and takes a stream for DDP",
    "megatron.training.training": "moves the model, takes streams, reads memory statistics, keeps losses on 'cuda'",
    "megatron.training.utils": "reduces losses on the current device",
    "megatron.training.utils.common_utils": "the same, from 0.18",
}
"""Module of a checkout -> what in it needs CUDA. Modules that a version lacks are skipped."""

DEFAULTS: dict[str, Any] = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "no_persist_layer_norm": True,
}
"""Megatron-LM's arguments whose own defaults need a GPU, Transformer Engine or apex."""


class _TrainingCuda(cpu_platform.CpuCuda):
    """The part of ``torch.cuda`` that Megatron-LM's training loop uses in addition to what the core uses."""

    def is_available(self) -> bool:
        """True, so that the training program starts; torch itself still sees no GPU."""
        return True

    def device_count(self) -> int:
        return 1

    def set_device(self, *_: Any) -> None:
        """There is only one device."""

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        return (0, 0)

    def get_device_properties(self, *_: Any) -> SimpleNamespace:
        return SimpleNamespace(major=0, minor=0, name="cpu", total_memory=0, multi_processor_count=1)

    def memory_stats(self, *_: Any) -> defaultdict[str, int]:
        return defaultdict(int)

    def _no_bytes(self, *_: Any) -> int:
        return 0

    memory_allocated = max_memory_allocated = memory_reserved = max_memory_reserved = device_memory_used = (
        _no_bytes
    )

    def reset_peak_memory_stats(self, *_: Any) -> None:
        """Nothing is counted."""


def activate() -> None:
    """Make megatron.core and megatron.training of the checkout on ``sys.path`` usable on this CPU.

    :func:`megatron_lightseq.megatron.cpu.platform.deactivate` undoes it, except for two environment variables.

    Raises:
        UnsupportedError: CUDA is available.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron-LM requires it with TP or CP
    # Its fused functions take minutes to compile on a CPU, and gain nothing.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    cpu_platform.activate()
    cpu_platform.extend(TRAINING_MODULES, _TrainingCuda(), _attributes())


def _attributes() -> Iterator[tuple[Any, str, Any]]:
    # It can only raise on such a machine, and is called with arguments that tensor.cpu() does not accept.
    yield torch.Tensor, "cuda", _itself
    yield torch.nn.Module, "cuda", _itself
    initialize = importlib.import_module("megatron.training.initialize")
    # It warms up CUDA kernels. On a CPU it would draw from the only random stream, by shapes that depend on the
    # context-parallel size, so that initial weights would depend on that size.
    yield initialize, "_warmup_jit_function", _nothing
    yield importlib.import_module("megatron.training.training"), "_warmup_jit_function", _nothing
    with contextlib.suppress(ImportError):  # until 0.16
        yield importlib.import_module("megatron.legacy.fused_kernels"), "load", _nothing  # it looks for nvcc


def _itself(self: Any, *_: Any, **__: Any) -> Any:
    return self


def _nothing(*_: Any, **__: Any) -> None:
    return None


def script_code(code: CodeType) -> CodeType:
    """The code of a training script in which ``device='cuda'`` means the CPU."""
    return cpu_platform.on_cpu(code, rename_methods=False)


def with_defaults(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron-LM's ``add_megatron_arguments`` with those of :data:`DEFAULTS` that this version has."""

    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        known = {action.dest for action in parser._actions}
        parser.set_defaults(**{name: value for name, value in DEFAULTS.items() if name in known})
        return parser

    return add_megatron_arguments


def backend_problems(arguments: Any) -> list[str]:
    """A message if the communication backend needs GPUs, else nothing."""
    backend = getattr(arguments, "distributed_backend", "gloo")
    if backend == "gloo":
        return []
    return [
        explain(
            got=f"--distributed-backend {backend} on a machine without a CUDA device",
            rule="ranks on CPUs communicate over gloo",
            remedy="Give --distributed-backend gloo or leave it out, or run where torch sees GPUs",
        )
    ]
