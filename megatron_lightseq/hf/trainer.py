"""Hugging Face's Trainer, and its subclasses such as TRL's, over a context-parallel group.

accelerate keeps what it does right: the mesh of ranks, equal batches within a context-parallel group, data parallelism.
Its own context parallelism, which drops masks, is never switched on. No class or module of these libraries is changed.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import accelerate
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from megatron_lightseq.errors import ConfigError, UnsupportedError, explain
from megatron_lightseq.hf.batch import IGNORE_INDEX
from megatron_lightseq.hf.context import PLAN, ContextParallel
from megatron_lightseq.hf.experts import share_router_loss_in
from megatron_lightseq.hf.recompute import keep_attention_in
from megatron_lightseq.hf.supported import unwrapped


class ParallelismConfig(accelerate.ParallelismConfig):
    """accelerate's, with our context parallelism: ``ParallelismConfig(cp_size=2, dp_replicate_size=4)``.

    Works on CPUs and under DDP too, where accelerate's refuses. ``cp_enabled`` is true until the mesh is made, and
    false from then on: what asks for it later (accelerate's hooks, Trainer's split of batches, TRL's refusal of
    packing) is about torch's context parallelism.
    """

    dp_replicate_size: int | None

    def __post_init__(self) -> None:
        replicas = self.dp_replicate_size or 1
        self.dp_replicate_size = 1  # accelerate refuses replicas beside cp without dp_shard
        super().__post_init__()
        self._set_size("dp_replicate", replicas)
        for name in ("tp", "sp"):
            if self.cp_size > 1 and self._sizes[name] > 1:
                raise UnsupportedError(
                    explain(
                        got=f"cp_size={self.cp_size} with {name}_size={self._sizes[name]}",
                        rule="context parallelism has been tried with data parallelism only",
                        remedy=f"Set {name}_size=1",
                    )
                )

    @property
    def cp_enabled(self) -> bool:
        """Whether the mesh is still to get a dimension ``cp``."""
        return self.cp_size > 1 and self.device_mesh is None

    def build_device_mesh(self, device_type: str) -> Any:
        """As in accelerate, whose mesh would fail in other words on another number of processes."""
        if dist.is_initialized():
            self._check_processes(dist.get_world_size())
        return super().build_device_mesh(device_type)

    def _validate_accelerator(self, accelerator: Any) -> None:
        if self.total_size == 1:
            self._set_size("dp_replicate", accelerator.num_processes)
        self._check_processes(accelerator.num_processes)

    def _check_processes(self, number: int) -> None:
        if self.total_size not in (1, number):
            sizes = ", ".join(f"{name}_size={size}" for name, size in self._sizes.items() if size > 1)
            raise ConfigError(
                explain(
                    got=f"{sizes} with {number} processes",
                    rule="the sizes multiply to the number of processes",
                    remedy="Set dp_replicate_size or dp_shard_size to the number of processes / cp_size",
                )
            )


class LightSeqTrainerMixin:
    """Cuts the batches of a Trainer: ``class SFT(hf.LightSeqTrainerMixin, SFTTrainer): pass``.

    Give the trainer a model with ``attn_implementation="lightseq"`` and, in its arguments,
    ``parallelism_config=hf.ParallelismConfig(cp_size=...)``. Losses, gradients, gradient norms and evaluation are those
    of one process with the same global batch, whatever the lengths and wherever the labels are.
    """

    context_parallel_options: ClassVar[Mapping[str, Any]] = {}
    """Keyword arguments of :class:`ContextParallel`, to be set in a subclass."""

    accelerator: Any
    args: Any
    model_accepts_loss_kwargs: bool
    context_parallel: ContextParallel
    _prepared: tuple[int, bool] | None = None
    _wants_logits = False

    def create_accelerator_and_postprocess(self) -> None:
        """As in Trainer; then the context-parallel group of the mesh is taken."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        config = getattr(self.accelerator, "parallelism_config", None)
        group = None
        if config is not None and (config.cp_size > 1 or getattr(config, "sp_size", 1) > 1):
            if not isinstance(config, ParallelismConfig):
                raise UnsupportedError(
                    explain(
                        got=f"a {type(config).__module__}.ParallelismConfig with cp_size={config.cp_size}",
                        rule="sequences are cut once, and accelerate's context parallelism would cut them too",
                        remedy="Use megatron_lightseq.hf.ParallelismConfig",
                    )
                )
            group = self.accelerator.torch_device_mesh["cp"].get_group()
        self.context_parallel = ContextParallel(group, **self.context_parallel_options)

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As in Trainer, of this rank's part of the batch; in evaluation, the loss of all ranks' batches together.

        Raises:
            UnsupportedError: an option or a model that would give another loss.
        """
        cp, evaluating = self.context_parallel, not torch.is_grad_enabled()
        self._prepare_once(model)
        local = cp.shard(self._without_repeats(inputs) if evaluating else inputs)
        counting = self.model_accepts_loss_kwargs  # Axolotl switches it off: then each batch counts alike
        processes = self.accelerator.num_processes
        averaged = counting and self.args.average_tokens_across_devices
        counted = num_items_in_batch if counting else None
        if "labels" in local and (evaluating or counted is None):
            counted = self._targets(local, everywhere=evaluating)
        if counted is not None and not counting:
            local["num_items_in_batch"] = counted
        summed = evaluating or (
            averaged and counted is num_items_in_batch
        )  # over all ranks, else over a group
        local[PLAN] = replace(local[PLAN], router_weight=cp.size / processes if summed else cp.size)
        found = super().compute_loss(  # type: ignore[misc]
            model, dict(local), return_outputs=return_outputs, num_items_in_batch=counted
        )
        loss, outputs = found if return_outputs else (found, None)
        if evaluating:
            loss = self._sum_over_ranks(loss)
        if counted is not num_items_in_batch and averaged:
            loss = loss / processes  # Trainer multiplies by it where targets are counted
        if outputs is not None and self._wants_logits:
            outputs["logits"] = cp.gather(outputs["logits"], local)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer, which fetches all batches of a step at once; the plans of the later ones are made ahead."""
        samples, counted = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        cut = self.context_parallel.size > 1
        for batch in samples[1:] if cut else ():
            self.context_parallel.prepare(batch)
        if cut and counted is not None and not self.args.average_tokens_across_devices:
            # Releases before 5.24 divide by the size of a group in whole numbers, which loses targets.
            counted = torch.as_tensor(
                sum(map(self.context_parallel.num_targets, samples)), device=self.args.device
            )
            counted = counted / self.context_parallel.size
        return samples, counted

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """As in Trainer; logits are gathered over the group where they are asked for."""
        self._wants_logits = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._wants_logits = False

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; the copies that the ranks of a group hold count once."""
        if self.context_parallel.size > 1:
            self.gather_function = self._gather_once_a_group  # Trainer puts its own back at the end
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def _prepare_context_parallel_inputs(self, model: Any, inputs: Any) -> Any:
        """Trainer's own split, which ``compute_loss`` replaces."""
        return contextlib.nullcontext, inputs

    def _prepare_once(self, model: Any) -> None:
        outer = self.accelerator.unwrap_model(model)
        inner = unwrapped(outer)
        state = (id(inner), bool(inner.training))
        if state == self._prepared:
            return
        share_router_loss_in(outer)
        self.context_parallel.check(inner)
        _check_options(self, inner)
        keep_attention_in(inner)
        self._prepared = state

    def _targets(self, local: Mapping[str, Any], *, everywhere: bool) -> Tensor:
        """Targets of the batch: of all ranks for a sum over them, else so that a mean over ranks is one over targets.

        A mean over each rank's own targets would weigh ranks alike that hold very different numbers of them.
        """
        cp = self.context_parallel
        count = torch.tensor(float(cp.num_targets(local)), device=local["labels"].device)
        if everywhere:
            count = self._sum_over_ranks(count)
        return count.clamp(min=1) / cp.size

    def _without_repeats(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The last batch of an evaluation without the labels of samples that accelerate repeats to fill it."""
        state, cp = self.accelerator.gradient_state, self.context_parallel
        if not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        labels = [name for name in ("labels", "shift_labels") if inputs.get(name) is not None]
        changed = dict(inputs)
        for name in labels:
            before = self.accelerator.process_index // cp.size * len(inputs[name])
            changed[name] = inputs[name].clone()
            changed[name][max(0, state.remainder - before) :] = IGNORE_INDEX
        return changed

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        """Over all ranks of the run, which evaluate their batches at the same time."""
        total = x.detach().clone()
        if self.accelerator.num_processes > 1:
            dist.all_reduce(total)
        return total

    def _gather_once_a_group(self, values: Any) -> Any:
        """accelerate's ``gather_for_metrics`` over data-parallel ranks."""
        if isinstance(values, tuple | list):
            return type(values)(map(self._gather_once_a_group, values))
        size = self.context_parallel.size
        gathered = self.accelerator.gather(values.contiguous())
        gathered = gathered.unflatten(0, (-1, size, len(values)))[:, 0].flatten(0, 1)
        state = self.accelerator.gradient_state
        kept = state.remainder if state.end_of_dataloader and state.remainder > 0 else math.inf
        return gathered[: min(kept, len(gathered))]


class Trainer(LightSeqTrainerMixin, transformers.Trainer):
    """``transformers.Trainer`` over a context-parallel group."""


def _check_options(trainer: Any, model: Any) -> None:
    """Raise :class:`UnsupportedError` for options of a trainer whose losses are not sums over tokens of a shard."""
    if trainer.context_parallel.size == 1:
        return
    for found, what, why, remedy in (
        (
            trainer.args.label_smoothing_factor,
            f"label_smoothing_factor={trainer.args.label_smoothing_factor}",
            "it shifts the labels of each rank's shard once more",
            "Set it to 0",
        ),
        (
            trainer.compute_loss_func is not None,
            "compute_loss_func",
            "it sees a shard's logits with labels that are already shifted",
            "Override compute_loss below this class, and read shift_labels there",
        ),
        (
            trainer.is_deepspeed_enabled,
            "DeepSpeed",
            "its engine averages gradients over groups of its own",
            "Use FSDP2 or DDP",
        ),
        (
            not _takes_count(model),
            f"{type(model).__name__}, which does not take num_items_in_batch",
            "targets are counted over the group",
            "Train this model without context parallelism",
        ),
    ):
        if found:
            raise UnsupportedError(explain(got=f"{what} with context parallelism", rule=why, remedy=remedy))


def _takes_count(model: Any) -> bool:
    """Whether a model hands ``num_items_in_batch`` on to its loss."""
    arguments = inspect.signature(model.forward).parameters.values()
    return any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in arguments)
