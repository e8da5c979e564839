"""Batches, rotary embeddings and attention agree on which rank holds which tokens; otherwise an error is raised."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch

from megatron_lightseq.errors import ConfigError, LayoutError, UnsupportedError
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.megatron import shard_batch
from tests.megatron.runs import TINY, VOCAB_SIZE, on_ranks

LENGTH = 16


def whole_batch(length: int = LENGTH) -> dict[str, torch.Tensor]:
    tokens = torch.arange(2 * length).view(2, length) % VOCAB_SIZE
    return {
        "tokens": tokens,
        "labels": tokens + 1,
        "loss_mask": torch.ones(2, length),
        "position_ids": torch.arange(length).expand(2, -1),
        "attention_mask": torch.ones(2, 1, length, length, dtype=torch.bool).tril(),
    }


# --- batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped"])
def test_shards_hold_the_positions_of_the_layout(name: str) -> None:
    layout, whole = SequenceLayout(name, 4), whole_batch()
    for rank in range(4):
        shard = shard_batch(whole, layout, rank)
        positions = torch.tensor(layout.positions(rank, LENGTH))
        for key in ("tokens", "labels", "loss_mask", "position_ids"):
            assert torch.equal(shard[key], whole[key][:, positions])
            assert shard[key].is_contiguous()
        assert torch.equal(shard["attention_mask"], whole["attention_mask"][:, :, positions])


@pytest.mark.parametrize("size", [1, 2])
def test_entries_are_cut_along_their_tokens_by_shape(size: int) -> None:
    """A padding mask is (B, S), a mask of queries and keys (B, 1, S, S), and positions of several axes (3, B, S)."""
    layout, local = SequenceLayout.contiguous(size), LENGTH // size
    padding = torch.rand(2, LENGTH) > 0.5
    batch = {"attention_mask": padding, "padding_mask": padding, "position_ids": torch.rand(3, 2, LENGTH)}
    shard = shard_batch(batch, layout, size - 1)
    for name, tensor in batch.items():
        assert torch.equal(shard[name], tensor[..., LENGTH - local :])
    square = torch.rand(1, 1, LENGTH, LENGTH) > 0.5
    shard = shard_batch({"attention_mask": square}, layout, size - 1)
    assert torch.equal(shard["attention_mask"], square[:, :, LENGTH - local :])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attention_mask", (2, 1, 1, 16)),
        ("attention_mask", (2, 16, 16)),
        ("tokens", (16,)),
        ("labels", (2, 16, 1)),
    ],
)
def test_entries_of_other_shapes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ConfigError, match=rf"batch entry '{name}' of shape .*\(B, seq_length\).*Give it in this shape"
    ):
        shard_batch({name: torch.zeros(shape)}, SequenceLayout.contiguous(2), 0)


def test_zigzag_shards_are_megatrons() -> None:
    for ours, theirs in on_ranks(4, _zigzag_shards):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def _zigzag_shards() -> tuple[dict[str, Any], dict[str, Any]]:
    import torch.distributed as dist
    from megatron.core.utils import get_batch_on_this_cp_rank

    ours = shard_batch(whole_batch(), SequenceLayout.zigzag(4), dist.get_rank())
    return dict(ours), get_batch_on_this_cp_rank(whole_batch(), dist.group.WORLD)


def test_one_rank_keeps_the_batch() -> None:
    whole = whole_batch()
    shard = shard_batch(whole, SequenceLayout.contiguous(1), 0)
    assert all(shard[key] is whole[key] for key in whole)
    assert shard_batch({"tokens": None}, SequenceLayout.zigzag(2), 0) == {"tokens": None}


def test_unknown_entries_and_lengths_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"batch entry 'cu_seqlens' of shape \(3,\): tokens, labels.*Take it out"
    ):
        shard_batch({"cu_seqlens": torch.zeros(3)}, SequenceLayout.contiguous(2), 0)
    with pytest.raises(LayoutError, match=r"tokens of 16 tokens, labels of 8 tokens, .*same sequences"):
        shard_batch({**whole_batch(), "labels": torch.zeros(2, 8)}, SequenceLayout.contiguous(2), 0)
    square = torch.zeros(16, 16)
    with pytest.raises(
        ConfigError, match=r"tokens of 2 sequences, .*attention_mask of 16 sequences: .* same B"
    ):
        shard_batch({**whole_batch(), "attention_mask": square}, SequenceLayout.contiguous(2), 0)
    with pytest.raises(LayoutError, match=r"seq_length 16 over cp_size 3: .*multiple of"):
        shard_batch(whole_batch(), SequenceLayout.contiguous(3), 0)


# --- rotary embeddings ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("kind", ["RotaryEmbedding", "YarnRotaryEmbedding"])
def test_angles_follow_the_layout(kind: str, name: str) -> None:
    from megatron.core.models.common import embeddings

    from megatron_lightseq.megatron.rope import adopt_rotary

    rotary = getattr(embeddings, kind)(8, rotary_percent=1.0, use_cpu_initialization=True)
    whole = rotary(LENGTH)
    layout = SequenceLayout(name, 4)
    for rank in range(4):
        model = torch.nn.Module()
        model.rotary_pos_emb = rotary
        assert adopt_rotary(model, layout, rank) == 1
        shard = model.rotary_pos_emb(LENGTH)
        positions = layout.positions(rank, LENGTH)
        if kind == "YarnRotaryEmbedding":
            assert torch.equal(shard[0], whole[0][positions])
            assert shard[1] == whole[1]
        else:
            assert torch.equal(shard, whole[positions])
        assert model.rotary_pos_emb.get_rotary_seq_len == rotary.get_rotary_seq_len


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("name", "chunks"), [("contiguous", 1), ("zigzag", 2)])
def test_no_rank_computes_the_angles_of_others(name: str, chunks: int) -> None:
    """At a million tokens and head dim 128, the angles of the whole sequence would take 512 MiB per rank."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megatron_lightseq.megatron.rope import LayoutRotaryEmbedding

    asked: list[int] = []

    class Counting(RotaryEmbedding):
        def forward(self, max_seq_len: int, *args: Any, **kwargs: Any) -> Any:
            asked.append(max_seq_len)
            return super().forward(max_seq_len, *args, **kwargs)

    rotary = Counting(8, rotary_percent=1.0, use_cpu_initialization=True)
    LayoutRotaryEmbedding(rotary, SequenceLayout(name, 4), 1)(LENGTH)
    assert asked == [LENGTH // 4 // chunks] * chunks


@pytest.mark.usefixtures("one_rank")
def test_rotary_embeddings_that_cut_themselves_are_refused() -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding

    from megatron_lightseq.megatron.rope import LayoutRotaryEmbedding, adopt_rotary

    model = torch.nn.Module()
    model.rotary_pos_emb = MultimodalRotaryEmbedding(8, 1.0)
    adopt_rotary(model, SequenceLayout.zigzag(2), 0)
    with pytest.raises(
        UnsupportedError, match=r"Multimodal.* with layout contiguous\(2\): .*itself, by Megatron's zigzag"
    ):
        adopt_rotary(model, SequenceLayout.contiguous(2), 0)
    with pytest.raises(UnsupportedError, match=r"rotary embedding with packed_seq: .*Give packed_seq_params"):
        LayoutRotaryEmbedding(model.rotary_pos_emb, SequenceLayout.zigzag(2), 0)(LENGTH, packed_seq=True)
    with pytest.raises(
        UnsupportedError, match=r"apply_rope_fusion with latent.*Switch apply_rope_fusion off"
    ):
        LayoutRotaryEmbedding(model.rotary_pos_emb, SequenceLayout.zigzag(2), 0).get_cached_cos_sin(LENGTH)


def _yarn(size: int, original: int) -> list[torch.Tensor]:
    """The angles of this rank, in a model with latent attention and YaRN."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import MLATransformerConfig

    from megatron_lightseq.megatron import adopt_layout, gpt_layer_spec
    from megatron_lightseq.megatron.cpu import platform as cpu_platform

    cpu_platform.activate()
    parallel_state.initialize_model_parallel(context_parallel_size=size, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    config = MLATransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        context_parallel_size=size,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        multi_latent_attention=True,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_head_dim=8,
        qk_pos_emb_head_dim=8,
        v_head_dim=8,
        rope_type="yarn",
        original_max_position_embeddings=original,
    )
    model = GPTModel(config, gpt_layer_spec(config), VOCAB_SIZE, 48, position_embedding_type="rope")
    adopt_layout(model)
    angles, scale = model.decoder.layers[0].self_attention.rotary_pos_emb(48)
    parts = [torch.empty_like(angles) for _ in range(size)]
    dist.all_gather(parts, angles)
    parallel_state.destroy_model_parallel()
    return [torch.cat(parts), torch.tensor(scale)]


@pytest.mark.parametrize("original", [4096, 7])
def test_yarn_works_on_any_number_of_ranks(original: int) -> None:
    """Megatron fills a table of ``original`` positions at construction, and cuts it in zigzag order."""
    (expected,) = on_ranks(1, _yarn, 1, original)
    for found in on_ranks(3, _yarn, 3, original):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --- a GPTModel built by a user ---------------------------------------------------------------------------------


def own_config(kind: str, cp_size: int) -> Any:
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    options = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": TINY["num_query_groups"],
        "context_parallel_size": cp_size,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.3,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
    }
    if kind == "experts":
        return TransformerConfig(
            **options, num_moe_experts=2, add_bias_linear=False, moe_router_load_balancing_type="none"
        )
    if kind == "latent":
        widths = {
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_head_dim": 8,
            "qk_pos_emb_head_dim": 8,
            "v_head_dim": 12,
        }
        options["num_query_groups"] = None
        return MLATransformerConfig(**options, **widths, multi_latent_attention=True, apply_rope_fusion=False)
    return TransformerConfig(**options)


def own_model(method: str, adopt: bool = True, kind: str = "dense") -> tuple[Any, Any]:
    """A GPTModel as a user of Megatron would build it, on two context-parallel ranks."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_lightseq.config import ContextParallelConfig
    from megatron_lightseq.megatron import adopt_layout, gpt_layer_spec
    from megatron_lightseq.megatron.cpu import platform as cpu_platform

    cpu_platform.activate()
    size = dist.get_world_size()
    parallel_state.initialize_model_parallel(context_parallel_size=size, create_gloo_process_groups=False)
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    config = own_config(kind, size)
    spec = gpt_layer_spec(config, context=ContextParallelConfig(cp_method=method))
    model = GPTModel(config, spec, VOCAB_SIZE, LENGTH, position_embedding_type="rope").eval()
    return model, adopt_layout(model) if adopt else None


def _losses(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])


