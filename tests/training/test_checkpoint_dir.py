from __future__ import annotations

import builtins
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_lightseq.errors import CheckpointError
from megatron_lightseq.training.checkpoint import directory as checkpoint_dir
from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory, checkpoint_name, iteration_of
from megatron_lightseq.training.checkpoint.lineage import Lineage
from megatron_lightseq.training.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    _content_hash,
    check_relative,
    record_files,
)

NAMES = ("a.distcp", "rng/rank_00000.pt")
KILLED = 77


def _save(root: Path, iteration: int, line: Lineage | None = None) -> Path:
    """A complete save of two small files whose content depends on the iteration."""
    directory = CheckpointDirectory(root=root)
    folder = directory.begin(iteration)
    for name in NAMES:
        (folder / name).parent.mkdir(exist_ok=True)
        checkpoint_dir.write_durably(folder / name, f"{name} {iteration} " + "x" * 1000)
    checkpoint_dir.fsync_files(folder, NAMES)
    return directory.commit(folder, _manifest(iteration, tuple(record_files(folder, NAMES)), line))


def _manifest(iteration: int, files: tuple[FileRecord, ...] = (), line: Lineage | None = None) -> Manifest:
    return Manifest(
        iteration=iteration,
        consumed_samples=iteration * 2,
        model={"hidden_size": 128},
        optimizer={"optimizer": "adam"},
        data={"seed": 1},
        world={"tp": 1, "world_size": 1},
        config_fingerprint="0" * 16,
        versions={"torch": "x"},
        lineage=line or Lineage(),
        files=files,
    )


def _newest_whole(root: Path) -> int | None:
    for folder in CheckpointDirectory(root=root).candidates():
        try:
            if not Manifest.read(folder).problems(folder):
                return iteration_of(folder)
        except CheckpointError:
            continue
    return None


def test_commit_leaves_a_verified_checkpoint_and_both_trackers(tmp_path: Path) -> None:
    final = _save(tmp_path, 20)
    assert final.name == "iter_0000020"
    assert sorted(os.listdir(tmp_path)) == ["iter_0000020", "latest", "latest_checkpointed_iteration.txt"]
    assert (tmp_path / "latest").read_text() == "iter_0000020\n"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "20\n"
    manifest = Manifest.read(final)
    assert manifest.problems(final) == []
    assert [record.name for record in manifest.files] == sorted(NAMES)


def test_candidates_are_newest_first_and_ignore_everything_else(tmp_path: Path) -> None:
    for iteration in (3, 20, 12_345_678):
        _save(tmp_path, iteration)
    CheckpointDirectory(root=tmp_path).begin(99)
    (tmp_path / "iter_0000050").write_text("a file")
    (tmp_path / "iter_77").mkdir()
    (tmp_path / "iter_0000060").symlink_to(tmp_path / "iter_0000020")
    found = [path.name for path in CheckpointDirectory(root=tmp_path).candidates()]
    assert found == ["iter_12345678", "iter_0000020", "iter_0000003"]


def _iterations(root: Path) -> list[int]:
    return [iteration_of(path) for path in CheckpointDirectory(root=root).candidates()]


def test_checkpoints_of_an_earlier_run_that_got_further_are_left_out(tmp_path: Path) -> None:
    """Run a recipe to its end, run it again, interrupt it: `--load` resumes what was interrupted."""
    first, second = Lineage.fresh(), Lineage.fresh()
    for iteration, line in ((50, first), (100, first), (10, second), (30, second)):
        _save(tmp_path, iteration, line)
    assert _iterations(tmp_path) == [30, 10]
    assert CheckpointDirectory(root=tmp_path).iterations() == [10, 30, 50, 100]
    (tmp_path / "iter_0000030" / NAMES[0]).write_text("damaged")
    assert _newest_whole(tmp_path) == 10, "the fallback stays within the run"
    _save(tmp_path, 100, first)
    assert _iterations(tmp_path) == [100, 50]


