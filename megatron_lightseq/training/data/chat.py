"""Conversations as text, rendered by the template that comes with a tokenizer, and which of it the assistant says.

A template is a Jinja program that is published with a model. It is rendered as transformers renders it: in Jinja's
sandbox, with the same options, filters and functions, and with the tokenizer's special tokens by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_lightseq.errors import DataError, explain

TEMPLATE_NAME, SETTINGS_NAME, SPECIAL_NAME = (
    "chat_template.jinja",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
ASSISTANT = "assistant"

Message = Mapping[str, Any]
Span = tuple[int, int]
"""Characters of a text: the first, and the one behind the last."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it may name."""

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, prompts: bool = False
    ) -> tuple[str, list[Span]]:
        """A conversation as text, and what the template itself marks as generated (``{% generation %}``).

        Args:
            messages: with a role each; keys whose value is None are left out, as transformers does.
            tools: that the assistant may call, as the template expects them.
            prompts: end with what the assistant's answer is to follow.

        Raises:
            DataError: the template is no Jinja template, refuses the conversation, or leaves the sandbox.
        """
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        blocks: list[str] = []
        spans: list[Span] = []
        token = _TRACKED.set((blocks, spans))
        try:
            for block in self._compiled.generate(
                messages=given,
                tools=tools,
                documents=None,
                add_generation_prompt=prompts,
                **self.special_tokens,
            ):
                blocks.append(block)
        except Exception as error:  # whatever a published program does
            raise DataError(
                explain(
                    got=f"a conversation of {', '.join(str(x.get('role')) for x in messages)}, "
                    f"for which the chat template raises {type(error).__name__}: {error}",
                    rule="the template renders every conversation",
                    remedy="Correct the conversation, leave it out with --skip-bad-lines, or give another template "
                    "with --chat-template",
                )
            ) from error
        finally:
            _TRACKED.reset(token)
        return "".join(blocks), spans

    def answers(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[str, list[Span]]:
        """A conversation as text, and what of it is learned: what the assistant says, with the end of its turns.

        Where the template does not mark it, a turn is what follows the prompt for it, up to the end of the turn
        without the white space behind it.

        Raises:
            DataError: as :meth:`render`; or a turn cannot be found, because the template renders the beginning of a
                conversation differently when more follows.
        """
        text, marked = self.render(messages, tools)
        if marked or "{% generation" in self.source or "{%- generation" in self.source:
            return text, marked
        spans = []
        for number, message in enumerate(messages):
            if message.get("role") == ASSISTANT:
                spans.append(self._turn(text, messages, number, tools))
        return text, spans

    def _turn(self, text: str, messages: Sequence[Message], number: int, tools: Sequence[Any] | None) -> Span:
        """Where one of the assistant's turns is in the text; raises DataError if it cannot be found."""
        before, _ = self.render(messages[:number], tools)
        prompt, _ = self.render(messages[:number], tools, prompts=True)
        until = self.render(messages[: number + 1], tools)[0].rstrip()
        # A prompt may go further than what past turns begin with: some ask for thoughts, which are not kept.
        start = _common(prompt, until)
        if not text.startswith(until) or start < len(before):
            raise _not_found(number)
        return start, len(until)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            raise_exception=_raise_exception, strftime_now=lambda form: datetime.now().strftime(form)
        )
        return environment.from_string(self.source)


def read_chat_template(tokenizer: Path, override: Path | None = None) -> ChatTemplate:
    """The template beside a tokenizer file.

    Args:
        tokenizer: tokenizer.json; chat_template.jinja or tokenizer_config.json lie in the same folder.
        override: a file with another template.

    Raises:
        DataError: there is no template.
    """
    settings = _settings(tokenizer.with_name(SETTINGS_NAME))
    special = {**_settings(tokenizer.with_name(SPECIAL_NAME)), **settings}
    own = tokenizer.with_name(TEMPLATE_NAME)
    chosen = override or (own if own.is_file() else None)
    try:
        source = _default_of(settings.get("chat_template")) if chosen is None else chosen.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise _no_template(str(chosen), str(error)) from error
    if source is None:
        raise _no_template(
            str(tokenizer.parent), f"neither {TEMPLATE_NAME} nor chat_template in {SETTINGS_NAME}"
        )
    tokens = {key: _content(value) for key, value in special.items() if key.endswith("_token")}
    return ChatTemplate(source, {key: value for key, value in tokens.items() if value is not None})


def _default_of(stored: Any) -> str | None:
    """Of several templates, the one named default."""
    if isinstance(stored, list):
        named = {str(each.get("name")): each.get("template") for each in stored if isinstance(each, dict)}
        stored = named.get("default")
    return stored if isinstance(stored, str) else None


def _content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _no_template(str(path), str(error)) from error
    return value if isinstance(value, dict) else {}


def _common(first: str, second: str) -> int:
    """Characters with which both texts begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(first), len(second)))


# ---- what templates may use ------------------------------------------------------------------------------------

_TRACKED: ContextVar[tuple[list[str], list[Span]] | None] = ContextVar("tracked", default=None)
"""While a template is rendered: its blocks so far, and what it has marked as generated."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``, which marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """The block, whose content is rendered by :meth:`_mark`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        content: str = caller()
        tracked = _TRACKED.get()
        if tracked is not None:
            blocks, spans = tracked
            start = sum(map(len, blocks))
            spans.append((start, start + len(content)))
        return content


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


# ---- messages --------------------------------------------------------------------------------------------------


def _no_template(where: str, why: str) -> DataError:
    return DataError(
        explain(
            got=f"{where} ({why})",
            rule="conversations are rendered by the chat template of the tokenizer",
            remedy="Use the tokenizer.json of an instruction-tuned model with the files beside it, or give a template "
            "with --chat-template",
        )
    )


def _not_found(number: int) -> DataError:
    return DataError(
        explain(
            got=f"message {number}, an assistant's turn whose text changes when more messages follow",
            rule="a template without {% generation %} renders the beginning of a conversation always in the same way",
            remedy="Give a template with {% generation %} around the assistant's turns with --chat-template, or leave "
            "such conversations out with --skip-bad-lines",
        )
    )
