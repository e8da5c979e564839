"""Nothing grows with the number of sequence lengths and masks seen."""

from __future__ import annotations

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
    check, roll = _LayoutCheck(layout, rank), LayoutRoll(layout, dist.group.WORLD)
    for length in range(2, MANY + 2, 2):
        positions = torch.tensor(layout.positions(rank, length))[None]
        check(torch.nn.Identity(), (positions, positions), {})
        if length % 20 == 0:
            roll(positions)
    return len(check._positions), len(roll._plans)


def test_positions_and_rolls_keep_a_few_lengths() -> None:
    assert on_ranks(2, _positions_and_rolls) == [(8, 8)] * 2


def _attentions() -> tuple[int, int]:
    import torch.distributed as dist

    from megatron_lightseq.megatron.core_attention import CoreAttentionSettings

    settings, group = CoreAttentionSettings(), dist.group.WORLD
    for length in range(2, 202, 2):
        mask = Mask.documents((0, 1, length))
        q = torch.zeros(length // 2, 1, 1, 4)
        settings.attention(group, mask, "ring", 1)(q, q, q)
    first = settings.attention(group, Mask.causal(), "ring", 1)
    return len(settings._shared), int(settings.attention(group, Mask.causal(), "ring", 1) is first)


def test_layers_share_a_few_attentions() -> None:
    assert on_ranks(2, _attentions) == [(16, 1)] * 2


def _resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def _grows_by() -> float:
    """Memory growth of a rank in MiB over many lengths, with forward and backward through RoPE and attention."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_lightseq.megatron import shard_batch
    from tests.megatron.test_layouts import own_model

    torch.set_num_threads(1)
    model, layout = own_model("lightseq")
    rank = dist.get_rank()

    def step(length: int, border: int) -> None:
        tokens = torch.arange(length)[None] % 61
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        hidden[border:, :border] = True
        whole: dict[str, Any] = {
            "tokens": tokens,
            "labels": tokens,
            "position_ids": torch.arange(length)[None],
        }
        whole["attention_mask"] = hidden[None, None]
        shard = shard_batch(whole, layout, rank)
        loss = model(shard["tokens"], shard["position_ids"], shard["attention_mask"], labels=shard["labels"])
        loss.sum().backward()

    for number in range(100):
        step(256 + 4 * (number % 64), 1 + number)
    before = _resident_mib()
    for number in range(300):
        step(256 + 4 * (number * 7 % 64), 1 + number % 255)
    parallel_state.destroy_model_parallel()
    return _resident_mib() - before


def test_training_steps_of_many_lengths_and_masks_do_not_grow() -> None:
    for grown in on_ranks(2, _grows_by):
        assert grown < 8, f"{grown:.1f} MiB"
