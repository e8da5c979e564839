"""Run unmodified megatron-core on a CPU, over gloo.

Megatron-Core allocates on ``torch.cuda.current_device()``, reads CUDA's random state, compares tensor types with
``'torch.cuda.FloatTensor'`` and refuses sequence parallelism with torch's own norms. :func:`activate` patches these
places and no others. It refuses to run if CUDA is available, may be called repeatedly, and is undone by
:func:`deactivate`.

Nothing in torch itself changes, and no operation gets slower. There are three kinds of patches, all confined to the
modules in :data:`PATCHED_MODULES`:

1. the module's global name ``torch`` becomes a copy of the torch module whose ``cuda`` answers for the CPU;
2. constants and method names in the module's functions that name CUDA (``device='cuda'``, ``.cuda()``,
   ``'torch.cuda.FloatTensor'``) name the CPU instead: the functions get new code objects once, so their run time does
   not change;
3. a few attributes are replaced (:func:`_attribute_patches`, with the reason for each), and torch's norms are allowed
   under sequence parallelism (:mod:`megatron_lightseq.megatron.fixes.torch_norms`).

A ``TorchFunctionMode`` could do the same, but would slow down every operation of the forward and backward passes.

Not covered, because a GPT on CPUs does not use it: CUDA graphs, FP8, fused kernels, activation offloading, FSDP.
Saving a checkpoint needs ``psutil``: without it Megatron's writer processes die and the parent waits forever
(dist_checkpointing/strategies/filesystem_async.py).
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.megatron.cpu.variable_length_collectives import (
    gather_variable,
    reduce_scatter_variable,
)

PATCHED_MODULES: dict[str, str] = {
    "parallel_state": "synchronises the device after building groups",
    "rerun_state_machine": "keeps its flags in CUDA tensors and saves the CUDA random state",
    "timers": "Timer.start and .stop synchronise the device",
    "utils": "GlobalMemoryBuffer and the norms of a parameter list allocate on the current device",
    "tensor_parallel.data": "broadcast_data moves the batch through the current device",
    "tensor_parallel.layers": "weights and the gathered sequence are allocated on the current device",
    "tensor_parallel.mappings": "gather and reduce-scatter buffers are allocated on the current device",
    "tensor_parallel.random": "seeds are tracked as CUDA random states; any recompute saves and restores one",
    "tensor_parallel.utils": "the gathered activation checkpoint is allocated on the current device",
    "transformer.dot_product_attention": "the score buffer is allocated on the current device",
    "transformer.utils": "default causal masks are built with device='cuda'",
    "transformer.multi_token_prediction": "the loss tracker lives on the current device",
    "transformer.moe.experts": "expert weights are allocated on the current device",
    "transformer.moe.moe_utils": "the auxiliary loss tracker lives on device='cuda'",
    "transformer.moe.token_dispatcher": "token counts are copied to the host on a separate stream",
    "transformer.moe.router": "the router moves its weight to the current device",
    "models.common.embeddings.rotary_pos_embedding": "inverse frequencies are moved to the current device",
    "models.common.embeddings.yarn_rotary_pos_embedding": "inverse frequencies are moved to the current device",
    "models.common.language_module.language_module": "tied embeddings are moved with .cuda() before their all-reduce",
    "pipeline_parallel.p2p_communication": "receive buffers on the current device; synchronises after batched sends",
    "pipeline_parallel.schedules": "the token count is accumulated on device='cuda'",
    "distributed.distributed_data_parallel": "takes a CUDA stream when gradients are reduced in several instances",
    "distributed.param_and_grad_buffer": "gradient and parameter buffers are allocated on the current device",
    "optimizer.clip_grads": "norms on device='cuda'; gradients must be of type 'torch.cuda.FloatTensor'",
    "optimizer.distrib_optimizer": "sorts parameters by 'torch.cuda.*Tensor' type names",
    "optimizer.grad_scaler": "the loss scale lives on device='cuda'",
    "optimizer.optimizer": "sorts parameters by type name; overflow flags on device='cuda'",
    "dist_checkpointing.exchange_utils": "shards are exchanged through device='cuda'",
    "dist_checkpointing.strategies.async_utils": "synchronises the device; liveness flags on the current device",
    "dist_checkpointing.strategies.filesystem_async": "synchronises the device before writing",
    "dist_checkpointing.strategies.fully_parallel": "synchronises the device around the exchange",
    "dist_checkpointing.strategies.state_dict_saver": "agrees on failures through a CUDA tensor",
    "dist_checkpointing.tensor_aware_state_dict": "synchronises the device after copying",
}
"""Module below ``megatron.core`` -> what in it needs CUDA. Modules that a version lacks are skipped."""

_CONSTANTS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}

_undo: list[Callable[[], None]] = []  # global, because the patches affect the whole process


def activate() -> None:
    """Make megatron-core usable on this machine's CPU; a second call does nothing.

    Raises:
        UnsupportedError: CUDA is available, so Megatron must be used as it is.
    """
    if torch.cuda.is_available():
        raise UnsupportedError(
            explain(
                got=f"cpu_platform.activate() with {torch.cuda.device_count()} CUDA device(s) available",
                rule="the CPU platform replaces Megatron's CUDA calls, so it must not be used with a GPU",
                remedy="Do not call it, or hide the GPUs with CUDA_VISIBLE_DEVICES=''",
            )
        )
    if _undo:
        return
    try:
        for name in PATCHED_MODULES:
            _patch_module(f"megatron.core.{name}")
        for owner, attribute, value in _attribute_patches():
            _replace(owner, attribute, value)
        _undo.append(
            importlib.import_module("megatron_lightseq.megatron.fixes.torch_norms").extend_torch_norms()
        )
    except BaseException:
        deactivate()
        raise
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_not_cpu_state_warning)
    _undo.append(
        lambda: logging.getLogger("megatron.core.tensor_parallel.random").removeFilter(_not_cpu_state_warning)
    )


def extend(modules: Iterable[str], answers: ModuleType, attributes: Iterable[tuple[Any, str, Any]]) -> None:
    """Patch modules outside of megatron.core in the same way, until :func:`deactivate`.

    Args:
        modules: full names; a module that does not exist is skipped. Only constants are renamed in them, not
            ``tensor.cuda()``.
        answers: the replacement of their ``torch.cuda``, such as a subclass of :class:`CpuCuda`.
        attributes: (owner, name, value) to set.
    """
    assert is_active(), "activate() comes first"
    for name in modules:
        _patch_module(name, answers, rename_methods=False)
    for owner, attribute, value in attributes:
        _replace(owner, attribute, value)


def deactivate() -> None:
    """Undo :func:`activate`; otherwise do nothing."""
    while _undo:
        _undo.pop()()


def is_active() -> bool:
    """Whether :func:`activate` has been called and not undone."""
    return bool(_undo)


def _replace(owner: Any, attribute: str, value: Any) -> None:
    missing = object()
    before = inspect.getattr_static(owner, attribute, missing)
    setattr(owner, attribute, value)
    _undo.append(
        lambda: delattr(owner, attribute) if before is missing else setattr(owner, attribute, before)
    )


# --------------------------------------------------------------------------------------------------------------------
# 1 and 2: a module's `torch`, and its functions' constants
# --------------------------------------------------------------------------------------------------------------------


def _patch_module(name: str, answers: ModuleType | None = None, *, rename_methods: bool = True) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise  # the module exists; a package that it imports is missing
        return
    for function in _functions_of(module):
        _replace_code(function, rename_methods)
    if getattr(module, "torch", None) is torch:
        _replace(module, "torch", _cpu_torch(answers or CpuCuda()))


def _cpu_torch(answers: ModuleType) -> ModuleType:
    """The torch module with another ``cuda``. A full copy, so that torch.compile sees an ordinary module."""
    stand_in = ModuleType("torch")
    stand_in.__dict__.update(torch.__dict__)
    stand_in.__dict__["cuda"] = stand_in.__dict__["cpu"] = answers
    return stand_in


class CpuCuda(ModuleType):
    """The functions of ``torch.cuda`` that Megatron calls, for the CPU; all others are those of the real module."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def synchronize(self, *_: Any) -> None:
        """Nothing is asynchronous on a CPU."""

    def empty_cache(self) -> None:
        """There is no cache."""

    def current_stream(self, *_: Any) -> _CpuStream:
        """A stream that never has pending work."""
        return _CpuStream()

    def stream(self, _: Any) -> AbstractContextManager[None]:
        """A context in which work runs synchronously."""
        return nullcontext()

    @property
    def Stream(self) -> type[_CpuStream]:
        """The class of these streams."""
        return _CpuStream

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        """The CPU's random state: uint8, like CUDA's."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *_: Any) -> None:
        """Restore what :meth:`get_rng_state` returned."""
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        """Seed the CPU's generator."""
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds every device


