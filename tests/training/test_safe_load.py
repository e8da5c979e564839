from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException

from megatron_lightseq.errors import CheckpointError
from megatron_lightseq.training.checkpoint.safe_load import (
    check_extra_state,
    load_metadata,
    no_code_execution,
)
from tests.training.hostile import payloads, replace_string

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:Detected pickle protocol"
)

HOSTILE_NAMES = [name for name, _ in payloads(Path("unused"))]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    state = {"w": torch.arange(6.0), "h": torch.ones(3, dtype=torch.bfloat16), "note": {"step": 3}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def _load(folder: Path) -> dict[str, object]:
    state: dict[str, object] = {
        "w": torch.zeros(6),
        "h": torch.zeros(3, dtype=torch.bfloat16),
        "note": {"step": 0},
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return state


def test_honest_checkpoint_loads(checkpoint: Path) -> None:
    with no_code_execution():
        state = _load(checkpoint)
    assert torch.equal(state["w"], torch.arange(6.0))  # type: ignore[arg-type]
    assert state["note"] == {"step": 3}


class _OldPickler(pickle.Pickler):
    """Enumerations as Python 3.11.2 pickles them."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, dcp_metadata._MEM_FORMAT_ENCODING):
            return getattr, (type(value), value.name)
        return NotImplemented


class _NewPickler(pickle.Pickler):
    """Enumerations as Python 3.11.7 pickles them."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, dcp_metadata._MEM_FORMAT_ENCODING):
            return type(value), (value.value,)
        return NotImplemented


@pytest.mark.parametrize("pickler", [_OldPickler, _NewPickler])
def test_checkpoints_of_every_python_load(checkpoint: Path, pickler: type[pickle.Pickler]) -> None:
    metadata, stream = load_metadata(io.BytesIO((checkpoint / ".metadata").read_bytes())), io.BytesIO()
    pickler(stream).dump(metadata)
    assert (b"getattr" in stream.getvalue()) == (pickler is _OldPickler)
    assert load_metadata(io.BytesIO(stream.getvalue())) == metadata


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (dcp_metadata._MEM_FORMAT_ENCODING, "__class__"),
        (dcp_metadata.Metadata, "__init__"),
        (torch.Size, "mro"),
    ],
)
def test_no_other_attribute_is_handed_out(owner: type, name: str) -> None:
    class Asking:
        def __reduce__(self) -> Any:
            return getattr, (owner, name)

    with pytest.raises(CheckpointError, match=f"asks for builtins.getattr of '{name}'"):
        load_metadata(io.BytesIO(pickle.dumps(Asking())))


