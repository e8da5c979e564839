"""Megatron's ``core_attention`` module, computed by a schedule over the context-parallel group.

Shapes, per rank: S local tokens, B micro-batch, H query heads, G key/value heads (G divides H), D and Dv head
dimensions. Megatron calls it after the projections and RoPE and before the output projection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import utils as transformer_utils
from megatron.core.transformer.enums import AttnMaskType

from megatron_lightseq.attention import AttentionStats, DistAttention
from megatron_lightseq.config.choices import method_of_comm_type
from megatron_lightseq.config.resolved import ResolvedAttention
from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.megatron.bounded_cache import BoundedCache
from megatron_lightseq.megatron.checkpoint_scope import current_scope, track_checkpoints
from megatron_lightseq.megatron.dense_mask import DenseMasks
from megatron_lightseq.megatron.notes import note_replaced_kernels
from megatron_lightseq.megatron.options import (
    raise_refusals,
    refused_arguments,
    refused_fields,
    replaced_fields,
)
from megatron_lightseq.megatron.packed import shard_of
from megatron_lightseq.megatron.score_settings import ScoreSettings
from megatron_lightseq.megatron.sequence_layer import SequenceLayer
from megatron_lightseq.schedule import Network
from megatron_lightseq.transport.group import rank_in

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig


MAX_LENGTHS = 4
"""Sequence lengths whose factors of queries a layer keeps."""
MAX_SHARED_ATTENTIONS = 16
"""Attentions, each with its plans and receive buffers, that layers with the same settings keep: one for each mask and
method of a model, and one for all packed sequences."""

_PACKED = Mask.causal()
"""What an attention is made with whose mask comes with every call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CoreAttentionSettings:
    """What a layer spec hands to every :class:`LightSeqCoreAttention` it builds."""

    method: str = "lightseq"
    """How ranks share attention: a method that :func:`megatron_lightseq.dist_attention` accepts."""
    comm_types: tuple[str, ...] = ()
    """Megatron's cp_comm_type, one for all layers or one per layer; overrides ``method``."""
    ulysses_size: int | None = None
    """With a2a+p2p: number of ranks that exchange heads; None for usp's default."""
    layout: str = "contiguous"
    """Which rank holds which tokens: a name in :data:`megatron_lightseq.layout.LAYOUTS`."""
    kernel: str = "auto"
    """Attention kernel."""
    overlap: bool = True
    """Transfer the next step's inputs while this step's tiles are computed."""
    invariant_chunk: int | None = None
    """Tokens per chunk of the grid that fixes the order of all sums; None for the order of the schedule."""
    verify_transport: bool = False
    """Compare a checksum of every message."""
    network: Network | None = None
    """The network that method ``auto`` simulates; None for its default."""
    resolved: ResolvedAttention | None = None
    """Methods and schedules that were worked out at the start; None: layers work them out from their inputs."""
    scores: ScoreSettings = field(default_factory=ScoreSettings)
    """Softcap, chunks and temperature tuning."""
    keep_on_recompute: bool = True
    """Keep (out, lse) across activation recomputation instead of running attention again."""
    stats: AttentionStats = field(default_factory=AttentionStats)
    """Counts of all layers built with these settings."""
    _shared: BoundedCache[Any, DistAttention] = field(
        default_factory=lambda: BoundedCache(MAX_SHARED_ATTENTIONS), repr=False, compare=False
    )
    _dense_masks: DenseMasks = field(default_factory=DenseMasks, repr=False, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> CoreAttentionSettings:
        """Itself, so that layers built from copied specifications share buffers and counters."""
        del memo
        return self

    def method_of(self, comm_type: str | None) -> str:
        """The method for one of Megatron's communication types; p2p, its default, means the configured method."""
        return method_of_comm_type(comm_type, self.method, self.ulysses_size)

    def attention(
        self, group: torch.distributed.ProcessGroup | None, mask: Mask, method: str, layer_number: int
    ) -> DistAttention:
        """The attention that all layers with these settings share, with its plans and receive buffers.

        Masks of packed sequences are given with every call, so they share one.
        """
        if mask.length is not None:
            mask = _PACKED
        schedules = None if self.resolved is None else self.resolved.of_layer(layer_number)
        if schedules is not None and (
            schedules.problem.mask != mask or method not in ("auto", schedules.name)
        ):
            schedules = None  # this layer was built with another mask or method than the configuration says

        def make() -> DistAttention:
            return DistAttention(
                group,
                layout=self.layout,
                method=method,
                mask=mask,
                kernel=self.kernel,
                overlap=self.overlap,
                invariant_chunk=self.invariant_chunk,
                softcap=self.scores.softcap,
                verify_transport=self.verify_transport,
                network=self.network,
                schedules=schedules,
                stats=self.stats,
            )

        return self._shared.get((group, mask, method), make)

    def mask_of(
        self,
        hidden: torch.Tensor,
        layout: SequenceLayout,
        group: torch.distributed.ProcessGroup | None,
        *,
        causal: bool,
    ) -> Mask:
        """The mask that a dense one stands for (:meth:`DenseMasks.read`); layers share what was read."""
        return self._dense_masks.read(hidden, layout, group, causal=causal)


class LightSeqCoreAttention(SequenceLayer):
    """Drop-in replacement for ``DotProductAttention`` / ``TEDotProductAttention`` of megatron-core 0.14 and later.

    It has the same parameters as Megatron's (``softmax_offset`` of learnable sinks, else none), so checkpoints do not
    depend on which attention a model was trained with.

    Raises:
        UnsupportedError: the configuration asks for something that this attention would have to ignore.
        ConfigError: the sizes of the context-parallel group and of the configuration differ.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        settings: CoreAttentionSettings | None = None,
        **options: Any,
    ) -> None:
        settings = settings or CoreAttentionSettings()
        groups = pg_collection or options.pop("model_comm_pgs", None)
        comm_type = _comm_type(settings, config, layer_number, options.pop("cp_comm_type", None))
        _check_supported(config, attention_type, options)
        super().__init__(config, groups, settings.layout)
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.settings = settings
        self.method = settings.method_of(comm_type)
        # Megatron's apply_query_key_layer_scaling divides scores by the layer number, and multiplies them back in fp32
        # (FusedScaleMaskSoftmax). It protects fp16 scores from overflow; scores are fp32 here.
        self.softmax_scale = softmax_scale
        self.softmax_offset = _softmax_offset(config, self.tensor_group)
        self.window = _window(config, layer_number)
        self.has_rope = not _entry(getattr(config, "no_rope_freq", None), layer_number)
        self._last_packed: tuple[bool, int] | None = None
        """Of the last packed micro-batch: whether it was causal, and its tokens over all ranks."""
        self._query_scales: BoundedCache[Any, torch.Tensor | None] = BoundedCache(MAX_LENGTHS)
        if settings.keep_on_recompute:
            track_checkpoints()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **extras: Any,
    ) -> torch.Tensor:
        """Attention of this rank's queries over all ranks' keys and values.

        Args:
            query: (S, B, H, D), fp32, bf16 or fp16; (S, H, D) of packed sequences.
            key: (S, B, G, D) or (S, G, D).
            value: (S, B, G, Dv) or (S, G, Dv).
            attention_mask: (B or 1, 1, S, S * cp_size) for this rank's queries, or for those of all ranks; bool, True
                where a key is hidden. Over several ranks, all ranks give one or none does.
            attn_mask_type: overrides the type given at construction.
            packed_seq_params: documents in the S * cp_size tokens of all ranks, which see one another only within a
                document.
            extras: ``attention_bias`` among them; refused unless None.

        Returns:
            (S, B, H * Dv), in query's dtype; (S, H * Dv) where query is (S, H, D), as Transformer Engine returns it.

        Raises:
            UnsupportedError: a mask, mask type, bias or packing that this attention would have to ignore.
            ConfigError: borders of documents that are not those of these tokens.
            LayoutError: the model was not passed to :func:`megatron_lightseq.megatron.adopt_layout`.
        """
        raise_refusals([*refused_arguments("forward", extras)])
        self.check_adopted()
        self.settings.stats.place.layer = self.layer_number
        mask_type = attn_mask_type or self.attn_mask_type
        without_batch = query.dim() == 3
        if packed_seq_params is None:
            mask = self._mask(mask_type, attention_mask)
        else:
            self.settings.scores.check_packed()
            mask = self._packed_mask(mask_type, attention_mask, packed_seq_params, len(query))
            query, key, value = (x.unsqueeze(1) if x.dim() == 3 else x for x in (query, key, value))
        attention = self.settings.attention(self.group, mask, self.method, self.layer_number)
        out = self._attend(attention, mask, self._scaled(query), key, value)
        return out.reshape(len(out), -1) if without_batch else out.reshape(*out.shape[:2], -1)

    def prepare(self, params: PackedSeqParams) -> None:
        """Plan for a packed micro-batch ahead, as where the next one's borders are known.

        The forward pass then neither plans nor starts a collective for it. All ranks prepare the same micro-batches in
        the same order. Nothing happens before the first packed one, or for another number of tokens than the last one
        had.

        Args:
            params: the ``packed_seq_params`` of the forward pass.

        Raises:
            As the forward pass, for borders that are not those of a sequence.
        """
        if self._last_packed is None:
            return
        causal, tokens = self._last_packed
        shard = shard_of(params, self.layout, rank_in(self.group))
        if shard.packing.tokens == tokens:
            mask = shard.mask(causal, self.window)
            self.settings.attention(self.group, mask, self.method, self.layer_number).prepare(mask)

    def _attend(
        self,
        attention: DistAttention,
        mask: Mask,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        extras = self.softmax_scale, self.softmax_offset, mask
        scope = current_scope() if self.settings.keep_on_recompute else None
        if scope is None:
            return attention(query, key, value, *extras)
        stash = scope.stash(self)
        if not scope.replaying:
            out, lse = attention.forward_with_lse(query, key, value, *extras)
            stash.push(out, lse)
            return out
        if not stash:  # the second backward through a retained graph: the first one has consumed the result
            return attention(query, key, value, *extras)
        return attention.reattach(query, key, value, stash.pop(query.shape), *extras)

    def _packed_mask(
        self, mask_type: AttnMaskType, hidden: torch.Tensor | None, params: PackedSeqParams, tokens: int
    ) -> Mask:
        """The mask of packed sequences. Megatron's types with padding name the same: padding is in the borders."""
        if hidden is not None:
            raise UnsupportedError(
                explain(
                    got=f"packed_seq_params together with an attention_mask of shape {tuple(hidden.shape)}",
                    rule="the borders of packed sequences say which keys a query sees",
                    remedy="Give attention_mask=None",
                )
            )
        unpadded = {
            AttnMaskType.padding_causal: AttnMaskType.causal,
            AttnMaskType.padding: AttnMaskType.no_mask,
        }
        causal = _is_causal(unpadded.get(mask_type, mask_type))
        shard = shard_of(params, self.layout, rank_in(self.group))
        shard.packing.check_tokens(tokens * self.layout.cp_size)
        self._last_packed = causal, shard.packing.tokens
        return shard.mask(causal, self.window)

    def _mask(self, attn_mask_type: AttnMaskType, hidden: torch.Tensor | None) -> Mask:
        causal = _is_causal(attn_mask_type)
        mask = Mask.causal() if causal else Mask.full()
        if hidden is not None:
            mask &= self.settings.mask_of(hidden, self.layout, self.group, causal=causal)
        mask = mask if self.window is None else mask & self.window
        return self.settings.scores.restrict(mask, has_rope=self.has_rope)

    def _scaled(self, query: torch.Tensor) -> torch.Tensor:
        """Queries (S, B, H, D) times the factors of their positions, where temperature tuning asks for it."""
        length = len(query) * self.layout.cp_size

        def factors() -> torch.Tensor | None:
            rank = 0 if self.group is None else self.group.rank()
            positions = torch.tensor(self.layout.positions(rank, length), device=query.device)
            return self.settings.scores.query_scale(positions, has_rope=self.has_rope)

        scale = self._query_scales.get((length, query.device), factors)
        return query if scale is None else (query * scale[:, None, None, None]).to(query.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The sharded state: learnable sinks, cut by heads as Megatron's are; else nothing."""
        if not isinstance(self.softmax_offset, torch.nn.Parameter):
            return {}
        found: dict[str, Any] = transformer_utils.make_sharded_tensors_for_checkpoint(
            {"softmax_offset": self.softmax_offset},
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tensor_group,
            dp_cp_group=transformer_utils.ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        return found

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.method} on {self.layout}, kernel={self.settings.kernel}"


def prepare_packed(model: torch.nn.Module, params: PackedSeqParams) -> None:
    """Plan the attention of all layers below ``model`` for a packed micro-batch: :meth:`LightSeqCoreAttention.prepare`.

    Call it with the next micro-batch while one is computed, on all ranks in the same order.

    Args:
        model: a model whose attention is ours.
        params: what its forward pass will get, such as from
            :func:`~megatron_lightseq.megatron.packed.packed_seq_params`.
    """
    for module in model.modules():
        if isinstance(module, LightSeqCoreAttention):
            module.prepare(params)


def _is_causal(mask_type: AttnMaskType) -> bool:
    """Whether a mask type hides later tokens; raises :class:`UnsupportedError` for types that say more."""
    if mask_type not in (AttnMaskType.causal, AttnMaskType.no_mask):
        raise UnsupportedError(
            explain(
                got=f"attn_mask_type {mask_type.name}",
                rule="LightSeq attention supports the mask types causal and no_mask",
                remedy="Use one of the two, or Megatron's own attention for this layer",
            )
        )
    return mask_type is AttnMaskType.causal


def _comm_type(
    settings: CoreAttentionSettings, config: TransformerConfig, layer_number: int, given: str | None
) -> str | None:
    """This layer's cp_comm_type.

    Megatron-Core up to 0.17 indexes per-layer lists off by one (layer numbers start at 1), so lists are resolved here.
    """
    if settings.comm_types:
        return settings.comm_types[layer_number - 1 if len(settings.comm_types) > 1 else 0]
    configured = getattr(config, "cp_comm_type", None)
    return configured[layer_number - 1] if isinstance(configured, list) else given


def _entry(pattern: list[int] | None, layer_number: int) -> bool:
    """A pattern's entry of a layer; layers of multi-token prediction, which follow the others, are like the last."""
    return bool(pattern and pattern[min(layer_number, len(pattern)) - 1])


def _window(config: TransformerConfig, layer_number: int) -> Mask | None:
    """This layer's sliding window; Megatron writes (left, right), with -1 for an unbounded side."""
    size = getattr(config, "window_size", None)
    skip = getattr(config, "window_attn_skip_freq", None)
    if isinstance(skip, int) and not transformer_utils.is_layer_window_attention(size, skip, layer_number):
        return None
    if not size or (isinstance(skip, list) and not _entry(skip, layer_number)):
        return None
    left, right = (None if side < 0 else side for side in size)
    return Mask.window(left, right)


def _softmax_offset(
    config: TransformerConfig, tensor_group: torch.distributed.ProcessGroup | None
) -> torch.Tensor | None:
    """(H,): a logit per head that is added to every softmax row; None if vanilla, a parameter if learnable.

    Raises:
        UnsupportedError: an unknown softmax_type.
    """
    kind = getattr(config, "softmax_type", "vanilla")
    rank, size = (0, 1) if tensor_group is None else (tensor_group.rank(), tensor_group.size())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "vanilla":
        return None
    if kind == "off-by-one":
        return torch.zeros(config.num_attention_heads // size, dtype=config.params_dtype, device=device)
    if kind != "learnable":
        raise UnsupportedError(
            explain(
                got=f"softmax_type = {kind!r}",
                rule="the types are vanilla, off-by-one and learnable",
                remedy="Choose one of them, or use Megatron's own attention (cp_method megatron)",
            )
        )
    # Drawn for all heads, then cut, as Megatron's matrices are: initial values do not depend on the number of ranks.
    drawn_on = "cpu" if config.use_cpu_initialization else device
    whole = torch.empty(config.num_attention_heads, dtype=config.params_dtype, device=drawn_on)
    if config.perform_initialization:
        config.init_method(whole)
    offset = torch.nn.Parameter(whole.chunk(size)[rank].to(device, copy=True))
    set_tensor_model_parallel_attributes(offset, is_parallel=True, dim=0, stride=1)
    return offset


def _check_supported(config: TransformerConfig, attention_type: str, options: dict[str, Any]) -> None:
    """Refuse what would have to be ignored, and note which kernels are replaced by ours."""
    given = {**options, "attention_type": attention_type}
    if given.get("attention_dropout") is None:
        given["attention_dropout"] = config.attention_dropout
    raise_refusals(
        [*refused_fields(config, but={"attention_dropout"}), *refused_arguments("constructor", given)]
    )
    note_replaced_kernels(list(replaced_fields(config)))
