"""Packed sequences: documents that share a sequence train as if each were alone, wherever ranks cut them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_lightseq.errors import ConfigError, LightSeqError, UnsupportedError
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.megatron.packing import Packing
from tests.megatron.runs import TINY, VOCAB_SIZE, on_ranks

LENGTH = 48
DOCUMENTS = ((5, 11, 1, 24), (13, 7, 28), (3,), (48,), (1, 1, 30, 9), (17, 20), (2, 46), (29,))
"""Lengths in rows of 48 tokens, the rest of which is padding: nothing divides by anything."""


# --- documents on the host --------------------------------------------------------------------------------------------


def test_documents_end_with_their_last_token() -> None:
    tokens = torch.tensor([5, 9, 3, 9, 9, 4])
    assert Packing.of_tokens(tokens, 9) == Packing(cu_seqlens=(0, 2, 4, 5, 6), lengths=(2, 2, 1, 1))
    assert Packing.of_tokens(tokens[:2], 9).cu_seqlens == (0, 2)
    assert Packing.of_tokens(tokens[2:3], 9).cu_seqlens == (0, 1)


def test_rows_are_joined_and_padding_belongs_to_nobody() -> None:
    joined = Packing.joined([Packing.of_documents((2, 3), 6), Packing.of_documents((4,), 4)])
    assert joined == Packing(cu_seqlens=(0, 2, 5, 6, 10), lengths=(2, 3, 0, 4))
    assert (joined.tokens, joined.longest) == (10, 4)
    assert joined.positions().tolist() == [0, 1, 0, 1, 2, 0, 0, 1, 2, 3]
    assert joined.lasts().tolist() == [False, True, False, False, True, True, False, False, False, True]
    seen = [[key for keys in joined.mask.keys_of(query) for key in keys] for query in range(10)]
    assert seen == [[0, 1]] * 2 + [[2, 3, 4]] * 3 + [[]] + [[6, 7, 8, 9]] * 4


def test_borders_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"documents of 5 tokens in all, in a row of 4: .*without cutting"):
        Packing.of_documents((2, 3), 4)
    with pytest.raises(ConfigError, match=r"cu_seqlens .*never decrease"):
        Packing(cu_seqlens=(0, 5, 3), lengths=(5, -2)).mask  # noqa: B018
    with pytest.raises(ConfigError, match=r"borders that end at 8, for 12 tokens: .* borders of this very"):
        Packing.of_borders((0, 8)).check_tokens(12)


# --- Megatron's description -------------------------------------------------------------------------------------------


def params(**values: Any) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    borders = torch.tensor(values.pop("borders", (0, 3, 8)), dtype=torch.int32)
    return PackedSeqParams(
        **{"qkv_format": "thd", "cu_seqlens_q": borders, "cu_seqlens_kv": borders, **values}
    )


def test_borders_of_another_program_are_read_once() -> None:
    from megatron_lightseq.megatron.packed import shard_of

    layout = SequenceLayout.contiguous(2)
    padded = torch.tensor([0, 4, 12], dtype=torch.int32)
    given = params(cu_seqlens_q_padded=padded, cu_seqlens_kv_padded=padded)
    shard = shard_of(given, layout, 1)
    assert shard.packing == Packing(cu_seqlens=(0, 4, 12), lengths=(3, 5))
    assert shard.positions.tolist() == [2, 3, 4, 5, 6, 7]
    assert shard_of(given, layout, 1) is shard
    assert shard_of(given, layout, 0) is not shard
    assert str(shard.mask(causal=True, window=Mask.window(1))) == str(
        Mask.padded((0, 4, 12), (3, 5)) & Mask.window(1)
    )
    later = params()
    later.total_tokens = 10  # of later versions: what follows the last document is padding
    assert shard_of(later, layout, 0).packing == Packing(cu_seqlens=(0, 3, 8, 10), lengths=(3, 5, 0))


REFUSED: dict[str, dict[str, Any]] = {
    r"local_cp_size: hybrid context parallelism .*hybrid_context_parallel off": {"local_cp_size": 2},
    r"cp_group: hybrid context parallelism": {"cp_group": object()},
    r"qkv_format 'sbhd': packed sequences are in format thd": {"qkv_format": "sbhd"},
    r"cu_seqlens_q and cu_seqlens_kv that differ": {"cu_seqlens_kv": torch.tensor([0, 4, 8])},
    r"cu_seqlens_q of 3 borders and cu_seqlens_q_padded of 2": {"cu_seqlens_q_padded": torch.tensor([0, 8])},
}


@pytest.mark.parametrize("message", REFUSED)
def test_other_kinds_of_packing_are_refused_by_name(message: str) -> None:
    from megatron_lightseq.megatron.packed import shard_of

    with pytest.raises(UnsupportedError, match=f"packed sequences with {message}"):
        shard_of(params(**REFUSED[message]), SequenceLayout.contiguous(2), 0)


def test_the_partition_of_documents_is_refused_and_that_of_sequences_is_not() -> None:
    from megatron_lightseq.megatron.packed import shard_of

    given = params()
    given.cp_partition_mode = "zigzag"  # of the main branch
    with pytest.raises(UnsupportedError, match=r"cp_partition_mode 'zigzag': it cuts every document"):
        shard_of(given, SequenceLayout.contiguous(2), 0)
    given.cp_partition_mode = "contiguous"
    assert shard_of(given, SequenceLayout.contiguous(2), 0).packing.tokens == 8


# --- angles and successors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped"])
def test_every_token_has_the_angle_of_its_position(name: str) -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from megatron_lightseq.megatron.packed import packed_seq_params, shard_of
    from megatron_lightseq.megatron.rope import LayoutRotaryEmbedding

    cpu_platform.activate()
    rotary = RotaryEmbedding(kv_channels=8, rotary_percent=1.0, use_cpu_initialization=True, cp_group=None)
    whole = rotary.get_emb(200)
    packing = Packing.of_documents((90, 1, 100, 2), 204)
    layout = SequenceLayout(name, 3)
    for positions in (None, torch.arange(102).repeat(2)):
        expected = packing.positions() if positions is None else positions
        for rank in range(3):
            ours = LayoutRotaryEmbedding(rotary, layout, rank)
            ours.packed = shard_of(
                packed_seq_params(packing, layout, rank, positions=positions), layout, rank
            )
            angles = ours(max_seq_len=100, packed_seq=True)
            torch.testing.assert_close(angles, whole[layout.shard(expected, rank, 0)], rtol=1e-6, atol=1e-6)
            ours.packed = None
            with pytest.raises(UnsupportedError, match=r"packed_seq: .*Give packed_seq_params to the model"):
                ours(max_seq_len=100, packed_seq=True)


def _rolled(name: str, times: int) -> tuple[torch.Tensor, float]:
    import torch.distributed as dist

    from megatron_lightseq.megatron.multi_token import LayoutRoll
    from megatron_lightseq.megatron.packed import packed_seq_params

    size, rank = dist.get_world_size(), dist.get_rank()
    layout = SequenceLayout(name, size)
    given = packed_seq_params(Packing.of_documents(DOCUMENTS[0], LENGTH), layout, rank)
    roll = LayoutRoll(layout, dist.group.WORLD)
    part = layout.shard(torch.arange(1, LENGTH + 1).view(1, LENGTH), rank, 1)
    for _ in range(times):
        part, total = roll(part, packed_seq_params=given)
    return part, total.item()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", ["contiguous", "striped"])
def test_no_token_has_a_successor_in_another_document(name: str, size: int) -> None:
    expected, first = torch.zeros(1, LENGTH, dtype=torch.int64), 0
    for length in DOCUMENTS[0]:
        for token in range(first, first + length - 2):
            expected[0, token] = token + 3
        first += length
    results = on_ranks(size, _rolled, name, 2)
    assert torch.equal(SequenceLayout(name, size).unshard([part for part, _ in results], 1), expected)
    assert results[0][1] == pytest.approx(expected.sum().item() / size)


# --- training against a loop over documents ---------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "plain": {"micro_batch_size": 2},
    "windows and further tokens": {"mtp_num_layers": 2, "window_size": (9, 0), "window_attn_skip_freq": 2},
    "latent": {
        "multi_latent_attention": True,
        "num_query_groups": None,
        "kv_lora_rank": 16,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 8,
        "mtp_num_layers": 1,
    },
}
PARALLEL: dict[str, tuple[int, dict[str, Any]]] = {
    "cp 1": (1, {}),
    "cp 2": (2, {"context_parallel_size": 2, "cp_method": "balanced"}),
    "cp 3": (3, {"context_parallel_size": 3}),
    "cp 4, recomputed": (
        4,
        {
            "context_parallel_size": 4,
            "cp_method": "zigzag",
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    "tp 2 x cp 2": (
        4,
        {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "pp 2 x cp 2": (
        4,
        {"context_parallel_size": 2, "pipeline_model_parallel_size": 2, "cp_method": "balanced"},
    ),
}


def _text() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCAB_SIZE, (len(DOCUMENTS), LENGTH), generator=generator)


def _row(number: int) -> tuple[dict[str, torch.Tensor], Packing]:
    """A row of documents: the loss is that of every third token and of those after it, within its document."""
    tokens, packing = _text()[number], Packing.of_documents(DOCUMENTS[number], LENGTH)
    labels = tokens.roll(-1)
    kept = (packing.positions() % 3 > 0) & ~packing.lasts()
    row = {"tokens": tokens, "labels": labels, "loss_mask": kept.float(), "position_ids": packing.positions()}
    return row, packing


def _micro_batches(size: int) -> Iterator[dict[str, Any]]:
    for first in range(0, len(DOCUMENTS), size):
        rows, packings = zip(*(_row(number) for number in range(first, first + size)), strict=True)
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        yield {**batch, "packing": Packing.joined(packings)}


def _built(values: dict[str, Any]) -> Any:
    from megatron_lightseq.config import PretrainConfig, with_values
    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from megatron_lightseq.training.setup import build_training

    cpu_platform.activate()
    sizes = {"global_batch_size": len(DOCUMENTS), "seq_length": LENGTH, "clip_grad": 1e9}
    return build_training(with_values(PretrainConfig(), **{**TINY, **sizes, **values}), vocab_size=VOCAB_SIZE)


def _packed_step(values: dict[str, Any]) -> tuple[float, float]:
    from megatron.core import parallel_state

    from megatron_lightseq.training.step import train_step

    try:
        training = _built({**values, "sft": True})
        size = training.config.training.micro_batch_size
        result = train_step(training, [_micro_batches(size) for _ in training.chunks])
    finally:
        parallel_state.destroy_model_parallel()
    return result.loss, result.grad_norm


def _loop_over_documents(values: dict[str, Any]) -> tuple[float, float]:
    """Every document alone, by Megatron's model with Megatron's attention; the same average over all tokens."""
    from megatron.core import parallel_state

    from megatron_lightseq.training.setup import gpt_model

    try:
        training = _built({**values, "cp_method": "megatron", "micro_batch_size": 1})
        model = gpt_model(training.chunks[0])
        loss_sum = total = 0.0
        for number in range(len(DOCUMENTS)):
            row, packing = _row(number)
            for first, length in zip(packing.cu_seqlens, packing.lengths, strict=False):
                alone = {name: tensor[None, first : first + length] for name, tensor in row.items()}
                if length:
                    losses = model(
                        alone["tokens"],
                        alone["position_ids"],
                        None,
                        labels=alone["labels"],
                        loss_mask=alone["loss_mask"] if model.mtp_process else None,
                    )
                    loss = (losses * alone["loss_mask"]).sum()
                    loss.backward()
                    loss_sum, total = loss_sum + loss.item(), total + alone["loss_mask"].sum().item()
        norm = torch.stack([p.main_grad.norm() / total for p in model.parameters()]).norm()
    finally:
        parallel_state.destroy_model_parallel()
    return loss_sum / total, norm.item()


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("model", MODELS)
def test_packed_documents_train_as_if_each_were_alone(model: str, parallel: str) -> None:
    size, values = PARALLEL[parallel]
    (loss, norm), *_ = on_ranks(1, _loop_over_documents, MODELS[model])
    for found in on_ranks(size, _packed_step, {**MODELS[model], **values}):
        assert found == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4))


def _refused(packing: Packing) -> str:
    from megatron.core import parallel_state

    from megatron_lightseq.training.step import train_step

    try:
        training = _built({"sft": True, "context_parallel_size": 2})
        batches = ({**batch, "packing": packing} for batch in _micro_batches(1))
        train_step(training, batches)
    except LightSeqError as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
    return "trained"


@pytest.mark.parametrize(
    ("packing", "message"),
    [
        (Packing.of_borders((0, 5, 40)), r"borders that end at 40, for 48 tokens"),
        (Packing.of_borders((0, 30, 20, 48)), r"cu_seqlens .*never decrease"),
        (Packing.of_borders((0, 48, 96)), r"borders that end at 96, for 48 tokens"),
        (None, r"a batch without packing: .*Add packing"),
    ],
)
def test_borders_of_another_batch_are_refused_on_all_ranks(packing: Any, message: str) -> None:
    for found in on_ranks(2, _refused, packing):
        assert re.search(message, found)


# --- plans ahead ------------------------------------------------------------------------------------------------------


def _plans_in_forward_passes(values: dict[str, Any], ahead: bool) -> tuple[list[float], list[int]]:
    """Losses of three steps over other documents each, and how many plans their forward passes made."""
    from unittest.mock import patch

    from megatron.core import parallel_state

    from megatron_lightseq.attention.planner import Planner
    from megatron_lightseq.training.packed_batches import PreparedAhead, prepared_ahead
    from megatron_lightseq.training.step import train_step

    inside, plan = [0], Planner.plan
    count = 0

    def counted(planner: Planner, *args: Any) -> Any:
        nonlocal count
        count += inside[0]
        return plan(planner, *args)

    try:
        training = _built({**values, "sft": True, "train_iters": 3})
        for model in training.models:
            model.register_forward_pre_hook(lambda *_: inside.__setitem__(0, 1))
            model.register_forward_hook(lambda *_: inside.__setitem__(0, 0))
        rows = [batch for step in range(3) for batch in _micro_batches_of_other_documents(step)]
        reads = [prepared_ahead(training, iter(rows)) if ahead else iter(rows) for _ in training.chunks]
        assert isinstance(reads[0], PreparedAhead) == ahead
        losses, plans = [], []
        with patch.object(Planner, "plan", counted):
            for _ in range(3):
                losses.append(train_step(training, reads).loss)
                plans.append(count)
                count = 0
        with pytest.raises(StopIteration):
            next(reads[0])
    finally:
        parallel_state.destroy_model_parallel()
    return losses, plans


def _micro_batches_of_other_documents(step: int) -> Iterator[dict[str, Any]]:
    """In every step and micro-batch others."""
    for number in range(len(DOCUMENTS)):
        row, _ = _row(number)
        first = 3 + len(DOCUMENTS) * step + number
        packing = Packing.of_documents((first, LENGTH - first), LENGTH)
        row["position_ids"] = packing.positions()
        yield {**{name: tensor[None] for name, tensor in row.items()}, "packing": packing}


@pytest.mark.parametrize(
    ("size", "values"),
    [
        (2, {"context_parallel_size": 2, "cp_method": "balanced"}),
        (
            2,
            {
                "context_parallel_size": 2,
                "window_size": (9, 0),
                "window_attn_skip_freq": 2,
                "mtp_num_layers": 1,
            },
        ),
        (4, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}),
        (4, {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    ],
    ids=["balanced", "windows and further tokens", "pp 2", "tp 2"],
)
def test_forward_passes_find_their_plans_made(size: int, values: dict[str, Any]) -> None:
    """From the third micro-batch on: the second one is read before the first forward pass shows what is planned for."""
    plain = on_ranks(size, _plans_in_forward_passes, values, False)
    kinds = 2 if "window_size" in values else 1
    for (losses, plans), (expected, unprepared) in zip(
        on_ranks(size, _plans_in_forward_passes, values, True), plain, strict=True
    ):
        assert losses == expected
        assert unprepared == [kinds * len(DOCUMENTS)] * 3
        assert plans == [2 * kinds, 0, 0]


def test_an_error_of_the_next_micro_batch_waits_until_it_is_taken() -> None:
    from types import SimpleNamespace

    from megatron_lightseq.training.packed_batches import PreparedAhead

    def batches() -> Iterator[dict[str, Any]]:
        yield {"documents": SimpleNamespace(params=None)}
        raise OSError("the disk is gone")

    reads = PreparedAhead(SimpleNamespace(models=[]), batches())  # type: ignore[arg-type]
    next(reads)
    with pytest.raises(OSError, match="the disk is gone"):
        next(reads)