def test_a_run_that_continues_another_falls_back_to_what_it_continues(tmp_path: Path) -> None:
    first = Lineage.fresh()
    for iteration in (10, 20, 30):
        _save(tmp_path, iteration, first)
    second = first.continued(20)
    _save(tmp_path, 40, second)
    assert _iterations(tmp_path) == [40, 20, 10], "step 30 is another branch"
    _save(tmp_path, 50, second.continued(40))
    assert _iterations(tmp_path) == [50, 40, 20, 10]


@pytest.mark.parametrize("seconds", [-1e9, 1e9])
def test_a_clock_that_is_set_changes_nothing(tmp_path: Path, seconds: float) -> None:
    earlier, line = Lineage.fresh(), Lineage.fresh()
    _save(tmp_path, 90, earlier)
    CheckpointDirectory(root=tmp_path).start(line)
    assert CheckpointDirectory(root=tmp_path).of_this_run() == []
    _save(tmp_path, 20, line)
    for path in [*tmp_path.rglob("*")]:
        os.utime(path, (path.stat().st_atime + seconds * len(path.name),) * 2)
    assert [path.name for path in CheckpointDirectory(root=tmp_path).of_this_run()] == ["iter_0000020"]


def test_a_reader_changes_nothing_and_finds_a_save_that_was_killed_between_renames(tmp_path: Path) -> None:
    saved = _save(tmp_path, 20)
    aside = CheckpointDirectory(root=tmp_path)._move_aside(saved)
    before = sorted(os.listdir(tmp_path))
    assert CheckpointDirectory(root=tmp_path).candidates() == [aside]
    assert _newest_whole(tmp_path) == 20
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("keep_last", "retain_interval", "kept"),
    [
        (None, None, [10, 20, 30, 40, 50, 60]),
        (2, None, [50, 60]),
        (None, 30, [30, 60]),
        (2, 30, [30, 50, 60]),
        (9, None, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_old_checkpoints_of_the_run_are_removed(
    tmp_path: Path, keep_last: int | None, retain_interval: int | None, kept: list[int]
) -> None:
    other, first = Lineage.fresh(), Lineage.fresh()
    for iteration, line in ((5, other), (70, other), (10, first), (20, first), (30, first)):
        _save(tmp_path, iteration, line)
    second = first.continued(30)
    for iteration in (40, 50, 60):
        _save(tmp_path, iteration, second)
    CheckpointDirectory(root=tmp_path).prune(keep_last=keep_last, retain_interval=retain_interval)
    assert CheckpointDirectory(root=tmp_path).iterations() == sorted([5, 70, *kept]), (
        "other runs are left alone"
    )
    assert not [name for name in os.listdir(tmp_path) if ".tmp" in name]


def test_a_damaged_checkpoint_is_not_counted_among_those_that_are_kept(tmp_path: Path) -> None:
    for iteration in (10, 20, 30):
        _save(tmp_path, iteration)
    (tmp_path / "iter_0000030" / MANIFEST_NAME).write_text("{")
    CheckpointDirectory(root=tmp_path).prune(keep_last=1, retain_interval=None)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000020", "iter_0000030"]


HOLDER = """
import sys, time
from pathlib import Path
from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory
lock = CheckpointDirectory(root=Path(sys.argv[1])).lock()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_kept_out_of_a_folder_until_the_first_has_ended(tmp_path: Path) -> None:
    directory = CheckpointDirectory(root=tmp_path)
    directory.lock().release()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(
            CheckpointError, match=rf"in use by process {first.pid} on .*Choose another --save"
        ):
            directory.lock()
        first.kill()  # a lock must not outlive its process
        first.wait()
        directory.lock().release()


@pytest.mark.parametrize("tracker", [b"", b"step 20\n", b"\xff", b"iter_0000099\n"])
def test_a_tracker_of_no_use_is_passed_over(tmp_path: Path, tracker: bytes) -> None:
    for iteration in (20, 3):
        _save(tmp_path, iteration)
    (tmp_path / "latest").write_bytes(tracker)
    assert [iteration_of(path) for path in CheckpointDirectory(root=tmp_path).candidates()] == [20, 3]
    (tmp_path / "latest").unlink()
    assert [iteration_of(path) for path in CheckpointDirectory(root=tmp_path).candidates()] == [20, 3]


def test_candidates_of_a_missing_folder_are_none(tmp_path: Path) -> None:
    assert CheckpointDirectory(root=tmp_path / "absent").candidates() == []
    assert CheckpointDirectory(root=tmp_path / "absent").clean() == []


def test_clean_removes_only_torn_saves(tmp_path: Path) -> None:
    _save(tmp_path, 20)
    torn = CheckpointDirectory(root=tmp_path).begin(30)
    (torn / "half").write_text("x")
    (tmp_path / "iter_0000030.tmp-mine").mkdir()
    assert CheckpointDirectory(root=tmp_path).clean() == [torn.name]
    assert not torn.exists()
    assert (tmp_path / "iter_0000030.tmp-mine").exists()
    assert _newest_whole(tmp_path) == 20


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    _save(tmp_path, 20)
    marker = tmp_path / "iter_0000020" / "marker"
    marker.write_text("old")
    _save(tmp_path, 20)
    assert not marker.exists()
    assert _newest_whole(tmp_path) == 20
    assert not [name for name in os.listdir(tmp_path) if ".tmp" in name]


def _in_killed_child(operation: int, work: Callable[[], Any]) -> bool:
    """Run ``work`` in a forked child that dies without cleanup at its n-th file operation; True if it died."""
    child = os.fork()
    if child == 0:
        remaining = [operation]

        def dying(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                remaining[0] -= 1
                if remaining[0] == 0:
                    os._exit(KILLED)
                return function(*args, **kwargs)

            return call

        for name in ("fsync", "rename", "replace", "mkdir", "open", "rmdir", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        builtins.open = dying(builtins.open)
        Path.open = dying(Path.open)  # type: ignore[method-assign]
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED), code
    return code == KILLED


def test_a_save_killed_at_any_file_operation_leaves_a_whole_newest_checkpoint(tmp_path: Path) -> None:
    outcomes = []
    for operation in range(1, 100):
        root = tmp_path / f"at{operation}"
        _save(root, 10)
        died = _in_killed_child(operation, lambda root=root: _save(root, 20))  # type: ignore[misc]
        newest = _newest_whole(root)
        outcomes.append(newest)
        assert newest in (10, 20)
        CheckpointDirectory(root=root).clean()
        assert not [name for name in os.listdir(root) if ".tmp-" in name]
        assert _newest_whole(root) in (newest, 20)  # a complete save that was not yet renamed is finished
        _save(root, 30)
        assert _newest_whole(root) == 30
        if not died:
            break
    else:
        pytest.fail("the save never completed")
    assert len(outcomes) > 15, "the file operations were not counted"
    assert outcomes == sorted(outcomes), "once complete, the new checkpoint must stay"
    assert outcomes[0] == 10
    assert outcomes[-1] == 20


def test_a_replacing_save_killed_at_any_file_operation_loses_nothing(tmp_path: Path) -> None:
    gaps = 0
    for operation in range(1, 100):
        root = tmp_path / f"at{operation}"
        _save(root, 20)
        died = _in_killed_child(operation, lambda root=root: _save(root, 20))  # type: ignore[misc]
        gaps += not any(root.glob("iter_0000020"))
        assert _newest_whole(root) == 20
        CheckpointDirectory(root=root).recover()
        assert _newest_whole(root) == 20
        CheckpointDirectory(root=root).clean()
        assert _newest_whole(root) == 20
        if not died:
            break
    assert gaps, "no kill happened between the two renames"


def test_every_flip_and_truncation_is_found_and_named(tmp_path: Path) -> None:
    source = _save(tmp_path, 20)
    rng = random.Random(0)
    for name in NAMES:
        size = (source / name).stat().st_size
        for _ in range(50):
            damaged = _copy(source, tmp_path / "damaged")
            data = bytearray((damaged / name).read_bytes())
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
            (damaged / name).write_bytes(data)
            assert Manifest.read(damaged).problems(damaged) == [f"{name} is damaged (SHA-256 differs)"]
        for length in (0, 1, size // 2, size - 1):
            damaged = _copy(source, tmp_path / "damaged")
            os.truncate(damaged / name, length)
            assert Manifest.read(damaged).problems(damaged) == [
                f"{name} has {length} bytes and should have {size}"
            ]
        damaged = _copy(source, tmp_path / "damaged")
        (damaged / name).unlink()
        assert Manifest.read(damaged).problems(damaged) == [f"{name} is missing"]


def _copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    folder = _save(tmp_path, 20)
    text = (folder / MANIFEST_NAME).read_bytes()
    rng = random.Random(1)
    positions = [rng.randrange(len(text)) for _ in range(200)]
    survivors = 0
    for position in positions:
        data = bytearray(text)
        data[position] ^= 1 << rng.randrange(8)
        (folder / MANIFEST_NAME).write_bytes(data)
        try:
            assert Manifest.read(folder) == Manifest.loads(text.decode())
            survivors += 1  # a flip that turned white space between tokens into other white space
        except CheckpointError:
            continue
    assert survivors < 10
    for length in (0, 1, len(text) // 2, len(text) - 1):
        (folder / MANIFEST_NAME).write_bytes(text[:length])
        with pytest.raises(CheckpointError, match=r"manifest\.json.*must have a readable manifest"):
            Manifest.read(folder)


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        Manifest.read(tmp_path)


def test_manifest_round_trip_and_parts() -> None:
    files = tuple(FileRecord(name=f"f{i}", num_bytes=i, sha256="0" * 64) for i in range(5))
    manifest = _manifest(7, files)
    assert Manifest.loads(manifest.dumps()) == manifest
    absent = Path("absent")
    parts = [manifest.problems(absent, part=part, num_parts=3) for part in range(3)]
    assert [len(part) for part in parts] == [2, 2, 1]
    assert sorted(name for part in parts for name in part) == [f"f{i} is missing" for i in range(5)]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", "a/../../b", "a\\b", "a\0b"])
def test_file_names_that_lead_outside_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="leads out of the checkpoint"):
        check_relative(name)
    manifest = _manifest(1, (FileRecord(name=name, num_bytes=0, sha256=""),))
    with pytest.raises(ValueError, match="leads out of the checkpoint"):
        Manifest.loads(manifest.dumps())


def test_unknown_manifest_formats_and_keys_are_refused(tmp_path: Path) -> None:
    folder = _save(tmp_path, 1)
    content = json.loads((folder / MANIFEST_NAME).read_text())["content"]
    for change in ({"format": 2}, {"surprise": 1}):
        changed = {**content, **change}
        document = {"content": changed, "sha256": _content_hash(changed)}
        (folder / MANIFEST_NAME).write_text(json.dumps(document))
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            Manifest.read(folder)


def test_iteration_of_another_name_is_refused() -> None:
    assert iteration_of(Path(checkpoint_name(42))) == 42
    with pytest.raises(CheckpointError, match="folders are named like iter_0000020"):
        iteration_of(Path("step_42"))


def test_a_symbolic_link_is_no_file_of_a_checkpoint(tmp_path: Path) -> None:
    folder = _save(tmp_path, 20)
    target = folder / NAMES[0]
    copy = tmp_path / "elsewhere"
    target.rename(copy)
    target.symlink_to(copy)
    assert Manifest.read(folder).problems(folder) == [f"{NAMES[0]} is missing"]
