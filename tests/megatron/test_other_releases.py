"""What releases of Megatron-Core other than the pinned one do differently, with stand-ins for what they have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer import multi_token_prediction

from megatron_lightseq.errors import UnsupportedError
from megatron_lightseq.megatron import sequence_slices
from megatron_lightseq.megatron.fixes.checkpointed_tokens import checkpoint_multi_token_layers
from megatron_lightseq.training.checkpoint.optimizer_state import _take_own_rates


class LayerOf018(multi_token_prediction.MultiTokenPredictionLayer):
    """Of 0.18.0, whose forward pass gives ``padding_mask`` to a method that does not take it."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def _checkpointed_forward(self, hidden_states: int, rotary: int = 0) -> int:  # type: ignore[override]
        return hidden_states + rotary


def test_layers_of_0_18_can_be_recomputed() -> None:
    model = torch.nn.Sequential(LayerOf018())
    assert [checkpoint_multi_token_layers(model) for _ in range(2)] == [1, 0]
    layer: Any = model[0]
    assert layer._checkpointed_forward(hidden_states=2, padding_mask=None, rotary=3) == 5
    with pytest.raises(UnsupportedError, match="Leave the padding_mask out"):
        layer._checkpointed_forward(hidden_states=2, padding_mask=torch.ones(1))


def test_sliced_logits_are_not_counted_in_0_19(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = torch.tensor(3.0), torch.tensor(4.0)
    name = "_compute_mtp_acceptance_counts"
    monkeypatch.setattr(multi_token_prediction, name, lambda logits, labels: counts, raising=False)
    for _ in range(2):
        sequence_slices._count_no_pending_predictions()
    counted = getattr(multi_token_prediction, name)
    assert counted(torch.ones(1), None) is counts
    pending = sequence_slices.PendingLogits(lambda x: x, torch.ones(2, 1, 4), ())
    assert [float(count) for count in counted(pending, None)] == [0.0, 0.0]


@pytest.mark.parametrize("wrapped", [True, False])
def test_groups_of_a_checkpoint_are_found_whatever_their_rates(wrapped: bool) -> None:
    """From 0.19 on, Megatron looks for them by their learning rates as well."""
    own = [
        {"wd_mult": mult, "lr_mult": 1.0, "max_lr": 6e-3, "min_lr": 0.0, "is_expert_parallel": False}
        for mult in (1.0, 0.0)
    ]
    saved = [
        {**group, "max_lr": 3e-3, "min_lr": 3e-4, "step": 7, "params": [n]} for n, group in enumerate(own)
    ]
    state: dict[str, Any] = {"param_groups": saved}
    _take_own_rates(SimpleNamespace(param_groups=own), {"optimizer": state} if wrapped else state)
    assert saved == [{**group, "step": 7, "params": [n]} for n, group in enumerate(own)]


def test_groups_that_only_rates_distinguish_stay_as_they_are() -> None:
    own = [{"wd_mult": 1.0, "max_lr": rate} for rate in (1e-3, 2e-3)]
    saved = [{"wd_mult": 1.0, "max_lr": rate} for rate in (2e-3, 1e-3)]
    _take_own_rates(SimpleNamespace(param_groups=own), {"param_groups": saved})
    assert [group["max_lr"] for group in saved] == [2e-3, 1e-3]
