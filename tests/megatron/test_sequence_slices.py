"""MLPs and losses in slices: the same losses and gradients as without slices, in a fraction of the memory."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from megatron_lightseq.errors import UnsupportedError
from megatron_lightseq.tools.memory import peak_tensor_bytes
from tests.megatron.runs import TINY, VOCAB_SIZE, batches, on_ranks
from tests.megatron.test_parity import BLOCK, CP2, FULL, PP2, SELECTIVE, SHARDED_OPTIMIZER, SP, TP2, VPP

SLICES = {"mlp_tile_tokens": 7, "loss_tile_tokens": 5}  # neither divides the number of tokens per rank
UNTIED = {"untie_embeddings_and_output_weights": True}
BIASES = {"add_bias_linear": True, "swiglu": False}
WIDE = {"micro_batch_size": 2}  # a slice then has 3 or 2 positions
MTP = {"mtp_num_layers": 2}

# --------------------------------------------------------------------------------------------------------------------
# Any function of rows
# --------------------------------------------------------------------------------------------------------------------


def _gradients(result: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weight = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
    return torch.autograd.grad((result * weight).sum(), leaves)


@pytest.mark.parametrize("slice_rows", [1, 3, 10, 64])
def test_a_function_of_rows_and_its_gradients_are_what_they_were(slice_rows: int) -> None:
    from megatron_lightseq.megatron.sequence_slices import in_slices

    torch.manual_seed(0)
    x = torch.randn(10, 2, 4, dtype=torch.float64, requires_grad=True)
    weight, unused = (torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(2))
    place = torch.arange(10, dtype=torch.float64)[:, None, None]
    expected = (x @ weight).tanh() * place
    actual = in_slices(lambda x, rows: (x @ weight).tanh() * place[rows], x, [weight, unused], slice_rows)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for mine, wanted in zip(_gradients(actual, x, weight), _gradients(expected, x, weight), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


def _bf16_gradient(main_grad: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a bf16 weight over 512 slices: the part that autograd returned, and all of it in fp64."""
    from megatron_lightseq.megatron.sequence_slices import in_slices

    torch.manual_seed(0)
    x = torch.rand(512, 8).bfloat16()
    weight = torch.nn.Parameter(torch.rand(8, 8).bfloat16())
    if main_grad is not None:
        weight.main_grad = main_grad  # type: ignore[attr-defined]
    in_slices(lambda x, _: x @ weight, x, [weight], 1).backward(torch.ones(512, 8).bfloat16())
    assert weight.grad is not None
    return weight.grad, x.double().T @ torch.ones(512, 8).double()


def test_gradients_of_weights_add_up_in_fp32() -> None:
    """Adds 512 numbers below 1. In bf16, the sum would stop growing at 256."""
    gradient, exact = _bf16_gradient(None)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), exact, rtol=2**-8, atol=0)


def test_megatrons_main_grad_gets_all_slices_but_the_last() -> None:
    """Data parallelism adds what autograd returns (the last slice), so each slice counts once."""
    main_grad = torch.full((8, 8), 100.0)
    last, exact = _bf16_gradient(main_grad)
    assert last.max() <= 1
    torch.testing.assert_close((main_grad + last.float()).double() - 100, exact, rtol=2**-8, atol=0)


@pytest.mark.usefixtures("one_rank")
def test_a_layer_that_fuses_accumulation_is_left_to_add_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradient_accumulation_fusion Megatron's linear layers fill main_grad and return a placeholder."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, layers
    from megatron.core.transformer import TransformerConfig

    from megatron_lightseq.megatron.sequence_slices import in_slices

    def accumulate(x: torch.Tensor, grad: torch.Tensor, main_grad: torch.Tensor) -> None:
        main_grad += grad.T @ x

    fused = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", fused, raising=False)
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True
    )
    layer = ColumnParallelLinear(8, 6, config=config, init_method=torch.nn.init.normal_, bias=False)
    layer.gradient_accumulation_fusion = True
    x, grad = torch.randn(10, 1, 8), torch.randn(10, 1, 6)
    layer.weight.main_grad, layer.weight.grad_added_to_main_grad = torch.zeros(6, 8), False
    in_slices(lambda x, _: layer(x)[0], x, [layer.weight], 3).backward(grad)
    assert layer.weight.grad_added_to_main_grad
    torch.testing.assert_close(layer.weight.main_grad, grad[:, 0].T @ x[:, 0])


