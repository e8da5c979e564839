from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from megatron_lightseq.errors import LayoutError, ScheduleError, UnsupportedError
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import Direction, Network, Schedule
from megatron_lightseq.schedule.ir import Move, Payload, ScanStep, item_of
from megatron_lightseq.schedule.network import NETWORKS
from megatron_lightseq.schedule.scan import Scan
from megatron_lightseq.schedule.scan_choose import StateShape, rank_scans, simulate_scan
from megatron_lightseq.schedule.scan_place import SCANS, build_scan

SIZES = [*range(1, 14), 16, 31, 32, 33, 64]
NODES_OF_3 = Network(name="3", link_bytes_per_s=1e9, ranks_per_node=3)


def masks(size: int) -> list[Mask]:
    """Over 16 tokens for each rank."""
    length = 16 * size
    third, half = length // 3, length // 2
    return [
        Mask.causal(),
        Mask.documents([0, half, length]),
        Mask.documents([0, 1, third, third + 1, length - 2, length]),
        Mask.documents(sorted({*range(0, length, 40), length})),
    ]


@pytest.mark.parametrize("method", SCANS)
@pytest.mark.parametrize("direction", Direction)
def test_every_size_is_valid_and_round_trips(method: str, direction: Direction) -> None:
    for size in SIZES:
        layout = SequenceLayout.contiguous(size)
        for mask in masks(size):
            scan = build_scan(
                method, layout, mask=mask, direction=direction, seq_length=16 * size, network=NODES_OF_3
            )
            assert Scan.parse(str(scan)) == scan
            assert Scan.parse(str(scan)).fingerprint == scan.fingerprint


def test_a_scan_prints_what_ranks_fold_and_send() -> None:
    scan = build_scan("doubling", SequenceLayout.contiguous(5))
    assert str(scan) == (
        "doubling scan forward contiguous(5) causal 5120 tokens\n"
        "step 0   | -  -  -      -        -         | m1:1>2 m2:2>3 m3:3>4 s0:0>1\n"
        "step 1   | -  -  -      -        -         | m1:2>3 m2:3>4 s0:1>2\n"
        "step 2   | -  -  s0*m1  m1*m2    m2*m3     |\n"
        "step 3   | -  -  -      -        -         | s0:1>3 s0-1:2>4\n"
        "step 4   | -  -  -      s0*m1-2  s0-1*m2-3 |"
    )


def test_ranks_that_begin_with_a_document_need_nothing() -> None:
    mask = Mask.documents([0, 64, 96, 128])
    for method in SCANS:
        for direction in Direction:
            scan = build_scan(method, SequenceLayout.contiguous(4), mask=mask, direction=direction)
            assert list(map(str, scan.needed.values())) == (["s0"] if direction == "forward" else ["s1"])
            assert len([move for step in scan.steps for move in step.moves]) == 1


def mutants(scan: Scan) -> Iterator[tuple[str, tuple[ScanStep, ...]]]:
    """Scans with one move or one fold dropped, repeated, delayed, or sent elsewhere."""
    for t, step in enumerate(scan.steps):

        def with_step(changed: ScanStep, t: int = t) -> tuple[ScanStep, ...]:
            return (*scan.steps[:t], changed, *scan.steps[t + 1 :])

        for i, move in enumerate(step.moves):
            rest = step.moves[:i] + step.moves[i + 1 :]
            yield f"drop {move} at {t}", with_step(replace(step, moves=rest))
            yield f"repeat {move} at {t}", with_step(replace(step, moves=(*step.moves, move)))
            back = Move(move.payload, move.chunk, move.dst, move.src, move.chunks)
            yield f"turn {move} at {t}", with_step(replace(step, moves=(*rest, back)))
            if item_of(move).payload is Payload.STATE and item_of(move) != scan.needed.get(move.dst):
                kind = move._replace(payload=Payload.MAP)
                yield f"{kind} for {move} at {t}", with_step(replace(step, moves=(*rest, kind)))
        for rank, folds in enumerate(step.folds):
            for i, fold in enumerate(folds):
                fewer = folds[:i] + folds[i + 1 :]
                swapped = (*folds[:i], fold._replace(earlier=fold.later, later=fold.earlier), *folds[i + 1 :])
                for what, changed in (("drop", fewer), ("repeat", (*folds, fold)), ("swap", swapped)):
                    rows = (*step.folds[:rank], changed, *step.folds[rank + 1 :])
                    yield f"{what} {fold} of rank {rank} at {t}", with_step(replace(step, folds=rows))


