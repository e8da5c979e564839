"""Damaged and hostile files for every reader: each must return a value or raise one of this package's errors.

    python -m tests.fuzz.readers --minutes 10 --seed 7

runs longer than the tests do, in a process whose memory is limited, and prints what it has tried.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import resource
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import checkpoint as dcp

from megatron_lightseq.config import from_yaml, to_yaml
from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.errors import LightSeqError
from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory
from megatron_lightseq.training.checkpoint.health_marks import FAILED_NAME, failures
from megatron_lightseq.training.checkpoint.lineage import Lineage
from megatron_lightseq.training.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, _content_hash
from megatron_lightseq.training.checkpoint.safe_load import load_metadata, no_code_execution
from megatron_lightseq.training.data.corpus import (
    CorpusFacts,
    check_facts,
    check_index,
    file_of,
    read_facts,
    write_index,
)
from megatron_lightseq.training.data.safe_cache import load_index_cache
from megatron_lightseq.training.data.tokenizers import load_hf_tokenizer

MEMORY_BYTES = 8 << 30
"""Address space of the long run; torch alone maps some of it."""
Reader = Callable[[Path], Any]


class Target:
    """One reader: how a file of its kind is made, read, and changed."""

    def __init__(self, name: str, file: str, make: Callable[[Path], bytes], read: Reader) -> None:
        self.name = name
        self.file = file
        self.read = read
        self._make = make

    def prepare(self, folder: Path) -> bytes:
        """Write what the reader needs beside its file; returns a sound file."""
        folder.mkdir(parents=True, exist_ok=True)
        return self._make(folder)


def _manifest(folder: Path) -> bytes:
    (folder / "weights").write_bytes(b"weights")
    manifest = Manifest(
        iteration=3,
        consumed_samples=6,
        model={"num_layers": 2},
        optimizer={},
        data={},
        world={},
        config_fingerprint="0",
        versions={},
        lineage=Lineage.fresh(),
        files=(FileRecord.of(folder, "weights"),),
    )
    return manifest.dumps().encode()


def _read_manifest(path: Path) -> None:
    Manifest.read(path.parent).problems(path.parent)


def _line(_folder: Path) -> bytes:
    return Lineage.fresh().continued(3).dumps().encode()


def _facts(folder: Path) -> bytes:
    file_of(folder / "corpus", "bin").write_bytes(bytes(range(60)))
    write_index(file_of(folder / "corpus", "idx"), np.array([20, 40], np.int32), np.uint8)
    facts = CorpusFacts(
        fingerprint="a",
        content="b",
        tokenizer={"class": "ByteTokenizer"},
        vocab_size=257,
        documents=2,
        tokens=60,
        entropy=1.0,
        length_histogram=[[1, 2, 3]],
        files=1,
        skipped={},
        bin_bytes=60,
        idx_bytes=file_of(folder / "corpus", "idx").stat().st_size,
    )
    return json.dumps(asdict(facts)).encode()


def _read_facts(path: Path) -> None:
    prefix = path.with_suffix("")
    facts = read_facts(prefix)
    if facts is not None:
        check_facts(prefix, facts, check_index(prefix))


def _index(folder: Path) -> bytes:
    _facts(folder)
    return file_of(folder / "corpus", "idx").read_bytes()


def _cache(_folder: Path) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.arange(50))
    return stream.getvalue()


def _metadata(folder: Path) -> bytes:
    state = {"w": torch.arange(6.0), "h": torch.ones(3, 4, dtype=torch.bfloat16), "note": {"step": 3}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "dcp"), no_dist=True)
    return (folder / "dcp" / ".metadata").read_bytes()


def _read_metadata(path: Path) -> None:
    load_metadata(io.BytesIO(path.read_bytes()))


def _tensors(_folder: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"torch": torch.arange(10, dtype=torch.uint8), "python": [3, [1, 2], None]}, stream)
    return stream.getvalue()


def _read_tensors(path: Path) -> None:
    from megatron_lightseq.training.checkpoint.loading import load_plain

    with no_code_execution():
        load_plain(path)


def _tokenizer(_folder: Path) -> bytes:
    vocabulary = {"<unk>": 0, "<|endoftext|>": 1, **{chr(97 + i): i + 2 for i in range(20)}}
    file = {
        "version": "1.0",
        "added_tokens": [
            {"id": 1, "content": "<|endoftext|>", "special": True, "single_word": False, "lstrip": False}
            | {"rstrip": False, "normalized": False}
        ],
        "normalizer": {"type": "Replace", "pattern": {"Regex": "x+"}, "content": "y"},
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    return json.dumps(file).encode()


def _read_tokenizer(path: Path) -> None:
    load_hf_tokenizer(path).encode(["a b c", "xx"])


def _read_config(path: Path) -> None:
    from megatron_lightseq.config import load_config

    load_config([str(path)])


def _read_saved_recipe(path: Path) -> None:
    from_yaml(path.read_text(errors="replace"))


TARGETS = (
    Target("manifest", MANIFEST_NAME, _manifest, _read_manifest),
    Target("run_started", "run_started", _line, lambda path: CheckpointDirectory(root=path.parent).line()),
    Target(
        "latest",
        "latest",
        lambda _: b"iter_0000003\n",
        lambda path: CheckpointDirectory(root=path.parent).candidates(),
    ),
    Target("failures", FAILED_NAME, lambda _: b"1\n", lambda path: failures(path.parent)),
    Target(".metadata", ".metadata", _metadata, _read_metadata),
    Target("random state", "rank_00000.pt", _tensors, _read_tensors),
    Target("corpus facts", "corpus.json", _facts, _read_facts),
    Target("corpus index", "corpus.idx", _index, lambda path: check_index(path.with_suffix(""))),
    Target("index cache", "a.npy", _cache, load_index_cache),
    Target("tokenizer", "tokenizer.json", _tokenizer, _read_tokenizer),
    Target("recipe", "recipe.yaml", lambda _: to_yaml(PretrainConfig()).encode(), _read_config),
    Target("saved recipe", "recipe.yaml", lambda _: to_yaml(PretrainConfig()).encode(), _read_saved_recipe),
)


def hostile_contents() -> Iterator[bytes]:
    """Contents that have broken readers, of any kind."""
    deep = 100_000
    yield from (b"", b"\0", b"\xff\xfe", b"null", b"[]", b"{}", b"1e999", b'"\\ud800"')
    yield b"[" * deep
    yield b'{"content":' + b"[" * deep + b"]" * deep + b"}"
    yield b'{"a":' * deep
    yield b"- " * 20_000
    yield b"a: " + b"9" * 5_000
    yield b"\n".join(b"key%d: 1" % number for number in range(8_000))
    yield b"\x80\x04)" + b"\x85" * 1_000_000 + b"."  # a tuple in a tuple in a tuple
    yield b"\x80\x04}" + b")" + b"\x85" * 1_000_000 + b"K\x01s."  # as a key, which is hashed
    yield b"\x80\x02Nr\x00\x00\x00\x40."  # stored as object 2^30 of the memo
    yield b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"."  # a bytearray of a terabyte
    yield b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"\x01."  # a number of a gigabyte
    yield pickle.dumps({"a": [1, 2, 3]})
    yield b"\x93NUMPY\x01\x00" + struct.pack("<H", 60_000) + b"(" * 60_000
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (4611686018427387904,), }"
    yield b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    yield b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 1 << 62, 1 << 62)


def mutated(sound: bytes, rng: random.Random) -> bytes:
    """A sound file with some of its bytes, words or numbers changed."""
    data = bytearray(sound)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[place] = rng.choice((0, 0x7F, 0xFF, ord("-"), ord("9"), ord("{"), ord("["), ord('"')))
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            data[place:place] = rng.choice((b"-1", b"1e400", b"null", b"[]", b"\0" * 8, b"\xff" * 8, b"../"))
        elif kind == 4:
            other = rng.randrange(len(data) + 1)
            data[place:place] = data[other : other + rng.randrange(64)]
        elif kind == 5:
            del data[place : place + rng.randrange(16)]
        else:
            data[place : place + 8] = struct.pack("<q", rng.choice((-1, 0, 1 << 31, 1 << 62, -(1 << 63))))
    return bytes(data)


def lying_json(sound: bytes, rng: random.Random) -> bytes:
    """A JSON file, one value of which is of another kind; a manifest's checksum is made to fit."""
    try:
        document = json.loads(sound)
    except ValueError:
        return mutated(sound, rng)
    if not isinstance(document, (dict, list)):
        return mutated(sound, rng)
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key in value.keys() if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                collect(value[key])

    collect(document)
    value, key = rng.choice(places)
    value[key] = rng.choice((None, -1, 1 << 70, 1.5, "", "../x", "\0", [], {}, [[]], True, {"a": None}))
    if isinstance(document, dict) and isinstance(document.get("content"), dict) and "sha256" in document:
        document["sha256"] = _content_hash(document["content"])
    return json.dumps(document).encode()


