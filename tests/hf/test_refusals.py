"""What would be silently wrong is refused by name, and the remedy that the message gives works."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from megatron_lightseq import hf
from megatron_lightseq.errors import ConfigError, UnsupportedError
from megatron_lightseq.hf import attention, seams
from megatron_lightseq.transport import run_loopback
from megatron_lightseq.transport.group import Group
from tests.hf import tiny
from tests.hf.traps import ROPES


@pytest.fixture(autouse=True)
def _registered() -> None:
    hf.register()


def checked(model: Any, size: int = 2) -> str:
    """What ``check`` says about a model on several ranks; empty if nothing."""

    def check(group: Group) -> str:
        try:
            hf.ContextParallel(group).check(model)
        except UnsupportedError as error:
            return str(error)
        return ""

    return run_loopback(size, check)[0]


def hybrid() -> Any:
    config = transformers.Lfm2Config(
        **{**tiny.BASE, "block_auto_adjust_ff_dim": False}, layer_types=["conv", "full_attention"]
    )
    return transformers.Lfm2ForCausalLM._from_config(config, attn_implementation="lightseq")


def older() -> Any:
    config = transformers.BloomConfig(vocab_size=96, hidden_size=64, n_layer=1, n_head=4)
    return transformers.BloomForCausalLM(config)


def counting() -> Any:
    sizes = {"hidden_size": 64, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.OPTConfig(**sizes, vocab_size=96, word_embed_proj_dim=64, attention_dropout=0.0)
    return transformers.OPTForCausalLM._from_config(config, attn_implementation="lightseq")


ROUTED = {"output_router_logits": True}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "implementation": (
        lambda: tiny.model("llama", "sdpa"),
        r"LlamaForCausalLM with attn_implementation='sdpa': .* ",
    ),
    "dropout": (
        lambda: tiny.model("llama", "lightseq", attention_dropout=0.1),
        "attention_dropout 0.1: no kernel here drops",
    ),
    "layers": (hybrid, "layers of type conv: only layers with full, sliding or chunked attention"),
    "positions": (
        counting,
        r"positions that are counted in the attention mask \(model.decoder.embed_positions\)",
    ),
    "backend": (older, "BloomForCausalLM with attention layers of its own"),
    "router": (
        lambda: tiny.model("mixtral", "lightseq", **ROUTED),
        "output_router_logits: the load balancing loss",
    ),
    "bidirectional": (
        lambda: tiny.model("gemma3", "lightseq", use_bidirectional_attention=True),
        "use_bidirectional_attention True: attention is causal",
    ),
    **{
        kind: (
            lambda rope=rope: tiny.model("llama", "lightseq", rope_parameters=rope),  # type: ignore[misc]
            f"rope_type {kind}: its frequencies would follow the largest position",
        )
        for kind, rope in ROPES.items()
    },
    "no model": (lambda: torch.nn.Linear(2, 2), "a model of type Linear: models of transformers are checked"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_are_refused_by_name(name: str) -> None:
    build, text = REFUSED[name]
    said = checked(build())
    assert re.search(text, said), said


REMEDIES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "implementation": (
        lambda: tiny.model("llama", "sdpa"),
        lambda model: model.set_attn_implementation("lightseq"),
    ),
    "dropout": (
        lambda: tiny.model("llama", "lightseq", attention_dropout=0.1),
        lambda model: setattr(model.config, "attention_dropout", 0.0),
    ),
    "router": (
        lambda: tiny.model("mixtral", "lightseq", **ROUTED),
        lambda model: setattr(model.config, "output_router_logits", False),
    ),
    "router, shared": (lambda: tiny.model("mixtral", "lightseq", **ROUTED), hf.share_router_loss_in),
}


@pytest.mark.parametrize("name", REMEDIES)
def test_the_remedy_works(name: str) -> None:
    build, remedy = REMEDIES[name]
    model = build()
    assert checked(model)
    remedy(model)
    assert checked(model) == ""


def test_what_is_right_on_one_rank_is_allowed_there() -> None:
    for model in (hybrid(), tiny.model("mixtral", "lightseq", **ROUTED)):
        hf.ContextParallel().check(model)


def test_wrappers_are_looked_through() -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

    assert checked(Wrapper(tiny.model("llama", "lightseq"))) == ""
    assert "attn_implementation='eager'" in checked(Wrapper(tiny.model("llama")))


def test_a_batch_that_was_not_cut_is_refused_and_generation_has_a_remedy() -> None:
    model, ids = tiny.model("llama", "lightseq").eval(), torch.tensor([[5, 6, 7]])
    with pytest.raises(ConfigError, match=r"attention without the keyword argument 'lightseq'.*'sdpa'"):
        model(input_ids=ids)
    with pytest.raises(ConfigError, match="an attention_mask with padding"):
        model(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1]]))
    local = hf.ContextParallel().shard({"input_ids": ids})
    with pytest.raises(ConfigError, match="2 queries and 2 keys with a shard of 3 tokens"):
        model(**{**local, "input_ids": ids[:, :2], "position_ids": None})
    model.set_attn_implementation("sdpa")
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 5)


@pytest.mark.parametrize(
    ("others", "name"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "is_causal=False"),
        ({"attention_mask": torch.ones(1, 1, 2, 2)}, "attention_mask"),
        ({"alibi": torch.ones(1)}, "alibi"),
    ],
)
def test_arguments_that_would_have_to_be_ignored_are_refused(others: dict[str, Any], name: str) -> None:
    x = torch.randn(1, 2, 4, 8)
    plan = hf.ContextParallel().shard({"input_ids": torch.ones(1, 4, dtype=torch.long)})["lightseq"]
    arguments = {"attention_mask": None, "lightseq": plan, **others}
    with pytest.raises(UnsupportedError, match=f"attention with {name}: it would have to be ignored"):
        attention.lightseq_attention(torch.nn.Module(), x, x, x, **arguments)


def test_masks_with_functions_of_their_own_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="adds functions to its attention mask"):
        attention.lightseq_mask(batch_size=1, use_vmap=True)


def test_mask_functions_are_told_apart() -> None:
    """Also where no argument tells, as before transformers 5.0."""
    from transformers import masking_utils as masks

    def images(*_: Any) -> bool:
        return True

    packed = masks.packed_sequence_mask_function(torch.ones(1, 4))
    known = [masks.causal_mask_function, masks.sliding_window_causal_mask_function(3)]
    known += [masks.and_masks(known[1], packed), masks.chunked_causal_mask_function(3, torch.zeros(1))]
    assert not any(map(attention.adds_functions, known))
    for combine in (masks.or_masks, masks.and_masks):
        assert attention.adds_functions(combine(masks.causal_mask_function, images))
        assert attention.adds_functions(masks.and_masks(combine(known[1], images), packed))
    with pytest.raises(UnsupportedError, match="adds functions to its attention mask"):
        attention.lightseq_mask(mask_function=masks.or_masks(*known[:2]))


def test_reentrant_checkpoints_cannot_keep_attention() -> None:
    model = tiny.model("llama", "lightseq")
    assert hf.keep_attention_in(model) == 0
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UnsupportedError, match=r"use_reentrant=True: .*'use_reentrant': False"):
        hf.keep_attention_in(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert hf.keep_attention_in(model) == hf.keep_attention_in(model) > 0


def test_a_library_that_has_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the seams with each of them moved."""
    seams.check_seams()
    tables = transformers.AttentionInterface, transformers.AttentionMaskInterface
    loss = transformers.loss.loss_utils
    llama = transformers.models.llama.modeling_llama

    def refused() -> str:
        with pytest.raises(UnsupportedError) as raised:
            seams.check_seams()
        assert f"transformers {transformers.__version__}: " in str(raised.value)
        return str(raised.value)

    with monkeypatch.context() as changed:
        whole = llama.LlamaModel.forward

        def drops(self: Any, *args: Any, lightseq: Any = None, **others: Any) -> Any:
            return whole(self, *args, **others)

        changed.setattr(llama.LlamaModel, "forward", drops)
        assert "keyword arguments of a model do not reach" in refused()
    with monkeypatch.context() as changed:
        changed.setattr(llama, "create_causal_mask", lambda **_: None)
        assert "do not decide which mask" in refused()
    with monkeypatch.context() as changed:
        old = loss.ForCausalLMLoss

        def shifts(*args: Any, shift_labels: Any = None, **others: Any) -> Any:
            return old(*args, **others)

        changed.setitem(loss.LOSS_MAPPING, "ForCausalLM", shifts)
        assert "does not take shift_labels" in refused()
    with monkeypatch.context() as changed:
        changed.setattr(llama.LlamaForCausalLM, "forward", None)
        assert "a tiny Llama fails with TypeError" in refused()
    for table in tables:
        assert "lightseq_probe" not in table._global_mapping


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"transformers, which is not installed.*\[hf\]"):
        seams.check_seams()


def test_registering_leaves_random_numbers_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    seams.check_seams()
    assert torch.equal(torch.rand(2), wanted)
