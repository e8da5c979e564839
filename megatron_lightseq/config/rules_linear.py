"""Rules on linear layers."""

from __future__ import annotations

from megatron_lightseq.config.rules import Machine, RuleSet
from megatron_lightseq.config.rules_attention import PATTERN_REMEDY, pattern_fits
from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.config.sections_linear import LinearConfig
from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.kernels.linear.specs import LINEAR_KERNELS, Decay

LINEAR = RuleSet()

_WIDTHS = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_plain_output_norm",
)


@LINEAR.rule("linear_attention_freq", "num_layers", remedy=PATTERN_REMEDY)
def linear_pattern_fits(c: PretrainConfig, _: Machine) -> bool:
    """linear_attention_freq is a number of layers, or a list with one 0 or 1 for each of num_layers."""
    return pattern_fits(c.linear.linear_attention_freq, c.model.num_layers)


@LINEAR.rule(
    "experimental_attention_variant",
    "linear_attention_freq",
    "num_layers",
    remedy="Set both, so that one layer or more is linear, or remove both",
)
def linear_layers_are_somewhere(c: PretrainConfig, _: Machine) -> bool:
    """experimental_attention_variant says what linear layers are, and linear_attention_freq which layers are linear."""
    linear, num_layers = c.linear, c.model.num_layers
    if linear.experimental_attention_variant is None:
        return linear.linear_attention_freq is None
    # A pattern that does not fit has a message of its own.
    return bool(linear.layers(num_layers)) or not pattern_fits(linear.linear_attention_freq, num_layers)


@LINEAR.rule(
    "experimental_attention_variant",
    *_WIDTHS,
    remedy="Set experimental_attention_variant to gated_delta_net, or remove the others",
)
def widths_are_of_delta_nets(c: PretrainConfig, _: Machine) -> bool:
    """heads, convolution and output norm of a linear layer apply only to gated delta nets."""
    defaults = LinearConfig()
    unchanged = all(getattr(c.linear, key) == getattr(defaults, key) for key in _WIDTHS)
    return c.linear.experimental_attention_variant == "gated_delta_net" or unchanged


@LINEAR.rule(
    "experimental_attention_variant",
    "cp_linear_scan",
    "cp_linear_kernel",
    remedy="Set experimental_attention_variant, or remove the others",
)
def scans_are_of_linear_layers(c: PretrainConfig, _: Machine) -> bool:
    """cp_linear_scan and cp_linear_kernel are about linear layers, and no layer is linear."""
    defaults, linear = LinearConfig(), c.linear
    chosen = (linear.cp_linear_scan, linear.cp_linear_kernel)
    return linear.experimental_attention_variant is not None or chosen == (
        defaults.cp_linear_scan,
        defaults.cp_linear_kernel,
    )


@LINEAR.check("cp_linear_kernel", "experimental_attention_variant", "bf16", needs="num_gpus")
def linear_kernel_supports_device(c: PretrainConfig, m: Machine) -> None:
    """The kernel of linear layers must support dtype, head dims and gates on this host's devices."""
    linear, spec = c.linear, LINEAR_KERNELS.get(c.linear.cp_linear_kernel)
    if spec is None or linear.experimental_attention_variant is None:
        return
    is_delta_net = linear.experimental_attention_variant == "gated_delta_net"
    reason = spec.refusal(
        device_type="cuda" if m.num_gpus else "cpu",
        dtype="bfloat16" if c.training.bf16 else "float32",
        head_dim=linear.linear_key_head_dim if is_delta_net else c.model.head_dim,
        v_head_dim=linear.linear_value_head_dim if is_delta_net else c.model.value_head_dim,
        decay=Decay.HEAD if is_delta_net else Decay.NONE,
        has_beta=is_delta_net,
    )
    if reason is not None:
        got = f"cp_linear_kernel {linear.cp_linear_kernel}"
        raise UnsupportedError(explain(got=got, rule=reason, remedy="Set cp_linear_kernel to auto"))


@LINEAR.rule(
    "linear_num_key_heads",
    "linear_num_value_heads",
    "tensor_model_parallel_size",
    remedy="Choose multiples",
)
def linear_heads_divide(c: PretrainConfig, _: Machine) -> bool:
    """in gated delta nets, key heads divide value heads, and tensor parallel ranks divide both."""
    linear = c.linear
    if linear.experimental_attention_variant != "gated_delta_net" or linear.linear_num_key_heads < 1:
        return True  # bounds have messages of their own
    per_key = linear.linear_num_value_heads % linear.linear_num_key_heads
    return per_key == 0 and linear.linear_num_key_heads % c.parallel.tensor_model_parallel_size == 0


@LINEAR.rule(
    "experimental_attention_variant",
    "cp_method",
    "cp_layout",
    "context_parallel_size",
    remedy="Use cp_method lightseq, whose layout is contiguous, or set context_parallel_size to 1",
)
def linear_layers_hold_adjacent_tokens(c: PretrainConfig, _: Machine) -> bool:
    """a state goes through the tokens in their order, so with linear layers every rank holds adjacent ones."""
    if c.linear.experimental_attention_variant is None or c.parallel.context_parallel_size == 1:
        return True
    return c.context.cp_method != "megatron" and c.context.layout_name == "contiguous"


@LINEAR.rule(
    "experimental_attention_variant",
    "linear_conv_kernel_dim",
    "seq_length",
    "context_parallel_size",
    remedy="Use fewer ranks, or longer sequences",
)
def convolution_fits_a_shard(c: PretrainConfig, _: Machine) -> bool:
    """the convolution of a gated delta net looks back into one other rank at most."""
    if c.linear.experimental_attention_variant != "gated_delta_net":
        return True
    held = c.training.seq_length // max(1, c.parallel.context_parallel_size)
    return c.linear.linear_conv_kernel_dim - 1 <= held


@LINEAR.rule(
    "experimental_attention_variant",
    "multi_latent_attention",
    "attention_dropout",
    remedy="Use gated_delta_net, or plain attention without dropout",
)
def linear_attention_is_plain(c: PretrainConfig, _: Machine) -> bool:
    """variant linear takes the place of plain attention without dropout; latent attention has no such form."""
    if c.linear.experimental_attention_variant != "linear":
        return True
    return not c.model.multi_latent_attention and c.model.attention_dropout == 0
