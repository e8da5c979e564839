"""The files of Megatron's ``torch_dist`` format: written by torch's own writer, and read piece by piece."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import torch as megatron_strategy
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_lightseq.errors import CheckpointError, explain
from megatron_lightseq.training.checkpoint.pickle_scan import MAX_BYTES
from megatron_lightseq.training.checkpoint.safe_load import load_metadata, no_code_execution
from megatron_lightseq.training.plain_files import read_plain

Supply = Callable[[str, tuple[int, ...]], torch.Tensor]
"""From the key of a tensor and the offset of one piece to that piece."""


class PlainFileStrategy(megatron_strategy.TorchDistSaveShardedStrategy):
    """Megatron's ``torch_dist`` format, written by torch's own writer in this process.

    Megatron's writer forks worker processes from a process that has threads, spawns a manager that imports the main
    module again, and synchronises a CUDA device, which may not exist.

    Args:
        supply: makes each piece at the moment in which it is written, so that no two are in memory at a time; default:
            the tensors of the state dict, which with ``supply`` may be on the meta device.
        group: of all ranks, for the plan of who writes what; default: torch's.
    """

    def __init__(self, supply: Supply | None = None, group: dist.ProcessGroup | None = None) -> None:
        super().__init__("torch_dist", 1)
        self._supply = supply
        self._group = group

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        self.write(self.in_torchs_form(self.pieces_of(sharded_state_dict)), checkpoint_dir)

    @staticmethod
    def pieces_of(sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Megatron's sharded tensors and objects that this rank writes, by key: of several copies, one rank's."""
        by_key: dict[str, Any]
        by_key, _, _ = megatron_strategy._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        return by_key

    @staticmethod
    def in_torchs_form(pieces: dict[str, Any]) -> dict[str, Any]:
        """The same as torch's sharded tensors, which share their memory, and streams of serialised objects."""
        converted: dict[str, Any] = megatron_strategy.mcore_to_pyt_state_dict(pieces, False)
        return converted

    def write(self, pieces: dict[str, Any], checkpoint_dir: Path) -> None:
        """Write what :meth:`in_torchs_form` has returned. Collective over the group."""
        dcp.save(
            pieces,
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, overwrite=False),
            planner=_SavePlanner(self._supply),
            process_group=self._group,
        )


class _SavePlanner(megatron_strategy.MCoreSavePlanner):
    def __init__(self, supply: Supply | None) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._supply = supply

    def resolve_data(self, write_item: WriteItem) -> Any:
        if self._supply is None or write_item.type is WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        index, data = write_item.index, write_item.tensor_data
        assert index.offset is not None  # a piece of a sharded tensor
        assert data is not None
        return self._supply(index.fqn, tuple(index.offset)).reshape(data.chunk.sizes)


class PieceReader:
    """Reads any box of any tensor of a checkpoint, whichever pieces it was saved in, without executing anything.

    Args:
        folder: of one checkpoint.

    Raises:
        CheckpointError: the table of contents is missing, damaged or holds anything but data.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._metadata = load_metadata(io.BytesIO(read_plain(folder / ".metadata", MAX_BYTES)))
        except OSError as error:
            raise CheckpointError(
                explain(
                    got=f"{folder}/.metadata: {error.strerror or error}",
                    rule="a checkpoint has a table of contents",
                    remedy="Use another checkpoint",
                )
            ) from error
        self._reader = _Reader(folder, self._metadata)

    def entry(self, key: str) -> TensorStorageMetadata:
        """Shape, dtype and pieces of one tensor; raises CheckpointError if the checkpoint does not hold it."""
        found = self._metadata.state_dict_metadata.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise CheckpointError(
                explain(
                    got=f"{self._folder} without a tensor {key}",
                    rule="a checkpoint must hold every tensor of the model",
                    remedy="Use another checkpoint",
                )
            )
        return found

    def read(self, key: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """The box that begins at ``offset`` and has ``sizes``, in the dtype in which it was saved.

        Raises:
            CheckpointError: the checkpoint does not hold the tensor, or not all of the box.
        """
        entry = self.entry(key)
        box = ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [box])
        found = torch.empty(sizes, dtype=entry.properties.dtype)
        if sum(int(torch.Size(item.lengths).numel()) for item in items) != found.numel():
            raise CheckpointError(
                explain(
                    got=f"{self._folder}: {key} of shape {tuple(entry.size)}, of which {offset} + {sizes} is wanted",
                    rule="the pieces of a tensor cover all of it once",
                    remedy="Use another checkpoint",
                )
            )
        with no_code_execution():
            self._reader.read_data(LoadPlan(items), _Box(found)).wait()
        return found


class _Reader(dcp.FileSystemReader):
    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.storage_data: dict[MetadataIndex, Any] = metadata.storage_data


class _Box(LoadPlanner):
    """A planner for one tensor in memory; only what :meth:`FileSystemReader.read_data` calls."""

    def __init__(self, target: torch.Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        found = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            found = found.narrow(dim, start, length)
        return found

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        del read_item, tensor  # resolve_tensor gave a view

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError(f"{read_item.dest_index} is no tensor: {value}")

    def create_local_plan(self) -> LoadPlan:
        raise AssertionError("plans are made by PieceReader")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise AssertionError("plans are made by PieceReader")

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise AssertionError("plans are made by PieceReader")

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        raise AssertionError("plans are made by PieceReader")