def attempt(target: Target, folder: Path, content: bytes) -> float:
    """Read a file with this content; returns the seconds. Anything but a value or an error of ours is raised."""
    (folder / target.file).write_bytes(content)
    began = time.perf_counter()
    try:
        target.read(folder / target.file)
    except LightSeqError as error:
        if ": " not in str(error):
            raise AssertionError(f"an error without words: {error}") from error
    return time.perf_counter() - began


def cases(sound: bytes, rng: random.Random, count: int) -> Iterator[bytes]:
    """Hostile contents, then changed ones."""
    yield from hostile_contents()
    for number in range(count):
        yield (lying_json if number % 3 == 0 else mutated)(sound, rng)


def main(arguments: list[str]) -> int:
    """Fuzz all readers in turn until the time is over; returns the exit status."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    deadline = time.monotonic() + 60 * options.minutes
    tried, slowest, round_number = 0, (0.0, ""), 0
    with tempfile.TemporaryDirectory() as root:
        sounds = {target.name: target.prepare(Path(root) / target.name) for target in TARGETS}
        while time.monotonic() < deadline:
            for target in TARGETS:
                rng = random.Random(f"{options.seed} {round_number} {target.name}")
                for content in cases(sounds[target.name], rng, 200):
                    try:
                        seconds = attempt(target, Path(root) / target.name, content)
                    except BaseException:
                        kept = Path(f"fuzz-{os.getpid()}")
                        kept.write_bytes(content)
                        print(f"{target.name}: the file is kept as {kept}", file=sys.stderr)
                        raise
                    tried += 1
                    slowest = max(slowest, (seconds, target.name))
            round_number += 1
    print(f"{tried} files, {len(TARGETS)} readers, seed {options.seed}: 0 raw errors; ", end="")
    print(f"slowest {slowest[0]:.1f} s ({slowest[1]})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