def accept(scan: Scan, steps: tuple[ScanStep, ...], what: str) -> None:
    replace(scan, steps=steps)
    pytest.fail(f"accepted: {what}")


@pytest.mark.parametrize("method", SCANS)
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_every_mutant_is_refused(method: str, direction: Direction, size: int) -> None:
    count = 0
    for mask in (Mask.causal(), Mask.documents([0, 10, 16 * size])):
        scan = build_scan(
            method,
            SequenceLayout.contiguous(size),
            mask=mask,
            direction=direction,
            seq_length=16 * size,
            network=NODES_OF_3,
        )
        for what, steps in mutants(scan):
            count += 1
            with pytest.raises(ScheduleError, match="<-- here"):
                accept(scan, steps, what)
    assert count >= 6


def test_unused_transfers_are_refused() -> None:
    scan = build_scan("ring", SequenceLayout.contiguous(3))
    more = replace(scan.steps[0], moves=(*scan.steps[0].moves, Move(Payload.MAP, 0, 0, 2)))
    with pytest.raises(ScheduleError, match="brought to rank 2, which never uses it"):
        replace(scan, steps=(more, *scan.steps[1:]))


def test_layouts_and_texts_that_are_no_scans_are_refused() -> None:
    with pytest.raises(LayoutError, match="one chunk of adjacent ones"):
        build_scan("ring", SequenceLayout.zigzag(4))
    with pytest.raises(UnsupportedError, match="the scans are ring"):
        build_scan("rings", SequenceLayout.contiguous(4))
    text = str(build_scan("ring", SequenceLayout.contiguous(3)))
    for wrong in (
        text.replace(" scan ", " "),
        text.replace("step 1", "step 7"),
        text.replace("s0:0", "kv0:0"),
    ):
        with pytest.raises(ScheduleError, match="Give the text that"):
            Scan.parse(wrong)
    with pytest.raises(ScheduleError):
        Schedule.parse("ring forward contiguous(2) causal 8 tokens\nstep 0   | q0k0 q1k1 | m0:0>1")


def test_bytes_of_the_ring_do_not_depend_on_the_length() -> None:
    shape = StateShape(heads=4, key_dim=64, value_dim=32)
    for tokens in (64, 1 << 20):
        scan = build_scan("ring", SequenceLayout.contiguous(8), seq_length=tokens)
        assert simulate_scan(scan, shape).bytes_sent == (4 * 64 * 32 * 4,) * 7 + (0,)


def test_the_chosen_scan_is_as_fast_as_the_best_on_every_network() -> None:
    chosen = set()
    layout, shape = SequenceLayout.contiguous(64), StateShape(heads=32)
    for network in NETWORKS.values():
        ranked = rank_scans(layout, Mask.causal(), 64 * 1024, shape, network)
        assert [seconds for seconds, _ in ranked] == sorted(seconds for seconds, _ in ranked)
        assert {name for _, name in ranked} == set(SCANS)
        chosen.add(ranked[0][1])
        if network.ranks_per_node is not None:
            seconds = {name: of for of, name in ranked}
            best = min(of for name, of in seconds.items() if name != "two_level")
            assert seconds["two_level"] <= 1.3 * best, network
    assert chosen == {"doubling", "two_level"}
