"""Damaged indexes are named before Megatron maps them; pickles in caches are never executed."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lightseq.errors import DataError
from megatron_lightseq.training.data.corpus import (
    check_index,
    content_digest,
    entropy_nats,
    length_histogram,
    read_facts,
)
from megatron_lightseq.training.data.datasets import build_datasets, open_corpora, verify_contents
from megatron_lightseq.training.data.safe_cache import load_index_cache, safe_index_caches, save_index_cache
from tests.data.corpora import config_for, make_corpus

HEADER = struct.Struct("<9sQBQQ")
COUNT = 40


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return make_corpus(tmp_path, count=COUNT)[0]


def patch(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


LENGTHS, POINTERS, MARKS = HEADER.size, HEADER.size + 4 * COUNT, HEADER.size + 12 * COUNT

DAMAGE: dict[str, tuple[int, bytes, str]] = {
    "magic": (0, b"PK\x03\x04", "an index begins with"),
    "version": (9, struct.pack("<Q", 2), "it has version 2: this reader knows version 1"),
    "type code zero": (17, b"\0", "its token type code is 0"),
    "type code of floats": (17, b"\x06", "its token type code is 6"),
    "more sequences than bytes": (18, struct.pack("<Q", COUNT + 1), "for 41 sequences and 41 document marks"),
    "a count that overflows": (18, struct.pack("<Q", 2**63), "sequences and 41 document marks"),
    "more documents than bytes": (26, struct.pack("<Q", 2**40), "document marks: these need"),
    "no documents": (26, struct.pack("<Q", 0), "these need"),
    "negative length": (
        LENGTHS + 8,
        struct.pack("<i", -5),
        "a sequence has -5 tokens: lengths are not negative",
    ),
    "length past the end": (
        LENGTHS + 4 * (COUNT - 1),
        struct.pack("<i", 10**6),
        "a sequence ends after byte",
    ),
    "negative pointer": (POINTERS + 16, struct.pack("<q", -2), "a pointer is -2"),
    "odd pointer": (POINTERS + 16, struct.pack("<q", 3), "a pointer is inside a token"),
    "pointer past the end": (POINTERS, struct.pack("<q", 2**40), "a sequence ends after byte"),
    "pointer that overflows": (POINTERS, struct.pack("<q", 2**63 - 2), "a sequence ends after byte"),
    "first mark not zero": (MARKS, struct.pack("<q", 1), "document marks are out of order"),
    "marks out of order": (MARKS + 8, struct.pack("<q", 39), "document marks are out of order"),
    "last mark past the end": (
        MARKS + 8 * COUNT,
        struct.pack("<q", 41),
        "the last document ends at sequence 41",
    ),
}


def test_sound_index_passes(prefix: Path) -> None:
    index = check_index(prefix)
    assert index.token_type is np.uint16
    assert len(index.lengths) == COUNT
    assert index.documents.tolist() == list(range(COUNT + 1))


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_index_is_named(name: str, prefix: Path) -> None:
    offset, content, text = DAMAGE[name]
    patch(Path(f"{prefix}.idx"), offset, content)
    with pytest.raises(DataError) as caught:
        check_index(prefix)
    assert text in str(caught.value)
    assert "corpus.idx is damaged" in str(caught.value)
    assert "lightseq prepare-data" in str(caught.value)


def test_index_of_nothing_is_refused(prefix: Path) -> None:
    header = HEADER.pack(b"MMIDIDX\0\0", 1, 8, 0, 1)
    Path(f"{prefix}.idx").write_bytes(header + struct.pack("<q", 0))
    with pytest.raises(DataError, match="it has no sequences: a corpus has documents"):
        check_index(prefix)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_file_is_named_with_the_command(suffix: str, prefix: Path) -> None:
    Path(f"{prefix}.{suffix}").unlink()
    with pytest.raises(
        DataError, match=rf"corpus\.{suffix} is missing.*Run `lightseq prepare-data FOLDER --output"
    ):
        check_index(prefix)


@pytest.mark.parametrize("kept", [0, 1, 33, 34, 100, 500])
def test_truncated_index_is_refused(kept: int, prefix: Path) -> None:
    os.truncate(f"{prefix}.idx", kept)
    with pytest.raises(DataError, match="is damaged"):
        check_index(prefix)


@pytest.mark.parametrize("lost", [1, 2, 1000])
def test_truncated_tokens_are_refused(lost: int, prefix: Path) -> None:
    os.truncate(f"{prefix}.bin", Path(f"{prefix}.bin").stat().st_size - lost)
    with pytest.raises(
        DataError, match=r"a sequence ends after byte.*end of the \.bin file, which was truncated"
    ):
        check_index(prefix)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_is_refused_or_harmless(data: st.DataObject, prefix: Path) -> None:
    """A changed index either raises DataError, or Megatron can read every sequence in it."""
    path = Path(f"{prefix}.idx")
    sound = path.read_bytes()
    start = data.draw(st.integers(0, len(sound) - 1))
    change = data.draw(st.binary(min_size=1, max_size=16))
    kept = data.draw(st.one_of(st.just(len(sound)), st.integers(0, len(sound))))
    path.write_bytes((sound[:start] + change + sound[start + len(change) :])[:kept])
    try:
        index = check_index(prefix)
    except DataError:
        return
    finally:
        path.write_bytes(sound)
    tokens = Path(f"{prefix}.bin").stat().st_size // 2
    assert 0 <= index.lengths.min() <= index.lengths.max() <= tokens
    assert index.documents[0] == 0
    assert index.documents[-1] == len(index.lengths)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_random_bytes_are_not_an_index(content: bytes, prefix: Path) -> None:
    path = Path(f"{prefix}.idx")
    sound = path.read_bytes()
    path.write_bytes(content)
    try:
        with pytest.raises(DataError):
            check_index(prefix)
    finally:
        path.write_bytes(sound)


def test_data_of_megatrons_own_tools_is_read_without_facts(prefix: Path) -> None:
    known = content_digest(prefix)
    Path(f"{prefix}.json").unlink()
    assert read_facts(prefix) is None
    unknown = content_digest(prefix)
    assert unknown != known
    os.utime(f"{prefix}.bin", ns=(1, 1))
    assert content_digest(prefix) != unknown


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("documents", 39, "says documents = 39, the files have 40"),
        ("tokens", 10**15, "says tokens = 1000000000000000, the files have 4528"),
        ("bin_bytes", 0, "says bin_bytes = 0, the files have 9056"),
        ("idx_bytes", -1, "says idx_bytes = -1, the files have 842"),
        ("entropy", float("inf"), "is damaged"),
        ("entropy", float("nan"), "is damaged"),
        ("entropy", -1.0, "is damaged"),
    ],
)
def test_facts_that_contradict_the_files_are_named(name: str, value: float, text: str, prefix: Path) -> None:
    facts = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps(facts | {name: value}))
    with pytest.raises(DataError, match=text):
        open_corpora(config_for(str(prefix)))


def test_tokens_of_another_corpus_are_refused(prefix: Path, tmp_path: Path) -> None:
    other, _ = make_corpus(tmp_path, "other", count=41)
    for suffix in ("bin", "idx"):
        Path(f"{other}.{suffix}").replace(f"{prefix}.{suffix}")
    with pytest.raises(DataError, match=r"documents = 40, the files have 41.*are written together"):
        open_corpora(config_for(str(prefix)))


def test_content_digest_follows_the_tokens(tmp_path: Path) -> None:
    first, _ = make_corpus(tmp_path / "one")
    second, _ = make_corpus(tmp_path / "two")
    third, _ = make_corpus(tmp_path / "three", count=41)
    assert content_digest(first) == content_digest(second) != content_digest(third)


def test_entropy_and_histogram() -> None:
    assert entropy_nats(np.array([5, 5, 0, 5, 5])) == pytest.approx(np.log(4))
    assert entropy_nats(np.array([7, 0])) == 0
    lengths = np.array([1, 1, 2, 3, 4, 7, 8, 1024], dtype=np.int32)
    assert length_histogram(lengths) == [[1, 1, 2], [2, 3, 2], [4, 7, 2], [8, 15, 1], [1024, 2047, 1]]


# --- caches ---------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def hostile_files(folder: Path, canary: Path) -> list[Path]:
    """A raw pickle, and an array of objects, both named `.npy`."""
    raw, objects = folder / "raw.npy", folder / "objects.npy"
    raw.write_bytes(pickle.dumps(Bomb(canary)))
    np.save(objects, np.array([Bomb(canary)], dtype=object), allow_pickle=True)
    return [raw, objects]


def test_hostile_files_are_executed_by_plain_numpy(tmp_path: Path) -> None:
    """Shows that the threat is real. Otherwise the tests below would not prove anything."""
    for path in hostile_files(tmp_path, tmp_path / "canary"):
        np.load(path, allow_pickle=True)
        assert (tmp_path / "canary").exists()
        (tmp_path / "canary").unlink()


def test_hostile_files_are_refused_without_executing_them(tmp_path: Path) -> None:
    for path in hostile_files(tmp_path, tmp_path / "canary"):
        with pytest.raises(DataError, match=r"the index cache .*\.npy is no plain array"):
            load_index_cache(path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.array([0.5]), "holds float64, not integers"),
        (np.array(["x"]), "not integers"),
        (np.array([3, -1]), "holds the index -1"),
        (np.array([True]), "holds bool"),
    ],
)
def test_what_is_no_index_is_refused(array: np.ndarray[Any, Any], text: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=text):
        load_index_cache(tmp_path / "a.npy")


@pytest.mark.parametrize("kept", [0, 5, 100, 130])
def test_truncated_cache_is_refused(kept: int, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(100))
    os.truncate(tmp_path / "a.npy", kept)
    with pytest.raises(DataError, match=r"a\.npy is no plain array.*Remove the folder of that file"):
        load_index_cache(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((3,), r"has 928 bytes, and its header of shape \(3,\) needs 152"),
        ((101,), "is no plain array"),
        ((2**62,), "is no plain array"),
        ((2**70,), "is no plain array"),
        ((2**33, 2**33), "is no plain array"),
        ((-5,), "is no plain array"),
    ],
)
def test_a_header_with_another_size_is_refused(shape: tuple[int, ...], text: str, tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as stream:
        header = {"descr": "<i8", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(np.arange(100).tobytes())
    with pytest.raises(DataError, match=text):
        load_index_cache(tmp_path / "a.npy")


def test_a_cache_whose_content_was_changed_is_refused(tmp_path: Path) -> None:
    """Zeros point to existing samples, all to the same: such a run trained to a loss of 0."""
    path = tmp_path / "a.npy"
    save_index_cache(path, np.arange(100))
    sound = path.read_bytes()
    zeros = sound[:-800] + bytes(800)
    for changed in (zeros, sound[:-1] + b"\1"):
        path.write_bytes(changed)
        with pytest.raises(
            DataError, match=r"a\.npy is not what was written, or lost its hash.*Remove the folder"
        ):
            load_index_cache(path)
    path.write_bytes(sound)
    assert load_index_cache(path)[-1] == 99
    Path(f"{path}.xxh3").unlink()
    with pytest.raises(DataError, match="lost its hash"):
        load_index_cache(path)


def test_a_changed_bin_file_is_found_where_the_run_asks_for_it(tmp_path: Path) -> None:
    prefix, _ = make_corpus(tmp_path)
    corpora = open_corpora(config_for(str(prefix)))
    verify_contents(corpora, part=0, num_parts=1)
    content = bytearray(prefix.with_suffix(".bin").read_bytes())
    content[len(content) // 2] ^= 1
    prefix.with_suffix(".bin").write_bytes(content)
    verify_contents(corpora, part=1, num_parts=2)  # another rank's file
    with pytest.raises(DataError, match=r"corpus\.bin is damaged, its hash is"):
        verify_contents(corpora, part=0, num_parts=2)
    prefix.with_suffix(".json").unlink()
    with pytest.raises(DataError, match="has no recorded hash"):
        verify_contents(corpora, part=0, num_parts=1)


def test_archive_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a", x=np.arange(3))
    with pytest.raises(DataError, match="not integers"):
        load_index_cache(tmp_path / "a.npz")


def test_cache_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    save_index_cache(tmp_path / "a.npy", np.arange(5, dtype=np.int32))
    assert load_index_cache(tmp_path / "a.npy").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        save_index_cache(tmp_path / "b.npy", np.array([object()]))
    assert not (tmp_path / "b.npy").exists()


def test_the_context_covers_every_numpy_load_of_the_two_modules_and_is_left_again() -> None:
    from megatron.core.datasets import blended_dataset, gpt_dataset

    for module in (gpt_dataset, blended_dataset):
        assert "numpy.load(" in Path(str(module.__file__)).read_text()
    with safe_index_caches():
        for module in (gpt_dataset, blended_dataset):
            assert module.numpy.load is load_index_cache
            assert module.numpy.save is save_index_cache
            assert module.numpy.int32 is np.int32
    for module in (gpt_dataset, blended_dataset):
        assert module.numpy is np


def test_poisoned_cache_stops_the_run_unexecuted(prefix: Path, tmp_path: Path) -> None:
    config = config_for(str(prefix))
    corpora = open_corpora(config)
    build_datasets(config, corpora)
    caches = sorted(corpora.cache.glob("*.npy"))
    assert len(caches) == 3
    for cache in caches:
        sound = cache.read_bytes()
        for poison in hostile_files(tmp_path, tmp_path / "canary"):
            cache.write_bytes(poison.read_bytes())
            with pytest.raises(DataError, match="nothing in them is executed"):
                build_datasets(config, corpora)
        cache.write_bytes(sound)
    build_datasets(config, corpora)
    assert not (tmp_path / "canary").exists()
