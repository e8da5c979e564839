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
from megatron_lightseq.training.data.corpus import CorpusFacts, check_index
from megatron_lightseq.training.data.prepare import fingerprint, prepare, up_to_date
from megatron_lightseq.training.data.sources import SourceFile, find_files, find_stdlib_files
from megatron_lightseq.training.data.tokenizers import build_tokenizer

DEFAULT_OUTPUT = Path("data/stdlib")
"""Where the standard library goes; `configs/gpt_stdlib.yaml` reads it there."""


def run(arguments: Sequence[str]) -> int:
    """Prepare a corpus, or say that it is up to date."""
    options = _parser().parse_args(arguments)
    data = DataConfig(
        data_path=(str(options.output),),
        tokenizer_type=options.tokenizer_type,
        tokenizer_model=options.tokenizer_model,
        vocab_size=options.vocab_size,
    )
    _check(data)
    tokenizer = build_tokenizer(data)
    files = find_files(options.inputs) if options.inputs else find_stdlib_files()
    console = Console(file=sys.stdout, quiet=options.quiet, highlight=False)
    facts = up_to_date(options.output, fingerprint(files, tokenizer))
    if facts is not None:
        line = f"{options.output} is up to date: {facts.documents:,} documents, {facts.tokens:,} tokens"
        console.print(line, soft_wrap=True)
        return 0
    facts = _prepare_with_bar(files, data, options.output, console)
    console.print(summary(options.output, facts, options.seq_length))
    return 0


def _prepare_with_bar(
    files: list[SourceFile], data: DataConfig, output: Path, console: Console
) -> CorpusFacts:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"preparing {output}", total=len(files))
        return prepare(files, build_tokenizer(data), output, advance=lambda n: progress.advance(task, n))


def summary(prefix: Path, facts: CorpusFacts, seq_length: int) -> Table:
    """What was written, for a person."""
    table = Table(title=str(prefix), show_header=False, title_justify="left")
    lengths = check_index(prefix).lengths
    short = float((lengths < seq_length).mean())
    skipped = ", ".join(f"{number} {reason}" for reason, number in sorted(facts.skipped.items())) or "none"
    rows = {
        "files": f"{facts.files:,} (skipped: {skipped})",
        "documents": f"{facts.documents:,}",
        "tokens": f"{facts.tokens:,} of {facts.vocab_size:,} kinds, {facts.tokenizer['class']}",
        "unigram entropy": f"{facts.entropy:.4f} nats a token: the loss of guessing by frequency",
        f"shorter than {seq_length:,}": f"{short:.1%} of documents; samples join documents, none is cut off",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    longest = max(count for _, _, count in facts.length_histogram)
    for low, high, count in facts.length_histogram:
        table.add_row(f"length {low:,}-{high:,}", f"{'█' * max(1, round(30 * count / longest))} {count:,}")
    return table


def _check(data: DataConfig) -> None:
    """The rules of a run that concern data, so that a corpus can be trained on with the same settings."""
    validate(PretrainConfig(data=data), rule_sets=DATA_RULES)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="lightseq prepare-data",
        allow_abbrev=False,
        description="Turn text into Megatron's indexed token files PREFIX.bin and PREFIX.idx, with facts in "
        "PREFIX.json. A second run with the same files does nothing.",
    )
    made.add_argument(
        "inputs",
        nargs="*",
        type=Path,
        metavar="INPUT",
        help='folder (read recursively), text file, or .jsonl file whose lines have the key "text"; '
        "without one: the Python standard library's own source files",
    )
    made.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, metavar="PREFIX", help="default: %(default)s"
    )
    made.add_argument(
        "--tokenizer-type", choices=("byte", "hf", "null"), default="byte", help="default: byte"
    )
    made.add_argument("--tokenizer-model", metavar="FILE", help="a `tokenizers` JSON file, for hf")
    made.add_argument("--vocab-size", type=int, help="number of token ids, for null")
    made.add_argument(
        "--seq-length", type=int, default=4096, help="for the share of shorter documents (default: 4096)"
    )
    made.add_argument("--quiet", action="store_true", help="print errors only")
    return made
