"""`lightseq eval CONFIG.yaml [--key value ...]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lightseq.config import Machine, load_config
from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.training.evaluate import evaluate_checkpoint, for_evaluation
from megatron_lightseq.training.job.launch import Launch
from megatron_lightseq.training.pretrain import run_body


def run(arguments: Sequence[str]) -> int:
    """Evaluate, print a table, and write a file if one is named."""
    options, rest = _parser().parse_known_args(arguments)
    machine = Machine(world_size=Launch.from_environment().world_size)
    config = for_evaluation(load_config(rest, machine=machine))
    if not 1 <= options.buckets <= config.training.seq_length:
        raise ConfigError(
            explain(
                got=f"--buckets {options.buckets} with seq_length {config.training.seq_length}",
                rule="every range of positions holds at least one",
                remedy=f"Choose a number from 1 to {config.training.seq_length}",
            )
        )

    def show(found: dict[str, Any]) -> None:
        sys.stdout.write(table(found))
        sys.stdout.flush()
        if options.output is not None:
            options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    return run_body(
        config, machine, lambda resolved, _stop: evaluate_checkpoint(resolved, options.buckets, show)
    )


def table(found: dict[str, Any]) -> str:
    """The loss by position as lines of text."""
    lines = [f"{found['checkpoint']}: {found['sequences']} sequences of {found['seq_length']:,} tokens"]
    for one in found["by_position"]:
        loss = "-" if one["loss"] is None else f"{one['loss']:.4f}"
        lines.append(f"  positions {one['first']:>9,} to {one['last']:>9,}  loss {loss}")
    loss = "-" if found["loss"] is None else f"{found['loss']:.4f}"
    return "\n".join([*lines, f"  all {found['num_tokens']:,} tokens  loss {loss}", ""])


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="lightseq eval",
        allow_abbrev=False,
        description="The mean loss of a checkpoint (--load) by position, on eval_iters global batches of the "
        "validation split. All other arguments are those of lightseq pretrain: recipes, and keys with values. Start "
        "it with torchrun to use several ranks.",
    )
    made.add_argument(
        "--buckets",
        type=int,
        default=16,
        metavar="N",
        help="ranges of positions, of equal size (default: %(default)s)",
    )
    made.add_argument("--output", type=Path, metavar="FILE", help="write the result to this file, as JSON")
    return made
