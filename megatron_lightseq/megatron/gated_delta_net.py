"""Megatron's gated delta net layer over a cut sequence: its parameters and checkpoint keys, our attention.

Megatron's own class (``megatron.core.ssm.gated_delta_net``) needs flash-linear-attention and a GPU, and orders tokens
by zigzag. The layer: arXiv 2412.06464, as in Qwen3-Next.

Shapes, per rank: S local tokens, B micro-batch, G key heads, H value heads (G divides H), K and V their dimensions.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import utils as transformer_utils
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from megatron_lightseq.errors import ConfigError, UnsupportedError, explain
from megatron_lightseq.linear import dist_causal_conv1d
from megatron_lightseq.mask import Mask
from megatron_lightseq.megatron.linear_layer import LinearLayer, LinearSettings
from megatron_lightseq.megatron.rows_by_rank import SECTIONS, by_rank, rows_of_rank, split_rows

UNIFORM_INIT = "uniform_init_method"
"""The attribute of a TransformerConfig that holds an initialiser U(low, high), if initial weights have names."""
DECAY_RANGE = (1.0, 16.0)
"""Of the initial decays A, whose logarithms are parameters."""
NORM_EPSILON = 1e-6
"""Of the L2 norms of queries and keys."""
_UNUSED = frozenset({"rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin", "rotary_pos_cos_sin"})
"""Arguments of attention that mean nothing to a layer without RoPE."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedDeltaNetParts:
    """The modules that the layer is built of; in_proj may normalise its input."""

    in_proj: Any = IdentityOp
    out_norm: Any = IdentityOp
    out_proj: Any = IdentityOp


