"""Shifting tokens by one on shards of every layout, with tokens exchanged between ranks only where needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from megatron_lightseq.errors import UnsupportedError
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.megatron import seeded_init
from tests.megatron.runs import on_ranks

LENGTH = 24
LAYOUTS = ["contiguous", "zigzag", "striped"]


def _rolled(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    import torch.distributed as dist

    from megatron_lightseq.megatron.multi_token import LayoutRoll

    layout = SequenceLayout(name, dist.get_world_size())
    whole = torch.arange(1, 2 * LENGTH + 1).view(2, LENGTH).to(dtype)
    roll = LayoutRoll(layout, dist.group.WORLD)
    once, _ = roll(layout.shard(whole, dist.get_rank(), 1))
    twice, total = roll(once, shifts=-1, dims=-1, cp_group=None, packed_seq_params=None)
    return twice, total.item()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_rolling_shards_rolls_the_sequence(name: str, size: int) -> None:
    whole = torch.arange(1, 2 * LENGTH + 1).view(2, LENGTH)
    expected = torch.cat([whole[:, 2:], torch.zeros(2, 2, dtype=torch.int64)], dim=1)
    for dtype in (torch.int64, torch.float32):
        results = on_ranks(size, _rolled, name, dtype)
        assert torch.equal(
            SequenceLayout(name, size).unshard([part for part, _ in results], 1), expected.to(dtype)
        )
        assert [total for _, total in results] == pytest.approx([expected.sum().item() / size] * size)


def test_only_tokens_that_another_rank_needs_travel() -> None:
    from megatron_lightseq.megatron.multi_token import Successors

    def foreign(name: str) -> list[int]:
        layout = SequenceLayout(name, 4)
        plans = [Successors.of(layout, rank, LENGTH, torch.device("cpu")) for rank in range(4)]
        return [sum(plan.received_from) - plan.received_from[rank] for rank, plan in enumerate(plans)]

    assert foreign("contiguous") == [1, 1, 1, 0]
    assert foreign("zigzag") == [1, 2, 2, 1]
    assert foreign("striped") == [6, 6, 6, 5]


def test_other_shifts_are_refused() -> None:
    from megatron_lightseq.megatron.multi_token import LayoutRoll

    roll = LayoutRoll(SequenceLayout("striped", 2), None)
    with pytest.raises(UnsupportedError, match=r"a shift of 2: .*striped\(2\).*by one token"):
        roll(torch.zeros(1, 4), shifts=2)


def _adopted() -> tuple[int, bool, bool]:
    """How many methods were rebound, and whether other models kept Megatron's function."""
    import torch.distributed as dist
    from megatron.core.transformer import multi_token_prediction

    from megatron_lightseq.megatron.multi_token import LayoutRoll, adopt_rolls

    class Layer(torch.nn.Module):
        forward = multi_token_prediction.MultiTokenPredictionLayer._get_embeddings

    ours, theirs = Layer(), Layer()
    found = adopt_rolls(ours, SequenceLayout("striped", dist.get_world_size()), dist.group.WORLD)
    roll = ours.forward.__func__.__globals__["roll_tensor"]  # type: ignore[attr-defined]
    kept = theirs.forward.__func__.__globals__["roll_tensor"] is multi_token_prediction.roll_tensor  # type: ignore[attr-defined]
    return found, isinstance(roll, LayoutRoll), kept


def test_only_this_model_rolls_by_the_layout() -> None:
    assert on_ranks(2, _adopted) == [(1, True, True)] * 2


# --- a whole model ----------------------------------------------------------------------------------------------------

MULTI_TOKEN = {"mtp_num_layers": 2, "train_iters": 2}


def _trained(overrides: dict[str, Any], megatrons: bool = False) -> tuple[list[float], list[float | None]]:
    from megatron.core import parallel_state

    from megatron_lightseq.config import PretrainConfig, with_values
    from megatron_lightseq.megatron import batch
    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from megatron_lightseq.training.setup import build_training
    from megatron_lightseq.training.step import train_step
    from tests.megatron.runs import TINY, VOCAB_SIZE, batches

    cpu_platform.activate()
    adopt, batch.adopt_rolls = batch.adopt_rolls, (lambda *_: 0) if megatrons else batch.adopt_rolls
    try:
        config = with_values(PretrainConfig(), **{**TINY, **MULTI_TOKEN, **overrides})
        training = build_training(config, vocab_size=VOCAB_SIZE)
        results = [train_step(training, batches(training, step)) for step in range(2)]
    finally:
        batch.adopt_rolls = adopt
        parallel_state.destroy_model_parallel()
    return [result.loss for result in results], [result.mtp_loss for result in results]


