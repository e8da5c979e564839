"""The gated delta net layer beside Megatron's own, and in parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_lightseq.errors import ConfigError, UnsupportedError
from tests.megatron.runs import on_ranks

WIDTHS = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def layer_config(**changes: Any) -> Any:
    """Megatron's configuration of a small layer."""
    from megatron.core.transformer import TransformerConfig

    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "activation_func": torch.nn.functional.silu,
        "deterministic_mode": True,  # Megatron's path without flash-linear-attention's kernels
        "use_cpu_initialization": True,
        "layernorm_epsilon": 1e-6,
        **WIDTHS,
    }
    return TransformerConfig(**{**values, **changes})


@contextmanager
def on_a_cpu() -> Iterator[Any]:
    """Megatron's module, made to run without flash-linear-attention and without a GPU."""
    from megatron.core.ssm import gated_delta_net

    def l2norm(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    with (
        mock.patch.object(gated_delta_net, "HAVE_FLA", True),
        mock.patch.object(gated_delta_net, "l2norm", l2norm, create=True),
        mock.patch("torch.cuda.current_device", return_value="cpu"),
    ):
        yield gated_delta_net


def both(config: Any) -> tuple[Any, Any]:
    """Megatron's layer and ours, with the same weights."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from megatron_lightseq.megatron.gated_delta_net import GatedDeltaNetParts, LightSeqGatedDeltaNet

    parts = {
        "in_proj": ColumnParallelLinear,
        "out_norm": LocalSpecProvider().layer_norm(rms_norm=True, for_qk=False),
        "out_proj": RowParallelLinear,
    }
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with on_a_cpu() as megatrons:
        theirs = megatrons.GatedDeltaNet(
            config, megatrons.GatedDeltaNetSubmodules(**parts), layer_number=1, pg_collection=groups
        )
    ours = LightSeqGatedDeltaNet(config, GatedDeltaNetParts(**parts), 1, pg_collection=groups)
    with torch.no_grad():
        theirs.A_log.copy_(
            torch.rand_like(theirs.A_log) * 2 - 4
        )  # so that states live, and gradients are not rounding
        theirs.out_norm.weight.normal_(1, 0.2)
    ours.load_state_dict({name: x for name, x in theirs.state_dict().items() if x is not None}, strict=False)
    return theirs, ours


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("changes", [{}, {"activation_func": torch.nn.functional.gelu}], ids=["silu", "gelu"])
def test_output_and_gradients_are_megatrons(changes: dict[str, Any]) -> None:
    torch.manual_seed(1)
    theirs, ours = both(layer_config(**changes))
    x = torch.randn(150, 2, 64)
    results = []
    for layer in (theirs, ours):
        inputs = x.clone().requires_grad_()
        with on_a_cpu():
            out, bias = layer(inputs, None)
        assert bias is None
        gradients = torch.autograd.grad(out.square().sum(), [inputs, *layer.parameters()])
        results.append((out, *gradients))
    names = ["output", "input", *(name for name, _ in theirs.named_parameters())]
    assert names[2:] == [name for name, _ in ours.named_parameters()]
    for name, expected, found in zip(names, *results, strict=True):
        error = (found - expected).abs().max() / expected.abs().max()
        assert error < 2e-5, (name, float(error))


@pytest.mark.usefixtures("one_rank")
def test_fp64_is_fp64() -> None:
    """Against the fp32 layer the error is that of fp32; nothing in between is rounded further."""
    _, layer = both(layer_config())
    x = torch.randn(96, 1, 64)
    found = layer(x)[0]
    expected = layer.double()(x.double())[0]
    assert expected.dtype == torch.float64
    assert ((found - expected).abs().max() / expected.abs().max()) < 2e-6


@pytest.mark.usefixtures("one_rank")
def test_parameters_and_checkpoint_keys_are_megatrons() -> None:
    theirs, ours = both(layer_config())
    assert {name: x.shape for name, x in theirs.named_parameters()} == {
        name: x.shape for name, x in ours.named_parameters()
    }
    found = []
    for layer in (theirs, ours):
        state = layer.sharded_state_dict("decoder.")
        tensors = {}
        for entry in state.values():
            parts = entry.build() if hasattr(entry, "build") else [entry]
            for part in parts:
                if getattr(part, "data", None) is not None and hasattr(part, "global_shape"):
                    tensors[part.key] = (part.global_shape, part.global_offset, part.data)
        found.append((set(state), tensors))
    assert found[0][0] == found[1][0]
    assert found[0][1].keys() == found[1][1].keys()
    assert {
        "decoder.in_proj.weight.query",
        "decoder.in_proj.weight.alpha",
        "decoder.conv1d.weight.value",
    } <= set(found[1][1])
    for key, (shape, offset, data) in found[0][1].items():
        assert (shape, offset) == found[1][1][key][:2]
        assert torch.equal(data, found[1][1][key][2]), key


# --- several ranks ------------------------------------------------------------------------------------------------


def _layer_on_ranks(tp: int, cp: int, adopt: bool = True, **changes: Any) -> dict[str, Any]:
    """Output, and gradients of the whole parameters, of a layer on its share of one sequence."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_lightseq.megatron.cpu import platform
    from megatron_lightseq.megatron.rows_by_rank import rows_of_rank

    platform.activate()
    parallel_state.initialize_model_parallel(tp, context_parallel_size=cp)
    try:
        model_parallel_cuda_manual_seed(1)
        torch.manual_seed(3)
        config = layer_config(tensor_model_parallel_size=tp, context_parallel_size=cp, **changes)
        from megatron_lightseq.megatron.linear_layer import LinearSettings
        from megatron_lightseq.megatron.linear_spec import with_linear_layers
        from megatron_lightseq.megatron.spec import gpt_layer_spec

        spec = with_linear_layers(gpt_layer_spec(config), "GG", LinearSettings(), rms_norm=True)
        parts = spec.params["choices"].linear.delta_net
        layer = parts.module(config, parts.submodules, 1, **parts.params)
        layer.layout_adopted = adopt
        x = torch.randn(60, 2, 64)
        shard = layer.layout.shard(x, parallel_state.get_context_parallel_rank(), 0).requires_grad_()
        out, _ = layer(shard)
        out.square().sum().backward()
        rows = {
            "in_proj.weight": layer.projected,
            "conv1d.weight": layer.mixed,
            "A_log": {"alpha": 4},
            "dt_bias": {"alpha": 4},
        }
        owned = {
            name: rows_of_rank(sizes, parallel_state.get_tensor_model_parallel_rank(), tp)
            for name, sizes in rows.items()
        }
        gradients = {name: (parameter.grad, owned.get(name)) for name, parameter in layer.named_parameters()}
        return {"out": out.detach(), "input": shard.grad, "gradients": gradients}
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (1, 2), (1, 3), (2, 2)])
def test_ranks_compute_what_one_computes(tp: int, cp: int) -> None:
    (whole,) = on_ranks(1, _layer_on_ranks, 1, 1)
    ranks = on_ranks(tp * cp, _layer_on_ranks, tp, cp)
    outs = torch.cat([ranks[at * tp]["out"] for at in range(cp)])
    torch.testing.assert_close(outs, whole["out"], rtol=1e-4, atol=1e-5)
    inputs = torch.cat([ranks[at * tp]["input"] for at in range(cp)])
    torch.testing.assert_close(inputs, whole["input"], rtol=1e-4, atol=1e-4)
    for name, (expected, _) in whole["gradients"].items():
        for tensor_rank in range(tp):
            parts = [ranks[at * tp + tensor_rank]["gradients"][name] for at in range(cp)]
            found, rows = torch.stack([gradient for gradient, _ in parts]).sum(0), parts[0][1]
            if name == "out_proj.weight":
                there = expected.chunk(tp, 1)[tensor_rank]
            else:
                there = expected if rows is None else expected[rows]
            assert (found - there).abs().max() <= 2e-4 * expected.abs().max(), name


