"""What families share: recipe keys of decoders, windows and experts, and tables of names."""

from __future__ import annotations

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.convert.families.family import Keys, Names, Rule
from megatron_lightseq.convert.fields import Fields
from megatron_lightseq.convert.forms import ByGroup, Fused, Stacked

LAYER = "decoder.layers.{layer}."
THEIR_LAYER = "model.layers.{layer}."
FULL, SLIDING = "full_attention", "sliding_attention"


# ---- recipe keys ----------------------------------------------------------------------------------------------


def decoder_keys(
    fields: Fields, *, tied: bool = False, groups: int | None = None, head_dim: int | None = None
) -> Keys:
    """Widths, depth and norms; ``tied``, ``groups`` and ``head_dim`` are a family's defaults for absent fields."""
    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    fields.expect("chunk_size_feed_forward", 0)
    fields.expect("pretraining_tp", 1)
    return {
        "num_layers": fields.whole("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": fields.whole("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": fields.whole("num_key_value_heads", heads if groups is None else groups),
        "kv_channels": fields.whole("head_dim", hidden // max(heads, 1) if head_dim is None else head_dim),
        "max_position_embeddings": fields.whole("max_position_embeddings"),
        "norm_epsilon": fields.real("rms_norm_eps", 1e-6),
        "untie_embeddings_and_output_weights": not fields.flag("tie_word_embeddings", tied),
        "attention_dropout": fields.real("attention_dropout", 0.0),
        "vocab_size": fields.whole("vocab_size"),
    }


def expect_silu(fields: Fields) -> Keys:
    """The key of a gated MLP with SiLU."""
    fields.expect("hidden_act", "silu")
    return {"swiglu": True}


def window_keys(window: int | None, kinds: list[str], fields: Fields) -> Keys:
    """The keys of sliding windows.

    Args:
        window: tokens that a query sees, itself included.
        kinds: of attention, for each layer.
        fields: for the error.

    Raises:
        UnsupportedError: a layer has another kind of attention.
    """
    others = sorted(set(kinds) - {FULL, SLIDING})
    if others:
        raise fields.refusal("layer_types", others, f"recipes have {FULL} and {SLIDING}")
    if SLIDING not in kinds:
        return {}
    if window is None:
        raise fields.refusal("sliding_window", window, f"layers with {SLIDING} need its size")
    keys: Keys = {"window_size": [window - 1, 0]}
    full = [number for number, kind in enumerate(kinds, 1) if kind == FULL]
    if full:
        every = full[0]
        regular = full == list(range(every, len(kinds) + 1, every)) and every > 1
        keys["window_attn_skip_freq"] = every if regular else [int(kind == SLIDING) for kind in kinds]
    return keys


def layer_kinds(fields: Fields, usual: list[str]) -> list[str]:
    """``layer_types``, or where the file does not have it what the family derives from other fields."""
    kinds = [str(kind) for kind in fields.items("layer_types")] or usual
    if len(kinds) != len(usual):
        raise fields.refusal("layer_types", kinds, f"there is one kind for each of {len(usual)} layers")
    return kinds


def alternating_windows(fields: Fields, default: int | None, every: int = 2) -> Keys:
    """Windows in all layers but every n-th, where ``layer_types`` does not say otherwise."""
    layers = fields.whole("num_hidden_layers")
    usual = [SLIDING if i % every else FULL for i in range(1, layers + 1)]
    return window_keys(fields.given("sliding_window", default), layer_kinds(fields, usual), fields)


def qwen_window_keys(fields: Fields) -> Keys:
    """Windows of the later layers, from ``max_window_layers`` on, where ``use_sliding_window`` says so."""
    layers, window = fields.whole("num_hidden_layers"), fields.take("sliding_window", None)
    first = fields.whole("max_window_layers", 28)
    uses = fields.flag("use_sliding_window", False)
    usual = [SLIDING if uses and window is not None and i >= first else FULL for i in range(layers)]
    return window_keys(window, layer_kinds(fields, usual), fields)


# ---- names ----------------------------------------------------------------------------------------------------


def embedding_names() -> Names:
    """Embedding, output layer and last norm."""
    return {
        "embedding.word_embeddings.weight": Rule(("model.embed_tokens.weight",)),
        "output_layer.weight": Rule(("lm_head.weight",)),
        "decoder.final_layernorm.weight": Rule(("model.norm.weight",)),
    }


def in_layer(**names: str | tuple[str, ...]) -> Names:
    """Tensors of one layer that are the same in both; ``__`` stands for a dot in Megatron's names."""
    found = {}
    for ours, theirs in names.items():
        several = (theirs,) if isinstance(theirs, str) else theirs
        found[LAYER + ours.replace("__", ".")] = Rule(tuple(THEIR_LAYER + name for name in several))
    return found


def by_group(config: PretrainConfig) -> ByGroup:
    """How a model's queries, keys and values are joined."""
    model = config.model
    return ByGroup(model.num_attention_heads, model.query_groups, model.head_dim)


def attention_names(config: PretrainConfig) -> Names:
    """Grouped-query attention with separate projections."""
    found: dict[str, Rule] = {}
    for kind in ("weight", "bias"):
        parts = tuple(f"{THEIR_LAYER}self_attn.{x}_proj.{kind}" for x in "qkv")
        found[f"{LAYER}self_attention.linear_qkv.{kind}"] = Rule(parts, by_group(config))
    return {
        **found,
        **in_layer(
            self_attention__linear_proj__weight="self_attn.o_proj.weight",
            self_attention__linear_proj__bias="self_attn.o_proj.bias",
            self_attention__q_layernorm__weight="self_attn.q_norm.weight",
            self_attention__k_layernorm__weight="self_attn.k_norm.weight",
        ),
    }


def fused_attention_names(config: PretrainConfig) -> Names:
    """Grouped-query attention with one projection: queries, then keys, then values."""
    model = config.model
    rows = tuple(
        heads * model.head_dim
        for heads in (model.num_attention_heads, model.query_groups, model.query_groups)
    )
    form = Fused(by_group(config), rows)
    qkv = f"{LAYER}self_attention.linear_qkv.weight"
    return {
        **attention_names(config),
        qkv: Rule((THEIR_LAYER + "self_attn.qkv_proj.weight",), form),
    }


def norm_names() -> Names:
    """The two norms before attention and MLP."""
    return in_layer(
        input_layernorm__weight="input_layernorm.weight",
        pre_mlp_layernorm__weight="post_attention_layernorm.weight",
    )


def mlp_names(
    ours: str = "mlp.",
    theirs: str = "mlp.",
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Names:
    """A gated MLP, or with other prefixes an expert."""
    gate, up, down = (f"{THEIR_LAYER}{theirs}{name}.weight" for name in projections)
    return {
        f"{LAYER}{ours}linear_fc1.weight": Rule((gate, up), Stacked()),
        f"{LAYER}{ours}linear_fc2.weight": Rule((down,)),
    }


def fused_mlp_names() -> Names:
    """A gated MLP with one projection: gate, then up."""
    return in_layer(
        mlp__linear_fc1__weight="mlp.gate_up_proj.weight", mlp__linear_fc2__weight="mlp.down_proj.weight"
    )


def shared_expert_names() -> Names:
    """The expert that every token is routed to."""
    return mlp_names("mlp.shared_experts.", "mlp.shared_experts.")


def expert_bias_names() -> Names:
    """What is added to scores when experts are chosen; both formats keep it in float32."""
    theirs = THEIR_LAYER + "mlp.gate.e_score_correction_bias"
    return {LAYER + "mlp.router.expert_bias": Rule((theirs,), float32=True)}


def expert_names(
    theirs: str = "mlp.", projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Names:
    """Router and experts, each expert with its own tensors in the file."""
    return {
        LAYER + "mlp.router.weight": Rule((f"{THEIR_LAYER}{theirs}gate.weight",)),
        **mlp_names("mlp.experts.local_experts.{expert}.", theirs + "experts.{expert}.", projections),
    }


def llama_names(config: PretrainConfig) -> Names:
    """A decoder with Llama's names."""
    return {**embedding_names(), **attention_names(config), **norm_names(), **mlp_names()}
