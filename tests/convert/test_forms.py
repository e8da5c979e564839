"""Every rearrangement is undone bit for bit, and its parts lie where the formats say."""

from __future__ import annotations

import pytest
import torch

from megatron_lightseq.convert.forms import (
    Alternating,
    ByGroup,
    ByKeyHead,
    Form,
    Fused,
    GatedByGroup,
    Same,
    Sections,
    Stacked,
    Transposed,
)

BY_GROUP = ByGroup(heads=6, groups=2, head_dim=4)
CASES: dict[str, tuple[Form, list[tuple[int, ...]]]] = {
    "same": (Same(), [(6, 8)]),
    "stacked": (Stacked(), [(5, 8), (5, 8)]),
    "by group": (BY_GROUP, [(24, 7), (8, 7), (8, 7)]),
    "by group, bias": (BY_GROUP, [(24,), (8,), (8,)]),
    "fused": (Fused(BY_GROUP, (24, 8, 8)), [(40, 7)]),
    "gated by group": (GatedByGroup(heads=6, groups=2, head_dim=4), [(48, 7), (8, 7), (8, 7)]),
    "sections": (Sections((6, 2)), [(6, 7), (2, 7)]),
    "by key head": (ByKeyHead(2, ((4, 4, 6, 6), (3, 3))), [(40, 7), (12, 7)]),
    "transposed": (Transposed(), [(7, 5)]),
    "alternating": (Alternating(), [(7, 10)]),
    "alternating, bias": (Alternating(), [(10,)]),
}


@pytest.mark.parametrize("name", CASES)
def test_split_undoes_join(name: str) -> None:
    form, shapes = CASES[name]
    parts = [torch.randn(shape) for shape in shapes]
    whole = form.join(parts)
    back = form.split(whole)
    assert all(torch.equal(a, b) for a, b in zip(back, parts, strict=True))
    meta = form.split(torch.empty(whole.shape, device="meta"))
    assert [tuple(part.shape) for part in meta] == shapes


def test_heads_lie_by_group() -> None:
    query = torch.arange(6).repeat_interleave(4)
    key, value = 10 + torch.arange(2).repeat_interleave(4), 20 + torch.arange(2).repeat_interleave(4)
    joined = BY_GROUP.join([query, key, value])[::4]
    assert joined.tolist() == [0, 1, 2, 10, 20, 3, 4, 5, 11, 21]


def test_gates_lie_behind_the_queries_of_their_group() -> None:
    form = GatedByGroup(heads=4, groups=2, head_dim=1)
    joined = form.join(
        [torch.tensor([0, 100, 1, 101, 2, 102, 3, 103]), torch.tensor([10, 11]), torch.tensor([20, 21])]
    )
    assert joined.tolist() == [0, 1, 100, 101, 10, 20, 2, 3, 102, 103, 11, 21]


def test_sections_of_key_heads_lie_one_after_the_other() -> None:
    form = ByKeyHead(2, ((1, 2), (1,)))
    joined = form.join([torch.tensor([0, 10, 11, 1, 12, 13]), torch.tensor([20, 21])])
    assert joined.tolist() == [0, 1, 10, 11, 12, 13, 20, 21]