# --------------------------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------------------------


def _built(overrides: dict[str, Any]) -> Any:
    from megatron_lightseq.config import PretrainConfig, with_values
    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from megatron_lightseq.training.setup import build_training

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        cpu_platform.activate()
    return build_training(with_values(PretrainConfig(), **{**TINY, **overrides}), vocab_size=VOCAB_SIZE)


def _one_step(overrides: dict[str, Any]) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Losses of a training step and of an evaluation after it, and the gradient of every parameter."""
    from megatron.core import parallel_state

    from megatron_lightseq.training.step import evaluate, train_step

    training = _built(overrides)
    loss = train_step(training, [batches(training, 0) for _ in training.chunks]).loss
    gradients = {
        f"{number} {name}": parameter.main_grad.clone()
        for number, model in enumerate(training.models)
        for name, parameter in model.named_parameters()
    }
    after = evaluate(training, [batches(training, 1) for _ in training.chunks], 1).loss
    parallel_state.destroy_model_parallel()
    return loss, after, gradients


def _worst(overrides: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """Relative differences caused by slices on this rank: of losses, and of gradients by parameter."""
    *wanted_losses, wanted = _one_step(overrides)
    *losses, gradients = _one_step({**overrides, **SLICES})
    assert gradients.keys() == wanted.keys()
    differences = [abs(mine / right - 1) for mine, right in zip(losses, wanted_losses, strict=True)]
    return max(differences), {
        name: ((gradients[name] - right).norm() / right.norm().clamp(min=1e-12)).item()
        for name, right in wanted.items()
    }


LAYOUTS = [
    pytest.param(1, WIDE, id="wide"),
    pytest.param(1, {**UNTIED, **BIASES, **FULL}, id="biases-full"),
    pytest.param(1, {**MTP, **FULL, **UNTIED}, id="mtp-full"),
    pytest.param(2, {**CP2, **FULL}, id="cp2-full"),
    pytest.param(2, {**CP2, **SELECTIVE, "cp_method": "zigzag"}, id="cp2-selective"),
    pytest.param(2, TP2, id="tp2"),
    pytest.param(2, {**TP2, **SP, **FULL, **UNTIED, **WIDE}, id="tp2sp-full-wide"),
    pytest.param(2, {**PP2, **FULL, "recompute_num_layers": 2}, id="pp2-full-pairs"),
    pytest.param(2, {**PP2, **VPP, **BLOCK}, id="pp2vpp-block"),
    pytest.param(2, {**SHARDED_OPTIMIZER, **FULL}, id="dp2-sharded-optimizer-full"),
    pytest.param(4, {**TP2, **SP, **CP2, **FULL, **BIASES}, id="tp2sp-cp2-full"),
]


@pytest.mark.parametrize(("world_size", "overrides"), LAYOUTS)
def test_losses_and_every_gradient_are_what_they_were(world_size: int, overrides: dict[str, Any]) -> None:
    for losses, gradients in on_ranks(world_size, _worst, overrides):
        assert losses <= 1e-6
        assert {name: worst for name, worst in gradients.items() if not worst <= 1e-5} == {}


def test_bf16_differs_by_its_rounding() -> None:
    ((losses, gradients),) = on_ranks(1, _worst, {"bf16": True, **FULL})
    assert losses <= 2**-8
    assert max(gradients.values()) <= 2**-6


def _value_left_out_in_pairs() -> float:
    from unittest.mock import PropertyMock, patch

    from megatron_lightseq.config import PretrainConfig

    wrong = PropertyMock(return_value=True)
    with patch.object(PretrainConfig, "recomputes_single_layers", new_callable=lambda: wrong):
        gradients = _one_step({**SLICES, **FULL, "recompute_num_layers": 2})[2]
    return sum(gradient.norm().item() for gradient in gradients.values())


def test_a_value_that_somebody_reads_may_not_be_left_out() -> None:
    """Its placeholder is not a number, so it cannot be mistaken for one."""
    (norm,) = on_ranks(1, _value_left_out_in_pairs)
    assert norm != norm


def _logits() -> tuple[torch.Tensor, torch.Tensor]:
    from megatron.core import parallel_state

    results = []
    for overrides in ({}, SLICES):
        training = _built(overrides)
        batch = next(batches(training, 0))
        with torch.no_grad():
            results.append(training.models[0](batch["tokens"], batch["position_ids"], None))
        parallel_state.destroy_model_parallel()
    return results[0], results[1]


def test_without_labels_a_model_returns_logits() -> None:
    ((whole, sliced),) = on_ranks(1, _logits)
    assert whole.shape == (1, TINY["seq_length"], 64)
    torch.testing.assert_close(sliced, whole)


# --------------------------------------------------------------------------------------------------------------------
# Memory and arithmetic
# --------------------------------------------------------------------------------------------------------------------

LONG = {
    "seq_length": 2048,
    "num_layers": 1,
    "ffn_hidden_size": 512,
    "make_vocab_size_divisible_by": 2048,
    "global_batch_size": 1,
}
ONE_TENSOR = 2048 * 512 * 4
"""Bytes of one tensor inside the MLP; the logits are 4 of these."""


def _peak(overrides: dict[str, Any]) -> float:
    """Peak memory of a training step's tensors, in units of one tensor of the MLP's width."""
    from megatron.core import parallel_state

    from megatron_lightseq.training.step import train_step

    training = _built({**LONG, **overrides})
    batch = batches(training, 0)
    gc.collect()  # frees earlier models
    peak = peak_tensor_bytes(lambda: train_step(training, batch))
    parallel_state.destroy_model_parallel()
    return peak / ONE_TENSOR


def _peaks() -> dict[str, float]:
    sliced = {"mlp_tile_tokens": 64, "loss_tile_tokens": 64}
    return {
        "whole": _peak(FULL),
        "slices of the loss": _peak({**FULL, "loss_tile_tokens": 64}),
        "slices of the MLP": _peak({**FULL, "mlp_tile_tokens": 64}),
        "both": _peak({**FULL, **sliced}),
        "both, stored": _peak(sliced),
    }


def test_neither_logits_nor_an_mlp_ever_exist_whole() -> None:
    """An MLP's backward holds 7 tensors of its width at a time (2 of them share memory), the loss one of logits."""
    (peaks,) = on_ranks(1, _peaks)
    assert peaks["whole"] > 7
    assert peaks["slices of the loss"] > 7
    assert 4 < peaks["slices of the MLP"] < 6
    assert max(peaks["both"], peaks["both, stored"]) < 2


