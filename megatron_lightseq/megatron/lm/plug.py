"""LightSeq attention put into a running Megatron-LM: attention, batches, positions.

One :class:`Plug` a process. It replaces the seams of :mod:`megatron_lightseq.megatron.lm.seams`; until it has
options, and with ``cp_method megatron``, every replacement does what the original does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_lightseq.attention import AttentionStats
from megatron_lightseq.errors import ConfigError, UnsupportedError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.megatron.batch import adopt_layout, shard_batch
from megatron_lightseq.megatron.core_attention import CoreAttentionSettings, LightSeqCoreAttention
from megatron_lightseq.megatron.lm import cpu, seams
from megatron_lightseq.megatron.lm.options import LmOptions, add_flags, options_from_flags
from megatron_lightseq.megatron.lm.refusals import (
    LOSS_TILE_REFUSALS,
    MLP_TILE_REFUSALS,
    REFUSALS,
    Refusal,
    check_arguments,
)
from megatron_lightseq.megatron.lm.seams import Replacements, Seam
from megatron_lightseq.megatron.lm.settings import core_attention_settings
from megatron_lightseq.megatron.sequence_slices import compute_in_tiles

Batch = dict[str, Any]


class Plug:
    """What is replaced in this process, and the options by which the replacements act."""

    def __init__(self, *, on_cpu: bool = False) -> None:
        """``on_cpu``: :func:`megatron_lightseq.megatron.lm.cpu.activate` has been called."""
        self.on_cpu = on_cpu
        self.options: LmOptions | None = None
        """None until they are known."""
        self.stats = AttentionStats()
        """Attention forwards, bytes and waiting time of this rank, over all layers."""
        self._settings: CoreAttentionSettings | None = None
        self._replacements = Replacements()
        self._models = 0

    @property
    def active(self) -> bool:
        """Whether models built from now on get our attention."""
        return self.options is not None and self.options.active

    @property
    def settings(self) -> CoreAttentionSettings:
        """What every layer's attention is built with."""
        assert self._settings is not None, "configure() comes first"
        return self._settings

    def configure(self, options: LmOptions, arguments: Any) -> None:
        """Take the options of a run; called again with the same ones, it changes nothing.

        Args:
            options: ours.
            arguments: Megatron-LM's namespace.

        Raises:
            UnsupportedError: Megatron-LM is asked for something that our attention would have to ignore.
            ConfigError: our options do not fit together or to Megatron-LM's; or another run has configured this
                process before.
        """
        if options.active:
            check_arguments(arguments, _refusals(options))
        elif _tiles(options) != (None, None):
            raise ConfigError(
                explain(
                    got=f"--mlp-tile-tokens and --loss-tile-tokens {_tiles(options)} with --cp-method megatron",
                    rule="that leaves Megatron-LM as it is",
                    remedy="Leave them out",
                )
            )
        settings = core_attention_settings(options, arguments, self.stats) if options.active else None
        if self.options is None:
            self.options, self._settings = options, settings
        elif (options.active, settings, _tiles(options)) != (
            self.active,
            self._settings,
            _tiles(self.options),
        ):
            raise ConfigError(
                explain(
                    got=f"LightSeq options {options} after {self.options}",
                    rule="one process trains with one set of them",
                    remedy="Start another process",
                )
            )

    def wire_flags(self) -> None:
        """Add our flags to Megatron-LM's, and take the options when it parses them."""
        if self.on_cpu:
            self._replacements.replace(seams.ARGUMENTS, cpu.with_defaults)
        self._replacements.replace(seams.ARGUMENTS, _with_flags)
        self._replacements.replace(seams.PARSE, self._parsing)

    def wire_model(self) -> None:
        """Put our attention into layers, and our layout into batches and models.

        Raises:
            UnsupportedError: this Megatron lacks one of the seams.
        """
        self._replacements.replace(seams.LOCAL_ATTENTION, self._attention)
        if _importable(seams.TE_ATTENTION):
            self._replacements.replace(seams.TE_ATTENTION, self._attention)
        self._replacements.replace(seams.BATCH, self._cutting)
        self._replacements.replace(seams.MODEL, self._adopting)

    def remove(self) -> None:
        """Undo everything; models that were built keep their attention."""
        self._replacements.undo()

    def _parsing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def parse_args(*args: Any, **kwargs: Any) -> Any:
            arguments = original(*args, **kwargs)
            if self.on_cpu:
                cpu.check_backend(arguments)
            self.configure(options_from_flags(arguments), arguments)
            if self.active and len(arguments.cp_comm_type) > 1:
                # Read above, one for each layer. Megatron-Core until 0.16 counts layers from 1 in this list, and
                # fails at the last one.
                arguments.cp_comm_type = ["p2p"]
            return arguments

        return parse_args

    def _attention(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def core_attention(provider: Any) -> Any:
            if not self.active:
                return original(provider)
            return ModuleSpec(module=LightSeqCoreAttention, params={"settings": self.settings})

        return core_attention

    def _cutting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def get_batch_on_this_cp_rank(batch: Batch, *args: Any, **kwargs: Any) -> Batch:
            given = signature.bind(batch, *args, **kwargs).arguments
            group = given.get("cp_group") or parallel_state.get_context_parallel_group()
            if not self.active or group.size() == 1:
                return original(batch, *args, **kwargs)
            if not self._models:
                raise _no_model()
            return self.cut(batch, group, given)

        return get_batch_on_this_cp_rank

    def cut(self, batch: Batch, group: torch.distributed.ProcessGroup, given: dict[str, Any]) -> Batch:
        """This rank's part of a batch, cut by the layout of the attention.

        Args:
            batch: as Megatron-LM's ``get_batch_on_this_cp_rank`` gets it.
            group: the context-parallel ranks.
            given: the other arguments of that function.

        Raises:
            UnsupportedError: packed sequences, or a group chosen sample by sample.
        """
        packing = [name for name in ("is_hybrid_cp", "use_per_sequence_balancing") if given.get(name)]
        packing += [name for name in _PACKING_ENTRIES if batch.get(name) is not None]
        if packing:
            raise UnsupportedError(
                explain(
                    got=f"a batch with {', '.join(packing)}",
                    rule="LightSeq cuts batches of unpacked sequences over the whole context-parallel group",
                    remedy="Train on unpacked sequences, or use --cp-method megatron",
                )
            )
        layout = SequenceLayout(self.settings.layout, group.size())
        return shard_batch(batch, layout, group.rank())

    def _adopting(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def __init__(model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
            original(model, *args, **kwargs)
            if self.active:
                self.adopt(model)
                self.tile(model)

        return __init__

    def adopt(self, model: torch.nn.Module) -> None:
        """Make a finished model follow the layout of its attention.

        Raises:
            UnsupportedError: layers of the model have another attention than ours.
        """
        attentions = [
            module._modules["core_attention"] for module in model.modules() if _has_attention(module)
        ]
        others = {type(attention).__name__ for attention in attentions} - {LightSeqCoreAttention.__name__}
        if others:
            raise UnsupportedError(
                explain(
                    got=f"a {type(model).__name__} with {', '.join(sorted(others))}",
                    rule="all layers must have LightSeq attention, which this model's specification does not take "
                    "from where it is put",
                    remedy="Leave --spec out, or use --cp-method megatron",
                )
            )
        self._models += 1
        if attentions:  # a pipeline stage may hold the embedding or the output layer alone
            adopt_layout(model)

    def tile(self, model: Any) -> None:
        """Have a finished GPTModel compute in tiles what the options say.

        Raises:
            UnsupportedError: a layer has no dense MLP.
        """
        assert self.options is not None, "configure() comes first"
        compute_in_tiles(model, *_tiles(self.options))


def _tiles(options: LmOptions) -> tuple[int | None, int | None]:
    return options.mlp_tile_tokens, options.loss_tile_tokens


def _refusals(options: LmOptions) -> tuple[Refusal, ...]:
    return (
        *REFUSALS,
        *(MLP_TILE_REFUSALS if options.mlp_tile_tokens is not None else ()),
        *(LOSS_TILE_REFUSALS if options.loss_tile_tokens is not None else ()),
    )


_PACKING_ENTRIES = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")


def _with_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_megatron_arguments(parser: Any) -> Any:
        return add_flags(original(parser))

    return add_megatron_arguments


def _has_attention(module: torch.nn.Module) -> bool:
    return module._modules.get("core_attention") is not None


def _importable(seam: Seam) -> bool:
    """Whether Megatron's adapters of Transformer Engine can be imported; a broken one raises anything."""
    try:
        seam.find()
    except UnsupportedError:
        raise
    except Exception:  # noqa: BLE001 - without Transformer Engine there is nothing to replace
        return False
    return True


def _no_model() -> UnsupportedError:
    return UnsupportedError(
        explain(
            got="a batch for context-parallel ranks before any GPTModel was built",
            rule="LightSeq attention is put into Megatron's GPTModel, and this program trains something else",
            remedy="Use --cp-method megatron, or megatron_lightseq.gpt_layer_spec in a program of your own",
        )
    )
