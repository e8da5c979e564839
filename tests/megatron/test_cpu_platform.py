"""megatron-core on a CPU: what is patched, that it can be undone, and that nothing else changes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType

import pytest
import torch

from megatron_lightseq.errors import UnsupportedError
from megatron_lightseq.megatron.cpu import platform as cpu_platform


@pytest.fixture
def platform() -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("the CPU platform refuses to run on a machine with a GPU")
    cpu_platform.activate()
    yield
    cpu_platform.deactivate()


def test_refuses_where_cuda_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(
        UnsupportedError, match=r"3 CUDA device.* must not be used with a GPU\. .*hide the GPUs"
    ):
        cpu_platform.activate()
    assert not cpu_platform.is_active()


@pytest.mark.usefixtures("platform")
def test_activation_is_idempotent_and_undone_completely() -> None:
    clip_grads = importlib.import_module("megatron.core.optimizer.clip_grads")
    assert clip_grads.torch is not torch
    stand_in = clip_grads.torch
    cpu_platform.activate()
    assert clip_grads.torch is stand_in
    cpu_platform.deactivate()
    assert clip_grads.torch is torch
    assert not cpu_platform.is_active()
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    with pytest.raises((AssertionError, RuntimeError)):
        random._get_cuda_rng_state()
    assert _cuda_constants("megatron.core.optimizer.distrib_optimizer")


@pytest.mark.usefixtures("platform")
def test_torch_itself_is_untouched() -> None:
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        torch.zeros(1).cuda()
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_every_listed_module_needs_its_patch_and_loses_its_cuda_constants() -> None:
    for name in cpu_platform.PATCHED_MODULES:
        module = f"megatron.core.{name}"
        importlib.import_module(module)
        source = importlib.util.find_spec(module).origin  # type: ignore[union-attr]
        assert "cuda" in Path(source).read_text(), f"{module} no longer mentions CUDA"  # type: ignore[arg-type]
    if torch.cuda.is_available():
        pytest.skip("the CPU platform refuses to run on a machine with a GPU")
    before = sum(len(_cuda_constants(f"megatron.core.{name}")) for name in cpu_platform.PATCHED_MODULES)
    cpu_platform.activate()
    try:
        left = {name: _cuda_constants(f"megatron.core.{name}") for name in cpu_platform.PATCHED_MODULES}
    finally:
        cpu_platform.deactivate()
    assert before > 20
    assert not any(left.values()), left


@pytest.mark.usefixtures("platform")
def test_type_checks_and_devices_of_the_optimizer_name_the_cpu() -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.full((4,), 2.0)
    clip_grad_by_total_norm_fp32([parameter], max_norm=2.0, total_norm=4.0)
    torch.testing.assert_close(parameter.grad, torch.ones(4), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("platform")
def test_random_tracker_forks_and_restores_the_cpu_generator() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.manual_seed(1)
    tracker = CudaRNGStatesTracker()
    tracker.add("stream", 7)
    outside = torch.rand(1)
    with tracker.fork("stream"):
        first = torch.rand(1)
    with tracker.fork("stream"):
        second = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(outside, torch.rand(1))
    torch.manual_seed(7)
    assert torch.equal(torch.cat([first, second]), torch.cat([torch.rand(1), torch.rand(1)]))


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_torch_norms_carry_the_sequence_parallel_mark(sequence_parallel: bool) -> None:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, normalization="RMSNorm")
    config.sequence_parallel = sequence_parallel
    norm = WrappedTorchNorm(config, 8)
    assert isinstance(norm, torch.nn.RMSNorm)
    assert [parameter.sequence_parallel for parameter in norm.parameters()] == [sequence_parallel]
    assert config.sequence_parallel is sequence_parallel


@pytest.mark.usefixtures("platform")
def test_no_operation_passes_through_python() -> None:
    """No torch mode intercepts operations: a TorchFunctionMode would make small operations 3x slower."""
    assert torch.overrides._get_current_function_mode() is None
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.usefixtures("one_rank")
def test_what_is_being_sent_outlives_megatrons_deallocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interleaved pipeline replaces the storage of an output as soon as its transfer has been requested."""
    p2p = importlib.import_module("megatron.core.pipeline_parallel.p2p_communication")
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "isend", lambda tensor, dst, group: sent.append(tensor))
    outputs = {name: torch.full((3,), float(index)) for index, name in enumerate(("send_prev", "send_next"))}
    p2p._p2p_ops(
        **{f"tensor_{name}": output for name, output in outputs.items()},
        tensor_recv_prev=None,
        tensor_recv_next=None,
        group=torch.distributed.group.WORLD,
        prev_pipeline_rank=0,
        next_pipeline_rank=0,
    )
    for output in outputs.values():
        schedules.deallocate_output_tensor(output, True)
        assert output.numel() == 1
    assert sorted(tensor.tolist() for tensor in sent) == [[0.0] * 3, [1.0] * 3]


def _cuda_constants(module_name: str) -> list[str]:
    """Constants that select CUDA, in all functions of a module."""
    wanted = {"cuda", "torch.cuda.FloatTensor", "torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"}

    def constants(code: CodeType) -> Iterator[str]:
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from constants(constant)
            for item in constant if isinstance(constant, tuple) else (constant,):
                if isinstance(item, str) and item in wanted:
                    yield item

    functions: list[FunctionType] = list(cpu_platform._functions_of(importlib.import_module(module_name)))
    return [constant for function in functions for constant in constants(function.__code__)]


def test_norms_may_be_marked_without_the_platform() -> None:
    """Sequence parallelism on GPUs without Transformer Engine and apex."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from megatron_lightseq.megatron.fixes.torch_norms import extend_torch_norms

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
    config.sequence_parallel = True
    with pytest.raises(AssertionError, match="sequence parallel not supported"):
        WrappedTorchNorm(config, 8)
    undo = extend_torch_norms()
    try:
        extend_torch_norms()()  # already allowed: nothing to do or undo
        assert all(parameter.sequence_parallel for parameter in WrappedTorchNorm(config, 8).parameters())
    finally:
        undo()
    with pytest.raises(AssertionError, match="sequence parallel not supported"):
        WrappedTorchNorm(config, 8)
