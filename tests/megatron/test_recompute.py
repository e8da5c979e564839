"""Activation recomputation repeats neither attention's forward nor its communication."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.megatron.runs import Run, on_ranks, train
from tests.megatron.test_parity import BLOCK, CP2, FULL, PP2, SELECTIVE, VPP

SHORT = {"train_iters": 2}
PARALLEL = {
    "cp2": (2, {**SHORT, **CP2}),
    "cp2-zigzag": (2, {**SHORT, **CP2, "cp_method": "zigzag"}),
    "pp2-cp2": (4, {**SHORT, **PP2, **CP2}),
    "pp2vpp-cp2": (4, {**SHORT, **PP2, **VPP, **CP2}),
}
RECOMPUTE = {
    "full": FULL,
    "full-pairs": {**FULL, "recompute_num_layers": 2},
    "block": BLOCK,
    "selective": SELECTIVE,
}


@pytest.mark.parametrize("parallel", PARALLEL)
def test_forwards_and_bytes_equal_those_without_recomputation(parallel: str) -> None:
    world_size, overrides = PARALLEL[parallel]
    plain: list[Run] = on_ranks(world_size, train, overrides)
    assert all(run.forwards == run.layer_calls > 0 and run.bytes_sent > 0 for run in plain)
    for kind, recompute in RECOMPUTE.items():
        if parallel == "pp2vpp-cp2" and kind == "full-pairs":
            continue  # a chunk of one layer has no pairs
        for run, reference in zip(
            on_ranks(world_size, train, {**overrides, **recompute}), plain, strict=True
        ):
            assert (run.forwards, run.bytes_sent) == (reference.forwards, reference.bytes_sent), kind
            assert run.grad_norms == pytest.approx(reference.grad_norms, rel=1e-6), kind


def test_counts_double_when_attention_is_not_kept() -> None:
    """Shows that the counters work: if outputs are not kept, full recomputation runs every forward twice."""
    for run in on_ranks(2, train, {**SHORT, **CP2, **FULL, "keep_attention_on_recompute": False}):
        assert run.forwards == 2 * run.layer_calls


# --------------------------------------------------------------------------------------------------------------------
# Orders of backward passes that a pipeline schedule never uses, but a user's loop may
# --------------------------------------------------------------------------------------------------------------------


def _attention() -> Any:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_lightseq.megatron import CoreAttentionSettings, LightSeqCoreAttention

    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, attention_dropout=0.0)
    settings = CoreAttentionSettings(kernel="reference")
    return LightSeqCoreAttention(config, 1, AttnMaskType.causal, "self", settings=settings)


def _layer(attention: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def layer(x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (2, 8))
        return x + attention(heads * 1.1, heads * 0.9, heads.tanh())

    return layer


def _inputs(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 1, 16, generator=generator, requires_grad=True) for _ in range(count)]


def _gradients(outputs: list[torch.Tensor], inputs: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    sum(out.square().sum() for out in outputs).backward(**options)  # type: ignore[union-attr]
    gradients = [x.grad.clone() for x in inputs if x.grad is not None]
    for x in inputs:
        x.grad = None
    return gradients


@pytest.mark.usefixtures("one_rank")
def test_several_micro_batches_in_one_backward() -> None:
    """Autograd then recomputes the last micro-batch first, the opposite of a pipeline's order."""
    from megatron.core.tensor_parallel import checkpoint

    attention = _attention()
    layer, inputs = _layer(attention), _inputs(3)
    expected = _gradients([layer(x) for x in inputs], inputs)
    before = attention.settings.stats.forwards
    actual = _gradients([checkpoint(layer, False, x) for x in inputs], inputs)
    torch.testing.assert_close(actual, expected)
    assert attention.settings.stats.forwards - before == len(inputs)


@pytest.mark.usefixtures("one_rank")
def test_an_abandoned_forward_leaves_nothing_behind() -> None:
    from megatron.core.tensor_parallel import checkpoint

    layer, (lost, x) = _layer(_attention()), _inputs(2)
    expected = _gradients([layer(x)], [x])

    def fails(hidden: torch.Tensor) -> torch.Tensor:
        raise MemoryError(f"after attention gave {layer(hidden).shape}")

    with pytest.raises(MemoryError):
        checkpoint(fails, False, lost)
    checkpoint(layer, False, lost)  # a forward whose backward never comes
    torch.testing.assert_close(_gradients([checkpoint(layer, False, x)], [x]), expected)


@pytest.mark.usefixtures("one_rank")
def test_a_retained_graph_may_be_differentiated_twice() -> None:
    from megatron.core.tensor_parallel import checkpoint

    layer, (x,) = _layer(_attention()), _inputs(1)
    out = checkpoint(layer, False, x)
    first = _gradients([out], [x], retain_graph=True)
    torch.testing.assert_close(_gradients([out], [x]), first)


@pytest.mark.usefixtures("one_rank")
def test_two_layers_in_one_checkpoint_and_one_module_called_twice() -> None:
    from megatron.core.tensor_parallel import checkpoint

    first, second = _attention(), _attention()

    def layers(x: torch.Tensor) -> torch.Tensor:
        return _layer(first)(_layer(second)(_layer(first)(x)))

    (x,) = _inputs(1)
    expected = _gradients([layers(x)], [x])
    before = first.settings.stats.forwards + second.settings.stats.forwards
    torch.testing.assert_close(_gradients([checkpoint(layers, False, x)], [x]), expected)
    assert first.settings.stats.forwards + second.settings.stats.forwards - before == 3


@pytest.mark.usefixtures("one_rank")
def test_nested_checkpoints_are_right() -> None:
    from megatron.core.tensor_parallel import checkpoint

    layer, (x,) = _layer(_attention()), _inputs(1)
    expected = _gradients([layer(x)], [x])
    nested = checkpoint(lambda y: checkpoint(layer, False, y), False, x)
    torch.testing.assert_close(_gradients([nested], [x]), expected)


@pytest.mark.usefixtures("one_rank")
def test_checkpoints_of_models_without_our_attention_are_unchanged() -> None:
    from megatron.core.tensor_parallel import checkpoint

    from megatron_lightseq.megatron.checkpoint_scope import current_scope, track_checkpoints

    track_checkpoints()
    track_checkpoints()
    (x,) = _inputs(1)
    expected = _gradients([x.sin()], [x])
    torch.testing.assert_close(_gradients([checkpoint(torch.sin, False, x)], [x]), expected)
    assert current_scope() is None
