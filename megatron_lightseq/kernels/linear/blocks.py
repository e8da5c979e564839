"""Tokens in blocks, and everything about them that needs no state: differentiable, and for all blocks at once.

With ``prepare``'s result, what is left of every kind of linear attention is three lines from block to block:

    U   = values - erase S            (erase: with the delta rule)
    out = queries S + scores U
    S'  = keep S + keys^T U

Documents are data: ``queries``, ``erase``, ``scores`` and ``keys`` are zero between tokens of two documents, and
``keep`` is zero where a document begins. So no kernel has a second form for packed sequences.

Shapes: m blocks of C tokens in each of n pieces, B batch, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lightseq.kernels.linear.contract import Documents, Part
from megatron_lightseq.kernels.registry import accumulator_dtype

BLOCK = 64
"""Tokens of a block at most."""
CHANNEL_BLOCK = 16
"""Tokens among which decays of channels are applied pair by pair; further apart, they are factors of both sides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySide:
    """What a state becomes behind each block, as far as no queries are needed."""

    keys: Tensor
    """(m, n, B, H, C, K): k, decayed from its token to the end of the block."""
    values: Tensor
    """(m, n, B, H, C, V): v; with the delta rule, what is written into a state of zero."""
    keep: Tensor
    """(m, n, B, H, 1, 1), or (m, n, B, H, K, 1): the decay of a state over the block."""
    erase: Tensor | None
    """(m, n, B, H, C, K): what is taken from the values for each row of a state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuerySide:
    """What the outputs of a block are made of."""

    queries: Tensor
    """(m, n, B, H, C, K): scale * q, decayed from the start of the block to its token."""
    scores: Tensor
    """(m, n, B, H, C, C): scale * (q_i . k_j decayed from j to i) for j <= i."""


def block_size(piece: int) -> tuple[int, int]:
    """Number of blocks in a piece, and the tokens of each: the last one may be shorter."""
    count = -(-piece // BLOCK)
    return count, -(-piece // count)


def blocks_of(x: Tensor, piece: int) -> Tensor:
    """(S, B, H, ...) to (m, n, B, H, C, ...), with zeros behind the tokens of a piece."""
    count, size = block_size(piece)
    x = x.unflatten(0, (-1, piece))
    if count * size > piece:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, count * size - piece))
    return x.unflatten(1, (count, size)).movedim((1, 0, 3, 4, 2), (0, 1, 2, 3, 4)).contiguous()


def tokens_of(x: Tensor, piece: int) -> Tensor:
    """The inverse of :func:`blocks_of`."""
    x = x.movedim((0, 1, 2, 3, 4), (1, 0, 3, 4, 2)).flatten(1, 2)
    return x[:, :piece].flatten(0, 1)


@dataclass(frozen=True, slots=True)
class _Visible:
    """What documents leave of a block; None where there is one document."""

    pairs: Tensor
    """(m, n, R, 1, C, C): which tokens see which."""
    reached: Tensor | None = None
    """(m, n, R, 1, C, 1): whether the state that enters the block reaches a token."""
    leaving: Tensor | None = None
    """(m, n, R, 1, C, 1): whether a token reaches the state behind the block."""
    kept: Tensor | None = None
    """(m, n, R, 1, 1, 1): whether the entering state is left behind the block."""

    @staticmethod
    def of(documents: Documents | None, piece: int, like: Tensor) -> _Visible:
        """For blocks of ``like`` (m, n, B, H, C, K)."""
        size = like.shape[4]
        causal = torch.ones(size, size, dtype=torch.bool, device=like.device).tril()
        if documents is None:
            return _Visible(causal)
        of_token = documents.of_token
        before = torch.cat([documents.before[:, None], of_token[:, :-1]], 1)
        ids, entering = (_document_blocks(x, piece) for x in (of_token, before))
        entering, last = entering[..., :1], ids[..., -1:]
        real = ids >= 0
        pairs = (ids[..., :, None] == ids[..., None, :]) & causal & real[..., None]
        return _Visible(
            pairs,
            ((ids == entering) & real)[..., None].to(like.dtype),
            ((ids == last) & real)[..., None].to(like.dtype),
            ((entering == last) & (last >= 0))[..., None].to(like.dtype),
        )


def _document_blocks(ids: Tensor, piece: int) -> Tensor:
    """(R, S) to (m, n, R, 1, C); behind the tokens of a piece, its last document goes on."""
    count, size = block_size(piece)
    ids = ids.unflatten(1, (-1, piece))
    if count * size > piece:
        ids = torch.cat([ids, ids[..., -1:].expand(-1, -1, count * size - piece)], 2)
    return ids.unflatten(2, (count, size)).permute(2, 1, 0, 3)[:, :, :, None]


@dataclass(frozen=True, slots=True)
class _Gates:
    """Decays within blocks, as logarithms; None without decays."""

    since: Tensor | None
    """(m, n, B, H, C), or with K behind: from the start of the block to behind each token."""
    until: Tensor | None
    """From behind each token to the end of the block: of later tokens only, so that none is subtracted again."""

    @staticmethod
    def of(part: Part, dtype: torch.dtype) -> _Gates:
        if part.log_decay is None:
            return _Gates(None, None)
        gates = blocks_of(part.log_decay.to(dtype), part.piece)
        behind = gates.flip(4).cumsum(4).flip(4)
        later = behind.narrow(4, 1, behind.shape[4] - 1)
        return _Gates(gates.cumsum(4), torch.cat([later, torch.zeros_like(behind.narrow(4, 0, 1))], 4))

    def decay(self, x: Tensor, log: Tensor | None) -> Tensor:
        """``x`` (..., C, K), multiplied by the exponential of ``log``."""
        if log is None:
            return x
        return x * (log.exp() if log.dim() == x.dim() else log.exp()[..., None])

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """(..., C, C): a_i . b_j, decayed from j to i; for j <= i."""
        if self.since is None:
            return a @ b.mT
        if self.since.dim() == a.dim():
            return _channel_products(a, b, self.since)
        # The decay of the diagonal is 1 whatever the gates are: a gradient through it would be a difference of equals.
        between = (self.since[..., :, None] - self.since[..., None, :]).tril(-1).exp()
        return (a @ b.mT) * between

    def total(self, like: Tensor) -> Tensor:
        """The decay over the whole block: (m, n, B, H, 1, 1) or (m, n, B, H, K, 1)."""
        if self.since is None:
            return like.new_ones((*like.shape[:4], 1, 1))
        last = self.since.narrow(4, -1, 1).exp()
        return last.mT if self.since.dim() == like.dim() else last[..., None]


def _channel_products(a: Tensor, b: Tensor, since: Tensor) -> Tensor:
    """sum_d a_id b_jd exp(since_id - since_jd) for j <= i, without an exponent above zero. All (..., C, K)."""
    size, rows = a.shape[-2], []
    for start in range(0, size, CHANNEL_BLOCK):
        here = slice(start, min(start + CHANNEL_BLOCK, size))
        own, log = a[..., here, :], since[..., here, :]
        parts = [_near_products(own, b[..., here, :], log)]
        if start:
            at = since[..., start - 1 : start, :]
            far = b[..., :start, :] * (at - since[..., :start, :]).exp()
            parts.insert(0, (own * (log - at).exp()) @ far.mT)
        parts.append(a.new_zeros((*a.shape[:-2], own.shape[-2], size - here.stop)))
        rows.append(torch.cat(parts, -1))
    return torch.cat(rows, -2)


def _near_products(a: Tensor, b: Tensor, since: Tensor) -> Tensor:
    """The products of a few tokens, pair by pair; the diagonal, which does not decay, apart from the others."""
    between = since[..., :, None, :] - since[..., None, :, :]
    earlier = torch.ones(a.shape[-2], a.shape[-2], dtype=torch.bool, device=a.device).tril(-1)
    decays = between.masked_fill(~earlier[..., None], float("-inf")).exp()
    products = torch.einsum("...id,...jd,...ijd->...ij", a, b, decays)
    return products + torch.diag_embed((a * b).sum(-1))


class Prepared:
    """The blocks of a part. Each side is computed when it is asked for."""

    def __init__(self, part: Part, solved: tuple[Tensor, Tensor] | None = None) -> None:
        """``solved``: ``values`` and ``erase`` of the delta rule, if they have been computed before."""
        self._part, self._solved = part, solved
        self._dtype = accumulator_dtype(part.v.dtype)
        self._k = self._blocks(part.k)
        self._gates = _Gates.of(part, self._dtype)
        self._visible = _Visible.of(part.documents, part.piece, self._k)

    def key_side(self) -> KeySide:
        """Keys, values, and what a state becomes."""
        keys = self._gates.decay(self._k, self._gates.until)
        keep = self._gates.total(self._k)
        if self._visible.leaving is not None and self._visible.kept is not None:
            keys, keep = keys * self._visible.leaving, keep * self._visible.kept
        if self._part.beta is None:
            return KeySide(keys=keys, values=self._blocks(self._part.v), keep=keep, erase=None)
        values, erase = self._solve(self._part.beta) if self._solved is None else self._solved
        return KeySide(keys=keys, values=values, keep=keep, erase=erase)

    def query_side(self) -> QuerySide:
        """Queries and scores."""
        q = self._blocks(self._part.q)
        scores = torch.where(self._visible.pairs, self._gates.products(q, self._k), 0.0) * self._part.scale
        queries = self._gates.decay(q * self._part.scale, self._gates.since)
        if self._visible.reached is not None:
            queries = queries * self._visible.reached
        return QuerySide(queries=queries, scores=scores)

    def _blocks(self, x: Tensor) -> Tensor:
        shared = self._part.heads // x.shape[2]
        x = x.to(self._dtype)
        return blocks_of(x.repeat_interleave(shared, 2) if shared > 1 else x, self._part.piece)

    def _solve(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        """``values`` and ``erase``: a token's value without what the tokens before it in the block have written."""
        strength = self._blocks(beta)[..., None]
        earlier = self._visible.pairs.tril(-1)
        lower = torch.where(earlier, self._gates.products(self._k, self._k) * strength, 0.0)
        into = self._gates.decay(self._k, self._gates.since) * strength
        if self._visible.reached is not None:
            into = into * self._visible.reached
        v = self._blocks(self._part.v)
        unit = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        solved = torch.linalg.solve_triangular(
            lower + unit, torch.cat([v * strength, into], -1), upper=False, unitriangular=True
        )
        values, erase = solved.split([v.shape[-1], into.shape[-1]], -1)
        return values, erase
