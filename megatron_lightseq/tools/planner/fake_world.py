"""One rank of any number of ranks, in this process, on tensors without memory.

torch has the two halves: ``FakeTensorMode`` (tensors have shapes, dtypes and sizes, operations compute nothing) and the
process group ``fake`` (collectives return at once). What is added here are answers where code asks for a value, which a
fake tensor does not have, and shortcuts where code would wait for ranks that do not exist.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg as fake_pg  # registers the backend "fake"
from megatron.core import parallel_state
from megatron.core.optimizer import clip_grads
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megatron_lightseq.megatron.cpu import platform as cpu_platform
from megatron_lightseq.megatron.multi_token import Successors
from megatron_lightseq.tools.planner.balanced_experts import count_balanced, routed_tokens
from megatron_lightseq.training import translate
from megatron_lightseq.transport.p2p import P2PTransport

_COALESCED = (
    "allreduce_coalesced_",
    "allgather_coalesced_",
    "allgather_into_tensor_coalesced_",
    "reduce_scatter_tensor_coalesced_",
)
"""Collectives that torch has no implementation of for fake tensors, although the process group has."""


@contextmanager
def fake_world(rank: int, world_size: int, *, fused: bool, topk: int) -> Iterator[None]:
    """Be ``rank`` of ``world_size`` ranks within the block; process groups are torn down at its end.

    Args:
        rank: this rank.
        world_size: number of ranks.
        fused: build the model as on a GPU, with Megatron's fusions, which store fewer activations.
        topk: experts per token.
    """
    cpu_platform.activate()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=fake_pg.FakeStore())
    try:
        with ExitStack() as stack:
            for owner, name, value in _replacements(rank, fused):
                stack.enter_context(_replaced(owner, name, value))
            if fused:  # run fused functions as they are written: compiling them takes minutes
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(_Answers(fake, topk))
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class _Answers(TorchDispatchMode):
    """Answers for values of fake tensors: every number is 1, so losses and norms are finite and flags are set.

    Masks of values are those that route tokens to experts, of which each token has ``topk``.
    """

    def __init__(self, fake: FakeTensorMode, topk: int) -> None:
        super().__init__()
        self._fake = fake
        self._set_storage = torch.ops.aten.set_.source_Storage
        ops = torch.ops.c10d
        self._coalesced = {getattr(ops, name).default for name in _COALESCED}
        self._item = torch.ops.aten._local_scalar_dense.default
        self._select = torch.ops.aten.masked_select.default
        self._topk = topk

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is self._item:
            return _value(args[0])
        if func in self._coalesced:
            return FakeWork().boxed()
        if func is self._select:
            return args[0].new_empty(routed_tokens(args[1], self._topk))
        if func is self._set_storage:
            return self._uncached(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _uncached(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Without the cache of fake results, which would keep storages alive that are arguments."""
        self._fake.cache_enabled = False
        try:
            return func(*args, **kwargs)
        finally:
            self._fake.cache_enabled = True


def _value(tensor: Any) -> Any:
    """The value of a number that the program wrote down itself, else 1."""
    known = getattr(tensor, "constant", None)
    if known is None:
        return 1.0 if tensor.dtype.is_floating_point else 1
    with _disable_current_modes():
        return known.item()


def _replacements(rank: int, fused: bool) -> Iterator[tuple[Any, str, Any]]:
    """(owner, attribute, value) of what a fake rank does differently."""
    create = parallel_state.create_group

    def create_own_group(ranks: list[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Only groups that this rank is in: a world of 1,024 ranks has thousands."""
        return create(ranks, *args, **kwargs) if ranks is None or rank in ranks else None

    yield parallel_state, "create_group", create_own_group
    yield dist, "all_gather_object", _gather_own_object
    yield torch.nn.Module, "_apply", _apply
    yield clip_grads, "l2_norm_impl", _norm
    yield P2PTransport, "start_digests", _agree
    yield MoEAlltoAllTokenDispatcher, "preprocess", count_balanced
    yield Successors, "of", staticmethod(_with_values(Successors.of))
    yield translate, "has_fusions", lambda: fused


def _with_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on real tensors: it makes tables whose sizes depend on values that it wrote down itself."""

    def run(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return run


def _gather_own_object(everyone: list[Any], mine: Any, group: Any = None) -> None:
    """Ranks of one job have equal objects."""
    del group
    everyone[:] = [mine] * len(everyone)


def _apply(module: torch.nn.Module, function: Callable[[Any], Any], recurse: bool = True) -> torch.nn.Module:
    """``Module._apply`` with new parameters: torch exchanges the contents of fake ones, which others refer to."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            applied = function(parameter)
        if applied is not parameter:
            changed = torch.nn.Parameter(applied, parameter.requires_grad)
            changed.__dict__.update(parameter.__dict__)
            module._parameters[name] = changed
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _norm(chunk_size: int, flag: Any, lists: list[list[torch.Tensor]], *_: Any) -> tuple[torch.Tensor, None]:
    """Megatron's norm without apex reads the values of its parts."""
    del chunk_size, flag
    return torch.stack([torch.norm(part) for part in lists[0]]).norm().reshape(1), None


def _agree(transport: P2PTransport, digest: bytes) -> Callable[[], list[bytes]]:
    """Ranks of one job plan the same attention."""
    return lambda: [digest] * transport.size


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = inspect.getattr_static(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
