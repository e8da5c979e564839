"""`lightseq prepare-data [INPUT ...] [--output PREFIX]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_lightseq.config import DataConfig, PretrainConfig
from megatron_lightseq.config.validate import DATA_RULES, validate
from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.training.data.chat import ChatTemplate, read_chat_template
from megatron_lightseq.training.data.corpus import CorpusFacts, check_index, file_of
from megatron_lightseq.training.data.documents import ReadOptions
from megatron_lightseq.training.data.prepare import counted, fingerprint, prepare, up_to_date
from megatron_lightseq.training.data.sources import SourceFile, find_files, find_stdlib_files
from megatron_lightseq.training.data.tokenizers import Tokenizer, build_tokenizer

DEFAULT_OUTPUT = Path("data/stdlib")
"""Prefix for the standard library; `configs/gpt_stdlib.yaml` reads it."""


def run(arguments: Sequence[str]) -> int:
    """Prepare a corpus, or say that it is up to date."""
    options = _parser().parse_args(arguments)
    tokenizer = build_tokenizer(_data_config(options))
    reading, chat = _reading(options), _chat(options)
    files = find_files(options.inputs) if options.inputs else find_stdlib_files()
    console = Console(file=sys.stdout, quiet=options.quiet, highlight=False)
    if file_of(options.output, "json").is_file():
        facts = up_to_date(options.output, fingerprint(files, tokenizer, reading, options.pack, chat))
        if facts is not None:
            line = f"{options.output} is up to date: {facts.documents:,} documents, {facts.tokens:,} tokens"
            console.print(line, soft_wrap=True)
            return 0
    facts = _prepare_with_bar(files, tokenizer, options, reading, chat, console)
    console.print(summary(options.output, facts, options.seq_length))
    return 0


def _reading(options: argparse.Namespace) -> ReadOptions:
    """How records are read; raises ConfigError for options that do not belong together."""
    if options.pack is None:
        if options.prompt_key is not None:
            raise ConfigError(
                explain(
                    got=f"--prompt-key {options.prompt_key} without --pack",
                    rule="prompts and answers are told apart in packed corpora only",
                    remedy="Add --pack with the seq_length of fine-tuning, or leave --prompt-key out",
                )
            )
        return ReadOptions(text_key=options.text_key or "text", skip_bad_lines=options.skip_bad_lines)
    if not options.inputs or options.pack < 2:
        raise ConfigError(
            explain(
                got=f"--pack {options.pack} with {len(options.inputs)} inputs",
                rule="records with a prompt and an answer are packed into sequences of two tokens or more",
                remedy="Name files of JSON lines, and give the seq_length of fine-tuning, for example --pack 4096",
            )
        )
    if options.messages_key is not None:
        return ReadOptions(messages_key=options.messages_key, skip_bad_lines=options.skip_bad_lines)
    return ReadOptions(
        text_key=options.text_key or "answer",
        prompt_key=options.prompt_key or "prompt",
        skip_bad_lines=options.skip_bad_lines,
    )


def _chat(options: argparse.Namespace) -> ChatTemplate | None:
    """How conversations are rendered; None without --messages-key. Raises ConfigError where it does not apply."""
    if options.messages_key is None and options.chat_template is None:
        return None
    fits = options.messages_key and options.pack is not None and options.tokenizer_type == "hf"
    if not fits or options.prompt_key or options.text_key:
        raise ConfigError(
            explain(
                got=f"--messages-key {options.messages_key} with --pack {options.pack}, --tokenizer-type "
                f"{options.tokenizer_type}, --prompt-key {options.prompt_key} and --text-key {options.text_key}",
                rule="conversations are rendered by a tokenizer's chat template and packed",
                remedy="Give --messages-key, --pack, --tokenizer-type hf and --tokenizer-model, and no other key",
            )
        )
    return read_chat_template(Path(options.tokenizer_model), options.chat_template)


def _prepare_with_bar(
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    options: argparse.Namespace,
    reading: ReadOptions,
    chat: ChatTemplate | None,
    console: Console,
) -> CorpusFacts:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"preparing {options.output}", total=len(files))
        return prepare(
            files,
            tokenizer,
            options.output,
            options=reading,
            pack_length=options.pack,
            chat=chat,
            advance=lambda count: progress.advance(task, count),
        )


def summary(prefix: Path, facts: CorpusFacts, seq_length: int) -> Table:
    """What was written, as a table to print."""
    table = Table(title=str(prefix), show_header=False, title_justify="left")
    rows = {
        "files": f"{facts.files:,} (skipped: {counted(facts.skipped) or 'none'})",
        "documents": f"{facts.documents:,} (records skipped: {counted(facts.skipped_records) or 'none'})",
        "tokens": f"{facts.tokens:,} with ids below {facts.vocab_size:,}, {facts.tokenizer['class']}",
        "unigram entropy": f"{facts.entropy:.4f} nats per token: the loss of a model that knows only frequencies",
    }
    if facts.pack_length:
        filled = facts.tokens / (facts.packs * facts.pack_length)
        rows[f"packs of {facts.pack_length:,}"] = f"{facts.packs:,}, {filled:.1%} full; no document is cut"
    else:
        short = float((check_index(prefix).lengths < seq_length).mean())
        rows[f"shorter than {seq_length:,}"] = (
            f"{short:.1%} of documents; samples join documents, none is truncated"
        )
    for name, value in rows.items():
        table.add_row(name, value)
    longest = max(count for _, _, count in facts.length_histogram)
    for low, high, count in facts.length_histogram:
        table.add_row(f"length {low:,}-{high:,}", f"{'█' * max(1, round(30 * count / longest))} {count:,}")
    return table


def _data_config(options: argparse.Namespace) -> DataConfig:
    """The data settings of a run that reads the corpus; raises ConfigError if they break a rule."""
    data = DataConfig(
        data_path=(str(options.output),),
        tokenizer_type=options.tokenizer_type,
        tokenizer_model=options.tokenizer_model,
        eod_token=options.eod_token,
        vocab_size=options.vocab_size,
    )
    validate(PretrainConfig(data=data), rule_sets=DATA_RULES)
    return data


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="lightseq prepare-data",
        allow_abbrev=False,
        description="Turn text into Megatron's indexed token files PREFIX.bin and PREFIX.idx, and record facts about "
        "them in PREFIX.json. If the files, their contents and the options are the same as before, nothing is done.",
    )
    made.add_argument(
        "inputs",
        nargs="*",
        type=Path,
        metavar="INPUT",
        help="folder (searched recursively; links are followed, hidden entries ignored) or file: text, JSON lines, a "
        "JSON array of objects, or Parquet (needs pyarrow), also compressed with gzip, bzip2 or xz; default: the "
        "source files of the Python standard library",
    )
    made.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        metavar="PREFIX",
        help="where to write (default: %(default)s)",
    )
    made.add_argument(
        "--text-key",
        metavar="KEY",
        help="JSON key or Parquet column of the text (default: text, or with --pack answer)",
    )
    made.add_argument(
        "--pack",
        type=int,
        metavar="N",
        help="for fine-tuning with sft: put records with a prompt and an answer into sequences of N tokens, without "
        "cutting any",
    )
    made.add_argument(
        "--prompt-key",
        metavar="KEY",
        help="with --pack: JSON key or Parquet column of the prompt (default: prompt)",
    )
    made.add_argument(
        "--messages-key",
        metavar="KEY",
        help="with --pack: JSON key or Parquet column of a conversation, a list of messages with role and content, "
        "such as messages; the tokenizer's chat template renders it, and the loss is that of the assistant's turns",
    )
    made.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="with --messages-key: a Jinja template (default: chat_template.jinja or tokenizer_config.json beside the "
        "tokenizer file)",
    )
    made.add_argument(
        "--skip-bad-lines",
        action="store_true",
        help="leave out records without a text and count them, instead of stopping at the first one",
    )
    made.add_argument(
        "--tokenizer-type",
        choices=("byte", "hf", "null"),
        default="byte",
        help="byte: UTF-8 bytes, hf: a `tokenizers` file, null: the text is token ids (default: byte)",
    )
    made.add_argument("--tokenizer-model", metavar="FILE", help="the `tokenizers` JSON file, for hf")
    made.add_argument(
        "--eod-token",
        metavar="NAME",
        help="name of the end-of-document token, for hf (default: the first well-known name in the file)",
    )
    made.add_argument("--vocab-size", type=int, metavar="N", help="number of token ids, for null")
    made.add_argument(
        "--seq-length",
        type=int,
        default=4096,
        metavar="N",
        help="sequence length for the statistics of short documents (default: 4096)",
    )
    made.add_argument("--quiet", action="store_true", help="print only errors")
    return made
