"""Rotary position embeddings cut by the layout of attention.

Megatron's rotary modules always give a context-parallel rank its zigzag chunks
(models/common/embeddings/rope_utils.py), whatever layout attention uses. Of packed sequences they give the angles of
the longest document, which every layer then cuts by zigzag, document by document. Here the module gives every local
token the angle of its own position, once, and layers apply it as in sequences that are not packed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.megatron.bounded_cache import BoundedCache
from megatron_lightseq.megatron.fixes.rebind import rebind
from megatron_lightseq.megatron.packed import PackedShard, given_params, shard_of

MAX_LENGTHS = 4
"""Sequence lengths whose angles a rotary module keeps, 4 bytes per local token and rotary dimension each."""


def forget_angles() -> None:
    """Empty the caches of Megatron's rotary modules.

    They belong to the classes, so that they keep the modules of models that are gone, and their process groups.
    """
    for rotary in (RotaryEmbedding, YarnRotaryEmbedding):
        rotary.forward.cache_clear()


class LayoutRotaryEmbedding(torch.nn.Module):
    """One of Megatron's rotary modules, with angles that follow a :class:`SequenceLayout`.

    Args:
        rotary: Megatron's RotaryEmbedding or YarnRotaryEmbedding; only ``forward`` is replaced.
        layout: which rank holds which tokens.
        rank: this context-parallel rank.
    """

    def __init__(self, rotary: RotaryEmbedding, layout: SequenceLayout, rank: int) -> None:
        super().__init__()
        self.rotary = rotary
        self.layout = layout
        self.rank = rank
        self.packed: PackedShard | None = None
        """The documents of the forward pass that is under way; None if its sequences are not packed."""
        self._shards: BoundedCache[tuple[int, int], Any] = BoundedCache(MAX_LENGTHS)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("rotary"), name)

    def forward(
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None
    ) -> Any:
        """The angles of this rank's tokens.

        Args:
            max_seq_len: length of the whole sequence, over all ranks; unused if it is packed.
            offset: added to every position.
            packed_seq: whether sequences are packed: those of the model's ``packed_seq_params``.
            cp_group: another group for this call (Megatron's hybrid context parallelism); refused.

        Returns:
            (local tokens, 1, 1, rotary dimensions); for YaRN a tuple of this and its scale.

        Raises:
            UnsupportedError: packed sequences that the model was not told of, or another group.
            LayoutError: ``max_seq_len`` does not divide among the ranks.
        """
        if cp_group is not None or (packed_seq and self.packed is None):
            raise UnsupportedError(
                explain(
                    got=f"rotary embedding with {'packed_seq' if cp_group is None else 'cp_group'}",
                    rule=f"positions are those of the model's tokens on layout {self.layout}",
                    remedy="Give packed_seq_params to the model's forward, without cp_group",
                )
            )
        if self.packed is not None:
            return self._packed_angles(self.packed)
        return self._shards.get((max_seq_len, offset), lambda: self._kept_angles(max_seq_len, offset))

    @torch.inference_mode(False)  # or training could not use what an evaluation has left here
    def _kept_angles(self, max_seq_len: int, offset: int) -> Any:
        return self._angles(max_seq_len, offset)

    def get_cached_cos_sin(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the tables of YaRN for fused latent attention are cut by Megatron's zigzag."""
        del args, kwargs
        raise UnsupportedError(
            explain(
                got="apply_rope_fusion with latent attention and context parallelism",
                rule="its tables of angles do not follow a layout",
                remedy="Switch apply_rope_fusion off",
            )
        )

    def _angles(self, max_seq_len: int, offset: int) -> Any:
        """Computed chunk by chunk: those of the whole sequence would take cp_size times the memory."""
        self.layout.check_length(max_seq_len)
        chunks = [
            self.layout.chunk_positions(chunk, max_seq_len) for chunk in self.layout.chunks_of(self.rank)
        ]
        if any(chunk.step != 1 for chunk in chunks):  # stripes, where Megatron can only count by one
            return self._join(
                [self._uncut(max_seq_len, offset)], lambda x: self.layout.shard(x, self.rank, 0)
            )
        return self._join([self._uncut(len(chunk), offset + chunk.start) for chunk in chunks])

    def _packed_angles(self, packed: PackedShard) -> Any:
        """Computed range by range: documents start again at 0, and a long one may lie on many ranks."""
        ranges, index = packed.angles_of()
        parts = [self._uncut(len(positions), positions.start) for positions in ranges]
        return self._join(parts, lambda x: x.index_select(0, index.to(x.device)))

    def _uncut(self, length: int, offset: int) -> Any:
        # In every version of Megatron, angles of packed sequences are not cut. Its own cache of 32 lengths is bypassed.
        forward = type(self.rotary).forward
        return getattr(forward, "__wrapped__", forward)(self.rotary, length, offset, packed_seq=True)

    @staticmethod
    def _join(parts: list[Any], select: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> Any:
        """The parts in order, each angles or, from YaRN, (angles, scale)."""
        if isinstance(parts[0], tuple):
            return (select(torch.cat([angles for angles, *_ in parts])).contiguous(), *parts[0][1:])
        return select(torch.cat(parts)).contiguous()


def rotated(
    t: torch.Tensor, freqs: torch.Tensor, config: Any, cu_seqlens: Any = None, **options: Any
) -> torch.Tensor:
    """Megatron's ``apply_rotary_pos_emb``, where angles are those of the local tokens also of packed sequences.

    Args:
        t: queries or keys, (S, B, H, D), or packed (tokens, H, D).
        freqs: (S, 1, 1, rotary dimensions), from :class:`LayoutRotaryEmbedding`.
        config: of the layer.
        cu_seqlens: given for packed sequences.
        options: of Megatron's function.
    """
    if cu_seqlens is None:
        return apply_rotary_pos_emb(t, freqs, config, **options)
    return apply_rotary_pos_emb(t.unsqueeze(1), freqs, config, **options).squeeze(1)


def adopt_rotary(model: torch.nn.Module, layout: SequenceLayout, rank: int) -> int:
    """Make every rotary module below ``model`` follow ``layout``; they are replaced in place.

    Returns:
        The number of rotary modules.

    Raises:
        UnsupportedError: a rotary module that only works with layout zigzag.
    """
    found = 0
    for owner in list(model.modules()):
        rebind(owner, "apply_rotary_pos_emb", rotated)
        rotary = owner._modules.get("rotary_pos_emb")
        if rotary is None:
            continue
        found += 1
        if isinstance(rotary, LayoutRotaryEmbedding):
            rotary = rotary.rotary
        if isinstance(rotary, RotaryEmbedding):
            adopted = LayoutRotaryEmbedding(rotary, layout, rank)
            owner.rotary_pos_emb = adopted
            owner.register_forward_pre_hook(_Announcement(owner, adopted), with_kwargs=True)
        elif layout.name != "zigzag":
            raise UnsupportedError(
                explain(
                    got=f"{type(rotary).__name__} with layout {layout}",
                    rule="it cuts its angles itself, by Megatron's zigzag",
                    remedy="Use cp_layout zigzag, or rope or yarn positions",
                )
            )
    return found


class _Announcement:
    """A forward pre-hook of the module that owns a rotary module: tells it of the documents of this call."""

    def __init__(self, owner: torch.nn.Module, rotary: LayoutRotaryEmbedding) -> None:
        self._signature = inspect.signature(owner.forward)
        self._rotary = rotary

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        params, rotary = given_params(self._signature, args, kwargs), self._rotary
        rotary.packed = None if params is None else shard_of(params, rotary.layout, rotary.rank)


def allow_any_number_of_ranks() -> None:
    """Let models with YaRN be built over any number of context-parallel ranks; a second call does nothing.

    ``YarnRotaryEmbedding`` fills tables for ``original_max_position_embeddings`` tokens while it is built, and cuts
    them by zigzag, which fails unless twice the number of ranks divides that length. The tables serve fused RoPE only;
    here they are made for the next length that can be cut.
    """
    original = YarnRotaryEmbedding._set_cos_sin_cache
    if hasattr(original, "rounds_up"):
        return

    def fill(self: YarnRotaryEmbedding, seq_len: int, *args: Any, **kwargs: Any) -> None:
        pieces = 1 if self.cp_group is None else 2 * self.cp_group.size()
        original(self, -(-seq_len // pieces) * pieces, *args, **kwargs)

    fill.rounds_up = True  # type: ignore[attr-defined]
    YarnRotaryEmbedding._set_cos_sin_cache = fill
