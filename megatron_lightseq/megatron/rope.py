"""Rotary position embeddings cut by the attention's layout.

Megatron's rotary modules give each context-parallel rank its zigzag chunks
(models/common/embeddings/rope_utils.py), whatever the attention does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.layout import SequenceLayout


class LayoutRotaryEmbedding(torch.nn.Module):
    """A rotary module of Megatron's whose angles follow a :class:`SequenceLayout`.

    Args:
        rotary: Megatron's RotaryEmbedding or YarnRotaryEmbedding; everything but ``forward`` stays its own.
        layout: which rank holds which tokens.
        rank: this context-parallel rank.
    """

    def __init__(self, rotary: RotaryEmbedding, layout: SequenceLayout, rank: int) -> None:
        super().__init__()
        self.rotary = rotary
        self.layout = layout
        self.rank = rank
        self._shards: dict[tuple[int, int], Any] = {}

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
            max_seq_len: length of the whole sequence, over all ranks.
            offset: added to every position.
            packed_seq: packed sequences; refused.
            cp_group: another group for this call (Megatron's hybrid context parallelism); refused.

        Returns:
            (max_seq_len / cp_size, 1, 1, rotary dimensions), and for YaRN its scale beside it.

        Raises:
            UnsupportedError: packed sequences or another group.
            LayoutError: ``max_seq_len`` does not divide among the ranks.
        """
        for name, given in (("packed_seq", packed_seq), ("cp_group", cp_group is not None)):
            if given:
                raise UnsupportedError(
                    explain(
                        got=f"rotary embedding with {name}",
                        rule=f"positions are those of one sequence on layout {self.layout}",
                        remedy="Use unpacked sequences and the model's own context-parallel group",
                    )
                )
        key = (max_seq_len, offset)
        if key not in self._shards:
            with torch.inference_mode(False):  # or training could not use what an evaluation has left here
                self._shards[key] = self._angles(max_seq_len, offset)
        return self._shards[key]

    def get_cached_cos_sin(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: YaRN's tables for fused latent attention are cut by Megatron's zigzag."""
        del args, kwargs
        raise UnsupportedError(
            explain(
                got="apply_rope_fusion with latent attention and context parallelism",
                rule="its tables of angles do not follow a layout",
                remedy="Switch apply_rope_fusion off",
            )
        )

    def _angles(self, max_seq_len: int, offset: int) -> Any:
        """Asks for those of this rank's chunks, one by one: the whole sequence's would be cp_size times as many."""
        self.layout.check_length(max_seq_len)
        chunks = [
            self.layout.chunk_positions(chunk, max_seq_len) for chunk in self.layout.chunks_of(self.rank)
        ]
        if any(chunk.step != 1 for chunk in chunks):  # stripes: Megatron counts by one only
            return self._join(
                [self._uncut(max_seq_len, offset)], lambda x: self.layout.shard(x, self.rank, 0)
            )
        return self._join([self._uncut(len(chunk), offset + chunk.start) for chunk in chunks])

    def _uncut(self, length: int, offset: int) -> Any:
        # Megatron leaves the angles of packed sequences whole: the way, in every version, to get them uncut.
        return self.rotary(length, offset, packed_seq=True)

    @staticmethod
    def _join(parts: list[Any], select: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> Any:
        """Parts one after another, each the angles or, from YaRN, (angles, scale)."""
        if isinstance(parts[0], tuple):
            return (select(torch.cat([angles for angles, *_ in parts])).contiguous(), *parts[0][1:])
        return select(torch.cat(parts)).contiguous()


def adopt_rotary(model: torch.nn.Module, layout: SequenceLayout, rank: int) -> int:
    """Make every rotary module below ``model`` follow ``layout``.

    Returns:
        How many rotary modules there were; they are replaced in place.

    Raises:
        UnsupportedError: a kind of rotary module that cannot be cut by a layout other than zigzag.
    """
    found = 0
    for owner in list(model.modules()):
        rotary = owner._modules.get("rotary_pos_emb")
        if rotary is None:
            continue
        found += 1
        if isinstance(rotary, LayoutRotaryEmbedding):
            rotary = rotary.rotary
        if isinstance(rotary, RotaryEmbedding):
            owner.rotary_pos_emb = LayoutRotaryEmbedding(rotary, layout, rank)
        elif layout.name != "zigzag":
            raise UnsupportedError(
                explain(
                    got=f"{type(rotary).__name__} with layout {layout}",
                    rule="it cuts its angles by Megatron's zigzag itself",
                    remedy="Use cp_layout zigzag, or rope or yarn positions",
                )
            )
    return found
