"""Read torch.distributed checkpoints without executing anything in them.

``torch.distributed.checkpoint`` unpickles ``.metadata`` with the plain unpickler, and stored objects with
``weights_only=False``; both run any code that a file asks for. :func:`no_code_execution` replaces both for the duration
of a load: ``.metadata`` may name only the dataclasses of a checkpoint's table of contents (:func:`load_metadata`), and
every ``torch.load`` is restricted to ``weights_only=True``. The result is still unsafe for modules that unpickle parts
of it themselves, so call :func:`check_extra_state` before ``load_state_dict``.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from types import ModuleType, SimpleNamespace
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.serialization import _get_layout

from megatron_lightseq.errors import CheckpointError, explain
from megatron_lightseq.training.checkpoint.manifest import check_relative
from megatron_lightseq.training.checkpoint.pickle_scan import MAX_BYTES, check_pickle

_RECORDS: tuple[type, ...] = (
    dcp_filesystem._StorageInfo,
    dcp_metadata.BytesStorageMetadata,
    dcp_metadata.ChunkStorageMetadata,
    dcp_metadata.Metadata,
    dcp_metadata.MetadataIndex,
    dcp_metadata.StorageMeta,
    dcp_metadata.TensorProperties,
    dcp_metadata.TensorStorageMetadata,
)


class _MemoryFormats:
    """Replaces the enumeration that a checkpoint names: gives its members by value, or by name through ``getattr``.

    Python 3.11.2 (Debian 12) pickles enumeration members by name, 3.11.7 by value.
    """

    __slots__ = ()  # nothing for an unpickler to set

    def __call__(self, value: int) -> dcp_metadata._MEM_FORMAT_ENCODING:
        return dcp_metadata._MEM_FORMAT_ENCODING(value)


def _member_by_name(owner: Any, name: Any) -> dcp_metadata._MEM_FORMAT_ENCODING:
    if not isinstance(owner, _MemoryFormats) or name not in dcp_metadata._MEM_FORMAT_ENCODING.__members__:
        raise _refusal(f".metadata asks for builtins.getattr of {name!r}")
    return dcp_metadata._MEM_FORMAT_ENCODING[name]


# Wrapped in our own functions, because the unpickler can set attributes on what find_class returns.
_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("pathlib", "PosixPath"): lambda *parts: PurePosixPath(*parts),
    ("pathlib", "PurePosixPath"): lambda *parts: PurePosixPath(*parts),
    ("builtins", "getattr"): _member_by_name,
    ("torch", "Size"): lambda sizes: torch.Size(sizes),
    ("torch.serialization", "_get_layout"): lambda name: _get_layout(name),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Resolves the names in a ``.metadata`` file from a fixed list only."""

    def find_class(self, module: str, name: str) -> Any:
        for record in _RECORDS:
            if (module, name) == (record.__module__, record.__qualname__):
                return record
        if (module, name) == (dcp_metadata.__name__, "_MEM_FORMAT_ENCODING"):
            return _MemoryFormats()
        if (module, name) in _MAKERS:
            maker = _MAKERS[module, name]
            return lambda *args: maker(*args)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _refusal(f".metadata asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _refusal(f".metadata refers to the persistent object {pid!r}")


def load_metadata(stream: IO[bytes]) -> dcp_metadata.Metadata:
    """A checkpoint's table of contents from its ``.metadata`` file.

    Raises CheckpointError, without executing anything, if the file is not a table of contents, names anything else, or
    points outside the checkpoint.
    """
    before = [dict(vars(record)) for record in _RECORDS]
    data = stream.read(MAX_BYTES + 1)
    try:
        check_pickle(data)
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
    except CheckpointError:
        raise
    except Exception as error:
        raise _refusal(f".metadata cannot be read ({type(error).__name__}: {error})") from error
    finally:
        tampered = _restore_classes(before)
    if tampered:
        raise _refusal(f".metadata changes the class {tampered[0]}")
    _check_contents(metadata)
    return metadata


def _restore_classes(before: list[dict[str, Any]]) -> list[str]:
    """Undo what BUILD opcodes did to classes instead of instances; returns the names of the changed classes."""
    tampered = []
    for record, attributes in zip(_RECORDS, before, strict=True):
        now = dict(vars(record))
        if now == attributes:
            continue
        tampered.append(record.__qualname__)
        for name in now.keys() - attributes.keys():
            delattr(record, name)
        for name in [name for name in attributes if now.get(name) is not attributes[name]]:
            setattr(record, name, attributes[name])
    return tampered


def _check_contents(metadata: Any) -> None:
    if not isinstance(metadata, dcp_metadata.Metadata):
        raise _refusal(f".metadata holds a {type(metadata).__name__}, which is no table of contents")
    tables = getattr(metadata, "storage_data", None), getattr(metadata, "state_dict_metadata", None)
    if not all(isinstance(table, dict) for table in tables):
        raise _refusal(".metadata has no table of stored tensors")
    try:
        for index, info in metadata.storage_data.items():
            _check_storage(index, info)
        for name, entry in metadata.state_dict_metadata.items():
            _check_entry(name, entry)
    except (ValueError, TypeError, AttributeError) as error:
        raise _refusal(f".metadata: {error}") from error


def _check_storage(index: Any, info: Any) -> None:
    """Raises ValueError, TypeError or AttributeError unless an entry says where in which file something lies."""
    if not isinstance(index, dcp_metadata.MetadataIndex) or not isinstance(index.fqn, str):
        raise TypeError("a storage entry has no name")
    if not isinstance(info, dcp_filesystem._StorageInfo) or not isinstance(info.relative_path, str):
        raise TypeError("a storage entry is of an unknown kind")
    check_relative(info.relative_path)
    if not (_is_count(info.offset) and _is_count(info.length)):
        raise ValueError(f"{index.fqn} lies at byte {info.offset!r}, {info.length!r} long")


def _check_entry(name: Any, entry: Any) -> None:
    """Raises ValueError, TypeError or AttributeError unless an entry describes bytes, or a tensor and its pieces."""
    if not isinstance(name, str):
        raise TypeError("an entry has no name")
    if isinstance(entry, dcp_metadata.BytesStorageMetadata):
        return
    if not isinstance(entry, dcp_metadata.TensorStorageMetadata):
        raise TypeError(f"{name} is of an unknown kind")
    if not isinstance(entry.properties, dcp_metadata.TensorProperties) or not isinstance(
        entry.properties.dtype, torch.dtype
    ):
        raise TypeError(f"{name} has no dtype")
    for chunk in entry.chunks:
        if not isinstance(chunk, dcp_metadata.ChunkStorageMetadata):
            raise TypeError(f"{name} has a piece of an unknown kind")
        boxes = (chunk.offsets, chunk.sizes, entry.size)
        if not all(isinstance(box, tuple) and all(map(_is_count, box)) for box in boxes):
            raise ValueError(f"{name} has a piece whose place is no list of counts")
        fits = all(start + size <= whole for start, size, whole in zip(*boxes, strict=True))
        if not fits:
            raise ValueError(f"{name} of shape {tuple(entry.size)} has a piece outside of it")


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 62


def check_extra_state(state: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless every ``_extra_state`` of a model's state dict is blank.

    Transformer Engine keeps FP8 scales there and unpickles them in ``set_extra_state``, including bytes in a tensor.
    Nothing here trains in FP8, so no legitimate state is lost.
    """
    for name, value in state.items():
        if name.endswith("_extra_state") and not _is_blank(value):
            raise _refusal(f"{name} holds a pickle")


def _is_blank(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 0
    if not isinstance(value, io.BytesIO):
        return value is None
    content = value.getvalue()
    try:  # older Transformer Engines write a pickled None
        return not content or torch.load(io.BytesIO(content), weights_only=True) is None
    except Exception:  # noqa: BLE001 - anything that cannot be loaded is not blank
        return False


def _refusal(got: str) -> CheckpointError:
    return CheckpointError(
        explain(
            got=got,
            rule="a checkpoint is data and may not contain code or point elsewhere",
            remedy="Do not use this file; use a checkpoint from a source that you trust",
        )
    )


class _FromEnd(io.RawIOBase):
    """A stream that seeks from its end as it should: torch's view of a part of a file goes the other way."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        stream.seek(0, io.SEEK_END)
        self._size = stream.tell()

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._stream.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._size}[whence]
        self._stream.seek(base + offset)
        return self.tell()

    def read(self, size: int = -1, /) -> bytes:
        return bytes(self._stream.read(size))


def _check_torch_file(source: Any) -> None:
    """Raise ValueError or BadZipFile unless ``torch.load`` may read a file or stream: torch's unpickler has no bounds.

    Files in the format before torch 1.6 are refused: nothing that can be loaded here has it.
    """
    if not hasattr(source, "read"):
        with open(source, "rb") as stream:
            return _check_torch_file(stream)
    start = source.tell()
    with zipfile.ZipFile(_FromEnd(source)) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed")
            if entry.filename.endswith("data.pkl"):
                check_pickle(archive.read(entry), has_storages=True)
    source.seek(start)
    return None


@contextmanager
def no_code_execution() -> Iterator[None]:
    """Restrict torch's checkpoint readers to plain data inside the block, for all callers.

    This applies to the whole process: a ``torch.load`` in another thread is restricted to ``weights_only=True``, too.
    """
    unrestricted_load = torch.load

    def weights_only_load(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pickle_module", None)
        kwargs["weights_only"] = True
        try:
            _check_torch_file(args[0] if args else kwargs["f"])
            return unrestricted_load(*args, **kwargs)
        except (pickle.UnpicklingError, ValueError, zipfile.BadZipFile) as error:
            raise _refusal(f"{_file_name(args)} holds an object that is not plain data") from error

    # `dump` is unchanged: a save may be running in another thread.
    data_only_pickle = SimpleNamespace(load=load_metadata, dump=pickle.dump)
    with (
        _replaced(dcp_filesystem, "pickle", data_only_pickle),
        _replaced(torch, "load", weights_only_load),
    ):
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Replace a module's global inside the block.

    Reading the old value first raises AttributeError if a later torch drops the name, so the protection cannot silently
    stop working.
    """
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _file_name(args: tuple[Any, ...]) -> str:
    source = args[0] if args else None
    if isinstance(source, (str, PurePosixPath)):
        return str(source)
    return str(getattr(source, "name", "a stored object"))
