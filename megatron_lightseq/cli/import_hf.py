"""`lightseq import-hf MODEL --recipe out.yaml --save CHECKPOINTS`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def run(arguments: Sequence[str]) -> int:
    """Convert a model and say what was written."""
    options = _parser().parse_args(arguments)
    from megatron_lightseq.convert.importing import import_hf

    found = import_hf(
        options.source,
        save=options.save,
        recipe=options.recipe,
        dtype=options.dtype,
        ignored_fields=tuple(options.ignore_field),
    )
    sys.stdout.write(
        f"{found.checkpoint}: {found.num_tensors:,} tensors, {found.num_parameters:,} parameters\n"
        f"{options.recipe}: train with lightseq pretrain {options.recipe} --data-path PREFIX --save FOLDER\n"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="lightseq import-hf",
        allow_abbrev=False,
        description="Turn a Hugging Face model into a checkpoint that loads with any parallelism, and a recipe that "
        "trains it further. Tensors are converted one at a time, so the model need not fit into memory. Every field of "
        "config.json is honoured or refused by name.",
    )
    made.add_argument(
        "source",
        type=Path,
        metavar="MODEL",
        help="folder with config.json and safetensors files, as save_pretrained writes it, or a GGUF file (llama, "
        "qwen2, qwen3, qwen3moe), whose weights are dequantised",
    )
    made.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="recipe to write (YAML)")
    made.add_argument(
        "--save", type=Path, required=True, metavar="FOLDER", help="new folder of checkpoints to write"
    )
    made.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="convert the weights (default: as they are, if all of them are float32 or all bfloat16)",
    )
    made.add_argument(
        "--ignore-field",
        action="append",
        default=[],
        metavar="NAME",
        help="treat an unknown field of config.json as without effect; may be repeated",
    )
    return made
