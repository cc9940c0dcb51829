"""Writing safetensors files tensor by tensor.

The format (github.com/huggingface/safetensors): 8 bytes little-endian length n, n bytes of JSON
with each tensor's type, shape and place, then the tensors' bytes. All in front of the bytes is
known from shapes and types, so that a model of any size is written with one tensor in memory, where
`safetensors.torch.save_file` wants all of a file's at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 64  # the bytes begin at a multiple of this, so that readers may map them


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_sharded(
    folder: Path, stem: str, entries: Sequence[Entry], tensors: Iterable[Tensor], max_bytes: int
) -> dict[str, str]:
    """Write `tensors`, those that `entries` describe and in their order, into `folder`.

    One file ``<stem>.safetensors``, or several of at most `max_bytes` (but for a larger tensor,
    which has a file of its own) with ``<stem>.safetensors.index.json``, as `transformers` has them.
    Holds one tensor at a time. Returns file -> sha256.
    """
    parts = _parts(entries, max_bytes)
    total = len(parts)
    names = [f"{stem}-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    if total == 1:
        names = [f"{stem}.safetensors"]
    iterator = iter(tensors)
    sums = {
        name: _write(folder / name, part, iterator) for name, part in zip(names, parts, strict=True)
    }
    assert next(iterator, None) is None, "more tensors than entries"
    if total > 1:
        index = {
            "metadata": {"total_size": sum(entry.bytes for entry in entries)},
            "weight_map": {
                entry.name: name for name, part in zip(names, parts, strict=True) for entry in part
            },
        }
        path = folder / f"{stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=1) + "\n")
        sums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return sums


def _parts(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    parts: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if parts[-1] and size + entry.bytes > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += entry.bytes
    return parts


def _write(path: Path, entries: Sequence[Entry], tensors: Iterable[Tensor]) -> str:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.bytes
        header[entry.name] = {
            "dtype": _TYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            digest.update(block)
            file.write(block)
        for entry, tensor in zip(entries, tensors, strict=False):
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise ValueError(
                    f"{entry.name} should be {entry.dtype} {list(entry.shape)}, and is "
                    f"{tensor.dtype} {list(tensor.shape)}"
                )
            content = tensor.contiguous().flatten().view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        if file.tell() != 8 + len(text) + end:
            raise ValueError(f"{path.name}: fewer tensors than its header lists")
    return digest.hexdigest()