class _CpuStream:
    """A stream, and its event, on a device that runs everything synchronously."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """As CUDA's: a device, a priority."""

    def wait_stream(self, _: Any) -> None:
        """Nothing is ever pending."""

    def record_event(self) -> _CpuStream:
        return self

    def synchronize(self) -> None:
        """Nothing is ever pending."""


def _functions_of(module: ModuleType) -> Iterator[FunctionType]:
    """Every plain function that is defined in the module, decorated ones and methods included."""
    owners: list[Any] = [module]
    while owners:
        for member in list(vars(owners.pop()).values()):
            if inspect.isclass(member) and member.__module__ == module.__name__:
                owners.append(member)
            for function in _unwrapped(member):
                if function.__module__ == module.__name__:
                    yield function


def _unwrapped(member: Any) -> Iterator[FunctionType]:
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    if isinstance(member, property):
        yield from (accessor for accessor in (member.fget, member.fset) if isinstance(accessor, FunctionType))
        return
    while member is not None:
        if isinstance(member, FunctionType):
            yield member
        member = (
            getattr(member, "__wrapped__", None) if callable(member) and not inspect.isclass(member) else None
        )


def _replace_code(function: FunctionType, rename_methods: bool) -> None:
    before = function.__code__
    after = on_cpu(before, rename_methods=rename_methods)
    if after is not before:
        function.__code__ = after
        _undo.append(lambda: setattr(function, "__code__", before))


