"""Conversations: rendered as transformers renders them, and packed with the loss on the assistant's turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_lightseq.cli import run
from megatron_lightseq.errors import DataError
from megatron_lightseq.training.data.chat import ChatTemplate, read_chat_template
from megatron_lightseq.training.data.datasets import build_datasets, open_corpora
from megatron_lightseq.training.data.pairs import document_lengths, first_parts, pairs_of
from tests.data.corpora import config_for

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nBe kind & <helpful>.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is not defined %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{% endif %}"""
TAGGED = """{{ bos_token }}
{% for message in messages %}
    {% if message['role'] not in ['user', 'assistant'] %}
        {{ raise_exception('Only users and assistants!') }}
    {% endif %}
    {% if message['role'] == 'assistant' %}
<|im_start|>assistant
        {% generation %}
{{ message['content'] + eos_token }}
        {% endgeneration %}

    {% else %}
{{ '<|im_start|>user\\n' + message['content'] + '<|im_end|>' }}

    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
FORGETFUL = """{% for message in messages %}
{%- if loop.last %}{{ message.thinking }}{% endif %}{{ message.role + ':' + message.content + '<|im_end|>' }}
{%- endfor %}"""

TALK = [
    {"role": "user", "content": "How far is the Müller glacier? 🏔"},
    {"role": "assistant", "content": "Ten miles — äußerst weit."},
    {"role": "user", "content": "And back?"},
    {"role": "assistant", "content": "The same  \n", "tool_calls": None},
]
SYSTEM = [{"role": "system", "content": "Answer briefly."}, *TALK]
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "<html> & ünïcode"}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes with special tokens, as a model has it."""
    made = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(made / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    (made / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHATML}))
    return made


def theirs(folder: Path, template: str) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
    )


def ours(folder: Path, template: str) -> ChatTemplate:
    return ChatTemplate(template, read_chat_template(folder / "tokenizer.json").special_tokens)


@pytest.mark.parametrize("template", [CHATML, TAGGED, FORGETFUL])
@pytest.mark.parametrize("messages", [TALK, SYSTEM])
@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_templates_render_as_transformers_renders_them(
    template: str, messages: list[Any], prompts: bool, tools: Any, folder: Path
) -> None:
    if template is TAGGED and messages is SYSTEM:
        with pytest.raises(DataError, match="Only users and assistants!"):
            ours(folder, template).render(messages, tools, prompts=prompts)
        return
    expected = theirs(folder, template).apply_chat_template(
        messages, tools=tools, add_generation_prompt=prompts, tokenize=False
    )
    assert ours(folder, template).render(messages, tools, prompts=prompts)[0] == expected


def test_turns_are_found_without_the_tag(folder: Path) -> None:
    text, spans = ours(folder, CHATML).answers(SYSTEM)
    assert [text[start:stop] for start, stop in spans] == [
        "Ten miles — äußerst weit.<|im_end|>",
        "The same<|im_end|>",
    ]


def test_a_template_that_forgets_is_refused_and_its_last_turn_learned(folder: Path) -> None:
    talk = [{**message, "thinking": "hm: "} for message in TALK]
    with pytest.raises(DataError, match="message 1, an assistant's turn whose text changes"):
        ours(folder, FORGETFUL).answers(talk)


def test_templates_stay_in_the_sandbox(folder: Path) -> None:
    with pytest.raises(DataError, match="SecurityError"):
        ours(folder, "{{ ''.__class__.__mro__[1].__subclasses__() }}").render(TALK)
    with pytest.raises(DataError, match="SecurityError"):
        ours(folder, "{{ messages.append(1) }}").render(TALK)
    with pytest.raises(DataError, match="TemplateSyntaxError"):
        ours(folder, "{% for %}").render(TALK)


def test_the_template_is_that_of_the_tokenizers_files(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    file = tmp_path / "tokenizer.json"
    found = read_chat_template(file)
    assert (found.source, dict(found.special_tokens)) == (CHATML, {"bos_token": "<s>", "eos_token": "</s>"})
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert read_chat_template(file).source == "yes"
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert read_chat_template(file).source == "newer"
    (tmp_path / "own.jinja").write_text("own")
    assert read_chat_template(file, tmp_path / "own.jinja").source == "own"
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(
        DataError, match=r"neither chat_template\.jinja nor chat_template in tokenizer_config\.json"
    ):
        read_chat_template(file)


# ---- packed ----------------------------------------------------------------------------------------------------------


def prepared(folder: Path, tmp_path: Path, template: str, records: list[Any], *flags: str) -> Path:
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "template.jinja").write_text(template)
    arguments = ["--pack", "512", "--messages-key", "messages", "--output", str(tmp_path / "sft"), "--quiet"]
    arguments += ["--tokenizer-type", "hf", "--tokenizer-model", str(folder / "tokenizer.json")]
    arguments += ["--chat-template", str(tmp_path / "template.jinja"), *flags]
    code = run(["prepare-data", str(tmp_path / "talks.jsonl"), *arguments])
    assert code == 0, f"prepare-data returned {code}"
    return tmp_path / "sft"


