"""Ring Self-Attention, the historical baseline (Li et al., arXiv 2105.13120, section 3.2; Colossal-AI).

There is no online softmax: a first ring, of keys, fills a rank's full rows of scores; after the softmax, a second
ring, of values, computes the output. The backward recomputes the scores with one ring, then runs one ring of values
and one of keys. Memory grows with S x P S and everything travels twice, which is what later methods improve on.
Here each ring is one execution of the ring's program.

Shape letters: S = local tokens, N = P S tokens in all, B = batch, G = key/value heads, R = query heads for each of
them, D = head dim. Rows are indexed by global key position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lightseq.attention.passes import Bundle
from megatron_lightseq.attention.runtime import BoundProgram, Runtime
from megatron_lightseq.kernels.reference import sum_over_seen, visible
from megatron_lightseq.kernels.registry import accumulator_dtype
from megatron_lightseq.kernels.tile_mask import TileMask
from megatron_lightseq.schedule import Payload
from megatron_lightseq.schedule.program import Call


@dataclass(frozen=True, slots=True)
class RowRun:
    """Executes the forward and backward programs of the ring, several times each."""

    forward_program: BoundProgram
    backward_program: BoundProgram
    runtime: Runtime
    softcap: float | None = None
    """Bound of the scores, c in c * tanh(score / c); None: none."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """One ring of keys for full rows of scores, a softmax, one ring of values. Shapes as in :class:`plan.Run`."""
        scores_BGRSN = self._scores(q, k, scale)
        lse_BGRS = scores_BGRSN.logsumexp(-1)
        weights = _probabilities(scores_BGRSN, lse_BGRS)
        out = torch.empty((*q.shape[:3], v.shape[3]), dtype=weights.dtype, device=q.device)
        self.runtime.run(self.forward_program, _Outputs.over(v, weights, out, self._batch_rows))
        return out.to(q.dtype), lse_BGRS.flatten(1, 2)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One ring of keys to recompute the rows, then one ring of values and one of keys for the gradients."""
        acc, groups = accumulator_dtype(q.dtype), k.shape[2]
        scores = self._scores(q, k, scale)
        weights = _probabilities(scores, lse.unflatten(1, (groups, -1)))
        dq, dk, dv = (torch.empty(x.shape, dtype=acc, device=x.device) for x in (q, k, v))
        dweights, rows = torch.zeros_like(weights), self._batch_rows
        self.runtime.run(self.backward_program, _ValueGradients.over(dout, v, weights, dweights, dv, rows))
        dscores = weights * (dweights - delta.unflatten(1, (groups, -1)).unsqueeze(-1)) * scale
        if self.softcap is not None:  # masked scores are -inf, and their weights 0
            dscores *= (1 - (scores / self.softcap).square()).masked_fill(scores.isneginf(), 0.0)
        self.runtime.run(self.backward_program, _KeyGradients.over(q, k, dscores, dq, dk, rows))
        return dq, dk, dv

    def _scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Full rows (B, G, R, S, N) of scaled scores, -inf where masked; one ring of keys."""
        (tokens, batch, heads, _), groups = q.shape, k.shape[2]
        num_keys = tokens * (1 if self.runtime.transport is None else self.runtime.transport.size)
        shape = (batch, groups, heads // groups, tokens, num_keys)
        rows = torch.full(shape, float("-inf"), dtype=accumulator_dtype(q.dtype), device=q.device)
        self.runtime.run(self.forward_program, _Scores.over(q, k, rows, scale, self._batch_rows))
        if self.softcap is None:
            return rows
        capped = self.softcap * torch.tanh(rows / self.softcap)
        return capped.masked_fill(rows.isneginf(), float("-inf"))

    @property
    def _batch_rows(self) -> int:
        return self.forward_program.program.batch_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowPass:
    """A ring that reads or writes full rows. Its query side does not travel; its results, if any, are sums."""

    own: dict[Payload, Bundle]
    rows: Tensor
    """(B, G, R, S, N)."""
    batch_rows: int
    """As in :class:`schedule.Program`."""

    def part(self, rows: Tensor, call: Call) -> Tensor:
        """The scores (B, G, R, queries, keys) of a call."""
        keys, queries = call.k_positions, slice(call.q.start, call.q.stop)
        if self.batch_rows > 1:
            (tokens, num_keys), row = rows.shape[-2:], keys.start // rows.shape[-1]
            rows = rows[row : row + 1]
            keys = range(keys.start - row * num_keys, keys.stop - row * num_keys, keys.step)
            queries = slice(call.q.start - row * tokens, call.q.stop - row * tokens)
        return rows[..., queries, keys.start : keys.stop : keys.step]

    def sum_over_seen(self, equation: str, call: Call, mask: TileMask, x: Tensor) -> Tensor:
        """einsum of a call's rows and ``x``. Pairs of other calls contribute nothing: a tile may take several calls."""
        seen = visible(mask, len(call.q_positions), len(call.k_positions), x.device)
        rows = self.part(self.rows, call).masked_fill(~seen, 0.0)
        return sum_over_seen(equation, rows, x.to(rows.dtype), seen)

    def add(self, call: Call, total: Tensor, part: Tensor) -> None:
        total.copy_(part) if call.fresh else total.add_(part)

    def clear(self, payload: Payload, bundle: Bundle) -> None:
        for tensor in bundle:
            tensor.zero_()

    def absorb(self, payload: Payload, mine: Bundle, arrived: Bundle) -> None:
        for total, part in zip(mine, arrived, strict=True):
            total += part


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scores(_RowPass):
    scale: float

    @staticmethod
    def over(q: Tensor, k: Tensor, rows: Tensor, scale: float, batch_rows: int) -> _Scores:
        own: dict[Payload, Bundle] = {Payload.Q: (q,), Payload.KV: (k,), Payload.OUT: ()}
        return _Scores(own=own, rows=rows, batch_rows=batch_rows, scale=scale)

    def compute(
        self, call: Call, mask: TileMask, q_side: Bundle, k_side: Bundle, results: list[Bundle]
    ) -> None:
        (q,), (k,) = q_side, k_side
        scores = (
            torch.einsum("sbgrd,nbgd->bgrsn", _grouped(q, k.shape[2]), k.to(self.rows.dtype)) * self.scale
        )
        part, seen = self.part(self.rows, call), visible(mask, q.shape[0], k.shape[0], q.device)
        part.copy_(torch.where(seen, scores, part))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outputs(_RowPass):
    @staticmethod
    def over(v: Tensor, weights: Tensor, out: Tensor, batch_rows: int) -> _Outputs:
        own: dict[Payload, Bundle] = {Payload.Q: (), Payload.KV: (v,), Payload.OUT: (out,)}
        return _Outputs(own=own, rows=weights, batch_rows=batch_rows)

    def compute(
        self, call: Call, mask: TileMask, q_side: Bundle, k_side: Bundle, results: list[Bundle]
    ) -> None:
        (v,), ((out,),) = k_side, results
        self.add(call, out, self.sum_over_seen("bgrsn,nbgd->sbgrd", call, mask, v).flatten(2, 3))


