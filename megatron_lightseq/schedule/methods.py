"""The registry of methods. Every list of methods in this package, its flags and its documents is derived from it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from megatron_lightseq.errors import ConfigError, UnsupportedError, explain
from megatron_lightseq.layout import DEALT_RANKS_PER_NODE
from megatron_lightseq.schedule.balance.place import (
    BALANCED_LAYOUTS,
    balanced_variants,
    place_balanced,
    splits_of,
)
from megatron_lightseq.schedule.ir import Direction, Placement
from megatron_lightseq.schedule.method import Method, SizedForm
from megatron_lightseq.schedule.network import Network
from megatron_lightseq.schedule.place import (
    LIGHTSEQ_LAYOUTS,
    mesh_rows,
    place_all_gather,
    place_lightseq,
    place_mesh,
    place_ring,
    place_usp,
)
from megatron_lightseq.schedule.problem import Problem

SMALL_GROUP = 64
"""Ranks up to which ``auto`` simulates every candidate: a schedule over 256 ranks takes seconds to build."""


# --- what auto considers ---------------------------------------------------------------------------------------


def ring_candidates(problem: Problem) -> Sequence[str]:
    """The ring where no method made for the layout is a better ring: on contiguous shards it is unbalanced, and on
    zigzag shards it is the method ``zigzag``.
    """
    return ("ring",) if problem.layout.name == "striped" else ()


def mesh_candidates(problem: Problem) -> Sequence[str]:
    """Process meshes of every shape, except one column, which is the ring, and contiguous shards, which are
    unbalanced. Beyond SMALL_GROUP ranks, only those that move the least or that keep their rows within nodes.
    """
    cp_size, network = problem.layout.cp_size, problem.network
    if problem.layout.name in BALANCED_LAYOUTS:
        return ()
    if cp_size <= SMALL_GROUP:
        rows = [rows for rows in range(1, cp_size + 1) if cp_size % rows == 0]
    else:
        rows = [mesh_rows(cp_size, *problem.shape.bytes_per_side(direction)) for direction in Direction]
        if network is not None and network.ranks_per_node and cp_size % network.ranks_per_node == 0:
            rows.append(cp_size // network.ranks_per_node)
    return [f"mesh:{a}x{cp_size // a}" for a in dict.fromkeys(rows) if a < cp_size]


def ulysses_candidates(problem: Problem) -> Sequence[str]:
    """Ulysses wherever there are ranks to exchange heads with."""
    return ("ulysses",) if problem.layout.cp_size > 1 else ()


def usp_candidates(problem: Problem) -> Sequence[str]:
    """Exchanges among every possible number of ranks, at most as many as there are heads; on contiguous shards also
    with ``balanced`` between the groups. With a prime number of ranks, the default is a ring in finer tiles."""
    if problem.layout.name == "dealt":  # adjacent pieces are on different nodes
        return ()
    inner = ("", "-balanced") if problem.layout.name in BALANCED_LAYOUTS else ("",)
    sizes = exchange_sizes(problem.layout.cp_size, problem.shape.num_heads)
    cp_size = problem.layout.cp_size
    finer = cp_size > 1 and nearly_square(cp_size) == 1 and problem.layout.name not in LIGHTSEQ_LAYOUTS
    return [*(["usp"] if finer else []), *(f"usp:{size}{form}" for size in sizes for form in inner)]


def balanced_candidates(problem: Problem) -> Sequence[str]:
    """Several numbers of steps, and with some of the imbalance left, where moving work costs more than it saves."""
    variants = balanced_variants(problem.layout.cp_size) if problem.layout.cp_size > 1 else ()
    return ["balanced", *(f"balanced:{steps}x{percent}" for steps, percent in variants)]


def exchange_sizes(cp_size: int, num_heads: int) -> list[int]:
    """Sizes of the groups that ``usp`` may exchange heads within; 1 and ``cp_size`` are other methods. Rings of more
    than SMALL_GROUP ranks between the groups are left out.
    """
    sizes = [u for u in range(2, min(cp_size - 1, num_heads) + 1) if cp_size % u == 0]
    return [u for u in sizes if cp_size // u <= SMALL_GROUP]


def never(problem: Problem) -> Sequence[str]:
    """For methods that ``auto`` does not consider."""
    del problem
    return ()


# --- methods with sizes ----------------------------------------------------------------------------------------


@cache
def mesh(rows: int, columns: int) -> Method:
    """The ``mesh`` method on a process mesh of the given shape, for ``rows * columns`` ranks."""

    def place(problem: Problem) -> Placement:
        if problem.layout.cp_size != rows * columns:
            raise UnsupportedError(
                explain(
                    got=f"a mesh of {rows} x {columns} for {problem.layout.cp_size} ranks",
                    rule="the mesh has one place for every rank",
                    remedy="Choose factors of the number of ranks, or method='mesh'",
                )
            )
        return place_mesh(problem, rows)

    return replace(MESH, name=f"mesh:{rows}x{columns}", place=place)


@cache
def usp(ulysses_size: int) -> Method:
    """The ``usp`` method with heads exchanged among ``ulysses_size`` ranks."""
    return replace(USP, name=f"usp:{ulysses_size}", ulysses_size=lambda cp_size: ulysses_size)


@cache
def usp_balanced(ulysses_size: int) -> Method:
    """Heads exchanged among ``ulysses_size`` ranks, and the ``balanced`` method between such groups."""
    return replace(
        BALANCED,
        name=f"usp:{ulysses_size}-balanced",
        summary="ulysses within groups of ranks; balanced between the groups",
        ulysses_size=lambda cp_size: ulysses_size,
    )


@cache
def balanced(num_steps: int, target_percent: int) -> Method:
    """The ``balanced`` method in a number of steps, with ranks filled up to a percentage of the mean load."""

    def place(problem: Problem) -> Placement:
        return place_balanced(problem, num_steps, target_percent)

    return replace(BALANCED, name=f"balanced:{num_steps}x{target_percent}", place=place)


def nearly_square(cp_size: int) -> int:
    """The largest divisor of ``cp_size`` up to its square root."""
    return max(u for u in range(1, cp_size + 1) if cp_size % u == 0 and u * u <= cp_size)


# --- the registry ----------------------------------------------------------------------------------------------

MESH = Method(
    "mesh",
    place_mesh,
    summary="the queries of a row of ranks against the keys of a column: traffic grows with the square root of P",
    source="derived here",
    default_layout="zigzag",
    sized=(SizedForm("ROWSxCOLUMNS", mesh),),
    auto_candidates=mesh_candidates,
)
BALANCED = Method(
    "balanced",
    place_balanced,
    summary="its own queries, except for rectangles of work that ranks with less take over; for any mask",
    source="derived here",
    only_layouts=BALANCED_LAYOUTS,
    splits=splits_of,
    uses_shape=True,
    relays=True,
    sized=(SizedForm("STEPSxPERCENT", balanced),),
    auto_candidates=balanced_candidates,
)
USP = Method(
    "usp",
    place_usp,
    summary="ulysses within groups of ranks; lightseq or the ring between the groups",
    source="USP, arXiv 2405.07719",
    splits=2,
    ulysses_size=nearly_square,
    sized=(SizedForm("SIZE", usp), SizedForm("SIZE-balanced", usp_balanced)),
    auto_candidates=usp_candidates,
)
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "lightseq",
            place_lightseq,
            summary="its own queries, and those of ranks that have too much work",
            source="DistFlashAttn, arXiv 2310.03294",
            only_layouts=LIGHTSEQ_LAYOUTS,
            splits=2,
        ),
        Method(
            "ring",
            place_ring,
            summary="its own queries against keys that arrive from one rank after another",
            source="Ring Attention, arXiv 2310.01889",
            auto_candidates=ring_candidates,
        ),
        Method(
            "zigzag",
            place_ring,
            summary="the ring, on shards of one early and one late piece",
            source="the layout of Megatron-Core and Transformer Engine",
            default_layout="zigzag",
            only_layouts=("zigzag",),
        ),
        Method(
            "all_gather",
            place_all_gather,
            summary="its own queries against all keys, received in one step",
            source="Llama 3, arXiv 2407.21783, section 3.3.2",
            default_layout="zigzag",
        ),
        MESH,
        BALANCED,
        Method(
            "ulysses",
            place_ring,
            summary="all tokens of some heads, after exchanging heads for tokens; heads need not divide evenly",
            source="DeepSpeed-Ulysses, arXiv 2309.14509",
            ulysses_size=lambda cp_size: cp_size,
            auto_candidates=ulysses_candidates,
        ),
        USP,
        Method(
            "rsa",
            place_ring,
            summary="full rows of scores in two rings, without online softmax: the historical baseline",
            source="Ring Self-Attention, arXiv 2105.13120",
            full_rows=True,
            auto_candidates=never,
        ),
    )
}
"""Every method by name, in the order in which they are listed. Add an entry to make a method known by its name."""


def register(method: Method) -> Method:
    """Add a method to ``METHODS``, so that its name is accepted wherever a method is chosen.

    Every rank of a job must register it, before the configuration is read.

    Raises:
        ConfigError: another method has that name, or the name contains a colon, which introduces sizes.
    """
    if METHODS.get(method.name, method) != method or ":" in method.name:
        raise ConfigError(
            explain(
                got=f"a method named {method.name!r}",
                rule=f"a name has no colon and is not taken yet; taken are {', '.join(METHODS)}",
                remedy="Give the method another name",
            )
        )
    METHODS[method.name] = method
    return method


def method_names() -> tuple[str, ...]:
    """The names of all methods."""
    return tuple(METHODS)


def method_forms() -> tuple[str, ...]:
    """Everything that :func:`resolve_method` accepts, for messages: the names, then the forms with sizes."""
    sized = (f"{method.name}:{form.text}" for method in METHODS.values() for form in method.sized)
    return (*METHODS, *sized)


def default_layouts() -> tuple[str, ...]:
    """The layouts that some method is used on by default."""
    return tuple(dict.fromkeys(method.default_layout for method in METHODS.values()))


def layouts_worth_comparing(cp_size: int, network: Network | None) -> tuple[str, ...]:
    """The default layouts; and over several nodes, the one that deals every document to all of them."""
    several = cp_size > DEALT_RANKS_PER_NODE and cp_size % DEALT_RANKS_PER_NODE == 0
    if network is None or network.ranks_per_node != DEALT_RANKS_PER_NODE or not several:
        return default_layouts()
    return (*default_layouts(), "dealt")


def resolve_method(method: str | Method) -> Method:
    """The method of that name; a :class:`Method` is returned as it is.

    In addition to the names in ``METHODS``: ``mesh:4x2`` for a process mesh of 4 rows and 2 columns, ``usp:4`` for
    heads exchanged among 4 ranks, ``usp:4-balanced`` for the same with the ``balanced`` method between the groups,
    ``balanced:6x103`` for 6 steps and ranks filled up to 103 % of the mean load.

    Raises:
        UnsupportedError: no method has that name; the message gives the nearest one.
    """
    if isinstance(method, Method):
        return method
    name, colon, sizes = method.partition(":")
    known = METHODS.get(name)
    if known is not None and not colon:
        return known
    for form in () if known is None else known.sized:
        sized = form.parse(sizes)
        if sized is not None:
            return sized
    near = difflib.get_close_matches(method, METHODS, n=1)
    raise UnsupportedError(
        explain(
            got=f"method {method!r}",
            rule=f"the methods are {', '.join(method_forms())}",
            remedy=f"The nearest name is {near[0]!r}"
            if near
            else "Choose one of them, or pass a schedule.Method",
        )
    )
