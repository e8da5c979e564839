"""`lightseq export-hf CHECKPOINTS FOLDER`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def run(arguments: Sequence[str]) -> int:
    """Convert a checkpoint and say what was written."""
    options = _parser().parse_args(arguments)
    from megatron_lightseq.convert.exporting import export_adapter, export_hf

    if options.adapter:
        found = export_adapter(options.checkpoint, options.folder, like=options.like)
    else:
        found = export_hf(
            options.checkpoint, options.folder, like=options.like, max_shard_bytes=options.max_shard_bytes
        )
    sys.stdout.write(
        f"{found.folder}: {found.num_tensors:,} tensors, {found.num_bytes:,} bytes, from {found.checkpoint}\n"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="lightseq export-hf",
        allow_abbrev=False,
        description="Turn the newest checkpoint of a folder into a model that transformers loads. config.json, "
        "tokenizer and generation settings are those that were imported with the model; what training may change "
        "(RoPE's base, the longest sequence) is written into config.json. Adapters (lora_dim) are merged into the "
        "weights, or written on their own with --adapter.",
    )
    made.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINTS",
        help="folder that a run or an import has saved to, or one checkpoint in it",
    )
    made.add_argument("folder", type=Path, metavar="FOLDER", help="new folder to write")
    made.add_argument(
        "--like",
        type=Path,
        metavar="FOLDER",
        help="folder with config.json and tokenizer (default: those that were imported with the model)",
    )
    made.add_argument(
        "--adapter",
        action="store_true",
        help="write only the adapters, as a folder that the peft library loads",
    )
    made.add_argument(
        "--max-shard-bytes",
        type=int,
        default=5_000_000_000,
        metavar="N",
        help="size of one safetensors file (default: %(default)s)",
    )
    return made
