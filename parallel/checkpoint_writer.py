"""Writing a checkpoint from one process, piece by piece; the format: `parallel.checkpoint_reader`.

For copies of checkpoints. A run writes its own with `parallel.checkpoint_io`, all ranks together;
both are read alike.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from parallel.checkpoint_manifest import ChecksummedFile, write_manifest
from parallel.checkpoint_reader import FORMAT_FILE, INDEX_FILE, PLAIN_FILE
from parallel.new_folder import new_folder

_DATA_FILE = "__0_0.distcp"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class CheckpointWriter:
    """Takes the tensors of a checkpoint; made by `new_checkpoint`."""

    def __init__(self, folder: Path, file: ChecksummedFile) -> None:
        self.folder = folder
        self._file = file
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def add(
        self, name: str, shape: tuple[int, ...], offsets: tuple[int, ...], piece: Tensor
    ) -> None:
        """Write the block at `offsets` of the tensor `name` of `shape`."""
        empty = TensorStorageMetadata(TensorProperties(piece.dtype), torch.Size(shape), [])
        entry = self._entries.setdefault(name, empty)
        assert isinstance(entry, TensorStorageMetadata)
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), piece.shape))
        start = self._file.tell()
        if piece.untyped_storage().nbytes() != piece.nbytes:
            piece = piece.clone()  # torch.save writes the whole storage behind a view
        torch.save(piece, cast(IO[bytes], self._file))
        self._note(MetadataIndex(name, offsets), start)

    def add_object(self, name: str, content: bytes) -> None:
        """Write a sharded value that is no tensor, as `CheckpointReader.read_object` gave it."""
        self._entries[name] = BytesStorageMetadata()
        start = self._file.tell()
        self._file.write(content)
        self._note(MetadataIndex(name), start)

    def index(self) -> Metadata:
        return Metadata(
            state_dict_metadata=dict(self._entries),
            storage_data=self._places,
            storage_meta=StorageMeta(),
            version=CURRENT_DCP_VERSION,
        )

    def _note(self, index: MetadataIndex, start: int) -> None:
        self._places[index] = _StorageInfo(_DATA_FILE, start, self._file.tell() - start)


@contextmanager
def new_checkpoint(folder: Path, plain: dict[str, Any]) -> Iterator[CheckpointWriter]:
    """A checkpoint with the values `plain`, which appears as `folder` when the block ends.

    Holds one piece at a time. Raises as `new_folder`.
    """
    with new_folder(folder) as partial:
        with ChecksummedFile(partial / _DATA_FILE) as file:
            writer = CheckpointWriter(partial, file)
            yield writer
            known = {_DATA_FILE: file.close()}
        torch.save(plain, partial / PLAIN_FILE)
        (partial / INDEX_FILE).write_bytes(pickle.dumps(writer.index()))
        (partial / FORMAT_FILE).write_text(json.dumps(_FORMAT))
        write_manifest(partial, known)
