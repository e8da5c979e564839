"""Small corpora for tests."""

from __future__ import annotations

from pathlib import Path

from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.training.data.corpus import CorpusFacts
from megatron_lightseq.training.data.prepare import prepare
from megatron_lightseq.training.data.sources import find_files
from megatron_lightseq.training.data.tokenizers import ByteTokenizer


def write_texts(folder: Path, count: int = 40, size: int = 90) -> Path:
    """Text files whose contents and lengths differ."""
    folder.mkdir(parents=True)
    for number in range(count):
        text = f"document {number} " * (1 + number % 7) + "é" * (number % 3)
        (folder / f"{number:03d}.txt").write_text((text * 9)[: size + number], encoding="utf-8")
    return folder


def make_corpus(folder: Path, name: str = "corpus", count: int = 40) -> tuple[Path, CorpusFacts]:
    """Prepares a byte-level corpus. Returns its prefix and its facts."""
    texts = write_texts(folder / f"{name}-texts", count)
    prefix = folder / name
    return prefix, prepare(find_files([texts]), ByteTokenizer(), prefix)


def config_for(*data_path: str, **values: object) -> PretrainConfig:
    """A configuration with short sequences."""
    small = {"seq_length": 32, "train_iters": 12, "global_batch_size": 4, "split": "8,1,1"}
    return with_values(PretrainConfig(), data_path=data_path, **{**small, **values})
