"""The load balancing loss of experts when the tokens of a batch are on several ranks.

With ``output_router_logits``, models of transformers add to their loss (Switch Transformer, arXiv 2101.03961, equations
4 to 6)::

    coefficient * E * sum over experts of (share of the tokens' choices) * (mean probability)

This is not a sum over tokens, but it is one once the shares of the whole batch are known, and those are counts, without
gradients. So the ranks add up their counts, and each takes its tokens' part of the sum.

Letters: E = experts, K = experts of a token, T = tokens of a rank, rows after each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.hf.context import PLAN, Shard
from megatron_lightseq.hf.supported import SHARES_ROUTER_LOSS, unwrapped

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
_CHOICES = ("num_experts_per_tok", "num_experts_per_token", "top_k")
_WITHOUT = "Set output_router_logits=False, or train without context parallelism"


def share_router_loss_in(model: torch.nn.Module) -> bool:
    """Make the load balancing loss of a model's experts that of the whole batch; needed with ``output_router_logits``.

    After it, ``loss`` and ``aux_loss`` of the model's output are this rank's part, to be summed over the group, as the
    rest of the loss is. Call it on the model that is called, behind ``get_peft_model`` if there is one. Only this
    model gets hooks; its class is not changed. A second call changes nothing.

    Args:
        model: a transformers model; adapters of PEFT and wrappers of data parallelism are looked through.

    Returns:
        Whether the model has such a loss; without one, nothing is done.

    Raises:
        UnsupportedError: the loss is made of numbers that are not found in the model.
    """
    inner = unwrapped(model)
    if not hasattr(inner.config.get_text_config(), "output_router_logits"):
        return False
    sharing = _Sharing(_number(inner, _COEFFICIENTS), int(_number(inner, _CHOICES)), type(inner).__name__)
    for module in _called(model, inner):
        if SHARES_ROUTER_LOSS not in vars(module):  # a tuner passes its model's attributes on
            module.register_forward_pre_hook(_take, with_kwargs=True)
            module.register_forward_hook(sharing, with_kwargs=True)
            setattr(module, SHARES_ROUTER_LOSS, True)
    return True


@dataclass
class _Sharing:
    """A forward hook that puts the whole batch's loss in the place of the shard's."""

    coefficient: float
    choices: int
    """K."""
    name: str
    """Of the model, for messages."""
    checked: bool = False
    """Whether the model has been seen to compute this loss."""

    def __call__(self, module: Any, args: Any, arguments: dict[str, Any], output: Any) -> Any:
        shard: Shard | None = arguments.get(PLAN)
        if shard is None or shard.group is None or shard.router_loss_of is not module:
            return None
        if getattr(output, "aux_loss", None) is None:
            return None
        own = output.aux_loss
        logits = [layer for layer in output.router_logits if layer is not None]
        sums = _Sums.of(logits, self.choices, shard.is_token)
        wrong = None if self.checked else self._unlike(own, logits)
        part = sums.part(shard.group, wrong, self._refuse)
        self.checked = True
        if output.loss is not None:
            # The shard's own loss leaves value and gradient again.
            weighted = shard.router_weight * part - own
            output.loss = output.loss + self.coefficient * weighted.to(output.loss.device)
        output.aux_loss = part
        return output

    def _unlike(self, own: Tensor, logits: Sequence[Tensor]) -> bool:
        """Whether the model's loss of this shard is another function."""
        mine = _Sums.of(logits, self.choices, None)
        expected = mine.loss(mine.counts, mine.tokens)
        near = 1e-4 if logits[0].dtype == torch.float32 else 2e-2
        return not torch.allclose(own.detach().float(), expected.detach(), rtol=near, atol=0)

    def _refuse(self) -> None:
        raise UnsupportedError(
            explain(
                got=f"{self.name}, whose aux_loss is not the load balancing loss of Switch Transformer",
                rule="its parts on several ranks are known for that loss only",
                remedy=_WITHOUT,
            )
        )


@dataclass(frozen=True, slots=True)
class _Sums:
    """What the loss is made of, over some tokens and all layers."""

    counts: Tensor
    """(E,) fp32: how often each expert was chosen."""
    probabilities: Tensor
    """(E,) fp32, differentiable."""
    tokens: Tensor
    """Scalar, fp32: tokens times layers."""

    @classmethod
    def of(cls, logits: Sequence[Tensor], choices: int, is_token: Tensor | None) -> _Sums:
        """Of each layer's (T, E), without the tokens that ``is_token`` (S,), one row's, leaves out."""
        first = logits[0]
        experts, device = first.shape[-1], first.device
        counts, probabilities = torch.zeros(2, experts, device=device).unbind()
        tokens = torch.zeros((), device=device)
        for layer in logits:
            routing = torch.softmax(layer.flatten(0, -2).to(device), -1)
            if is_token is not None:
                routing = routing.unflatten(0, (-1, len(is_token)))[:, is_token.to(device)].flatten(0, 1)
            chosen = routing.topk(choices, -1).indices.flatten()
            counts = counts.index_add(0, chosen, counts.new_ones(len(chosen)))
            probabilities = probabilities + routing.float().sum(0)
            tokens = tokens + len(routing)
        return cls(counts, probabilities, tokens)

    def loss(self, counts: Tensor, tokens: Tensor) -> Tensor:
        """These tokens' part of the loss of ``tokens`` whose choices are ``counts``."""
        return len(counts) * (counts / tokens * (self.probabilities / tokens)).sum()

    def part(self, group: Any, wrong: bool | None, refuse: Any) -> Tensor:
        """These tokens' part of the loss of all ranks' tokens. Collective, as is a refusal."""
        whole = torch.cat([self.counts, self.tokens[None], self.tokens.new_full((1,), float(bool(wrong)))])
        dist.all_reduce(whole, group=group)
        if wrong is not None and whole[-1] > 0:
            refuse()
        return self.loss(whole[:-2], whole[-2])


def _take(module: Any, args: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """The outermost module that is called takes the loss on; attention layers refuse where none has."""
    shard = arguments.get(PLAN)
    if shard is None or shard.router_loss_of is not None:
        return None
    return args, {**arguments, PLAN: replace(shard, router_loss_of=module)}


def _called(model: Any, inner: Any) -> set[Any]:
    """What may be called: a tuner of PEFT calls ``inner.forward``, without its hooks, and other adapters ``inner``."""
    while model is not inner and not hasattr(model, "get_base_model"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return {inner} if model is inner else {inner, model.base_model}


def _number(model: Any, names: Sequence[str]) -> float:
    for holder in (model, model.config.get_text_config()):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int | float):
                return value
    raise UnsupportedError(
        explain(
            got=f"{type(model).__name__} with output_router_logits",
            rule=f"its load balancing loss is made of {' or '.join(names)}, which it does not have",
            remedy=_WITHOUT,
        )
    )
