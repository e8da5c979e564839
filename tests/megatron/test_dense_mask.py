"""Dense attention masks: applied if an equal Mask exists, refused otherwise, and read only once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lightseq.errors import UnsupportedError
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.megatron import shard_batch
from tests.megatron.runs import on_ranks

LENGTH = 24
ONE_RANK = SequenceLayout.contiguous(1)


def dense(mask: Mask, length: int = LENGTH) -> Tensor:
    """(S, S), bool: the pairs that a mask hides."""
    rows = [[mask.area(range(q, q + 1), range(k, k + 1)) == 0 for k in range(length)] for q in range(length)]
    return torch.tensor(rows)


EXPRESSIBLE = [
    Mask.causal(),
    Mask.full(),
    Mask.window(5),
    Mask.window(0),
    Mask.window(3, 2),
    Mask.window(None, 4),
    Mask.documents((0, 7, 8, 24)),
    Mask.documents((0, 7, 8, 24), causal=False),
    Mask.documents(range(LENGTH + 1)),
]


@pytest.mark.parametrize("mask", EXPRESSIBLE, ids=str)
def test_a_mask_is_recognised_by_what_it_hides(mask: Mask) -> None:
    from megatron_lightseq.megatron.dense_mask import mask_from_hidden

    hidden = dense(mask)
    found = mask_from_hidden(hidden.expand(3, 1, -1, -1))
    assert found is not None
    assert torch.equal(dense(found), hidden)
    assert found in (mask, Mask.window(0)), "documents of one token equal a window of one token"


def irregular_masks() -> dict[str, Tensor]:
    """Masks of no particular kind, in which each query sees a few intervals of keys."""
    causal = dense(Mask.causal())
    padding = causal.clone()
    padding[:, 20:] = True
    prefix = causal.clone()
    prefix[:8, :8] = False
    hole = causal.clone()
    hole[20, 3] = True
    sink = dense(Mask.window(4))
    sink[:, 0] = False
    nothing = causal.clone()
    nothing[5] = True
    return {"padding": padding, "prefix": prefix, "hole": hole, "sink": sink, "empty row": nothing}


@pytest.mark.parametrize("name", irregular_masks())
def test_masks_of_a_few_intervals_are_expressed_exactly(name: str) -> None:
    from megatron_lightseq.megatron.dense_mask import mask_from_hidden

    hidden = irregular_masks()[name]
    found = mask_from_hidden(hidden)
    assert found is not None
    assert torch.equal(dense(found), hidden)


def other_masks() -> dict[str, Tensor]:
    """Masks that no Mask expresses: too many intervals in a row, and two sequences that differ."""
    causal = dense(Mask.causal())
    stripes = causal.clone()
    stripes[:, ::2] = True
    two = torch.stack([causal, dense(Mask.documents((0, 12, 24)))])[:, None]
    return {"stripes": stripes, "two": two}


@pytest.mark.parametrize("name", other_masks())
def test_any_other_mask_has_no_equal(name: str) -> None:
    from megatron_lightseq.megatron.dense_mask import mask_from_hidden

    assert mask_from_hidden(other_masks()[name]) is None


def test_long_masks_are_read_in_blocks() -> None:
    from megatron_lightseq.megatron.dense_mask import mask_from_hidden

    hidden = torch.ones(2500, 2500, dtype=torch.bool).triu(1)
    hidden[1800:, :1800] = True
    assert mask_from_hidden(hidden) == Mask.documents((0, 1800, 2500))


# --- in attention ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "mask",
    [Mask.causal(), Mask.documents((0, 5, 13)), Mask.window(4), Mask.window(3) | Mask.sinks(1)],
    ids=str,
)
def test_attention_follows_a_dense_mask_like_megatrons(mask: Mask) -> None:
    from tests.megatron.test_core_attention import build, megatrons, qkv, transformer_config

    hidden = dense(mask, 13)[None, None]
    config, inputs = transformer_config(), qkv()
    ours, theirs = (make(config)(*inputs, hidden) for make in (build, megatrons))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    without = build(config)(*inputs, None)
    assert torch.allclose(ours, without, atol=1e-6) == (mask == Mask.causal())


@pytest.mark.usefixtures("one_rank")
def test_attention_without_a_mask_type_follows_a_dense_mask() -> None:
    from megatron.core.transformer.enums import AttnMaskType

    from tests.megatron.test_core_attention import build, megatrons, qkv, transformer_config

    hidden = dense(Mask.documents((0, 5, 13), causal=False), 13)[None, None]
    options = {"attn_mask_type": AttnMaskType.no_mask}
    ours, theirs = (make(transformer_config(), **options)(*qkv(), hidden) for make in (build, megatrons))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


REFUSED: dict[str, Tensor] = {
    **{name: hidden.expand(2, 1, LENGTH, LENGTH) for name, hidden in other_masks().items()},
    "later tokens": dense(Mask.full()).expand(2, 1, LENGTH, LENGTH),
    "prefix in a causal layer": irregular_masks()["prefix"].expand(2, 1, LENGTH, LENGTH),
    "padding of (B, S)": torch.zeros(2, LENGTH, dtype=torch.bool),
    "padding of (B, 1, 1, S)": torch.zeros(2, 1, 1, LENGTH, dtype=torch.bool),
    "numbers that are added": torch.zeros(1, 1, LENGTH, LENGTH),
    "another length": torch.zeros(1, 1, LENGTH, 2 * LENGTH, dtype=torch.bool),
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", REFUSED)
def test_attention_refuses_any_other_mask_in_words(name: str) -> None:
    from tests.megatron.test_core_attention import build, qkv, transformer_config

    with pytest.raises(
        UnsupportedError,
        match=r"attention_mask of shape \(.*at most 4 intervals of keys.*attention_mask=None",
    ):
        build(transformer_config())(*qkv(length=LENGTH), REFUSED[name])


@pytest.mark.usefixtures("one_rank")
def test_a_window_of_the_layer_stays_in_force() -> None:
    from tests.megatron.test_core_attention import build, qkv, transformer_config

    inputs = qkv(length=LENGTH)
    windowed = build(transformer_config(window_size=(4, 0)))
    both = windowed(*inputs, dense(Mask.documents((0, 10, 24)))[None, None])
    plain = build(transformer_config())(*inputs, dense(Mask.documents((0, 10, 24)))[None, None])
    assert torch.equal(windowed(*inputs, dense(Mask.causal())[None, None]), windowed(*inputs, None))
    assert not torch.allclose(both, plain, atol=1e-3)


# --- once -----------------------------------------------------------------------------------------------------------


def test_a_tensor_is_read_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lightseq.megatron import dense_mask

    reads = 0

    def counted(hidden: Tensor) -> Mask | None:
        nonlocal reads
        reads += 1
        return original(hidden)

    original = dense_mask.mask_from_hidden
    monkeypatch.setattr(dense_mask, "mask_from_hidden", counted)
    masks = dense_mask.DenseMasks()

    def read(hidden: Tensor) -> Mask:
        return masks.read(hidden, ONE_RANK, None, causal=True)

    hidden = dense(Mask.causal())[None, None]
    for same in (hidden, hidden, hidden.detach(), hidden[:]):  # recomputation passes detached tensors
        assert read(same) == Mask.causal()
    assert reads == 1
    hidden[0, 0, 12:, :12] = True
    assert read(hidden) == Mask.documents((0, 12, 24))
    assert reads == 2
    assert read(hidden[..., 12:, 12:]) == Mask.causal()
    assert reads == 3
    del hidden
    for _ in range(100):  # allocators reuse memory
        assert read(dense(Mask.window(3))[None, None]) == Mask.window(3)
    assert reads == 103
    assert len(masks._seen) == 8
    with torch.inference_mode():
        frozen = dense(Mask.causal())[None, None].clone()
        assert read(frozen) == read(frozen) == Mask.causal()
        frozen[0, 0, 12:, :12] = True
        assert read(frozen) == Mask.documents((0, 12, 24))


# --- over ranks -----------------------------------------------------------------------------------------------------


def _second_half(first: int, mask: Tensor, method: str) -> Tensor | str:
    """Losses of the second half of a sequence, gathered from all ranks, or the error."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from tests.megatron.test_layouts import own_model

    model, layout = own_model(method)
    tokens = torch.cat([torch.full((1, 8), first), torch.arange(8)[None]], 1)
    whole = {
        "tokens": tokens,
        "labels": tokens,
        "position_ids": torch.arange(16)[None],
        "attention_mask": mask,
    }
    try:
        shard = shard_batch(whole, layout, dist.get_rank())
        with torch.no_grad():
            local = model(
                shard["tokens"], shard["position_ids"], shard["attention_mask"], labels=shard["labels"]
            )
    except UnsupportedError as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
    parts = [torch.empty_like(local) for _ in range(layout.cp_size)]
    dist.all_gather(parts, local.contiguous())
    losses: Tensor = layout.unshard(parts, 1)[:, 8:]
    return losses


