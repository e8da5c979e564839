"""What is made of a batch before it is cut, without any model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_lightseq import Mask, hf
from megatron_lightseq.errors import ConfigError, LightSeqError, UnsupportedError
from megatron_lightseq.hf.batch import IGNORE_INDEX, read
from megatron_lightseq.transport import run_loopback
from megatron_lightseq.transport.group import Group

IDS = torch.arange(3, 15).reshape(2, 6)


def test_plain_rows_stay_rows_and_are_completed() -> None:
    found = read({"input_ids": IDS, "labels": IDS}, 4)
    assert found.documents is None
    assert found.mask() == Mask.causal()
    assert found.fields["input_ids"].tolist() == [[3, 4, 5, 6, 7, 8, 0, 0], [9, 10, 11, 12, 13, 14, 0, 0]]
    assert found.fields["shift_labels"][0].tolist() == [4, 5, 6, 7, 8, *[IGNORE_INDEX] * 3]
    assert found.num_targets == 10


def test_padding_is_dropped_and_predicts_nothing() -> None:
    keep = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    found = read({"input_ids": IDS, "labels": IDS, "attention_mask": keep}, 4)
    assert found.fields["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 0]]
    assert found.documents == (0, 4, 7, 8)
    assert found.row_starts == (0, 4)
    # The first token of the first row would be predicted by padding; the last kept one of the second predicts padding,
    # as its label says.
    assert found.fields["shift_labels"].tolist() == [[6, 7, 8, IGNORE_INDEX, 10, 11, 12, IGNORE_INDEX]]
    assert found.fields["position_ids"].tolist() == [[2, 3, 4, 5, 0, 1, 2, 0]]


def test_windows_and_chunks_hold_within_documents_and_rows() -> None:
    rows = read({"input_ids": IDS}, 1)
    assert rows.mask(window=3) == Mask.window(2)
    assert rows.mask(chunk=4) == Mask.chunked(4)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]])
    packed = read({"input_ids": IDS, "position_ids": positions}, 1)
    assert packed.mask() == Mask.documents([0, 6, 8, 12])
    assert packed.mask(window=2) == Mask.documents([0, 6, 8, 12]) & Mask.window(1)
    assert packed.mask(chunk=4) == Mask.documents([0, 4, 6, 8, 10, 12])


@pytest.mark.parametrize(
    "others",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
        {"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2]])},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]])},
        {"cu_seq_lens_q": torch.tensor([0, 3, 6]), "max_length_q": 3},
    ],
)
def test_documents_are_found_in_whatever_describes_them(others: dict[str, Any]) -> None:
    assert read({"input_ids": IDS[:1], **others}, 1).documents == (0, 3, 6)


def test_a_batch_of_padding_alone_is_a_sequence_without_targets() -> None:
    found = read({"input_ids": IDS, "labels": IDS, "attention_mask": torch.zeros_like(IDS)}, 4)
    assert found.fields["input_ids"].shape == (1, 4)
    assert found.num_targets == 0


REFUSED: dict[str, tuple[dict[str, Any], type[LightSeqError], str]] = {
    "4-D mask": (
        {"attention_mask": torch.ones(2, 1, 6, 6)},
        UnsupportedError,
        r"attention_mask \(2, 1, 6, 6\)",
    ),
    "images": (
        {"pixel_values": torch.ones(2, 3)},
        UnsupportedError,
        r"pixel_values \(2, 3\) in a batch: of tensors",
    ),
    "types": ({"token_type_ids": IDS % 2}, UnsupportedError, "token_type_ids of several types"),
    "positions": ({"position_ids": torch.ones(3, 2, 6)}, UnsupportedError, r"position_ids \(3, 2, 6\)"),
    "cache": ({"past_key_values": object()}, UnsupportedError, "past_key_values in a batch: a cache holds"),
    "last logits": (
        {"logits_to_keep": 1},
        UnsupportedError,
        "logits_to_keep in a batch: the last tokens of a shard",
    ),
    "labels": ({"labels": IDS[:, 1:]}, ConfigError, r"labels \(2, 5\) with tokens \(2, 6\)"),
    "borders": ({"cu_seq_lens_q": torch.tensor([0, 12])}, ConfigError, "cu_seq_lens_q up to 12 with 2 rows"),
    "two kinds": ({"inputs_embeds": torch.ones(2, 6, 4)}, ConfigError, "either input_ids"),
    "cut twice": ({"lightseq": object()}, ConfigError, "batches are cut once"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused_by_name(name: str) -> None:
    others, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text):
        hf.ContextParallel().shard({"input_ids": IDS, **others})


def test_what_says_nothing_is_left_out() -> None:
    found = hf.ContextParallel().shard(
        {
            "input_ids": IDS,
            "token_type_ids": torch.zeros_like(IDS),
            "logits_to_keep": 0,
            "labels": None,
            "top": "x",
        }
    )
    assert set(found) == {"input_ids", "position_ids", "lightseq", "use_cache", "logits_to_keep", "top"}


def test_ranks_with_different_batches_are_told() -> None:
    def cut(group: Group) -> str:
        try:
            hf.ContextParallel(group).shard({"input_ids": IDS + group.rank()})
        except LightSeqError as error:
            return str(error)
        return "nothing was noticed"

    for rank, said in enumerate(run_loopback(2, cut)):
        assert f"rank {rank} of the context-parallel group has another batch than ranks [{1 - rank}]" in said


def test_targets_cannot_be_counted_without_labels() -> None:
    with pytest.raises(ConfigError, match="targets are counted in labels or shift_labels"):
        hf.ContextParallel().num_targets({"input_ids": IDS})
    with pytest.raises(ConfigError, match="pad_to_multiple_of=0"):
        hf.ContextParallel(pad_to_multiple_of=0)
