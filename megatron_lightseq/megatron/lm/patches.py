"""LightSeq in a running Megatron-LM: its functions for arguments, attention, batches and models, replaced by ours.

One :class:`Patches` per process. It replaces the patch points of :mod:`megatron_lightseq.megatron.lm.patch_points`.
Until it knows its options, and with ``cp_method megatron``, every replacement does what the original does.
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
from megatron_lightseq.config.rules import report
from megatron_lightseq.errors import ConfigError, UnsupportedError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.megatron.batch import adopt_layout, shard_batch
from megatron_lightseq.megatron.core_attention import CoreAttentionSettings, LightSeqCoreAttention
from megatron_lightseq.megatron.fixes.apply import fix_model
from megatron_lightseq.megatron.lm import cpu, patch_points
from megatron_lightseq.megatron.lm.options import LmOptions, add_flags, options_from_flags
from megatron_lightseq.megatron.lm.patch_points import PatchPoint, Replacements
from megatron_lightseq.megatron.lm.refusals import refusals, replace_kernels
from megatron_lightseq.megatron.lm.settings import core_attention_settings, violated_rules
from megatron_lightseq.megatron.notes import note_once, note_replaced_kernels
from megatron_lightseq.megatron.options import raise_refusals
from megatron_lightseq.megatron.rope import allow_any_number_of_ranks
from megatron_lightseq.megatron.sequence_mixers import check_other_mixers, other_mixers
from megatron_lightseq.megatron.sequence_slices import compute_in_slices

Batch = dict[str, Any]

PACKING_ENTRIES = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")
"""Entries of a batch that say how documents are packed in it, or over which ranks it is cut."""


class Patches:
    """What is replaced in this process, and the options that the replacements follow."""

    def __init__(self, *, on_cpu: bool = False) -> None:
        """``on_cpu``: whether :func:`megatron_lightseq.megatron.lm.cpu.activate` has been called."""
        self.on_cpu = on_cpu
        self.options: LmOptions | None = None
        """None until they are known."""
        self.stats = AttentionStats()
        """Attention forwards, bytes and waiting time of this rank, over all layers."""
        self._settings: CoreAttentionSettings | None = None
        self._replacements = Replacements()
        self._models = 0
        """Models with our attention that were built."""

    @property
    def active(self) -> bool:
        """Whether models that are built now get our attention."""
        return self.options is not None and self.options.active

    @property
    def settings(self) -> CoreAttentionSettings:
        """What every layer's attention is built with."""
        assert self._settings is not None, "configure() comes first"
        return self._settings

    # --- options ----------------------------------------------------------------------------------------------

    def configure(self, options: LmOptions, arguments: Any) -> None:
        """Take the options of a run; a second call with the same ones changes nothing.

        Args:
            options: ours.
            arguments: Megatron-LM's namespace. Arguments that only select an attention kernel are set to their neutral
                values, and one log line says so.

        Raises:
            UnsupportedError: Megatron-LM is asked for something that our attention would have to ignore; names all of
            it.
            ConfigError: our options do not fit together or to Megatron-LM's; or this process was configured otherwise.
        """
        self._check(options, arguments)
        if options.active:
            note_replaced_kernels(replace_kernels(arguments))
        settings = core_attention_settings(options, arguments, self.stats) if options.active else None
        if self.options is None:
            self.options, self._settings = options, settings
        elif (options.active, settings, options.slices) != (self.active, self._settings, self.options.slices):
            raise ConfigError(
                explain(
                    got=f"LightSeq options {options} after {self.options}",
                    rule="one process trains with one set of options",
                    remedy="Start another process",
                )
            )

    def _check(self, options: LmOptions, arguments: Any) -> None:
        """Raise one error that lists every problem."""
        backend = cpu.backend_problems(arguments) if self.on_cpu else []
        if not options.active:
            unused = [] if options.slices == (None, None) else [_slices_without_us(options)]
            if backend or unused:
                raise report([*backend, *unused])
            return
        refused = refusals(arguments, options.values)
        rules = [*backend, *violated_rules(options, arguments)]
        if refused:
            raise_refusals([*refused, *rules])
        if rules:
            raise report(rules)

    # --- patches ----------------------------------------------------------------------------------------------

    def patch_arguments(self) -> None:
        """Add our flags to Megatron-LM's, and take the options when Megatron-LM parses them."""
        if self.on_cpu:
            self._replacements.replace(patch_points.ARGUMENTS, cpu.with_defaults)
        self._replacements.replace(patch_points.ARGUMENTS, _with_flags)
        self._replacements.replace(patch_points.PARSE, self._parse_args)

    def patch_model(self) -> None:
        """Put our attention into layers, and our layout into batches and models.

        Raises:
            UnsupportedError: this Megatron lacks a patch point.
        """
        allow_any_number_of_ranks()
        self._replacements.replace(patch_points.LOCAL_ATTENTION, self._core_attention)
        if _importable(patch_points.TE_ATTENTION):
            self._replacements.replace(patch_points.TE_ATTENTION, self._core_attention)
        self._replacements.replace(patch_points.BATCH, self._get_batch)
        self._replacements.replace(patch_points.MODEL, self._build_gpt_model)
        self._replacements.replace(patch_points.WRAPPED_MODEL, self._wrap_model)

    def undo(self) -> None:
        """Restore Megatron-LM; models that were built keep their attention."""
        self._replacements.undo()

    def _parse_args(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def parse_args(*args: Any, **kwargs: Any) -> Any:
            arguments = original(*args, **kwargs)
            self.configure(options_from_flags(arguments), arguments)
            if self.active and len(arguments.cp_comm_type) > 1:
                # Our settings hold the list, one entry per layer. Megatron-Core up to 0.17 would index it off by one,
                # and fail in the last layer.
                arguments.cp_comm_type = ["p2p"]
            return arguments

        return parse_args

    def _core_attention(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def core_attention(provider: Any) -> Any:
            if not self.active:
                return original(provider)
            return ModuleSpec(module=LightSeqCoreAttention, params={"settings": self.settings})

        return core_attention

    def _get_batch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def get_batch_on_this_cp_rank(batch: Batch, *args: Any, **kwargs: Any) -> Batch:
            given = signature.bind(batch, *args, **kwargs).arguments
            group = given.get("cp_group") or parallel_state.get_context_parallel_group()
            if not self.active or group.size() == 1:
                return original(batch, *args, **kwargs)
            if not self._models:
                raise _no_model("a batch for context-parallel ranks before a GPTModel was built")
            return self.shard(batch, group, given)

        return get_batch_on_this_cp_rank

    def shard(self, batch: Batch, group: torch.distributed.ProcessGroup, given: dict[str, Any]) -> Batch:
        """This rank's shard of a batch, cut by the layout of attention.

        Args:
            batch: what Megatron-LM's ``get_batch_on_this_cp_rank`` is given.
            group: the context-parallel ranks.
            given: the other arguments of that function.

        Raises:
            UnsupportedError: packed sequences, or a group that differs between samples.
        """
        packing = [name for name in ("is_hybrid_cp", "use_per_sequence_balancing") if given.get(name)]
        packing += [name for name in PACKING_ENTRIES if batch.get(name) is not None]
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

    def _build_gpt_model(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def __init__(model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
            original(model, *args, **kwargs)
            if self.active:
                self.adopt(model)
                assert self.options is not None
                compute_in_slices(model, *self.options.slices)

        return __init__

    def adopt(self, model: torch.nn.Module) -> None:
        """Make a GPTModel follow the layout of its attention.

        Raises:
            UnsupportedError: layers of the model have another attention than ours.
        """
        attentions = [
            module._modules["core_attention"]
            for module in model.modules()
            if module._modules.get("core_attention") is not None
        ]
        others = {type(attention).__name__ for attention in attentions} - {LightSeqCoreAttention.__name__}
        if others:
            raise UnsupportedError(
                explain(
                    got=f"a {type(model).__name__} with {', '.join(sorted(others))}",
                    rule="all layers must have LightSeq attention, but this model's specification brings its own",
                    remedy="Leave --spec out, or use --cp-method megatron",
                )
            )
        self._models += 1
        if attentions:
            adopt_layout(model)
        else:  # a pipeline stage that holds only the embedding or the output layer
            fix_model(model)

    def _wrap_model(self, original: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def __init__(*args: Any, **kwargs: Any) -> None:
            model = signature.bind(*args, **kwargs).arguments.get("module")
            if self.active and isinstance(model, torch.nn.Module):
                self.notice(model)
            original(*args, **kwargs)

        return __init__

    def notice(self, model: torch.nn.Module) -> None:
        """Say that a model other than GPTModel does not use our attention, or refuse it over several ranks.

        Raises:
            UnsupportedError: the model's sequences are cut over context-parallel ranks.
        """
        size = parallel_state.get_context_parallel_world_size()
        if any(isinstance(module, LightSeqCoreAttention) for module in model.modules()):
            check_other_mixers(model, SequenceLayout(self.settings.layout, size))
            return
        mixers = ", ".join(f"{count} {name}" for name, count in other_mixers(model).items())
        if not mixers:
            return  # a pipeline stage without attention
        if size > 1:
            raise _no_model(f"a model that is not a GPTModel, with {mixers}, over context-parallel ranks")
        note_once(f"LightSeq attention is not used: the layers of this model use other attention ({mixers})")


def _with_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_megatron_arguments(parser: Any) -> Any:
        return add_flags(original(parser))

    return add_megatron_arguments


def _importable(point: PatchPoint) -> bool:
    """Whether Megatron's adapters of Transformer Engine can be imported; a broken installation raises anything."""
    try:
        point.find()
    except UnsupportedError:
        raise
    except Exception:  # noqa: BLE001 - without Transformer Engine there is nothing to replace
        return False
    return True


def _slices_without_us(options: LmOptions) -> str:
    return explain(
        got=f"--mlp-tile-tokens and --loss-tile-tokens {options.slices} with --cp-method megatron",
        rule="that leaves Megatron-LM as it is",
        remedy="Leave them out",
    )


def _no_model(got: str) -> UnsupportedError:
    return UnsupportedError(
        explain(
            got=got,
            rule="LightSeq puts its attention into Megatron's GPTModel, and this program trains another model",
            remedy="Use --cp-method megatron, or megatron_lightseq.gpt_layer_spec in a program of your own",
        )
    )
