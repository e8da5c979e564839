"""Initial weights that depend only on the seed.

Megatron draws weights from one random stream in the order in which a rank builds its modules, so they depend on how the
pipeline is split. Here every weight has its own stream, seeded by a name for the weight. Together with
``use_cpu_initialization``, which draws whole matrices and cuts them, the same seed gives the same model on any
number of tensor-, pipeline-, context- and data-parallel ranks.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_lightseq.megatron.layer import ChoosingTransformerLayer

Init = Callable[[torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class WeightNames:
    """Names the weights of one model while it is built: by role, layer, and how many of that role were drawn before."""

    seed: int
    layer: int = 0
    """Global number of the layer that is being built, from 1; 0 outside of layers."""
    scope: str = ""
    """Prefix of roles; experts, which are counted over all expert-parallel ranks, have one."""
    _drawn: Counter[tuple[str, int]] = field(default_factory=Counter)

    def normal(self, role: str, std: float) -> Init:
        """An initialiser N(0, std) for Megatron's ``init_method`` fields.

        Args:
            role: distinguishes weights of one layer that have different initialisers.
            std: standard deviation.
        """

        def draw(tensor: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return tensor.normal_(0.0, std, generator=self._stream(role, tensor.device))

        return draw

    def uniform(self, tensor: torch.Tensor, low: float, high: float) -> torch.Tensor:
        """Draw U(low, high), for weights that are not matrices."""
        with torch.no_grad():
            return tensor.uniform_(low, high, generator=self._stream("uniform", tensor.device))

    def _stream(self, role: str, device: torch.device) -> torch.Generator:
        """The random numbers of the next weight of a role."""
        scoped = self.scope + role
        index = self._drawn[scoped, self.layer]
        self._drawn[scoped, self.layer] += 1
        name = f"{self.seed}/{scoped}/{self.layer}/{index}"
        stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
        return torch.Generator(device).manual_seed(stream)

    @contextmanager
    def building_layer(self, number: int) -> Iterator[None]:
        """A context in which weights belong to this layer."""
        self.layer = number
        try:
            yield
        finally:
            self.layer = 0

    @contextmanager
    def building_experts(self, first: int) -> Iterator[None]:
        """A context in which weights belong to experts with one weight per role, numbered from ``first``."""
        self.scope = "expert "
        for role in ("weight", "residual"):
            self._drawn[self.scope + role, self.layer] = first
        try:
            yield
        finally:
            self.scope = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightNames:
        """Itself, because Megatron copies configurations and specifications while it builds one model."""
        del memo
        return self


class NamedTransformerLayer(ChoosingTransformerLayer):
    """A layer that names its layer number while its weights are drawn."""

    def __init__(
        self,
        config: Any,
        submodules: Any,
        layer_number: int = 1,
        *args: Any,
        weight_names: WeightNames,
        vp_stage: int | None = None,
        **kwargs: Any,
    ) -> None:
        number = layer_number + _layers_before(config, vp_stage, kwargs)
        with weight_names.building_layer(number):
            super().__init__(config, submodules, layer_number, *args, vp_stage=vp_stage, **kwargs)


def _layers_before(config: Any, vp_stage: int | None, options: Mapping[str, Any]) -> int:
    """What a layer's global number has more than its ``layer_number``.

    Layers of multi-token prediction follow the model's own. Until Megatron-Core 0.17 their ``layer_number`` says so;
    from then on ``is_mtp_layer`` does, and they count from 1 on every pipeline stage.
    """
    if options.get("is_mtp_layer", False):
        return int(config.num_layers)
    if not options.get("add_layer_offset", True):
        return 0
    return int(get_transformer_layer_offset(config, vp_stage))
