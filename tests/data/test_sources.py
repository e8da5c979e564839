"""The files in a folder: links are followed, loops end, and all skipped files are counted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_lightseq.errors import DataError
from megatron_lightseq.training.data.documents import ReadCounts, read_documents
from megatron_lightseq.training.data.prepare import fingerprint
from megatron_lightseq.training.data.sources import find_files
from megatron_lightseq.training.data.tokenizers import ByteTokenizer


def read(*inputs: Path) -> tuple[list[str], dict[str, int]]:
    counts = ReadCounts()
    texts = sorted(document.text for document in read_documents(find_files(inputs), counts))
    return texts, counts.skipped


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "texts"
    (made / "deep").mkdir(parents=True)
    (made / "a.txt").write_text("a")
    (made / "deep" / "b.txt").write_text("b")
    (tmp_path / "outside" / "more").mkdir(parents=True)
    (tmp_path / "outside" / "c.txt").write_text("c")
    (tmp_path / "outside" / "more" / "d.txt").write_text("d")
    return made


def test_links_to_files_and_folders_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "link.txt").symlink_to(tmp_path / "outside" / "c.txt")
    (folder / "more").symlink_to(tmp_path / "outside" / "more")
    assert read(folder) == (["a", "b", "c", "d"], {})
    (tmp_path / "whole").symlink_to(folder)
    assert read(tmp_path / "whole") == (["a", "b", "c", "d"], {})


def test_loops_end_and_are_counted(folder: Path) -> None:
    (folder / "deep" / "up").symlink_to("..")
    (folder / "self").symlink_to(".")
    (folder / "root").symlink_to("/")
    (folder / "ring").symlink_to("ring")
    assert read(folder) == (["a", "b"], {"link to a folder that is read already": 3, "broken link": 1})


def test_folders_that_link_to_each_other_are_read_once(folder: Path, tmp_path: Path) -> None:
    (folder / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "in").symlink_to(folder)
    (tmp_path / "outside" / "deep").symlink_to(folder / "deep")
    assert read(folder) == (["a", "b", "c", "d"], {"link to a folder that is read already": 2})


def test_a_file_with_two_names_is_one_document(folder: Path) -> None:
    """If it were in training and validation data, the validation loss would be too low."""
    (folder / "0-link.txt").symlink_to("a.txt")
    assert read(folder) == (["a", "b"], {"link to a file that is read already": 1})
    assert {file.name for file in find_files([folder]) if file.problem is None} == {"a.txt", "deep/b.txt"}


def test_pipes_are_counted_and_not_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe.txt")
    assert read(folder) == (["a", "b"], {"pipe or device": 1})
    with pytest.raises(DataError, match=r"pipe\.txt is a pipe or a device"):
        find_files([folder / "pipe.txt"])


def test_a_folder_that_cannot_be_read_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = os.scandir

    def refusing(path: Path) -> object:
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert read(folder) == (["a"], {"folder that cannot be read (Permission denied)": 1})


def test_changed_text_of_equal_size_and_time_changes_the_fingerprint(folder: Path) -> None:
    def now() -> str:
        return fingerprint(find_files([folder]), ByteTokenizer())

    before, status = now(), (folder / "a.txt").stat()
    (folder / "a.txt").write_text("z")
    os.utime(folder / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = now()
    assert changed != before
    (folder / "a.txt").write_text("a")
    assert now() == before, "a new time with the same text is no change"