class LightSeqGatedDeltaNet(LinearLayer):
    """A gated delta net in the place of self-attention.

    Args:
        config: Megatron's; its ``linear_*`` fields give heads and dimensions.
        submodules: the projections and the norm.
        layer_number: from 1.
        pg_collection: Megatron's groups; default: its global ones.
        settings: shared by all layers.
        options: other arguments of Megatron's layers, which concern attention.

    Raises:
        ConfigError: heads that do not divide.
    """

    def __init__(
        self,
        config: Any,
        submodules: GatedDeltaNetParts,
        layer_number: int = 1,
        *,
        pg_collection: Any = None,
        settings: LinearSettings | None = None,
        **options: Any,
    ) -> None:
        groups = pg_collection or options.pop("model_comm_pgs", None)
        super().__init__(config, groups, settings, normalize=False)
        self.layer_number = layer_number
        self.tp_rank, self.tp_size = _place(self.tensor_group)
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        key_heads, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        _check_heads(key_heads, value_heads, self.tp_size)
        keys, values = key_heads * self.key_dim, value_heads * self.value_dim
        self.mixed = {"query": keys, "key": keys, "value": values}
        """Rows of the convolution, over all tensor-parallel ranks."""
        self.projected = {**self.mixed, "z": values, "beta": value_heads, "alpha": value_heads}
        """Rows of the input projection."""
        self._build(submodules, values)
        self._initialise()

    def _build(self, parts: GatedDeltaNetParts, values: int) -> None:
        config, device = self.config, "cuda" if torch.cuda.is_available() else "cpu"
        linear = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tensor_group}
        self.in_proj = build_module(
            parts.in_proj,
            config.hidden_size,
            sum(self.projected.values()),
            init_method=by_rank(config.init_method, self.projected, self.tp_size),
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **linear,
        )
        channels, width = sum(self.mixed.values()) // self.tp_size, config.linear_conv_kernel_dim
        new = {"dtype": config.params_dtype, "device": device}
        self.conv1d = (
            torch.nn.utils.skip_init(  # which draws nothing: ranks have different numbers of channels
                torch.nn.Conv1d,
                channels,
                channels,
                width,
                groups=channels,
                padding=width - 1,
                bias=False,
                **new,
            )
        )
        heads = self.projected["alpha"] // self.tp_size
        self.dt_bias = torch.nn.Parameter(torch.ones(heads, **new))
        self.A_log = torch.nn.Parameter(torch.zeros(heads, **new))
        for parameter in (self.conv1d.weight, self.dt_bias, self.A_log):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        for parameter, sizes in ((self.in_proj.weight, self.projected), (self.conv1d.weight, self.mixed)):
            setattr(parameter, SECTIONS, tuple(rows // self.tp_size for rows in sizes.values()))
        self.out_norm = build_module(
            parts.out_norm,
            config=_with_plain_norms(config) if self.settings.plain_output_norm else config,
            hidden_size=self.value_dim,
            eps=config.layernorm_epsilon,
        )
        self._sum_norm_gradients()
        self.out_proj = build_module(
            parts.out_proj,
            values,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **linear,
        )

    def _sum_norm_gradients(self) -> None:
        """Sum the output norm's gradients over the heads of all ranks; with sequence parallelism Megatron does."""
        if self.tp_size == 1 or self.config.sequence_parallel:
            return

        def summed(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            torch.distributed.all_reduce(gradient, group=self.tensor_group)
            return gradient

        for parameter in self.out_norm.parameters():
            parameter.register_hook(summed)

    def _initialise(self) -> None:
        """Draw convolution and decays: whole ones, cut, where Megatron initialises on the CPU; else this rank's."""
        if not self.config.perform_initialization:
            return
        bound = 1 / math.sqrt(self.config.linear_conv_kernel_dim)
        with torch.no_grad():
            self.conv1d.weight.copy_(self._drawn(self.conv1d.weight, self.mixed, -bound, bound))
            decays = {"alpha": self.projected["alpha"]}
            self.A_log.copy_(self._drawn(self.A_log, decays, *DECAY_RANGE).log())

    def _drawn(self, parameter: Tensor, sizes: dict[str, int], low: float, high: float) -> Tensor:
        """Uniform numbers of a parameter's shape, in fp32."""
        if not self.config.use_cpu_initialization:
            with get_cuda_rng_tracker().fork():
                return torch.empty_like(parameter, dtype=torch.float32).uniform_(low, high)
        whole = torch.empty(sum(sizes.values()), *parameter.shape[1:])
        seeded = getattr(self.config, UNIFORM_INIT, None)
        if seeded is None:
            whole.uniform_(low, high)
        else:
            seeded(whole, low, high)
        return whole[rows_of_rank(sizes, self.tp_rank, self.tp_size)]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What the layer adds to the residual stream.

        Args:
            hidden_states: (S, B, hidden); with sequence parallelism this rank's part of S.
            attention_mask: dense, as attention gets it; documents are read from it.
            packed_seq_params: documents, as attention gets them.
            options: RoPE's angles, which are not used; anything else is refused unless None.

        Returns:
            The same shape as ``hidden_states``, and a bias or None.

        Raises:
            UnsupportedError: inference, or another argument or mask that would have to be ignored.
        """
        _check_options(options)
        mixed, _ = self.in_proj(hidden_states)
        mask = self.mask_for(attention_mask, packed_seq_params, len(mixed))
        widths = [rows // self.tp_size for rows in self.projected.values()]
        qkv, gate, beta, alpha = mixed.split([sum(widths[:3]), *widths[3:]], -1)
        q, k, v = self._convolved(qkv, mask).split(widths[:3], -1)
        q, k = (_unit(x.unflatten(-1, (-1, self.key_dim))) for x in (q, k))
        wide = torch.promote_types(alpha.dtype, torch.float32)
        decay = -self.A_log.to(wide).exp() * F.softplus(alpha.to(wide) + self.dt_bias)
        v = v.unflatten(-1, (-1, self.value_dim))
        out = self.attend(q, k, v, mask, log_decay=decay, beta=beta.to(wide).sigmoid())
        result: tuple[Tensor, Tensor | None] = self.out_proj(self._gated(out, gate))
        return result

    def _convolved(self, qkv: Tensor, mask: Mask) -> Tensor:
        """(S, B, C) to the same: the short convolution and its activation."""
        activation = self.config.activation_func
        is_silu = activation is F.silu
        out = dist_causal_conv1d(
            qkv,
            self.conv1d.weight,
            group=self.group,
            layout=self.layout,
            mask=mask,
            activation="silu" if is_silu else None,
        )
        return out if is_silu else activation(out)

    def _gated(self, out: Tensor, gate: Tensor) -> Tensor:
        """(S, B, H, V) and the gate (S, B, H * V) to (S, B, H * V): normalised per head, times the activated gate."""
        wide = torch.promote_types(gate.dtype, torch.float32)
        normed = self.out_norm(out.reshape(-1, self.value_dim)).view(gate.shape)
        return (normed * self.config.activation_func(gate.to(wide))).to(out.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None, **options: Any
    ) -> dict[str, Any]:
        """The sharded state under Megatron's keys: projections and convolution section by section."""
        metadata = transformer_utils.ensure_metadata_has_dp_cp_group(metadata)
        group = options.get("tp_group") or self.tensor_group
        common = {"tp_group": group, "dp_cp_group": metadata["dp_cp_group"]}
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        found: dict[str, Any] = transformer_utils.make_sharded_tensors_for_checkpoint(
            own, prefix, dict.fromkeys(own, 0), sharded_offsets, **common
        )
        for name, module in self.named_children():
            if name == "conv1d":
                state = module.state_dict(prefix="", keep_vars=True)
                found |= transformer_utils.make_sharded_tensors_for_checkpoint(
                    state, f"{prefix}conv1d.", {"weight": 0}, sharded_offsets, **common
                )
            else:
                found |= transformer_utils.sharded_state_dict_default(
                    module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=group
                )
        for name, sizes in (("in_proj.weight", self.projected), ("conv1d.weight", self.mixed)):
            found[prefix + name] = split_rows(found[prefix + name], sizes, self.tp_size)
        return found


def _with_plain_norms(config: Any) -> Any:
    plain = copy.copy(config)
    plain.layernorm_zero_centered_gamma = False
    return plain


def _place(group: torch.distributed.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank(), group.size())


def _unit(x: Tensor) -> Tensor:
    """Queries or keys (S, B, G, K) divided by their lengths, in their dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + NORM_EPSILON)).to(x.dtype)


def _check_heads(key_heads: int, value_heads: int, tp_size: int) -> None:
    if value_heads % key_heads or key_heads % tp_size:
        raise ConfigError(
            explain(
                got=f"linear_num_key_heads {key_heads}, linear_num_value_heads {value_heads}, {tp_size} "
                "tensor-parallel ranks",
                rule="key heads divide value heads, and tensor-parallel ranks divide both",
                remedy="Choose multiples",
            )
        )


def _check_options(options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None and name not in _UNUSED]
    if given:
        raise UnsupportedError(
            explain(
                got=f"a gated delta net called with {', '.join(given)}",
                rule="it takes hidden states and documents, for training and evaluation",
                remedy="Leave these arguments out, or use Megatron's own layer",
            )
        )
