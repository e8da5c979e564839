"""Every reader, with a seed and a number of cases; ``python -m tests.fuzz.readers`` goes on for as long as asked."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lightseq.errors import LightSeqError
from megatron_lightseq.training.checkpoint.find import _warn_of_writers
from megatron_lightseq.training.checkpoint.manifest import MANIFEST_NAME, Manifest
from megatron_lightseq.training.checkpoint.pickle_scan import MAX_DEPTH, check_pickle
from megatron_lightseq.training.plain_files import read_plain
from tests.fuzz.readers import TARGETS, Target, attempt, cases

CASES = 150
NAMES = [target.name for target in TARGETS]


@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
@pytest.mark.filterwarnings("ignore")
def test_a_reader_gives_a_value_or_words(target: Target, tmp_path: Path) -> None:
    sound = target.prepare(tmp_path)
    attempt(target, tmp_path, sound)
    rng = random.Random(target.name)
    for content in cases(sound, rng, CASES):
        attempt(target, tmp_path, content)


BY_FILE = [target for target in TARGETS if target.name not in ("recipe", "saved recipe", ".metadata")]
"""A recipe may come through a pipe, and a table of contents is read by its callers."""


@pytest.mark.parametrize("target", BY_FILE, ids=[target.name for target in BY_FILE])
@pytest.mark.filterwarnings("ignore")
def test_a_pipe_or_a_link_is_not_waited_for(target: Target, tmp_path: Path) -> None:
    target.prepare(tmp_path)
    path = tmp_path / target.file
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with contextlib.suppress(LightSeqError):
        target.read(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with contextlib.suppress(LightSeqError):
        target.read(path)


def test_a_checkpoint_that_everybody_can_change_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (manifest,) = (target for target in TARGETS if target.name == "manifest")
    (tmp_path / MANIFEST_NAME).write_bytes(manifest.prepare(tmp_path))
    for path in (tmp_path, *tmp_path.iterdir()):
        path.chmod(path.stat().st_mode & ~0o022)
    _warn_of_writers(tmp_path, Manifest.read(tmp_path))
    assert caplog.text == ""
    (tmp_path / "weights").chmod(0o666)
    _warn_of_writers(tmp_path, Manifest.read(tmp_path))
    assert f"{tmp_path}/weights can be written by every user of this machine: chmod" in caplog.text


def test_only_regular_files_up_to_a_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_plain(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="has 5 bytes, and at most 4 are read"):
        read_plain(tmp_path / "a", 4)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="symbolic link"):
        read_plain(tmp_path / "b")
    assert read_plain(tmp_path / "b", follow=True) == b"12345"
    os.mkfifo(tmp_path / "c")
    with pytest.raises(OSError, match="is not a regular file"):
        read_plain(tmp_path / "c")


def nested(depth: int) -> bytes:
    return b"\x80\x04)" + b"\x85" * depth + b"."


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (nested(MAX_DEPTH + 1), "nested more than"),
        (b"\x80\x02Nr\x00\x00\x00\x40.", "numbers an object 1073741824 after 0 others"),
        (b"\x80\x02Nq\x00h\x01.", "values that are not there"),
        (b"\x80\x02(0.", "the opcode POP is not among"),
        (b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".", "is a number of"),
        (b"\x80\x02(.\x85", ""),
        (b"\x80\x02(N\x86.", "a mark is in the place of a value"),
    ],
)
def test_a_pickle_is_looked_at_before_it_is_built(data: bytes, text: str) -> None:
    if not text:
        check_pickle(data)
        return
    with pytest.raises(ValueError, match=text):
        check_pickle(data)


def test_plain_pickles_pass() -> None:
    import pickle

    check_pickle(nested(MAX_DEPTH))
    shared = ("x", 1.5, True, b"y")
    for protocol in range(2, 6):
        check_pickle(pickle.dumps({"a": [shared, shared], "b": {1, 2}, "c": (None,) * 5, 3: -5}, protocol))


def test_the_long_run_can_be_started(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.readers", "--minutes", "0", "--seed", "3"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"0 files, {len(TARGETS)} readers, seed 3: 0 raw errors")
