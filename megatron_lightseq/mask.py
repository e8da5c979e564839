"""Which keys a query may attend to, as arithmetic on positions; no S x S array anywhere.

Every mask here lets a query at position p see one interval of positions: a window around p, cut by the
borders of p's document. A tile (a range of query positions against a range of key positions) is then a *band*
of its index space, ``lo <= j - i <= hi``, crossed with at most one rectangle a document. Kernels compute just
that band, schedules weigh tiles by its area, and tiles of area 0 do not exist.

Standard library only.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_lightseq.errors import ConfigError, UnsupportedError, explain

_WINDOW_TEXT = re.compile(r"window\((?P<left>inf|\d+),(?P<right>inf|\d+)\)")
_DOCUMENTS_TEXT = re.compile(r"documents\((?P<bounds>\d+(?:,\d+)*)\)")


@dataclass(frozen=True, slots=True)
class Segment:
    """Query rows ``[q_start, q_stop)`` of a tile may see its keys ``[k_start, k_stop)``, within the band."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int


@dataclass(frozen=True, slots=True)
class Mask:
    """A query at position p sees keys at p - left ... p + right, within its document.

    Build one with :meth:`causal`, :meth:`full`, :meth:`window` or :meth:`documents`; ``a & b`` allows what both
    allow. ``str()`` gives a text form that :meth:`parse` reads back.
    """

    left: int | None = None
    """Tokens back that may be seen; None for all."""
    right: int | None = None
    """Tokens ahead that may be seen; None for all, 0 for causal."""
    cu_seqlens: tuple[int, ...] | None = None
    """Borders of packed documents, from 0 to the sequence length; None for one document."""

    def __post_init__(self) -> None:
        if min(self.left or 0, self.right or 0) < 0:
            raise ConfigError(
                explain(
                    got=f"window ({self.left}, {self.right})",
                    rule="a window counts tokens back and ahead, so neither side is negative",
                    remedy="Use None for an unbounded side",
                )
            )
        bounds = self.cu_seqlens
        if bounds is not None and (len(bounds) < 2 or bounds[0] != 0 or list(bounds) != sorted(bounds)):
            raise ConfigError(
                explain(
                    got=f"cu_seqlens {_abbreviate(bounds)}",
                    rule="document borders start at 0, never decrease, and end at the sequence length",
                    remedy="Give cumulative lengths, for example (0, 3, 8) for documents of 3 and 5 tokens",
                )
            )

    @staticmethod
    def causal() -> Mask:
        """A query sees its own position and all before."""
        return Mask(right=0)

    @staticmethod
    def full() -> Mask:
        """A query sees every key."""
        return Mask()

    @staticmethod
    def window(left: int | None, right: int | None = 0) -> Mask:
        """A query sees ``left`` tokens back and ``right`` ahead (flash-attention's ``window_size``)."""
        return Mask(left=left, right=right)

    @staticmethod
    def documents(cu_seqlens: Sequence[int], causal: bool = True) -> Mask:
        """Packed documents: a query sees its own document only.

        Args:
            cu_seqlens: borders ``(0, n_1, n_1 + n_2, ..., seq_length)``, as in flash-attention's varlen calls.
            causal: whether, within a document, a query sees only itself and what comes before.
        """
        return Mask(right=0 if causal else None, cu_seqlens=tuple(int(border) for border in cu_seqlens))

    def __and__(self, other: Mask) -> Mask:
        bounds = sorted({*(self.cu_seqlens or ()), *(other.cu_seqlens or ())})
        if self.cu_seqlens and other.cu_seqlens and self.cu_seqlens[-1] != other.cu_seqlens[-1]:
            raise ConfigError(
                explain(
                    got=f"documents ending at {self.cu_seqlens[-1]} and at {other.cu_seqlens[-1]}",
                    rule="masks combine over one sequence length",
                    remedy="Give both masks borders of the same sequence",
                )
            )
        return Mask(
            left=_tighter(self.left, other.left),
            right=_tighter(self.right, other.right),
            cu_seqlens=tuple(bounds) or None,
        )

    @property
    def is_causal(self) -> bool:
        """True if no query sees a later key."""
        return self.right == 0

    def __str__(self) -> str:
        parts = []
        if self.left is not None or self.right not in (None, 0):
            parts.append(f"window({_bound_text(self.left)},{_bound_text(self.right)})")
        elif self.is_causal:
            parts.append("causal")
        if self.cu_seqlens is not None:
            parts.append(f"documents({','.join(map(str, self.cu_seqlens))})")
        return "&".join(parts) or "full"

    @staticmethod
    def parse(text: str) -> Mask:
        """Read the form that ``str()`` writes: ``causal``, ``full``, ``window(512,0)``, ``causal&documents(0,3,8)``.

        Raises:
            ConfigError: a part of the text is none of these.
        """
        mask = Mask.full()
        for part in text.replace(" ", "").split("&"):
            mask &= _parse_part(part)
        return mask

    # --- tiles --------------------------------------------------------------------------------------------

    def check_length(self, seq_length: int) -> None:
        """Raise :class:`ConfigError` unless the document borders end at ``seq_length``."""
        if self.cu_seqlens is not None and self.cu_seqlens[-1] != seq_length:
            raise ConfigError(
                explain(
                    got=f"cu_seqlens ending at {self.cu_seqlens[-1]} for {seq_length} tokens",
                    rule="document borders end at the sequence length",
                    remedy="Add the last border, or cut the sequence",
                )
            )

    def band(self, queries: range, keys: range) -> tuple[int, int]:
        """The tile's ``(lo, hi)``: query i may see key j only if ``lo <= j - i <= hi``.

        Args:
            queries: positions of the tile's queries.
            keys: positions of the tile's keys, with the same stride.

        Returns:
            The bounds, clamped to ``[-len(queries), len(keys)]`` so that they are always finite.
        """
        stride = _common_stride(queries, keys)
        ahead = keys.start - queries.start
        lo = -len(queries) if self.left is None else -((self.left + ahead) // stride)
        hi = len(keys) if self.right is None else (self.right - ahead) // stride
        limit_lo, limit_hi = -len(queries), len(keys)
        return min(max(lo, limit_lo), limit_hi), min(max(hi, limit_lo), limit_hi)

    def segments(self, queries: range, keys: range) -> Iterator[Segment]:
        """The document rectangles of a tile that hold both queries and keys, in order."""
        if self.cu_seqlens is None:
            yield Segment(0, len(queries), 0, len(keys))
            return
        if not queries or not keys:
            return
        first = bisect_right(self.cu_seqlens, max(queries.start, keys.start)) - 1
        last = bisect_left(self.cu_seqlens, min(queries[-1], keys[-1]) + 1)
        for start, stop in zip(
            self.cu_seqlens[first:last], self.cu_seqlens[first + 1 : last + 1], strict=True
        ):
            q_start, q_stop = _index_range(queries, start, stop)
            k_start, k_stop = _index_range(keys, start, stop)
            if q_start < q_stop and k_start < k_stop:
                yield Segment(q_start, q_stop, k_start, k_stop)

    def area(self, queries: range, keys: range) -> int:
        """How many (query, key) pairs of the tile are allowed; exact."""
        lo, hi = self.band(queries, keys)
        return sum(
            _pairs_up_to(segment, hi) - _pairs_up_to(segment, lo - 1)
            for segment in self.segments(queries, keys)
        )


def _tighter(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _bound_text(bound: int | None) -> str:
    return "inf" if bound is None else str(bound)


def _parse_part(part: str) -> Mask:
    if part in ("causal", "full"):
        return Mask.causal() if part == "causal" else Mask.full()
    if match := _WINDOW_TEXT.fullmatch(part):
        left, right = (None if side == "inf" else int(side) for side in match.groups())
        return Mask.window(left, right)
    if match := _DOCUMENTS_TEXT.fullmatch(part):
        return Mask.documents([int(border) for border in match["bounds"].split(",")], causal=False)
    raise ConfigError(
        explain(
            got=f"mask text {part!r}",
            rule="a mask is causal, full, window(LEFT,RIGHT), documents(0,...,N), or several joined by &",
            remedy="Write, for example, causal&documents(0,3,8)",
        )
    )


def _abbreviate(bounds: Sequence[int]) -> str:
    return (
        str(tuple(bounds)) if len(bounds) <= 8 else f"({', '.join(map(str, bounds[:6]))}, ..., {bounds[-1]})"
    )


def _common_stride(queries: range, keys: range) -> int:
    if len(queries) > 1 and len(keys) > 1 and queries.step != keys.step:
        raise UnsupportedError(
            explain(
                got=f"queries of stride {queries.step} against keys of stride {keys.step}",
                rule="the positions of a tile's queries and keys advance alike",
                remedy="Cut both by the same layout",
            )
        )
    return queries.step if len(queries) > 1 else keys.step


def _index_range(positions: range, start: int, stop: int) -> tuple[int, int]:
    """Indices of the positions that lie in ``[start, stop)``."""
    step = positions.step
    first = max(0, -((positions.start - start) // step))
    last = max(0, -((positions.start - stop) // step))
    return min(first, len(positions)), min(last, len(positions))


def _pairs_up_to(segment: Segment, hi: int) -> int:
    """Pairs (i, j) of a segment's rectangle with ``j - i <= hi``, in closed form."""
    rows, columns = segment.q_stop - segment.q_start, segment.k_stop - segment.k_start
    # Row a (counted from the segment's first) sees its first `a + reach` columns, cut to [0, columns].
    reach = hi - (segment.k_start - segment.q_start) + 1
    first_row = min(max(0, 1 - reach), rows)  # rows before see nothing
    full_row = min(max(first_row, columns - reach), rows)  # rows from here on see all columns
    growing = full_row - first_row
    seen_first = first_row + reach
    return growing * seen_first + growing * (growing - 1) // 2 + (rows - full_row) * columns
