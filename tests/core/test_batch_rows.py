"""A mask for each row of a batch: every method is exact, rows are balanced together, and none sees another."""

from __future__ import annotations

import random
import re

import pytest
import torch
from torch import Tensor

from megatron_lightseq import Mask, SequenceLayout, dist_attention
from megatron_lightseq.attention import DistAttention
from megatron_lightseq.errors import ConfigError, LayoutError, ScheduleError
from megatron_lightseq.schedule import Direction, Problem, Schedule, SchedulePair, TensorShape
from megatron_lightseq.schedule.balance import plan
from megatron_lightseq.schedule.balance.plan import BalanceOptions, plan_blocks, plan_in_python
from megatron_lightseq.schedule.balance.solve import Prices
from megatron_lightseq.transport import run_loopback
from megatron_lightseq.transport.group import Group
from tests.core import oracle
from tests.core.test_attention import EVERY, unshard
from tests.core.test_mask_parity import kinds

Rows = tuple[Mask, ...]


def expected(whole: list[Tensor], masks: Rows) -> list[Tensor]:
    """out, dq, dk, dv, row by row."""
    rows = [oracle.expected([x[:, row : row + 1] for x in whole], mask) for row, mask in enumerate(masks)]
    return [torch.cat(parts, 1) for parts in zip(*rows, strict=True)]


def run(
    size: int, method: str, layout: SequenceLayout, calls: list[Rows], whole: list[Tensor], kernel: str
) -> list[list[Tensor]]:
    """out, dq, dk, dv of the whole sequence for every call; one attention makes them all."""

    def one_rank(group: Group) -> list[list[Tensor]]:
        attention = DistAttention(group, layout=layout, method=method, kernel=kernel)
        results = []
        for masks in calls:
            q, k, v, dout = (layout.shard(x, group.rank(), 0).clone() for x in whole)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out = attention(*leaves, mask=masks)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
        return results

    parts = run_loopback(size, one_rank)
    return [unshard(layout, [part[call] for part in parts]) for call in range(len(calls))]


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("method", "layout_name"), [*EVERY, ("auto", "contiguous")])
def test_every_row_has_its_own_mask_in_fp64(size: int, method: str, layout_name: str) -> None:
    layout, length = SequenceLayout(layout_name, size), max(2 * size * 3, 8)
    whole = oracle.inputs(length, (4, 2), (5, 3), torch.float64)
    masks = list(kinds(length))
    calls = [(mask, masks[(i + 1 + size) % len(masks)]) for i, mask in enumerate(masks)]
    calls = calls[size % 3 :: 3 if size <= 4 else 5]
    for masks_of_call, got in zip(calls, run(size, method, layout, calls, whole, "reference"), strict=True):
        for name, result, want in zip(oracle.NAMES, got, expected(whole, masks_of_call), strict=True):
            assert (result - want).abs().max() <= 1e-12, (method, masks_of_call, name)


@pytest.mark.parametrize("method", ["lightseq", "balanced", "ulysses"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_views_that_the_cpu_kernel_takes(method: str, dtype: torch.dtype) -> None:
    layout, length = SequenceLayout.contiguous(2), 80
    whole = oracle.inputs(length, (4, 2), (16, 16), dtype)
    masks = (Mask.documents((0, 7, 50, length)), Mask.window(9))
    (got,) = run(2, method, layout, [masks], whole, "auto")
    for row, mask in enumerate(masks):
        one_row = [x[:, row : row + 1] for x in whole]
        oracle.check_within_budget([x[:, row : row + 1] for x in got], one_row, mask, f"{method} row {row}")


def test_equal_rows_share_one_plan_and_one_call() -> None:
    attention = DistAttention(None, kernel="reference")
    q = torch.randn(8, 2, 1, 4)
    attention(q, q, q, mask=Mask.documents((0, 3, 8)))
    attention(
        q, q, q, mask=[Mask.documents((0, 3, 8)), Mask.causal() & Mask.documents((0, 3, 8), causal=False)]
    )
    assert len(attention._plans) == 1


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        ([Mask.causal()], "1 masks (Mask) for a batch of 2"),
        ([Mask.causal()] * 3, "3 masks (Mask) for a batch of 2"),
        ([], "0 masks"),
        ([Mask.causal(), None], "(Mask, NoneType)"),
        ([Mask.causal(), Mask.documents((0, 9))], "a mask ending at 9 for 8 tokens"),
    ],
)
def test_masks_that_are_not_those_of_the_batch_are_refused(masks: list[Mask], text: str) -> None:
    q = torch.randn(8, 2, 1, 4)
    with pytest.raises(ConfigError, match=re.escape(text)):
        dist_attention(q, q, q, mask=masks)