def _all_losses(method: str, kind: str) -> torch.Tensor:
    import torch.distributed as dist
    from megatron.core import parallel_state

    model, layout = own_model(method, kind=kind)
    whole = whole_batch()
    del whole["attention_mask"]
    local = _losses(model, shard_batch(whole, layout, dist.get_rank()))
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.contiguous())
    parallel_state.destroy_model_parallel()
    return layout.unshard(parts, 1)


@pytest.mark.parametrize("method", ["lightseq", "zigzag"])
@pytest.mark.parametrize("kind", ["dense", "experts", "latent"])
def test_own_model_gives_every_token_the_loss_of_one_rank(kind: str, method: str) -> None:
    (expected,) = on_ranks(1, _all_losses, method, kind)
    for losses in on_ranks(2, _all_losses, method, kind):
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def _refusal(method: str, fed: str, tagged: bool) -> str:
    import torch.distributed as dist
    from megatron.core import parallel_state

    model, _ = own_model(method)
    whole = whole_batch()
    del whole["attention_mask"]
    shard = shard_batch(whole, SequenceLayout(fed, 2), dist.get_rank())
    if not tagged:
        shard = {key: value.clone() for key, value in shard.items() if value is not None}
    try:
        _losses(model, shard)
    except LayoutError as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
    return "ran"


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize(
    ("method", "fed"), [("lightseq", "zigzag"), ("ring", "striped"), ("zigzag", "contiguous")]
)
def test_data_of_another_layout_is_refused_by_both_names(method: str, fed: str, tagged: bool) -> None:
    wanted = "zigzag(2)" if method == "zigzag" else "contiguous(2)"
    for message in on_ranks(2, _refusal, method, fed, tagged):
        assert f"cut by {fed}(2)" in message
        assert f"attention on {wanted}" in message
        assert "future tokens" in message
        assert "shard_batch" in message
    assert on_ranks(2, _refusal, method, wanted.partition("(")[0], tagged) == ["ran", "ran"]