def on_cpu(code: CodeType, *, rename_methods: bool = True) -> CodeType:
    """The same code with ``'cpu'`` for constants that name CUDA, and ``tensor.cpu()`` for ``tensor.cuda()``.

    This also turns ``torch.cuda`` into ``torch.cpu``, so :func:`_cpu_torch` provides both names. Without
    ``rename_methods`` only constants change.
    """
    constants = tuple(_constant_on_cpu(constant, rename_methods) for constant in code.co_consts)
    names = tuple("cpu" if rename_methods and name == "cuda" else name for name in code.co_names)
    if names == code.co_names and all(new is old for new, old in zip(constants, code.co_consts, strict=True)):
        return code
    return code.replace(co_consts=constants, co_names=names)


def _constant_on_cpu(constant: Any, rename_methods: bool) -> Any:
    if isinstance(constant, str):
        return _CONSTANTS.get(constant, constant)
    if isinstance(constant, CodeType):
        return on_cpu(constant, rename_methods=rename_methods)
    if isinstance(constant, tuple):
        items = tuple(_constant_on_cpu(item, rename_methods) for item in constant)
        return constant if all(new is old for new, old in zip(items, constant, strict=True)) else items
    return constant


# --------------------------------------------------------------------------------------------------------------------
# 3: attributes
# --------------------------------------------------------------------------------------------------------------------


def _attribute_patches() -> Iterator[tuple[Any, str, Any]]:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    yield (
        random,
        "_get_cuda_rng_state",
        _get_rng_state,
    )  # reaches the CUDA generator through torch's C functions
    yield random, "_set_cuda_rng_state", _set_rng_state

    # The index of the zigzag cut is pinned and moved to CUDA (models/common/embeddings/rope_utils.py).
    for name in (
        "rope_utils",
        "rotary_pos_embedding",
        "yarn_rotary_pos_embedding",
    ):  # imported by name from the first
        embeddings = importlib.import_module(f"megatron.core.models.common.embeddings.{name}")
        yield embeddings, "get_pos_emb_on_this_cp_rank", _zigzag_angles

    # Without a GPU, split sizes stay tensors, where collectives expect numbers.
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    yield dispatcher, "maybe_move_tensor_to_cpu", _on_host

    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
    for name, variable in (
        ("_gather_along_first_dim", gather_variable),
        ("_reduce_scatter_along_first_dim", reduce_scatter_variable),
    ):
        yield mappings, name, variable(getattr(mappings, name))

    # The interleaved pipeline frees tensors that it has sent by replacing their storage, which gloo may still be
    # reading: gradients became garbage. A second tensor keeps the storage alive until the transfer is complete.
    p2p = importlib.import_module("megatron.core.pipeline_parallel.p2p_communication")
    yield p2p, "_p2p_ops", _sending_aliases(p2p._p2p_ops)

    # Without Transformer Engine, Megatron's wrappers of it are mock objects that can still be imported, so HAVE_TE is
    # incorrectly true and `isinstance(x, TELinear)` fails (transformer/multi_latent_attention.py).
    extension = importlib.import_module("megatron.core.extensions.transformer_engine")
    if not extension.HAVE_TE:
        latent_attention = importlib.import_module("megatron.core.transformer.multi_latent_attention")
        yield latent_attention, "HAVE_TE", False
        # Here the same import fails half-way, and leaves the name undefined (transformer/moe/moe_utils.py).
        yield importlib.import_module("megatron.core.transformer.moe.moe_utils"), "te_general_gemm", None


def _sending_aliases(original: Callable[..., Any]) -> Callable[..., Any]:
    def p2p_ops(**tensors: Any) -> Any:
        for name in ("tensor_send_prev", "tensor_send_next"):
            if tensors.get(name) is not None:
                tensors[name] = tensors[name].detach()
        return original(**tensors)

    return p2p_ops


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    del record_stream
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(new_state)


def _zigzag_angles(
    pos_emb: torch.Tensor, seq_dim: int, cp_group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    layout = SequenceLayout.zigzag(cp_group.size())
    angles: torch.Tensor = layout.shard(pos_emb, cp_group.rank(), seq_dim)
    return angles


def _not_cpu_state_warning(record: logging.LogRecord) -> bool:
    """Drop "CPU RNG state changed within GPU RNG context": on a CPU the two are the same generator."""
    return "CPU RNG state changed" not in record.getMessage()


__all__ = ["PATCHED_MODULES", "CpuCuda", "activate", "deactivate", "extend", "is_active", "on_cpu"]
