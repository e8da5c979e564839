"""The `balanced` method from its plan to its results."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_lightseq.attention import DistAttention
from megatron_lightseq.errors import ScheduleError
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import (
    Chooser,
    Direction,
    Move,
    Network,
    Payload,
    Schedule,
    Step,
    TensorShape,
    Tile,
    build,
    compile_program,
    rank_methods,
    simulate,
)
from megatron_lightseq.schedule.ir import RESULTS
from megatron_lightseq.tools.lengths import draw
from megatron_lightseq.transport import run_loopback
from megatron_lightseq.transport.group import Group
from tests.core import oracle

TWO_NODES = Network(
    name="two nodes", link_bytes_per_s=100e9, ranks_per_node=2, nic_bytes_per_s=25e9, nic_latency_s=1e-6
)


def schedule(
    mask: Mask, cp_size: int, seq_length: int, direction: str = "forward", groups: int = 1
) -> Schedule:
    shape = TensorShape(num_heads=8, num_query_groups=groups, head_dim=64)
    return build(
        "balanced",
        SequenceLayout.contiguous(cp_size),
        mask=mask,
        direction=direction,
        seq_length=seq_length,
        shape=shape,
        network=TWO_NODES,
    )


def random_documents(rng: random.Random, seq_length: int) -> Mask:
    borders = rng.sample(range(1, seq_length), rng.choice([0, 1, 3, 12]))
    return Mask.documents((0, *sorted(borders), seq_length))


@pytest.mark.parametrize("seed", range(12))
def test_results_equal_one_device_over_two_nodes(seed: int) -> None:
    rng = random.Random(seed)
    size, per_rank, groups = rng.choice([2, 3, 4, 5]), rng.choice([60, 64, 97]), rng.choice([1, 2, 4])
    seq_length = size * per_rank
    mask = random_documents(rng, seq_length)
    whole = oracle.inputs(seq_length, (4, groups), (8, 5), torch.float64)
    layout = SequenceLayout.contiguous(size)

    def attend(group: Group) -> list[Tensor]:
        attention = DistAttention(group, method="balanced", mask=mask, network=TWO_NODES)
        q, k, v, dout = (layout.shard(x, group.rank(), 0).clone() for x in whole)
        for x in (q, k, v):
            x.requires_grad_()
        out = attention(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    parts = run_loopback(size, attend)
    for i, want in enumerate(oracle.expected(whole, mask)):
        got = layout.unshard([part[i] for part in parts], 0)
        assert (got - want).abs().max() <= 1e-12, oracle.NAMES[i]


@pytest.mark.parametrize("size", [12, 16])
def test_results_equal_one_device_on_dealt_shards(size: int) -> None:
    """Two nodes of 8, and a number of ranks that makes no whole nodes."""
    seq_length = size * 32
    mask = random_documents(random.Random(size), seq_length)
    whole = oracle.inputs(seq_length, (2, 1), (4, 3), torch.float64)
    layout = SequenceLayout("dealt", size)
    network = Network.parse("nvlink+8x400gbps")

    def attend(group: Group) -> list[Tensor]:
        attention = DistAttention(group, method="balanced", layout=layout, mask=mask, network=network)
        q, k, v, dout = (layout.shard(x, group.rank(), 0).clone() for x in whole)
        for x in (q, k, v):
            x.requires_grad_()
        out = attention(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    parts = run_loopback(size, attend)
    for i, want in enumerate(oracle.expected(whole, mask)):
        got = layout.unshard([part[i] for part in parts], 0)
        assert (got - want).abs().max() <= 1e-12, oracle.NAMES[i]


def test_dealt_shards_keep_help_inside_nodes() -> None:
    """Fewer bytes cross between nodes than on contiguous shards, so that auto chooses them over several nodes."""
    mask, shape = Mask.documents(draw("wlb", 32 * 8192, 0)), TensorShape(num_heads=64, num_query_groups=8)
    network = Network.parse("nvlink+8x400gbps")
    chooser = Chooser(32, 32 * 8192, mask)
    dealt, contiguous = (
        chooser.predict("balanced", name, Direction.FORWARD, shape, network).seconds
        for name in ("dealt", "contiguous")
    )
    assert dealt < 0.75 * contiguous
    assert rank_methods(32, shape, 32 * 8192, mask=mask, network=network)[0].layout == "dealt"


@pytest.mark.parametrize("size", [2, 4, 6])
def test_results_equal_one_device_with_heads_exchanged_around_it(size: int) -> None:
    seq_length = size * 96
    mask = random_documents(random.Random(size), seq_length)
    whole = oracle.inputs(seq_length, (4, 2), (8, 5), torch.float64)
    layout = SequenceLayout.contiguous(size)

    def attend(group: Group) -> list[Tensor]:
        attention = DistAttention(group, method="usp:2-balanced", mask=mask, network=TWO_NODES)
        q, k, v, dout = (layout.shard(x, group.rank(), 0).clone() for x in whole)
        for x in (q, k, v):
            x.requires_grad_()
        out = attention(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    parts = run_loopback(size, attend)
    for i, want in enumerate(oracle.expected(whole, mask)):
        got = layout.unshard([part[i] for part in parts], 0)
        assert (got - want).abs().max() <= 1e-12, oracle.NAMES[i]


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("cp_size", [1, 2, 3, 5, 8])
def test_schedules_are_valid_and_read_back(cp_size: int, direction: Direction) -> None:
    for seed in range(3):
        mask = random_documents(random.Random(seed), cp_size * 640)
        built = schedule(mask, cp_size, cp_size * 640, direction)
        assert Schedule.parse(str(built)) == built
        for rank in range(cp_size):
            compile_program(built, rank)


def test_packed_documents_are_balanced_and_lightseq_is_not() -> None:
    mask = Mask.documents(draw("magi", 8 * 4096, 0))
    assert simulate(schedule(mask, 8, 8 * 4096)).busy > 0.93
    assert (
        simulate(build("lightseq", SequenceLayout.contiguous(8), mask=mask, seq_length=8 * 4096)).busy < 0.6
    )


@pytest.mark.parametrize("groups", [1, 8])
def test_keys_that_two_ranks_of_another_node_need_cross_once(groups: int) -> None:
    built = schedule(Mask.causal(), 4, 4 * 640, groups=groups)
    crossing, needed = [], []
    for move in (move for step in built.steps for move in step.moves if move.payload is Payload.KV):
        node = TWO_NODES.node(move.dst)
        for chunk in range(move.chunk, move.chunk + move.chunks):
            if TWO_NODES.node(move.src) != node:
                crossing.append((chunk, node))
            if TWO_NODES.node(built.layout.owner[chunk]) != node:
                needed.append((chunk, node))
    assert len(crossing) == len(set(crossing)) < len(needed)


def variants(built: Schedule) -> dict[str, list[Step]]:
    """Variants of the schedule with one fault each."""
    found: dict[str, list[Step]] = {}

    def change(name: str, t: int, **fields: object) -> None:
        steps = list(built.steps)
        steps[t] = replace(steps[t], **fields)  # type: ignore[arg-type]
        found[name] = steps

    for t, step in enumerate(built.steps):
        for i, move in enumerate(step.moves):
            others = step.moves[:i] + step.moves[i + 1 :]
            change(f"drop {move} at {t}", t, moves=others)
            if move.chunks > 1:
                change(f"shorten {move} at {t}", t, moves=(*others, move._replace(chunks=move.chunks - 1)))
            if move.payload not in RESULTS and built.layout.owner[move.chunk] != move.src:
                early = (*built.steps[t - 1].moves, move)
                change(f"relay {move} too early", t - 1, moves=early)
        for rank, tiles in enumerate(step.tiles):
            for i, tile in enumerate(tiles):
                rest = tiles[:i] + tiles[i + 1 :]
                if tile.queries > 1:
                    shorter = (*rest, tile._replace(queries=tile.queries - 1))
                    change(f"shorten {tile}", t, tiles=(*step.tiles[:rank], shorter, *step.tiles[rank + 1 :]))
                twice = (*tiles, Tile(tile.q, tile.k))
                change(
                    f"repeat a chunk of {tile}", t, tiles=(*step.tiles[:rank], twice, *step.tiles[rank + 1 :])
                )
    return found


def is_refused(built: Schedule, steps: list[Step]) -> bool:
    try:
        replace(built, steps=tuple(steps))
    except ScheduleError:
        return True
    return False


def test_every_change_of_a_schedule_is_found() -> None:
    built = schedule(random_documents(random.Random(2), 4 * 320), 4, 4 * 320)
    changed = variants(built)
    assert len(changed) > 100
    for name, steps in changed.items():
        assert is_refused(built, steps), name


def test_moves_of_several_chunks_are_written_with_the_last_one() -> None:
    assert str(Move(Payload.KV, 3, 0, 1, chunks=4)) == "kv3-6:0>1"
    assert str(Tile(3, 0, queries=4, keys=16)) == "q3-6k0-15"
    assert str(Tile(3, 1)) == "q3k1"