# --- plans -------------------------------------------------------------------------------------------------


def documents(rng: random.Random, length: int) -> Mask:
    count = rng.choice([0, 1, 3, 12])
    return Mask.documents((0, *sorted(rng.sample(range(1, length), count)), length))


def problem(masks: Rows, length: int, size: int) -> Problem:
    return Problem(
        layout=SequenceLayout.contiguous(size).of_rows(len(masks)),
        mask=Mask.of_rows(masks, length),
        seq_length=len(masks) * length,
        shape=TensorShape(num_heads=8, num_query_groups=1),
    )


def loads(schedule: Schedule) -> list[int]:
    return [sum(schedule.areas(t) for step in schedule.steps for t in step.tiles[r]) for r in range(4)]


def test_rows_are_balanced_together() -> None:
    """Evenly, and with less to move than if every row were balanced by itself."""
    size, length = 4, 4 * 512
    moved = apart = 0
    for seed in range(5):
        rng = random.Random(seed)
        masks = tuple(documents(rng, length) for _ in range(3))
        for direction in Direction:
            schedule = SchedulePair.of("balanced", problem(masks, length, size)).schedule(direction)
            assert Schedule.parse(str(schedule)) == schedule
            assert max(loads(schedule)) <= 1.05 * sum(loads(schedule)) / size
            moved += tokens_moved(schedule)
            rows = [SchedulePair.of("balanced", problem((mask,), length, size)) for mask in masks]
            apart += sum(tokens_moved(row.schedule(direction)) for row in rows)
    assert moved < 0.9 * apart


def tokens_moved(schedule: Schedule) -> int:
    return sum(
        len(schedule.areas.positions(move.chunk, move.chunks))
        for step in schedule.steps
        for move in step.moves
    )


@pytest.mark.skipif(plan._native() is None, reason="the planner in C++ is not built")
@pytest.mark.parametrize("seed", range(30))
def test_both_solvers_plan_rows_alike(seed: int) -> None:
    rng = random.Random(seed)
    size, rows = rng.choice([1, 2, 3, 5, 8]), rng.choice([2, 3, 5])
    length = size * rng.choice([64, 96, 512])
    whole = [documents(rng, length) for _ in range(rows)]
    if rng.random() < 0.5:
        whole[0] &= Mask.window(rng.randrange(length))
    mask = Mask.of_rows(whole, length)
    options = BalanceOptions(
        prices=Prices(query=3.0, key=rng.choice([0.25, 2.0]), far=4.0),
        nodes=tuple(rank // 2 for rank in range(size)),
        batch_rows=rows,
        grain=rng.choice([4, 8, 16]),
        num_steps=rng.choice([3, 6]),
    )
    assert plan_blocks(mask, rows * length, options) == plan_in_python(mask, rows * length, options)


def test_no_tile_and_no_move_crosses_from_one_row_to_the_next() -> None:
    """On one rank the last chunk of a row and the first one of the next are neighbours in every other way."""
    masks = (Mask.causal(), Mask.window(1))
    good = SchedulePair.of("lightseq", problem(masks, 8, 1)).schedule(Direction.FORWARD)
    assert "2*contiguous(1)/2" in str(good)
    with pytest.raises(ScheduleError, match="several rows of the batch"):
        Schedule.parse(
            "balanced forward 2*contiguous(1)/2 causal&documents(0,8,16) 16 tokens\nstep 0   | q0-3k0-3 |"
        )


def test_a_mask_of_rows_is_their_masks_on_the_diagonal() -> None:
    for length in (8, 13):
        masks = list(kinds(length))
        stacked = oracle.dense(Mask.of_rows(masks, length), len(masks) * length)
        assert torch.equal(stacked, torch.block_diag(*[oracle.dense(mask, length) for mask in masks]).bool())


def test_tensors_are_cut_by_the_layout_of_one_row() -> None:
    layout = SequenceLayout.zigzag(2).of_rows(3)
    assert SequenceLayout.parse(str(layout)) == layout
    assert layout.chunks_of(0) == (0, 3, 4, 7, 8, 11)
    with pytest.raises(LayoutError, match="batch_rows=0"):
        layout.of_rows(0)