def test_further_tokens_are_learned_alike_and_megatrons_roll_would_not_do() -> None:
    (losses, mtp_losses), *_ = on_ranks(1, _trained, {})
    assert mtp_losses[1] is not None
    stripes = {"context_parallel_size": 2, "cp_method": "ring", "cp_layout": "striped"}
    for found in on_ranks(2, _trained, stripes):
        assert found[0] == pytest.approx(losses, rel=1e-5)
        assert found[1] == pytest.approx(mtp_losses, rel=1e-5)
    assert on_ranks(2, _trained, stripes, True)[0][1] != pytest.approx(mtp_losses, rel=1e-3)


def test_plain_models_have_no_such_loss() -> None:
    (_, mtp_losses), *_ = on_ranks(1, _trained, {"mtp_num_layers": None})
    assert mtp_losses == [None, None]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 3), ({"is_mtp_layer": False}, 3), ({"is_mtp_layer": True}, 8), ({"add_layer_offset": False}, 0)],
)
def test_initial_weights_do_not_depend_on_the_stage(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, bool], expected: int
) -> None:
    """From Megatron-Core 0.18 on, layers of multi-token prediction count from 1 on the stage that has them."""
    monkeypatch.setattr(seeded_init, "get_transformer_layer_offset", lambda config, vp_stage: 3)
    assert seeded_init._layers_before(SimpleNamespace(num_layers=8), None, options) == expected


@pytest.mark.parametrize("name", ["values", "loss_values"])
def test_the_loss_is_found_under_the_name_of_every_release(name: str) -> None:
    """``loss_values`` from Megatron-Core 0.19 on."""
    assert on_ranks(1, _logged_loss, name) == [pytest.approx(1.5)]


def _logged_loss(name: str) -> float | None:
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    from megatron_lightseq.training.auxiliary_losses import mtp_loss

    MTPLossLoggingHelper.tracker[name] = torch.tensor([2.0, 4.0])
    training = SimpleNamespace(
        config=SimpleNamespace(model=SimpleNamespace(mtp_num_layers=2)),
        device=torch.device("cpu"),
        is_last_stage=True,
        num_microbatches=2,
        collection=SimpleNamespace(dp_cp=torch.distributed.group.WORLD, pp=torch.distributed.group.WORLD),
    )
    return mtp_loss(training)  # type: ignore[arg-type]


# --- few tokens on many ranks -----------------------------------------------------------------------------------------


class MTPLossAutoScaler:
    """In place of Megatron's: keeps what is attached."""

    attached: ClassVar[list[float]] = []

    @classmethod
    def apply(cls, activation: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        cls.attached.append(float(loss.sum()))
        return activation


class MTPLossLoggingHelper:
    """In place of Megatron's: keeps what is logged."""

    logged: ClassVar[list[float]] = []

    @classmethod
    def save_loss_to_tracker(cls, loss: torch.Tensor, layer: int) -> None:
        del layer
        cls.logged.append(float(loss))


def roll_tensor(*_: Any) -> Any:
    raise AssertionError("replaced")


def _mtp_loss(
    hidden: torch.Tensor, losses: torch.Tensor, loss_mask: torch.Tensor, config: Any
) -> torch.Tensor:
    """As Megatron-Core 0.18 normalises the losses of further tokens."""
    original = loss_mask.sum()
    loss_mask, num_tokens = roll_tensor(loss_mask)
    losses = losses * loss_mask
    MTPLossLoggingHelper.save_loss_to_tracker(losses.sum() / num_tokens, 0)
    weight = original if config.calculate_per_token_loss else 1
    return MTPLossAutoScaler.apply(hidden, losses * weight / num_tokens.clamp(min=1))


def _attached(num_tokens: int, per_token: bool) -> tuple[float, float]:
    import torch.distributed as dist

    from megatron_lightseq.megatron.multi_token import LayoutLoss, LayoutRoll

    layout, group = SequenceLayout("contiguous", dist.get_world_size()), dist.group.WORLD
    losses, mask = torch.arange(1.0, LENGTH + 1)[None], torch.zeros(1, LENGTH)
    mask[0, 5 : 5 + num_tokens] = 1
    losses, mask = (layout.shard(x, dist.get_rank(), 1) for x in (losses, mask))
    MTPLossAutoScaler.attached.clear()
    MTPLossLoggingHelper.logged.clear()
    config = SimpleNamespace(calculate_per_token_loss=per_token)
    LayoutLoss(_mtp_loss, LayoutRoll(layout, group))(torch.zeros(1), losses, mask, config)  # type: ignore[arg-type]
    return MTPLossAutoScaler.attached[0], MTPLossLoggingHelper.logged[0]


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 9])
def test_few_tokens_weigh_the_same_on_many_ranks(num_tokens: int, per_token: bool) -> None:
    """Sums of attached losses, which Megatron averages over ranks unless it divides by all tokens, and of the log."""
    ((attached, logged),) = on_ranks(1, _attached, num_tokens, per_token)
    found = on_ranks(4, _attached, num_tokens, per_token)
    assert sum(part for part, _ in found) / (1 if per_token else 4) == pytest.approx(attached)
    assert sum(part for _, part in found) / 4 == pytest.approx(logged)
