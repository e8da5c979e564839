"""Models with other sequence layers: refused by name if those would get tokens in the wrong order."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_lightseq.errors import UnsupportedError
from megatron_lightseq.layout import SequenceLayout
from tests.megatron.runs import on_ranks


def stand_in(name: str, module: str, **members: Any) -> type[torch.nn.Module]:
    """A fake of a Megatron layer whose dependencies are not installed, with its name and module."""
    return type(name, (torch.nn.Module,), {"__module__": module, **members})


def _undo_attention_load_balancing(x: Any) -> Any:
    return x


class Reordering(torch.nn.Module):
    """A user's layer that undoes Megatron's zigzag order."""

    def forward(self, x: Any) -> Any:
        return [_undo_attention_load_balancing(part) for part in x]


def restore_order(x: Any) -> Any:
    return _undo_attention_load_balancing(x)


class Restorer:
    """An object that reorders for a layer, as Megatron's MambaContextParallel does."""

    def __call__(self, x: Any) -> Any:
        return restore_order(x)


class Indirect(torch.nn.Module):
    """A user's layer, in which an object that it makes calls a function that reorders."""

    def __init__(self) -> None:
        super().__init__()
        self.restore = Restorer()


class Static(torch.nn.Module):
    """A user's layer that reorders in a static method."""

    @staticmethod
    def restored(x: Any) -> Any:
        return restore_order(x)


MambaMixer = stand_in("MambaMixer", "megatron.core.ssm.mamba_mixer")
LAYERS = {
    "MambaMixer": MambaMixer,
    "Subclass": type("Subclass", (MambaMixer,), {}),
    "GatedDeltaNet": stand_in("GatedDeltaNet", "megatron.core.ssm.gated_delta_net"),
    "GatedDeltaProductMixer": stand_in("GatedDeltaProductMixer", "megatron.core.ssm.gated_delta_product"),
    "Reordering": Reordering,
    "Indirect": Indirect,
    "Static": Static,
}


def hybrid(kind: type[torch.nn.Module]) -> Any:
    """A model with LightSeq attention and another layer."""
    from tests.megatron.test_core_attention import build, transformer_config

    attention = torch.nn.Module()
    attention.core_attention = build(transformer_config())
    return torch.nn.ModuleList([attention, kind()])


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_reorder_tokens_are_refused_on_other_layouts(name: str) -> None:
    from megatron_lightseq.megatron.sequence_mixers import check_other_mixers

    model = hybrid(LAYERS[name])
    for layout in (SequenceLayout.contiguous(2), SequenceLayout.striped(2)):
        expected = (
            rf"1 {name} next to LightSeq attention on layout {layout.name}\(2\): .*zigzag.*cp_method zigzag"
        )
        with pytest.raises(UnsupportedError, match=expected):
            check_other_mixers(model, layout)
    check_other_mixers(model, SequenceLayout.zigzag(2))


@pytest.mark.usefixtures("one_rank")
def test_one_rank_is_told_which_layers_are_not_ours(caplog: pytest.LogCaptureFixture) -> None:
    from megatron_lightseq.megatron import adopt_layout, notes

    notes.note_once.cache_clear()
    adopt_layout(hybrid(torch.nn.Identity))
    assert not caplog.records
    adopt_layout(hybrid(MambaMixer))
    (record,) = caplog.records
    assert record.message == (
        "LightSeq attention is used in this model's attention layers; 1 MambaMixer stay Megatron's own"
    )


def test_megatrons_own_layers_are_known() -> None:
    """Detected by their source, because importing them needs packages that are not installed."""
    import megatron.core
    from megatron.core.models.gpt import GPTModel
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock

    from megatron_lightseq.megatron.fixes.rebind import code_names
    from megatron_lightseq.megatron.sequence_mixers import ZIGZAG_FUNCTIONS, _reorders

    source = Path(megatron.core.__path__[0]) / "ssm" / "mamba_mixer.py"
    names = code_names(compile(source.read_text(), "mamba_mixer.py", "exec"))
    assert "MambaContextParallel" in names & ZIGZAG_FUNCTIONS
    assert _reorders(GatedDeltaNet)
    harmless = GPTModel, SelfAttention, MLASelfAttention, MoELayer, MultiTokenPredictionBlock, torch.nn.Linear
    assert not any(map(_reorders, harmless))


def megatrons_delta_net(config: Any) -> torch.nn.Module:
    """A layer of Megatron's own class, which asks for packages before it builds anything."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm import gated_delta_net
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    parts = gated_delta_net.GatedDeltaNetSubmodules(
        in_proj=ColumnParallelLinear, out_norm=torch.nn.Identity, out_proj=RowParallelLinear
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with (
        mock.patch.object(gated_delta_net, "HAVE_FLA", True),
        mock.patch("torch.cuda.current_device", return_value="cpu"),
    ):
        layer: torch.nn.Module = gated_delta_net.GatedDeltaNet(
            config, parts, layer_number=2, pg_collection=groups
        )
    return layer


def _mixed_model(method: str, layer: str) -> str:
    """The error of adopt_layout for a GPTModel whose second layer is of another kind."""
    from megatron.core import parallel_state
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_lightseq.megatron import adopt_layout
    from tests.megatron.test_layouts import own_model

    model, _ = own_model(method, adopt=False)
    second = model.decoder.layers[1].self_attention
    if layer == "attention":
        second.core_attention = DotProductAttention.__new__(DotProductAttention)
        torch.nn.Module.__init__(second.core_attention)
    elif layer == "GatedDeltaNet":
        model.decoder.layers[1].self_attention = megatrons_delta_net(model.config)
    else:
        model.decoder.layers[1].self_attention = LAYERS[layer]()
    try:
        adopt_layout(model)
    except UnsupportedError as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
    return "adopted"


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        ("MambaMixer", "MambaMixer"),
        ("GatedDeltaNet", "GatedDeltaNet"),
        ("attention", "DotProductAttention"),
    ],
)
def test_adopting_a_layout_refuses_a_hybrid_model(layer: str, named: str) -> None:
    for message in on_ranks(2, _mixed_model, "lightseq", layer):
        assert f"a model with 1 {named} next to LightSeq attention on layout contiguous(2)" in message
    assert on_ranks(2, _mixed_model, "zigzag", layer) == ["adopted"] * 2