@dataclass(frozen=True, slots=True, kw_only=True)
class _ValueGradients(_RowPass):
    dweights: Tensor

    @staticmethod
    def over(
        dout: Tensor, v: Tensor, weights: Tensor, dweights: Tensor, dv: Tensor, batch_rows: int
    ) -> _ValueGradients:
        own = {Payload.QDO: (dout,), Payload.KV: (v,), Payload.DQ: (), Payload.DKV: (dv,)}
        return _ValueGradients(own=own, rows=weights, batch_rows=batch_rows, dweights=dweights)

    def compute(
        self, call: Call, mask: TileMask, q_side: Bundle, k_side: Bundle, results: list[Bundle]
    ) -> None:
        (dout,), (v,), (_, (dv,)) = q_side, k_side, results
        grouped = _grouped(dout, v.shape[2])
        dweights = torch.einsum("sbgrd,nbgd->bgrsn", grouped, v.to(grouped.dtype))
        self.part(self.dweights, call).copy_(dweights)
        self.add(call, dv, self.sum_over_seen("bgrsn,sbgrd->nbgd", call, mask, grouped))


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeyGradients(_RowPass):
    @staticmethod
    def over(q: Tensor, k: Tensor, dscores: Tensor, dq: Tensor, dk: Tensor, batch_rows: int) -> _KeyGradients:
        own: dict[Payload, Bundle] = {
            Payload.QDO: (q,),
            Payload.KV: (k,),
            Payload.DQ: (dq,),
            Payload.DKV: (dk,),
        }
        return _KeyGradients(own=own, rows=dscores, batch_rows=batch_rows)

    def compute(
        self, call: Call, mask: TileMask, q_side: Bundle, k_side: Bundle, results: list[Bundle]
    ) -> None:
        (q,), (k,), ((dq,), (dk,)) = q_side, k_side, results
        self.add(call, dq, self.sum_over_seen("bgrsn,nbgd->sbgrd", call, mask, k).flatten(2, 3))
        self.add(call, dk, self.sum_over_seen("bgrsn,sbgrd->nbgd", call, mask, _grouped(q, k.shape[2])))


def _grouped(x_SBHD: Tensor, groups: int) -> Tensor:
    """(S, B, H, D) -> (S, B, G, R, D) in the accumulator dtype."""
    return x_SBHD.to(accumulator_dtype(x_SBHD.dtype)).unflatten(2, (groups, -1))


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), and 0 in rows that see no key."""
    return torch.where(lse.isneginf().unsqueeze(-1), 0.0, (scores - lse.unsqueeze(-1)).exp())
