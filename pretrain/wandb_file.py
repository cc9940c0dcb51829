"""What stands in the .wandb files of a run's earlier starts; wandb has no call that tells.

A .wandb file is a log in LevelDB's format: blocks of 32 KiB of chunks, each with a checksum (4
bytes), a length (2) and a kind (1: whole record, 2, 3, 4: its first, middle, last part); a record
is a protobuf message. The process writes whole blocks, so one that is killed loses up to 32 KiB.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

_BLOCK, _HEADER = 1 << 15, 7  # bytes: of a block, and in front of a chunk or of the file
_WHOLE, _FIRST, _LAST = 1, 2, 4


def last_step(path: Path) -> int | None:
    """The step of the last row of metrics in a .wandb file; -1 where it has records but no row,
    None where it has no record: wandb cannot read such a file."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made by a call

    step = None
    for message in _records(path.read_bytes()):
        record = Record.FromString(message)
        step = -1 if step is None else step
        for item in record.history.item:
            if "_step" in (item.key, *item.nested_key):
                step = int(json.loads(item.value_json))
    return step


def _records(data: bytes) -> Iterator[bytes]:
    """The complete records of a file, up to where it is cut off."""
    at, record = _HEADER, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:  # too little for a chunk: padding
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        chunk = data[at + _HEADER : at + _HEADER + size]
        if kind == 0 or len(chunk) < size:
            return
        at += _HEADER + size
        record = chunk if kind in (_WHOLE, _FIRST) else record + chunk
        if kind in (_WHOLE, _LAST):
            yield record
