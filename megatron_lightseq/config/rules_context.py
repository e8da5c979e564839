"""Rules on context parallelism; most ask the layouts, methods and kernels themselves."""

from __future__ import annotations

from megatron_lightseq.config.rules import Machine, RuleSet
from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.kernels.specs import KERNELS, REPEATING_KERNELS
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import METHODS, Problem, resolve_method
from megatron_lightseq.schedule.grid import check_grid

CONTEXT = RuleSet()


def _layout(c: PretrainConfig) -> SequenceLayout:
    return SequenceLayout(c.context.layout_name, c.parallel.context_parallel_size)


@CONTEXT.check("seq_length", "context_parallel_size", "cp_method", "cp_layout")
def layout_divides_seq_length(c: PretrainConfig, _: Machine) -> None:
    """Every rank must get an equally long shard."""
    _layout(c).check_length(c.training.seq_length)


@CONTEXT.check("cp_method", "cp_layout", "context_parallel_size")
def method_accepts_layout(c: PretrainConfig, _: Machine) -> None:
    """The method must work on the layout."""
    if c.context.cp_method not in ("auto", "megatron"):
        resolve_method(c.context.method_name).check_layout(_layout(c))


@CONTEXT.rule(
    "cp_network",
    "cp_method",
    remedy="Remove it, or set cp_method to auto",
)
def network_is_for_auto(c: PretrainConfig, _: Machine) -> bool:
    """only cp_method auto uses cp_network, to predict the speed of methods."""
    return c.context.cp_network is None or c.context.cp_method == "auto"


@CONTEXT.check("cp_network")
def network_is_known(c: PretrainConfig, _: Machine) -> None:
    """The network must have a known name, or be described by numbers."""
    c.context.network  # noqa: B018 - parses


@CONTEXT.rule(
    "cp_ulysses_size",
    "cp_method",
    "cp_comm_type",
    remedy="Remove it, or set cp_method to usp",
)
def ulysses_size_is_for_usp(c: PretrainConfig, _: Machine) -> bool:
    """cp_ulysses_size is the number of ranks among which usp (Megatron-LM's a2a+p2p) exchanges heads."""
    used = c.context.cp_method == "usp" or "a2a+p2p" in c.context.cp_comm_type
    return used or c.context.cp_ulysses_size is None


@CONTEXT.check("cp_ulysses_size", "context_parallel_size")
def ulysses_size_divides(c: PretrainConfig, _: Machine) -> None:
    """The ranks must form groups of equal size."""
    if c.context.cp_ulysses_size is not None:
        _layout(c).merged(c.context.cp_ulysses_size)


@CONTEXT.rule(
    "cp_comm_type",
    "num_layers",
    "mtp_num_layers",
    remedy="Give one value, or one per layer",
)
def comm_type_is_one_or_one_per_layer(c: PretrainConfig, _: Machine) -> bool:
    """cp_comm_type has one value for all layers, or one value per layer (num_layers and mtp_num_layers)."""
    return len(c.context.cp_comm_type) in (0, 1, c.model.num_layers + (c.model.mtp_num_layers or 0))


@CONTEXT.rule(
    "cp_comm_type",
    "cp_method",
    remedy="Remove cp_comm_type, or choose another cp_method",
)
def comm_type_is_not_for_megatron(c: PretrainConfig, _: Machine) -> bool:
    """cp_comm_type selects methods of this package, which cp_method megatron does not use."""
    return c.context.cp_method != "megatron" or not c.context.cp_comm_type


@CONTEXT.rule(
    "cp_method",
    "cp_kernel",
    remedy="Set cp_kernel to auto, or cp_method to ring",
)
def full_rows_need_no_kernel(c: PretrainConfig, _: Machine) -> bool:
    """this cp_method computes full rows of scores without a kernel."""
    full_rows = c.context.cp_method in METHODS and METHODS[c.context.cp_method].full_rows
    return not full_rows or c.context.cp_kernel in ("auto", "reference")


@CONTEXT.rule(
    "cp_invariant",
    "cp_method",
    "cp_kernel",
    remedy="Remove cp_invariant, or set cp_method to lightseq, ring, zigzag or balanced and cp_kernel to auto",
)
def invariant_attention_is_ours(c: PretrainConfig, _: Machine) -> bool:
    """cp_invariant fixes the order of all sums, which only named methods with tiles and kernels that repeat follow."""
    name, kernel = c.context.cp_method, c.context.cp_kernel
    follows = name in METHODS and not METHODS[name].full_rows
    return c.context.cp_invariant is None or (follows and kernel in ("auto", *REPEATING_KERNELS))


@CONTEXT.rule(
    "cp_verify_transport",
    "cp_method",
    remedy="Set cp_verify_transport to false, or cp_method to one of this package's",
)
def verified_transport_is_ours(c: PretrainConfig, _: Machine) -> bool:
    """cp_verify_transport adds checksums to this package's messages; Megatron's own attention sends none of them."""
    return not c.context.cp_verify_transport or c.context.cp_method != "megatron"


