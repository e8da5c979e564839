"""What ``--spec megatron_lightseq.megatron.lm layers`` gives to Megatron-LM.

Up to 0.18 Megatron-LM takes one specification for all pipeline stages; from 0.19 it calls a function with its
configuration. Both return the layers that Megatron-LM would choose itself, with our attention.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.megatron.lm import patch_points
from megatron_lightseq.megatron.lm.options import options_from_environment
from megatron_lightseq.megatron.lm.patches import Patches


def switch_on() -> Any:
    """Put LightSeq into the running Megatron-LM, with options from the environment.

    Returns:
        A layer specification (up to 0.18), or a function from Megatron-LM's configuration to one.

    Raises:
        ConfigError: the options in the environment cannot be read.
        UnsupportedError: this Megatron lacks a patch point, or is asked for something that ``--spec`` cannot do.
    """
    arguments = importlib.import_module("megatron.training").get_args()
    patches = Patches()
    patches.configure(options_from_environment(), arguments)
    patches.patch_model()
    try:
        owner, name = patch_points.DEFAULT_LAYERS.find()
    except UnsupportedError:
        return _specification(arguments)
    return getattr(owner, name)


def _specification(arguments: Any) -> Any:
    """The layers that Megatron-LM's ``gpt_builders.py`` would choose. The launcher does not need them."""
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
    """Refuse what one specification for all stages cannot express."""
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
                    rule="Megatron-LM takes one specification for all stages there, and these layers need several",
                    remedy="Leave --spec out and use the launcher, lightseq megatron-lm",
                )
            )


def _call(function: Callable[..., Any], **options: Any) -> Any:
    """Call a function with the options that this version of it has."""
    known = inspect.signature(function).parameters
    return function(**{name: value for name, value in options.items() if name in known})