def said_by_transformers(tokenizer: Any, talk: list[Any]) -> tuple[str, str]:
    found = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = np.array(found["input_ids"]), np.array(found["assistant_masks"], dtype=bool)
    return tokenizer.decode(ids), tokenizer.decode(ids[mask])


def said_in_chatml(tokenizer: Any, talk: list[Any]) -> tuple[str, str]:
    said = "".join(message["content"].strip() + "<|im_end|>" for message in talk[1::2])
    return tokenizer.apply_chat_template(talk, tokenize=False), said


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_the_loss_is_on_the_assistants_turns(template: str, folder: Path, tmp_path: Path) -> None:
    talks = [TALK, TALK[:2], [{"role": "user", "content": "?" * 9}, *TALK[1:]]]
    prefix = prepared(folder, tmp_path, template, [{"messages": talk, "id": 7} for talk in talks])
    flags = {"tokenizer_type": "hf", "tokenizer_model": str(folder / "tokenizer.json")}
    config = config_for(str(prefix), seq_length=512, sft=True, split="1,0,0", global_batch_size=1, **flags)
    datasets = build_datasets(config, open_corpora(config))
    tokenizer = theirs(folder, template)
    expected = set()
    for talk in talks:
        expected.add(
            said_by_transformers(tokenizer, talk) if template is TAGGED else said_in_chatml(tokenizer, talk)
        )
    found = set()
    train = datasets.train
    for number in range(len(train.indices)):
        sample = train[number]
        packing = train.documents(number)
        tokens, labels, mask = (sample[key].numpy() for key in ("tokens", "labels", "loss_mask"))
        for start, length in zip(np.cumsum([0, *packing.lengths[:-1]]), packing.lengths, strict=True):
            ids, learned = tokens[start : start + length], mask[start : start + length] > 0
            said = labels[start : start + length][learned]
            if learned.any():
                found.add((tokenizer.decode(ids), tokenizer.decode(said)))
    assert found == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, "no list of messages under 'messages'"),
        ({"messages": [{"content": "?"}]}, "message 0 without a role"),
        ({"text": "?"}, "no list of messages under 'messages'"),
        ({"messages": TALK[:1]}, "the assistant says nothing"),
        ({"messages": [{"role": "system", "content": "x"}, *TALK]}, "Only users and assistants!"),
        ({"messages": [TALK[0], {"role": "assistant", "content": "x" * 600}]}, "a document is not cut"),
    ],
)
def test_conversations_that_cannot_be_used_are_named_or_left_out(
    record: dict[str, Any], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError, match="prepare-data returned"):
        prepared(folder, tmp_path, TAGGED, [{"messages": TALK}, record])
    error = capsys.readouterr().err
    assert message in error
    assert "talks.jsonl line 2" in error
    assert not (tmp_path / "sft.idx").exists()
    prepared(folder, tmp_path, TAGGED, [{"messages": TALK}, record], "--skip-bad-lines")


@pytest.mark.parametrize("flags", [("--prompt-key", "p"), ("--text-key", "t")])
def test_keys_that_contradict_conversations_are_refused(
    flags: tuple[str, ...], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError, match="prepare-data returned"):
        prepared(folder, tmp_path, CHATML, [{"messages": TALK}], *flags)
    assert "Give --messages-key, --pack, --tokenizer-type hf and --tokenizer-model" in capsys.readouterr().err


def test_pairs_and_joints() -> None:
    generator = np.random.default_rng(5)
    lengths: list[int] = []
    documents = [generator.integers(0, 2, size).astype(bool) for size in (1, 2, 7, 30, 1)]
    for learned in documents:
        tokens = np.arange(len(learned))
        parts = list(pairs_of(tokens, learned))
        assert np.array_equal(np.concatenate(parts), tokens)
        assert all(not learned[part].any() for part in parts[0::2])
        assert all(learned[part].all() for part in parts[1::2])
        lengths += map(len, parts)
    assert document_lengths(np.array(lengths)).tolist() == list(map(len, documents))
    assert len(first_parts(np.array(lengths))) == len(documents)