def test_torch_executes_metadata_without_the_guard(checkpoint: Path, tmp_path: Path) -> None:
    """Shows that the threat is real. If this ever fails, torch has fixed it and the guard can be removed."""
    canary = tmp_path / "canary"
    hostile = dict(payloads(canary))["os.system-4"]
    (checkpoint / ".metadata").write_bytes(hostile)
    with pytest.raises(CheckpointException):  # torch fails on the result of the code, after running it
        _load(checkpoint)
    assert canary.exists()


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_metadata_is_refused_and_not_executed(checkpoint: Path, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (checkpoint / ".metadata").write_bytes(dict(payloads(canary))[name])
    with no_code_execution(), pytest.raises(CheckpointException, match=r"\.metadata"):
        _load(checkpoint)
    assert not canary.exists()


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_bytes_inside_torch_files_are_not_executed(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    for index, data in enumerate(_torch_files(dict(payloads(canary))[name])):
        path = tmp_path / f"common{index}.pt"
        path.write_bytes(data)
        with no_code_execution(), pytest.raises(Exception, match=r"."):
            torch.load(path, weights_only=False)
        assert not canary.exists()


def _torch_files(hostile: bytes) -> list[bytes]:
    """The payload as a bare legacy file, and as data.pkl inside torch's zip format."""
    stream = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(stream)
    writer.write_record("data.pkl", hostile, len(hostile))
    writer.write_record("byteorder", b"little", 6)
    writer.write_end_of_file()
    return [hostile, stream.getvalue()]


def test_refusal_names_the_global(checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with (
        no_code_execution(),
        pytest.raises(CheckpointException, match=r"asks for os\.system: a checkpoint is data"),
    ):
        _load(checkpoint)


@pytest.mark.parametrize("outside", ["../secret", "/etc/passwd", "a/../../b", "x\\y"])
def test_metadata_cannot_point_outside_the_checkpoint(checkpoint: Path, outside: str) -> None:
    data = replace_string((checkpoint / ".metadata").read_bytes(), "__0_0.distcp", outside)
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        load_metadata(io.BytesIO(data))


def test_a_pickle_cannot_rewrite_the_classes_it_may_name() -> None:
    """BUILD with slot state, aimed at a class, sets attributes on the class."""
    module = dcp_metadata.__name__.encode()
    name = b"StorageMeta"
    attack = (
        b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93"
        b"N}\x8c\x08__init__\x8c\x05owneds\x86b."
    )
    original = dcp_metadata.StorageMeta.__init__
    with pytest.raises(CheckpointError, match="changes the class StorageMeta"):
        load_metadata(io.BytesIO(attack))
    assert dcp_metadata.StorageMeta.__init__ is original


@pytest.mark.parametrize("value", [3, {"a": 1}, torch.Size([2]), dcp_metadata.StorageMeta()])
def test_metadata_of_another_kind_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match="no table of contents"):
        load_metadata(io.BytesIO(pickle.dumps(value)))


@pytest.mark.parametrize("length", [0, 1, 10, -1])
def test_truncated_metadata_is_refused(checkpoint: Path, length: int) -> None:
    data = (checkpoint / ".metadata").read_bytes()[:length]
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        load_metadata(io.BytesIO(data))


def test_guard_is_removed_afterwards() -> None:
    torch_load, torch_pickle = torch.load, dcp_filesystem.pickle
    with no_code_execution():
        assert torch.load is not torch_load
        assert dcp_filesystem.pickle is not torch_pickle
    assert torch.load is torch_load
    assert dcp_filesystem.pickle is torch_pickle


def test_guard_is_removed_after_a_refusal(checkpoint: Path) -> None:
    torch_load, torch_pickle = torch.load, dcp_filesystem.pickle
    (checkpoint / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointException), no_code_execution():
        _load(checkpoint)
    assert torch.load is torch_load
    assert dcp_filesystem.pickle is torch_pickle


def _saved(value: object) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream


@pytest.mark.parametrize("blank", [None, torch.empty(0, dtype=torch.uint8), io.BytesIO(), _saved(None)])
def test_blank_extra_state_passes(blank: object) -> None:
    check_extra_state({"decoder.qkv._extra_state": blank, "decoder.qkv.weight": torch.ones(2)})


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_extra_state_that_a_module_would_unpickle_is_refused(tmp_path: Path, name: str) -> None:
    """As Transformer Engine reads it: pickle.loads of a tensor's bytes, torch.load of a stream."""
    canary = tmp_path / "canary"
    hostile = dict(payloads(canary))[name]
    for value in (
        torch.frombuffer(bytearray(hostile), dtype=torch.uint8),
        *map(io.BytesIO, [hostile, *_torch_files(hostile)]),
        _saved({"scale_fwd": torch.ones(1)}),
    ):
        with pytest.raises(CheckpointError, match=r"qkv\._extra_state holds a pickle"):
            check_extra_state({"decoder.qkv._extra_state": value})
        assert not canary.exists()


def test_a_table_of_contents_without_its_tables_is_refused() -> None:
    for state in ({}, {"storage_data": {}}, {"storage_data": {}, "state_dict_metadata": 3}):
        empty = object.__new__(dcp_metadata.Metadata)
        vars(empty).update(state)
        with pytest.raises(CheckpointError, match="no table of stored tensors"):
            load_metadata(io.BytesIO(pickle.dumps(empty)))
