"""A checkpoint is complete or absent, and failures reach every rank."""

import ctypes
import mmap
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel import checkpoint_io
from parallel.checkpoint_io import CheckpointError
from parallel.megatron import ShardedTensor
from tests.distributed import run_on_gloo


def state(fill: float, shape: int = 4) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    tensor = torch.full((shape,), fill + rank)
    return {"w": ShardedTensor.from_rank_offsets("w", tensor, (0, rank, size)), "step": 7}


def save_and_load(folder: Path) -> dict[str, Any]:
    checkpoint_io.save(state(1.0), folder, metadata={"kind": "test"})
    loaded = checkpoint_io.load(state(0.0), folder)
    return {"w": loaded["w"].tolist(), "step": checkpoint_io.load_plain_values(folder)["step"]}


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    first, second = run_on_gloo(2, save_and_load, folder)
    assert first == {"w": [1.0] * 4, "step": 7} and second == {"w": [2.0] * 4, "step": 7}
    assert checkpoint_io.is_complete(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def error_of(action: str, folder: Path) -> str:
    try:
        if action == "save":
            checkpoint_io.save(state(1.0), folder, metadata={})
        elif action == "save, rank 1 fails":
            content = state(1.0)
            if dist.get_rank() == 1:
                content["w"] = ShardedTensor.from_rank_offsets("w", torch.zeros(4), (0, 0, 2))
            checkpoint_io.save(content, folder, metadata={})
        elif action == "load":
            checkpoint_io.load(state(0.0), folder)
        elif action == "load another shape":
            checkpoint_io.load(state(0.0, shape=5), folder)
        elif action == "load plain values":
            checkpoint_io.load_plain_values(folder)
        else:
            checkpoint_io.plain_values_on_all_ranks(folder)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("action", "prepared", "expected"),
    [
        ("save", True, "exists already"),
        ("load", False, "is not a complete checkpoint"),
        ("load plain values", False, "is not a complete checkpoint"),
        ("read plain values together", False, "is not a complete checkpoint"),
        ("load another shape", True, "of another shape (1): w [8] stored, [10] wanted"),
    ],
)
def test_failures_are_raised_on_every_rank(
    tmp_path: Path, action: str, prepared: bool, expected: str
) -> None:
    folder = tmp_path / "c"
    if prepared:
        run_on_gloo(2, save_and_load, folder)
    for text in run_on_gloo(2, error_of, action, folder):
        assert expected in text


def test_plain_values_that_cannot_be_read_are_told_on_every_rank(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    run_on_gloo(2, save_and_load, folder)
    (folder / "common.pt").unlink()
    (folder / "common.pt").symlink_to("/proc/sys/net/ipv4/route/flush")  # write-only, for root too
    for text in run_on_gloo(2, error_of, "read plain values together", folder):
        assert text.startswith("could not load c: rank 0 on ")
        assert f"could not read {folder}: [Errno 13] Permission denied" in text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for text in run_on_gloo(2, error_of, "save", tmp_path / "file" / "c"):
        assert "could not prepare" in text and "file" in text


def test_leftovers_of_a_killed_save_are_overwritten(tmp_path: Path) -> None:
    leftover = tmp_path / ("c" + checkpoint_io.PARTIAL_SUFFIX)
    leftover.mkdir()
    (leftover / "metadata.json").write_text("{}")
    assert not checkpoint_io.is_complete(leftover)
    run_on_gloo(2, save_and_load, tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"]


def is_cached(path: Path, byte: int) -> bool:
    """Whether the kernel has it in memory. A read that must not wait would tell as well, and make
    the kernel fetch it."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = byte // mmap.PAGESIZE * mmap.PAGESIZE
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 1, mmap.MAP_PRIVATE, offset=page) as mapped,
    ):
        there = ctypes.c_ubyte()
        first = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(
            ctypes.c_void_p(ctypes.addressof(first)),
            ctypes.c_size_t(1),
            ctypes.byref(there),
        )
        del first
        assert not failed, os.strerror(ctypes.get_errno())
        return bool(there.value & 1)


def cached_after_reading_ahead(folder: Path) -> tuple[bool, bool]:
    checkpoint_io.save({"a": 1, **state(1.0, shape=1 << 20)}, folder, metadata={})
    path = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    last = path.stat().st_size - 1
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = is_cached(path, last)
    checkpoint_io.read_ahead(folder)
    deadline = time.monotonic() + 20
    while not is_cached(path, last) and time.monotonic() < deadline:
        time.sleep(0.01)
    return before, is_cached(path, last)


def test_reading_ahead_brings_files_into_memory(tmp_path: Path) -> None:
    ((before, after),) = run_on_gloo(1, cached_after_reading_ahead, tmp_path / "step_1")
    if before:
        pytest.skip("files of this folder cannot be dropped from memory")
    assert after


def test_reading_ahead_minds_nothing(tmp_path: Path) -> None:
    run_on_gloo(1, checkpoint_io.read_ahead, tmp_path / "nothing here")
