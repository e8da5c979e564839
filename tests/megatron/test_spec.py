"""gpt_layer_spec: Megatron's specification with one module replaced."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_lightseq.config import ContextParallelConfig, PretrainConfig, with_values
from megatron_lightseq.errors import ConfigError
from tests.megatron.test_core_attention import transformer_config

pytestmark = pytest.mark.usefixtures("one_rank")


def flattened(spec: Any, prefix: str = "") -> dict[str, Any]:
    """Every module that a specification names, by its path."""
    modules = {prefix: getattr(spec, "module", spec)}
    submodules = getattr(spec, "submodules", None)
    for name, child in vars(submodules).items() if submodules is not None else ():
        modules |= flattened(child, f"{prefix}.{name}")
    return modules


def test_only_core_attention_differs_from_megatrons_local_layer() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_lightseq.megatron import LightSeqCoreAttention, gpt_layer_spec

    for config in (
        transformer_config(normalization="RMSNorm", qk_layernorm=True),
        with_values(PretrainConfig(), normalization="RMSNorm", qk_layernorm=True),
    ):
        ours = flattened(gpt_layer_spec(config))
        theirs = flattened(get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=True))
        differing = {name for name in theirs if str(ours[name]) != str(theirs[name])}
        assert differing == {".self_attention.core_attention"}
        assert ours[".self_attention.core_attention"] is LightSeqCoreAttention
        assert theirs[".self_attention.core_attention"] is DotProductAttention


def test_settings_reach_the_attention() -> None:
    from megatron_lightseq.attention import AttentionStats
    from megatron_lightseq.megatron import gpt_layer_spec

    stats = AttentionStats()
    context = ContextParallelConfig(cp_method="zigzag", cp_kernel="reference", cp_overlap=False)
    spec = gpt_layer_spec(
        transformer_config(), context=context, keep_attention_on_recompute=False, stats=stats
    )
    settings = spec.submodules.self_attention.submodules.core_attention.params["settings"]
    assert (settings.method, settings.layout, settings.kernel) == ("zigzag", "zigzag", "reference")
    assert (settings.overlap, settings.keep_on_recompute) == (False, False)
    assert settings.stats is stats


def test_a_pretrain_config_brings_its_own_settings() -> None:
    from megatron_lightseq.megatron import gpt_layer_spec

    config = with_values(
        PretrainConfig(), cp_method="ring", cp_layout="striped", keep_attention_on_recompute=False
    )
    settings = gpt_layer_spec(config).submodules.self_attention.submodules.core_attention.params["settings"]
    assert (settings.method, settings.layout, settings.keep_on_recompute) == ("ring", "striped", False)


def test_megatron_method_is_megatrons_specification() -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_lightseq.megatron import gpt_layer_spec

    spec = gpt_layer_spec(transformer_config(), context=ContextParallelConfig(cp_method="megatron"))
    assert flattened(spec)[".self_attention.core_attention"] is DotProductAttention


def test_specifications_do_not_share_modules() -> None:
    """Megatron shares some objects between specifications. Changing ours must not change others."""
    from megatron_lightseq.megatron import gpt_layer_spec

    first, second = (gpt_layer_spec(transformer_config()) for _ in range(2))
    assert first.submodules.self_attention is not second.submodules.self_attention


def test_mixture_of_experts_and_latent_attention_stay_megatrons() -> None:
    from megatron.core.transformer import MLATransformerConfig

    from megatron_lightseq.megatron import LightSeqCoreAttention, gpt_layer_spec

    experts = gpt_layer_spec(transformer_config(num_moe_experts=2, add_bias_linear=False))
    assert "MoELayer" in str(flattened(experts)[".mlp"])
    latent = MLATransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        multi_latent_attention=True,
        apply_rope_fusion=False,
    )
    modules = flattened(gpt_layer_spec(latent))
    assert "MLASelfAttention" in str(modules[".self_attention"])
    assert modules[".self_attention.core_attention"] is LightSeqCoreAttention


# --- Transformer Engine -----------------------------------------------------------------------------------------


@pytest.fixture
def transformer_engine(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake Transformer Engine that can be imported, and Megatron's specification of its layers."""
    from megatron.core.extensions import transformer_engine as extension
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_lightseq.megatron import spec, transformer_impl

    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", ModuleType("transformer_engine.pytorch"))
    monkeypatch.setattr(extension, "HAVE_TE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    class TELinear:
        pass

    def te_spec(**options: Any) -> Any:
        assert "normalization" not in options, "the specification of Transformer Engine has no such argument"
        built = get_gpt_layer_local_spec(**options)
        built.submodules.self_attention.submodules.linear_qkv = TELinear
        return built

    monkeypatch.setattr(spec, "get_gpt_layer_with_transformer_engine_spec", te_spec)
    monkeypatch.delenv(transformer_impl.TRANSFORMER_IMPL_VARIABLE, raising=False)


@pytest.mark.usefixtures("transformer_engine")
def test_transformer_engine_is_used_where_it_is() -> None:
    from megatron_lightseq.megatron import LightSeqCoreAttention, gpt_layer_spec

    modules = flattened(gpt_layer_spec(transformer_config()))
    assert modules[".self_attention.linear_qkv"].__name__ == "TELinear"
    assert modules[".self_attention.core_attention"] is LightSeqCoreAttention


@pytest.mark.usefixtures("transformer_engine")
def test_the_environment_may_ask_for_local_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lightseq.megatron.transformer_impl import use_transformer_engine

    assert use_transformer_engine()
    monkeypatch.setenv("MLS_TRANSFORMER_IMPL", "local")
    assert not use_transformer_engine()
    monkeypatch.setenv("MLS_TRANSFORMER_IMPL", "te")
    with pytest.raises(
        ConfigError, match=r"MLS_TRANSFORMER_IMPL='te': .*transformer_engine or local.*unset it"
    ):
        use_transformer_engine()


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("error", [ImportError("no such file"), OSError("libcudart.so"), RuntimeError("abi")])
def test_a_broken_installation_means_local_modules(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Real installations raise many kinds of exceptions if torch was replaced by another version."""
    from megatron_lightseq.megatron import transformer_impl

    real_import = transformer_impl.importlib.import_module

    def failing(name: str) -> Any:
        if name.startswith("transformer_engine"):
            raise error
        return real_import(name)

    monkeypatch.setattr(transformer_impl.importlib, "import_module", failing)
    assert not transformer_impl.use_transformer_engine()
    monkeypatch.setenv("MLS_TRANSFORMER_IMPL", "transformer_engine")
    with pytest.raises(ConfigError, match=rf"cannot be used: {type(error).__name__}: {error}.*IMPL=local"):
        transformer_impl.use_transformer_engine()