def test_a_layer_that_has_not_adopted_its_layout_refuses() -> None:
    from tests.harness.ranks import RankError

    with pytest.raises(
        RankError, match=r"LayoutError: attention on layout contiguous\(2\) in a model that has"
    ):
        on_ranks(2, _layer_on_ranks, 1, 2, False)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_rank")
def test_what_would_be_ignored_is_refused() -> None:
    _, layer = both(layer_config())
    x = torch.randn(8, 1, 64)
    angles = torch.zeros(8, 1, 1, 4)
    torch.testing.assert_close(layer(x, None, rotary_pos_emb=angles)[0], layer(x)[0])
    for given in ({"inference_context": object()}, {"attention_bias": x}):
        with pytest.raises(UnsupportedError, match=f"a gated delta net called with {next(iter(given))}"):
            layer(x, None, **given)
    window = torch.ones(8, 8, dtype=torch.bool).tril().triu(-2).logical_not()[None, None]
    with pytest.raises(UnsupportedError):
        layer(x, window)
    future = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    with pytest.raises(UnsupportedError, match="in a causal layer"):
        layer(x, future)


@pytest.mark.usefixtures("one_rank")
def test_dense_masks_of_documents_are_followed() -> None:
    _, layer = both(layer_config())
    x = torch.randn(24, 1, 64)
    document = torch.arange(24) >= 9
    seen = (document[:, None] == document[None]).tril()
    apart = torch.cat([layer(x[:9])[0], layer(x[9:])[0]])
    torch.testing.assert_close(layer(x, ~seen[None, None])[0], apart, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("one_rank")
def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises((ConfigError, AssertionError), match=r"multiple|divide"):
        both(layer_config(linear_num_value_heads=3))
