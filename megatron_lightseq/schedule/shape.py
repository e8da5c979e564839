"""The shape of attention inputs, as far as a schedule needs it: for counting bytes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lightseq.schedule.ir import DATAFLOW, Direction, Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorShape:
    """Shape of the attention inputs, for counting bytes."""

    batch: int = 1
    num_heads: int = 1
    """Query heads H."""
    num_query_groups: int = 1
    """Key/value heads G."""
    head_dim: int = 128
    """D of queries and keys."""
    v_head_dim: int | None = None
    """D of the values; None for ``head_dim``."""
    element_bytes: int = 2
    """Bytes per input element; results and statistics travel in fp32."""

    @property
    def value_dim(self) -> int:
        """Dv, with the default resolved."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    def bytes_per_token(self, payload: Payload) -> int:
        """Bytes that one token of ``payload`` takes on the wire, over all heads and sequences of the batch."""
        v_dim = self.value_dim
        q, out = self.num_heads * self.head_dim, self.num_heads * v_dim
        kv = self.num_query_groups * (self.head_dim + v_dim)
        per_batch = {
            Payload.Q: q * self.element_bytes,
            Payload.KV: kv * self.element_bytes,
            Payload.OUT: (out + self.num_heads) * 4,
            Payload.QDO: (q + out) * self.element_bytes + 2 * self.num_heads * 4,
            Payload.DQ: q * 4,
            Payload.DKV: kv * 4,
        }
        return per_batch[payload] * self.batch

    def bytes_per_side(self, direction: Direction) -> tuple[int, int]:
        """Bytes that travel when a rank computes tiles for another one: per query token, and per key token.

        Each counts the input that is sent to the rank and the result, if there is one, that is sent back.
        """
        flow = DATAFLOW[direction]
        q_side, k_side = (
            self.bytes_per_token(needed) + (self.bytes_per_token(result) if result is not None else 0)
            for needed, result in ((flow.q_input, flow.q_result), (flow.k_input, flow.k_result))
        )
        return q_side, k_side