@pytest.mark.parametrize(("size", "method"), [(1, "lightseq"), (2, "lightseq"), (2, "zigzag")])
def test_documents_do_not_see_each_other(size: int, method: str) -> None:
    apart = dense(Mask.documents((0, 8, 16)), 16)[None, None]
    one, two = (on_ranks(size, _second_half, first, apart, method) for first in (1, 2))
    for rank in range(size):
        torch.testing.assert_close(one[rank], two[rank], rtol=0, atol=0)
    causal = dense(Mask.causal(), 16)[None, None]
    seen = on_ranks(size, _second_half, 1, causal, method)
    assert not torch.allclose(seen[0], one[0], atol=1e-3), "without the mask they would see each other"


def _two_refusals() -> list[str]:
    striped = dense(Mask.causal(), 16)[None, None].clone()
    striped[..., 8:, ::2] = True  # only the last rank's rows see more intervals than attention can follow
    return [
        str(_second_half(1, mask, "lightseq")) for mask in (striped, torch.zeros(1, 16, dtype=torch.bool))
    ]


def test_every_rank_refuses_the_mask_that_one_rank_cannot_follow() -> None:
    for messages in on_ranks(2, _two_refusals):
        for message in messages:
            assert "attention_mask of shape" in message


def _read_whole_and_cut(name: str) -> list[Any]:
    import torch.distributed as dist

    from megatron_lightseq.megatron.dense_mask import DenseMasks

    layout, rank = SequenceLayout(name, 2), dist.get_rank()
    masks, found = DenseMasks(), []
    for mask in (Mask.documents((0, 5, 24)), Mask.window(7), Mask.causal()):
        hidden = dense(mask)[None, None]
        for given in (hidden, layout.shard(hidden, rank, 2)):
            found.append(masks.read(given, layout, dist.group.WORLD, causal=True) == mask)
    return found


@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped"])
def test_ranks_put_their_rows_together(name: str) -> None:
    assert on_ranks(2, _read_whole_and_cut, name) == [[True] * 6] * 2
