"""Nothing grows with the number of sequence lengths and masks seen."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from tests.megatron.runs import on_ranks

MANY = 2000


def test_a_bounded_cache_drops_what_was_not_used_for_longest() -> None:
    from megatron_lightseq.megatron.bounded_cache import BoundedCache

    made: list[str] = []
    cache: BoundedCache[str, str] = BoundedCache(2)
    for key in "abacab":
        assert cache.get(key, lambda key=key: made.append(key) or key.upper()) == key.upper()  # type: ignore[misc]
        assert len(cache) <= 2
    assert made == ["a", "b", "c", "b"]


def test_a_bounded_cache_is_bounded_in_bytes() -> None:
    from megatron_lightseq.megatron.bounded_cache import BoundedCache
    from megatron_lightseq.megatron.multi_token import Successors

    cache: BoundedCache[int, Any] = BoundedCache(8, max_bytes=100)
    for words in (3, 4, 5):  # 12, 16 and 20 bytes
        cache.get(words, lambda words=words: (torch.zeros(words), 1.0))  # type: ignore[misc]
    assert (len(cache), cache.held_bytes) == (3, 48)
    cache.get(16, lambda: torch.zeros(16))
    assert (len(cache), cache.held_bytes) == (3, 100), "the first one made room"
    cache.get(80, lambda: torch.zeros(80))
    assert (len(cache), cache.held_bytes) == (1, 320), "the newest one stays"
    plan = Successors.of(SequenceLayout.striped(2), 0, 8, torch.device("cpu"))
    cache.get(0, lambda: plan)
    assert (len(cache), cache.held_bytes) == (1, plan.sent.nbytes + plan.placed.nbytes)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kind", ["RotaryEmbedding", "YarnRotaryEmbedding"])
def test_rotary_embeddings_keep_a_few_lengths(kind: str) -> None:
    from megatron.core.models.common import embeddings

    from megatron_lightseq.megatron.rope import MAX_LENGTHS, LayoutRotaryEmbedding

    rotary = getattr(embeddings, kind)(4, rotary_percent=1.0, use_cpu_initialization=True)
    ours = LayoutRotaryEmbedding(rotary, SequenceLayout.zigzag(2), 1)
    before = type(rotary).forward.cache_info().currsize
    for length in range(4, 4 * MANY + 4, 4):
        ours(length)
    assert len(ours._shards) == MAX_LENGTHS
    assert type(rotary).forward.cache_info().currsize == before, "Megatron's own cache must not change"


def _positions_and_rolls() -> tuple[int, int]:
    import torch.distributed as dist

    from megatron_lightseq.megatron.batch import _LayoutCheck
    from megatron_lightseq.megatron.multi_token import LayoutRoll

    layout, rank = SequenceLayout.contiguous(2), dist.get_rank()
    check = _LayoutCheck(layout, rank, inspect.signature(torch.nn.Identity.forward))
    roll = LayoutRoll(layout, dist.group.WORLD)
    for length in range(2, MANY + 2, 2):
        positions = torch.tensor(layout.positions(rank, length))[None]
        check(torch.nn.Identity(), (positions, positions), {})
        if length % 20 == 0:
            roll(positions)
    return len(check._positions), len(roll._plans)


def test_positions_and_rolls_keep_a_few_lengths() -> None:
    assert on_ranks(2, _positions_and_rolls) == [(8, 8)] * 2


def _attentions() -> tuple[int, int, int]:
    import torch.distributed as dist

    from megatron_lightseq.megatron.core_attention import CoreAttentionSettings

    settings, group = CoreAttentionSettings(), dist.group.WORLD
    for length in range(2, 202, 2):
        mask = Mask.documents((0, 1, length))
        q = torch.zeros(length // 2, 1, 1, 4)
        settings.attention(group, mask, "ring", 1)(q, q, q, mask=mask)
    packed = len(settings._shared)
    for left in range(100):
        settings.attention(group, Mask.window(left), "ring", 1)
    first = settings.attention(group, Mask.causal(), "ring", 1)
    return packed, len(settings._shared), int(settings.attention(group, Mask.causal(), "ring", 1) is first)


def test_layers_share_a_few_attentions() -> None:
    """Packed documents, which change with every micro-batch, share one."""
    assert on_ranks(2, _attentions) == [(1, 16, 1)] * 2


def _resident_bytes() -> int:
    """Of this process, without what its allocator keeps for later."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def _growth(steps: int) -> float:
    """By how much of its size a rank grows over this many training steps, each with another length and mask."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_lightseq.megatron import shard_batch
    from tests.megatron.test_layouts import own_model

    torch.set_num_threads(1)
    model, layout = own_model("lightseq")
    rank = dist.get_rank()
    lengths = range(68, 196, 4)
    pairs = [(length, border) for border in range(1, 68) for length in lengths]

    def step(length: int, border: int) -> None:
        tokens = torch.arange(length)[None] % 61
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        hidden[border:, :border] = True
        whole: dict[str, Any] = {
            "tokens": tokens,
            "labels": tokens,
            "position_ids": torch.arange(length)[None],
            "attention_mask": hidden[None, None],
        }
        shard = shard_batch(whole, layout, rank)
        loss = model(shard["tokens"], shard["position_ids"], shard["attention_mask"], labels=shard["labels"])
        loss.sum().backward()

    for length, border in pairs[:120]:
        step(length, border)
    before = _resident_bytes()
    for length, border in pairs[120 : 120 + steps]:
        step(length, border)
    after = _resident_bytes()
    parallel_state.destroy_model_parallel()
    return (after - before) / before


def test_training_steps_of_many_lengths_and_masks_do_not_grow() -> None:
    assert max(on_ranks(2, _growth, MANY)) <= 0.01


def _threads_after_steps(experts: bool) -> list[int]:
    """Of this rank: gloo's groups have three each."""
    import gc
    import os

    import torch.distributed as dist

    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from megatron_lightseq.megatron.rope import forget_angles
    from megatron_lightseq.tools.verify.parity import configure, run_step

    if not torch.cuda.is_available():
        cpu_platform.activate()
    config = configure({"num_experts": 4, "moe_aux_loss_coeff": 0.1} if experts else {}, {})
    counts = []
    for _ in range(3):
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        run_step(config)
        forget_angles()
        gc.collect()
        counts.append(len(os.listdir("/proc/self/task")))
    return counts


@pytest.mark.parametrize("experts", [False, True])
def test_a_model_that_is_gone_leaves_no_groups(experts: bool) -> None:
    ((first, second, third),) = on_ranks(1, _threads_after_steps, experts)
    assert first == second == third
