"""Checks claims about schedules with the simulator; needs neither a cluster nor torch.

    python scripts/measure_schedules.py balance   lightseq: busy share of the ranks if transfers take no time
    python scripts/measure_schedules.py mesh      bytes received by the busiest rank: mesh against other methods
    python scripts/measure_schedules.py auto      auto against every fixed method, for many ranks, groups and networks
    python scripts/measure_schedules.py packed    the same for packed documents of 8 distributions, 2K-32K tokens a rank

--ranks 2 3 4 selects the numbers of ranks. A schedule for hundreds of ranks takes seconds, and auto needs dozens.
Exits with 1 if a claim does not hold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import product

from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import (
    METHODS,
    Chooser,
    Direction,
    Network,
    TensorShape,
    build,
    resolve_method,
    simulate,
)
from megatron_lightseq.schedule.methods import default_layouts, exchange_sizes
from megatron_lightseq.tools.lengths import DISTRIBUTIONS, draw

NUM_HEADS = 32
TOKENS_PER_RANK = 8192
BALANCED = 0.98
MESH_LIMITS = {16: 0.7, 64: 0.4, 256: 0.2}
MESH_BALANCED = 0.95
BEHIND = 0.05
BEHIND_PACKED = 0.02
TOKENS = (2048, 8192, 32768)
RANKS_PER_NODE = 8
AROUND_POWERS = [2**power + off for power in range(7, 11) for off in (-1, 0, 1) if 2**power + off <= 1024]
RANKS = {
    "balance": [*range(2, 129), *(size for size in AROUND_POWERS if size > 128)],
    "mesh": list(MESH_LIMITS),
    "packed": [2, 3, 4, 5, 8, 16, 32],
    "auto": [2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256],
}


def balance(ranks: Sequence[int]) -> bool:
    """Whether lightseq keeps its ranks busy, for all numbers of ranks."""
    worst, at = min(
        (simulate(build("lightseq", SequenceLayout.contiguous(size))).busy, size) for size in ranks
    )
    sys.stdout.write(
        f"lightseq, {len(ranks)} sizes from {min(ranks)} to {max(ranks)}: at least {worst:.4f} (P = {at})\n"
    )
    return worst >= BALANCED


def mesh(ranks: Sequence[int]) -> bool:
    """Whether the busiest rank of mesh receives few bytes, compared with the best other method (forward, MHA)."""
    shape, held = TensorShape(num_heads=NUM_HEADS, num_query_groups=NUM_HEADS), True
    for size in ranks:
        simulated = {
            method: simulate(build(method, SequenceLayout(layout, size)), shape=shape)
            for method, layout in (
                ("mesh", "zigzag"),
                ("lightseq", "contiguous"),
                ("zigzag", "zigzag"),
                ("all_gather", "zigzag"),
            )
        }
        received = {method: max(result.bytes_received) for method, result in simulated.items()}
        share = received["mesh"] / min(number for method, number in received.items() if method != "mesh")
        busy = simulated["mesh"].busy
        sys.stdout.write(
            f"mesh, P = {size}: {share:.2f}x the bytes of the best other method, busy {busy:.3f}\n"
        )
        held = held and share <= MESH_LIMITS.get(size, 1.0) and busy >= MESH_BALANCED
    return held


def fixed_methods(size: int) -> Iterator[tuple[str, str]]:
    """All methods on all layouts that they accept, with all possible shapes of meshes and sizes of exchanges."""
    divisors = [d for d in range(2, size) if size % d == 0]
    names = [name for name, method in METHODS.items() if not method.full_rows]
    names += [f"mesh:{d}x{size // d}" for d in divisors] + [
        f"usp:{d}" for d in exchange_sizes(size, NUM_HEADS)
    ]
    for name in names:
        for layout in resolve_method(name).layouts:
            yield name, layout


def auto(ranks: Sequence[int]) -> bool:
    """Whether auto is predicted to be close to the best fixed method, for all groups and networks."""
    held = True
    for size in ranks:
        chooser = Chooser(size, size * TOKENS_PER_RANK)
        for network in map(Network.parse, ("nvlink", "nvlink+100gbps")):
            for groups in (NUM_HEADS, NUM_HEADS // 4, NUM_HEADS // 8, NUM_HEADS // 32):
                shape = TensorShape(num_heads=NUM_HEADS, num_query_groups=groups)
                chosen = chooser.rank(shape, network)[0]
                best, method, layout = min(
                    (
                        sum(chooser.predict(name, on, way, shape, network).seconds for way in Direction),
                        name,
                        on,
                    )
                    for name, on in fixed_methods(size)
                )
                behind = chosen.seconds / best - 1
                held = held and behind <= BEHIND
                sys.stdout.write(
                    f"auto, P = {size:<4d} r = 1/{NUM_HEADS // groups:<3d} {network.name:<15} {behind:+7.2%}  "
                    f"{chosen.name} on {chosen.layout}; best fixed: {method} on {layout}\n"
                )
                sys.stdout.flush()
    return held


def packed(ranks: Sequence[int]) -> bool:
    """Whether auto is predicted to be as fast as the best fixed method on packed documents.

    Striped layouts are left out: simulation does not know what their short pieces of documents cost in kernels.
    """
    held = True
    for size, name, groups, tokens in product(ranks, DISTRIBUTIONS, (NUM_HEADS, NUM_HEADS // 8), TOKENS):
        behind, text = auto_on_documents(size, name, groups, tokens)
        held = held and behind <= BEHIND_PACKED
        sys.stdout.write(
            f"packed, P = {size:<3d} {name:<9} r = {groups}/{NUM_HEADS} {tokens:>5d}  {behind:+7.2%}  {text}\n"
        )
        sys.stdout.flush()
    return held


def auto_on_documents(size: int, name: str, groups: int, tokens: int) -> tuple[float, str]:
    """How far auto is behind the best fixed method on one draw, and which they are."""
    shape = TensorShape(num_heads=NUM_HEADS, num_query_groups=groups)
    network = Network.parse("nvlink" if size <= RANKS_PER_NODE else "nvlink+8x400gbps")
    chooser = Chooser(size, size * tokens, Mask.documents(draw(name, size * tokens, 0)))
    chosen = chooser.rank(shape, network)[0]
    best, method, layout = min(
        (sum(chooser.predict(name, on, way, shape, network).seconds for way in Direction), name, on)
        for name, on in (*fixed_methods(size), *fixed_balanced(size))
        if on in default_layouts() and SequenceLayout(on, size).divides(size * tokens)
    )
    return chosen.seconds / best - 1, f"{chosen.name} on {chosen.layout}; best fixed: {method} on {layout}"


def fixed_balanced(size: int) -> Iterator[tuple[str, str]]:
    """The balanced method in several numbers of steps and with several targets, and inside exchanges of heads."""
    for layout in resolve_method("balanced").layouts:
        for steps, percent in product((4, 6, 8, 12), (100, 105, 125, 150, 170)):
            yield f"balanced:{steps}x{percent}", layout
        for exchanged in exchange_sizes(size, NUM_HEADS):
            yield f"usp:{exchanged}-balanced", layout


def main() -> int:
    """Check one claim; returns the exit status."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("figure", choices=list(RANKS))
    made.add_argument("--ranks", type=int, nargs="+", metavar="P")
    options = made.parse_args()
    measure = {"balance": balance, "mesh": mesh, "auto": auto, "packed": packed}[options.figure]
    return 0 if measure(options.ranks or RANKS[options.figure]) else 1


if __name__ == "__main__":
    sys.exit(main())