def _without_positions() -> str:
    from megatron.core import parallel_state

    model, _ = own_model("lightseq")
    try:
        model(whole_batch()["tokens"][:, : LENGTH // 2].clone(), None, None)
    except LayoutError as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
    return "ran"


def test_data_that_cannot_be_checked_is_refused() -> None:
    for message in on_ranks(2, _without_positions):
        assert "a batch without position_ids, which shard_batch did not cut" in message


def _unadopted() -> str:
    from megatron.core import parallel_state

    model, _ = own_model("lightseq", adopt=False)
    try:
        _losses(model, shard_batch(whole_batch(), SequenceLayout.contiguous(2), 0))
    except LayoutError as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
    return "ran"


def test_a_model_that_was_not_told_its_layout_is_refused() -> None:
    for message in on_ranks(2, _unadopted):
        assert "adopt_layout(model)" in message


def _tokens_seen_too_early(method: str, fed: str, guarded: bool) -> list[int]:
    """Positions whose loss changes when only the last input token of the sequence changes."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    model, layout = own_model(method)
    if not guarded:
        model._forward_pre_hooks.clear()
        layout = SequenceLayout(fed, 2)
    whole = whole_batch()
    del whole["attention_mask"]
    changed = {**whole, "tokens": whole["tokens"].clone()}
    changed["tokens"][:, -1] += 1
    rank = dist.get_rank()
    before, after = (_losses(model, shard_batch(batch, layout, rank)) for batch in (whole, changed))
    parallel_state.destroy_model_parallel()
    moved = (before - after).abs().amax(0) > 1e-4
    return [position for position, hit in zip(layout.positions(rank, LENGTH), moved, strict=True) if hit]


def test_without_the_guard_future_tokens_leak() -> None:
    """Why the guard exists: zigzag data with contiguous attention leaks future tokens without an error."""
    leaked = sorted(chain(*on_ranks(2, _tokens_seen_too_early, "lightseq", "zigzag", False)))
    assert len(leaked) > 1
    assert leaked[0] < LENGTH - 1
    for method in ("lightseq", "zigzag"):
        assert list(chain(*on_ranks(2, _tokens_seen_too_early, method, "", True))) == [LENGTH - 1]


@pytest.mark.usefixtures("one_rank")
def test_adopting_needs_one_layout() -> None:
    from megatron_lightseq.megatron import adopt_layout

    with pytest.raises(LayoutError, match=r"attentions have the layouts \(none\): .*one gpt_layer_spec"):
        adopt_layout(torch.nn.Linear(1, 1))


def _twice() -> list[str]:
    from megatron.core import parallel_state

    from megatron_lightseq.megatron import adopt_layout

    model, layout = own_model("lightseq")
    assert adopt_layout([model]) == layout
    parallel_state.destroy_model_parallel()
    return sorted(type(hook).__name__ for hook in model._forward_pre_hooks.values())


def test_adopting_twice_checks_once() -> None:
    """One hook checks the layout of batches, the other tells the rotary module of packed documents."""
    assert on_ranks(2, _twice) == [["_Announcement", "_LayoutCheck"]] * 2