FLOPS = {
    "whole": {},
    "slices": SLICES,
    "longer than any sequence": {"mlp_tile_tokens": 48, "loss_tile_tokens": 48},
    "full": FULL,
    "full, slices": {**FULL, **SLICES},
    "pairs, slices": {**FULL, "recompute_num_layers": 2, **SLICES},
    "three of four, slices": {**BLOCK, "recompute_num_layers": 3, **SLICES},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
    "mtp, full, slices": {**MTP, **FULL, **SLICES},
}


class _Operations(TorchDispatchMode):
    """Adds up the FLOPs of every operator for which torch has a formula."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def _flops(overrides: dict[str, Any]) -> tuple[float, float]:
    """FLOPs of a step, as counted by torch and as predicted, without the products of attention."""
    from megatron.core import parallel_state

    from megatron_lightseq.config.accounting import hardware_flops
    from megatron_lightseq.training.step import train_step

    training = _built(overrides)
    with _Operations() as counter:
        train_step(training, batches(training, 0))
    parallel_state.destroy_model_parallel()
    model = training.config.model
    layers, tokens = model.num_layers + (model.mtp_num_layers or 0), 4 * TINY["seq_length"]
    products = 6 * tokens * layers * TINY["seq_length"] / 2 * model.num_attention_heads * 2 * model.head_dim
    return counter.total, hardware_flops(training.config, training.padded_vocab_size) - products


@pytest.mark.parametrize("case", FLOPS)
def test_operations_are_those_that_run(case: str) -> None:
    """Torch counts matrix products, except those of attention, which run in our own kernel."""
    ((counted, predicted),) = on_ranks(1, _flops, FLOPS[case])
    assert counted == predicted


@pytest.mark.usefixtures("one_rank")
def test_layers_with_experts_are_refused() -> None:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_lightseq import gpt_layer_spec
    from megatron_lightseq.megatron.sequence_slices import slice_mlps

    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        num_moe_experts=2,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        add_bias_linear=False,
    )
    layer = TransformerLayer(config, gpt_layer_spec(config).submodules)
    with pytest.raises(UnsupportedError, match=r"MoELayer instead of a dense MLP: .*each token separately"):
        slice_mlps(layer, 8)
