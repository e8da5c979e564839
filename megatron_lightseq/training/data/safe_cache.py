"""Makes Megatron read and write its index caches safely: no pickles, no incomplete files.

Megatron-Core 0.16.1 reads its caches with `numpy.load(..., allow_pickle=True)`, which executes code from a prepared
`.npy` file, and writes them in place, so that an interrupted run leaves an incomplete one. Both use the name `numpy` in
two of its modules. Inside :func:`safe_index_caches` that name is a view of numpy whose `load` refuses pickles, foreign
types, wrong sizes, negative indexes and changed contents, and whose `save` writes to a temporary file and renames it.
Upstream stopped reading pickles after 0.16.1; the other checks remain.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from megatron_lightseq.errors import DataError, explain
from megatron_lightseq.training.file_hash import hash_file

CACHE_FORMAT = 2
"""Part of the name of cache folders; caches of format 1 had no hashes."""
_HASH_SUFFIX = ".xxh3"


def load_index_cache(file: str | Path, mmap_mode: Any = "r", **_: Any) -> np.ndarray[Any, Any]:
    """An array of indexes from a `.npy` file.

    Raises:
        DataError: The file is a pickle or anything else that is not an array of indexes, or its header states
            another size than the file has.
    """
    try:
        if not Path(file).is_file():
            raise OSError("it is not a regular file")
        with np.errstate(over="ignore"):  # of a header that claims more bytes than there are numbers for
            array = np.load(file, mmap_mode=mmap_mode, allow_pickle=False)
    except Exception as error:  # numpy evaluates the header as an expression, which may fail in any way
        raise _refused(file, f"is no plain array ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise _refused(file, f"holds {getattr(array, 'dtype', type(array).__name__)}, not integers")
    size = Path(file).stat().st_size
    if isinstance(array, np.memmap) and array.offset + array.nbytes != size:
        raise _refused(
            file,
            f"has {size} bytes, and its header of shape {array.shape} needs {array.offset + array.nbytes}",
        )
    if array.size and array.min() < 0:
        raise _refused(file, f"holds the index {array.min()}")
    if not _has_recorded_hash(Path(file)):
        raise _refused(file, "is not what was written, or lost its hash")
    return array


def _has_recorded_hash(path: Path) -> bool:
    try:
        return Path(f"{path}{_HASH_SUFFIX}").read_text(encoding="ascii") == hash_file(path)
    except (OSError, ValueError):
        return False


def save_index_cache(file: str | Path, array: np.ndarray[Any, Any], **_: Any) -> None:
    """Write an array of indexes atomically, after a file with its hash."""
    temporary = Path(f"{file}.tmp-{os.getpid()}")
    with temporary.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())
    hashed = Path(f"{temporary}{_HASH_SUFFIX}")
    hashed.write_text(hash_file(temporary), encoding="ascii")
    hashed.replace(f"{file}{_HASH_SUFFIX}")
    temporary.replace(file)


class _SafeNumpy(ModuleType):
    """numpy, with `load` and `save` of this module."""

    load = staticmethod(load_index_cache)
    save = staticmethod(save_index_cache)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@contextlib.contextmanager
def safe_index_caches() -> Iterator[None]:
    """Inside this context, Megatron's GPTDataset and BlendedDataset read and write caches through this module."""
    from megatron.core.datasets import blended_dataset, gpt_dataset

    modules = (blended_dataset, gpt_dataset)
    before = [module.numpy for module in modules]
    for module in modules:
        module.numpy = _SafeNumpy("numpy")
    try:
        yield
    finally:
        for module, original in zip(modules, before, strict=True):
            module.numpy = original


def _refused(file: str | Path, problem: str) -> DataError:
    return DataError(
        explain(
            got=f"the index cache {file} {problem}",
            rule="caches hold plain arrays of indexes, and nothing in them is executed",
            remedy="Remove the folder of that file; it will be rebuilt",
        )
    )
