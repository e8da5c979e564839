"""The interface of a kernel of linear attention, and the data that it works on.

A token acts on a state S, a K x V matrix for each head, as

    S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_(t-1) + beta_t k_t v_t^T        the delta rule, with beta
    S_t =                        diag(alpha_t) S_(t-1) +        k_t v_t^T        without

and its output is ``scale * S_t^T q_t``; ``log_decay`` is log(alpha). A run of tokens is therefore an affine map
S -> M S + B, and that is all that the tokens behind it have to know of it.

Shapes: S tokens, B batch, H heads, K key dim, V value dim; n pieces of equally many tokens. Heads of q, k and v may be
fewer than H if they divide it: each is shared by adjacent heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class StateMap(NamedTuple):
    """What each of n pieces does to a state: S -> M S + B; accumulator dtype."""

    transition: Tensor
    """M: (n, B, H, 1, 1) for a number, (n, B, H, K, 1) for a diagonal, (n, B, H, K, K) with the delta rule."""
    write: Tensor
    """B: (n, B, H, K, V), the state behind a piece that is entered with a state of zero."""


@dataclass(frozen=True, slots=True)
class Documents:
    """Which tokens see each other: those of one document."""

    of_token: Tensor
    """(R, S) with R = 1, or B where rows differ: the document of each token, ascending; -1 for padding."""
    before: Tensor
    """(R,): the document of the token before the first; -1 where there is none."""

    def part(self, start: int, stop: int) -> Documents:
        """Of the tokens ``[start, stop)``."""
        before = self.of_token[:, start - 1] if start else self.before
        return Documents(self.of_token[:, start:stop], before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Adjacent tokens of one rank, in pieces of equal length."""

    q: Tensor
    """(S, B, H or fewer, K)."""
    k: Tensor
    """(S, B, H or fewer, K)."""
    v: Tensor
    """(S, B, H or fewer, V)."""
    log_decay: Tensor | None
    """(S, B, H), or (S, B, H, K) for a decay of each channel; None for none."""
    beta: Tensor | None
    """(S, B, H), how much of its value a token writes; None without the delta rule."""
    piece: int
    """Tokens of a piece; divides S."""
    scale: float
    documents: Documents | None
    """None for one document that begins before these tokens or with them."""
    heads: int
    """H."""

    @staticmethod
    def of(
        tensors: Sequence[Tensor | None], *, piece: int, scale: float, documents: Documents | None, heads: int
    ) -> Part:
        """A part of q, k, v, log_decay and beta; the others as in the attributes."""
        q, k, v, log_decay, beta = tensors
        assert q is not None, "q is not optional"
        assert k is not None, "k is not optional"
        assert v is not None, "v is not optional"
        gates = {"log_decay": log_decay, "beta": beta}
        return Part(q=q, k=k, v=v, piece=piece, scale=scale, documents=documents, heads=heads, **gates)

    def cut(self, start: int, stop: int) -> Part:
        """The tokens ``[start, stop)``, which are whole pieces."""
        return Part.of(
            [None if x is None else x[start:stop] for x in self.tensors],
            piece=self.piece,
            scale=self.scale,
            documents=None if self.documents is None else self.documents.part(start, stop),
            heads=self.heads,
        )

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Part:
        """The same part of other inputs."""
        return Part.of(
            tensors, piece=self.piece, scale=self.scale, documents=self.documents, heads=self.heads
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The inputs that may have gradients."""
        return self.q, self.k, self.v, self.log_decay, self.beta

    @property
    def pieces(self) -> int:
        """n."""
        return self.q.shape[0] // self.piece


Gradients = Sequence[Tensor | None]
"""Of q, k, v, log_decay and beta, in their dtypes; None for an input that is None."""


class LinearKernel(Protocol):
    """Linear attention over a part. States are in the accumulator dtype."""

    name: str
    longest_part: int
    """Tokens of the parts that it is given, at most, unless one piece is longer. What it computes for a part is held
    in memory at once; more and shorter parts are more calls."""

    def summarise(self, part: Part) -> tuple[StateMap, Any]:
        """What the pieces do to a state, and what :meth:`inner` need not compute again."""

    def inner(self, part: Part, kept: Any) -> Any:
        """What :meth:`outer` needs and no state enters: it is computed while states travel."""

    def outer(self, part: Part, inner: Any, states: Tensor, out: Tensor) -> None:
        """Write the output (S, B, H, V), in v's dtype, from the states (n, B, H, K, V) that enter the pieces."""

    def summarise_backward(self, part: Part, dout: Tensor) -> tuple[Tensor, Any]:
        """Gradients (n, B, H, K, V) of the entering states, as far as the pieces' own outputs give them; and what
        :meth:`backward` need not compute again.
        """

    def backward(
        self, part: Part, dout: Tensor, states: Tensor, behind: Tensor, kept: Any, gradients: Gradients
    ) -> None:
        """Write the gradients of the inputs.

        Args:
            part, states: as of the forward pass.
            dout: (S, B, H, V), gradient of the output.
            behind: (n, B, H, K, V), gradients of the states behind the pieces, by all later outputs.
            kept: of what :meth:`summarise_backward` returned; None if it was dropped to save memory.
            gradients: of q, k, v, log_decay and beta, to be overwritten.
        """


def apply(transition: Tensor, state: Tensor, *, transposed: bool = False) -> Tensor:
    """M S, or M^T S: for a number, a diagonal or a matrix M of any leading dimensions."""
    if transition.shape[-1] == 1:
        return transition * state
    return (transition.mT if transposed else transition) @ state


def act(transition: Tensor, state: Tensor, write: Tensor, *, transposed: bool = False) -> Tensor:
    """M S + B, or M^T S + B, rounded as one operation where the device can."""
    if transition.shape[-1] == 1:
        return write.addcmul(transition, state)
    matrix = transition.mT if transposed else transition
    flat = write.reshape(-1, *write.shape[-2:])
    return flat.baddbmm(matrix.reshape(-1, *matrix.shape[-2:]), state.reshape(flat.shape)).view(write.shape)


def compose(earlier: StateMap, later: StateMap, *, transposed: bool = False) -> StateMap:
    """First ``earlier``, then ``later``; of transposed maps, whose transitions are stored as they are."""
    first, second = (later, earlier) if transposed else (earlier, later)
    return StateMap(
        apply(second.transition, first.transition),
        act(later.transition, earlier.write, later.write, transposed=transposed),
    )