@CONTEXT.check("cp_invariant", "seq_length", "context_parallel_size", "cp_method", "cp_layout")
def invariant_chunks_divide_the_sequence(c: PretrainConfig, _: Machine) -> None:
    """Every part of a shard must be made of whole chunks of the grid."""
    chunk = c.context.cp_invariant
    if chunk is not None and chunk > 0 and c.context.cp_method in METHODS:
        method, layout = resolve_method(c.context.method_name), _layout(c)
        problem = Problem(layout=layout, mask=Mask.causal(), seq_length=c.training.seq_length, chunk=chunk)
        check_grid(method.name, method.inner_problem(problem))


@CONTEXT.rule(
    "cp_method",
    "cp_layout",
    remedy="Set cp_layout to auto",
)
def megatron_method_is_zigzag(c: PretrainConfig, _: Machine) -> bool:
    """cp_method megatron uses Megatron's own zigzag layout."""
    return c.context.cp_method != "megatron" or c.context.layout_name == "zigzag"


@CONTEXT.rule(
    "cp_method",
    "context_parallel_size",
    needs="has_transformer_engine",
    remedy="Set context_parallel_size to 1, or choose another cp_method",
)
def megatron_method_needs_transformer_engine(c: PretrainConfig, m: Machine) -> bool:
    """cp_method megatron uses Megatron's own attention, which supports context parallelism only with Transformer
    Engine.
    """
    plain = c.context.cp_method == "megatron" and c.parallel.context_parallel_size > 1
    return not plain or m.has_transformer_engine is not False


@CONTEXT.rule(
    "cp_method",
    "attention_dropout",
    remedy="Set attention_dropout to 0, or cp_method to megatron",
)
def attention_has_no_dropout(c: PretrainConfig, _: Machine) -> bool:
    """attention is computed block by block, without storing the probabilities that dropout would apply to."""
    return c.context.cp_method == "megatron" or c.model.attention_dropout == 0


def _kernel_refusal(c: PretrainConfig, device_type: str | None) -> str | None:
    """Why the chosen kernel does not support the model, on this type of device or, with None, on any."""
    spec = KERNELS.get(c.context.cp_kernel)
    if spec is None:
        return None
    return spec.refusal(
        device_type=device_type,
        dtype="bfloat16" if c.training.bf16 else "float32",
        head_dim=c.model.head_dim,
        v_head_dim=c.model.value_head_dim,
        has_window=bool(c.model.window_size),
        has_documents=c.data.packed,
        has_softcap=c.model.attn_logit_softcapping is not None,
        layout=c.context.layout_name,
        cp_size=c.parallel.context_parallel_size,
    )


def _refused_kernel(c: PretrainConfig, reason: str) -> UnsupportedError:
    got = f"kernel {c.context.cp_kernel}"
    return UnsupportedError(explain(got=got, rule=reason, remedy="Set cp_kernel to auto"))


@CONTEXT.check(
    "cp_kernel",
    "bf16",
    "kv_channels",
    "window_size",
    "reset_attention_mask",
    "sft",
    "attn_logit_softcapping",
    "cp_method",
    "cp_layout",
    "context_parallel_size",
    "distributed_backend",
)
def kernel_supports_model(c: PretrainConfig, _: Machine) -> None:
    """The kernel must support dtype, head dimensions and mask on some device, with nccl on a GPU."""
    reason = _kernel_refusal(c, "cuda" if c.parallel.distributed_backend == "nccl" else None)
    if reason is not None:
        raise _refused_kernel(c, reason)


@CONTEXT.check("cp_kernel", "bf16", "kv_channels", needs="num_gpus")
def kernel_supports_device(c: PretrainConfig, m: Machine) -> None:
    """The kernel must support the model on this host's devices."""
    reason = _kernel_refusal(c, "cuda" if m.num_gpus else "cpu")
    if reason is not None and _kernel_refusal(c, None) is None:  # else it is refused on any device
        raise _refused_kernel(c, reason)


@CONTEXT.rule(
    "cp_kernel",
    needs="has_flash_attn",
    remedy="Install flash-attn, or set cp_kernel to auto",
)
def flash_attn_is_installed(c: PretrainConfig, m: Machine) -> bool:
    """the flash_attn kernel comes from the flash-attn package, which is not installed here."""
    return c.context.cp_kernel != "flash_attn" or m.has_flash_attn is not False


@CONTEXT.rule(
    "cp_kernel",
    "cp_method",
    remedy="Set cp_kernel to auto",
)
def megatron_method_has_no_kernel(c: PretrainConfig, _: Machine) -> bool:
    """cp_method megatron uses Megatron's attention, which does not run on the kernels of this package."""
    return c.context.cp_method != "megatron" or c.context.cp_kernel == "auto"
