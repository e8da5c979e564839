"""What Megatron-LM's ``--spec megatron_lightseq.megatron.lm layers`` gets.

Until 0.18 Megatron-LM takes a finished specification, the same for every pipeline stage; from 0.19 it calls a
function with its configuration. Both are made of Megatron-LM's own choice of layers, with the attention replaced
where that choice asks for it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.megatron.lm import seams
from megatron_lightseq.megatron.lm.options import options_from_environment
from megatron_lightseq.megatron.lm.plug import Plug


def switch_on() -> Any:
    """Put LightSeq into the running Megatron-LM, with options from the environment.

    Returns:
        A layer specification (until 0.18), or a function from Megatron-LM's configuration to one.

    Raises:
        ConfigError: the environment's options cannot be read.
        UnsupportedError: this Megatron lacks a seam, or is asked for what cannot be had by ``--spec``.
    """
    arguments = importlib.import_module("megatron.training").get_args()
    plug = Plug()
    plug.configure(options_from_environment(), arguments)
    plug.wire_model()
    try:
        owner, name = seams.DEFAULT_LAYERS.find()
    except UnsupportedError:
        return _specification(arguments)
    return getattr(owner, name)


def _specification(arguments: Any) -> Any:
    """The layers that ``gpt_builders.py`` would have chosen; the launcher needs none of this."""
    specs = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    _check(arguments)
    transformer_engine = arguments.transformer_impl == "transformer_engine"
    if arguments.num_experts:
        config = importlib.import_module("megatron.training.arguments").core_transformer_config_from_args(
            arguments
        )
        return _call(
            specs.get_gpt_decoder_block_spec,
            config=config,
            use_transformer_engine=transformer_engine,
            normalization=arguments.normalization,
            qk_l2_norm=getattr(arguments, "qk_l2_norm", False),
        )
    make = (
        specs.get_gpt_layer_with_transformer_engine_spec
        if transformer_engine
        else specs.get_gpt_layer_local_spec
    )
    return _call(
        make,
        qk_layernorm=arguments.qk_layernorm,
        multi_latent_attention=arguments.multi_latent_attention,
        normalization=arguments.normalization,
        qk_l2_norm=getattr(arguments, "qk_l2_norm", False),
    )


def _check(arguments: Any) -> None:
    """What one specification for all stages cannot say."""
    stages = getattr(arguments, "virtual_pipeline_model_parallel_size", None)
    refused = {
        "--num-experts with an interleaved pipeline": arguments.num_experts and stages,
        "--mtp-num-layers": getattr(arguments, "mtp_num_layers", None),
    }
    for name, given in refused.items():
        if given:
            raise UnsupportedError(
                explain(
                    got=f"{name} with --spec, in a Megatron-LM before 0.19",
                    rule="it takes one specification for all of the pipeline, which these layers need more than",
                    remedy="Leave --spec out and use the launcher, lightseq megatron-lm",
                )
            )


def _call(function: Callable[..., Any], **options: Any) -> Any:
    """Call with those of the options that this version's function has."""
    known = inspect.signature(function).parameters
    return function(**{name: value for name, value in options.items() if name in known})
