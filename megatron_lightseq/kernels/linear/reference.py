"""Linear attention one token after another, as the papers write it: the oracle of every other kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_lightseq.kernels.linear.contract import Documents, Gradients, Part, StateMap
from megatron_lightseq.kernels.linear.specs import LINEAR_KERNELS
from megatron_lightseq.kernels.registry import accumulator_dtype


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    *,
    scale: float,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (S, B, H, V) and the state behind the last token.

    Differentiable by autograd, in the dtype of its inputs.

    Args:
        q, k: (S, B, H, K). v: (S, B, H, V).
        log_decay: (S, B, H) or (S, B, H, K), or None. beta: (S, B, H), or None.
        state: (B, H, K, V), which enters the first token.
        scale: factor of the output.
        documents: of the tokens; None for one that has begun before.
    """
    out = []
    for t in range(q.shape[0]):
        key = k[t]
        if documents is not None:
            before = documents.of_token[:, t - 1] if t else documents.before
            now = documents.of_token[:, t]
            state = torch.where((now == before)[:, None, None, None], state, 0.0)
            key = torch.where((now >= 0)[:, None, None], key, 0.0)
        if log_decay is not None:
            alpha = log_decay[t].exp()
            state = state * (alpha[..., None, None] if alpha.dim() == 2 else alpha[..., None])
        write = v[t]
        if beta is not None:
            write = beta[t][..., None] * (write - (key[..., None, :] @ state)[..., 0, :])
        state = state + key[..., None] * write[..., None, :]
        out.append((q[t][..., None, :] @ state)[..., 0, :] * scale)
    return torch.stack(out), state


class ReferenceLinearKernel:
    """The recurrence, in the accumulator dtype; fp64 included."""

    spec = LINEAR_KERNELS["reference"]
    name = spec.name
    longest_part = 1024

    def unsupported(self, part: Part) -> str | None:
        """Why this machine cannot run the kernel: it can."""
        return None

    def summarise(self, part: Part) -> tuple[StateMap, None]:
        """As in :class:`~.contract.LinearKernel`: the recurrence from a unit matrix, and from zero."""
        maps = []
        for piece in _pieces(part):
            zero = _zero(part)
            write = _run(piece, zero)[1]
            maps.append(StateMap(_transition(piece, part), write))
        return StateMap(*(torch.stack(parts) for parts in zip(*maps, strict=True))), None

    def inner(self, part: Part, kept: None) -> None:
        """As in :class:`~.contract.LinearKernel`: nothing."""

    def outer(self, part: Part, inner: Any, states: Tensor, out: Tensor) -> None:
        """As in :class:`~.contract.LinearKernel`."""
        outs = [_run(piece, state)[0] for piece, state in zip(_pieces(part), states, strict=True)]
        out.copy_(torch.cat(outs))

    def summarise_backward(self, part: Part, dout: Tensor) -> tuple[Tensor, None]:
        """As in :class:`~.contract.LinearKernel`, by autograd."""
        found: list[Tensor] = []
        for piece, grad in zip(_pieces(part), dout.split(part.piece), strict=True):
            state = _zero(part).requires_grad_()
            with torch.enable_grad():
                out, _ = _run(piece, state)
            found += torch.autograd.grad(out, state, grad.to(out.dtype))
        return torch.stack(found), None

    def backward(
        self, part: Part, dout: Tensor, states: Tensor, behind: Tensor, kept: None, gradients: Gradients
    ) -> None:
        """As in :class:`~.contract.LinearKernel`, by autograd."""
        for i, (piece, grad) in enumerate(zip(_pieces(part), dout.split(part.piece), strict=True)):
            with torch.enable_grad():
                leaves = [None if x is None else x.detach().requires_grad_() for x in piece.tensors]
                out, leaving = _run(piece.with_tensors(leaves), states[i])
            wanted = [x for x in leaves if x is not None]
            found = torch.autograd.grad((out, leaving), wanted, (grad.to(out.dtype), behind[i]))
            for to, x in zip((x for x in gradients if x is not None), found, strict=True):
                to[i * part.piece : (i + 1) * part.piece] = x


def _zero(part: Part) -> Tensor:
    shape = (part.v.shape[1], part.heads, part.k.shape[-1], part.v.shape[-1])
    return part.v.new_zeros(shape, dtype=accumulator_dtype(part.v.dtype))


def _pieces(part: Part) -> list[Part]:
    """The pieces of a part, each a part of one piece."""
    starts = range(0, part.q.shape[0], part.piece)
    return [part.cut(start, start + part.piece) for start in starts]


def _run(piece: Part, state: Tensor) -> tuple[Tensor, Tensor]:
    dtype = state.dtype
    q, k, v = (
        x.to(dtype).repeat_interleave(piece.heads // x.shape[2], 2) for x in (piece.q, piece.k, piece.v)
    )
    log_decay, beta = (None if x is None else x.to(dtype) for x in (piece.log_decay, piece.beta))
    return recurrence(q, k, v, log_decay, beta, state, scale=piece.scale, documents=piece.documents)


def _transition(piece: Part, part: Part) -> Tensor:
    """M of one piece: what becomes of a unit matrix when nothing is written; without the delta rule its diagonal."""
    key_dim = piece.k.shape[-1]
    unit = torch.eye(key_dim, dtype=_zero(part).dtype, device=piece.k.device)
    state = unit.expand(piece.v.shape[1], part.heads, -1, -1)
    nothing = piece.v.new_zeros(*piece.v.shape[:3], key_dim)
    matrix = _run(replace(piece, v=nothing), state)[1]
    if piece.beta is not None:
        return matrix
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)[..., None]
    is_of_channels = piece.log_decay is not None and piece.log_decay.dim() == 4
    return diagonal if is_of_channels else diagonal[..., :1, :]
