"""Saves behind the training: what they hold, how they fail, and what a kill leaves."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel import checkpoint_io, checkpoint_manifest, checkpoint_save, failure_watch
from parallel.checkpoint_io import SaveFailed
from parallel.checkpoint_save import Background, HostMemory, StoreLost, wait_for
from parallel.config import ParallelConfig
from parallel.failure_watch import FailureWatch
from parallel.megatron import ShardedTensor
from parallel.progress_beacon import beacon
from parallel.runtime import initialize
from tests.disks import read_only, small_disk, writable
from tests.distributed import close_pool, run_on_gloo


def state(tensor: torch.Tensor, **plain: Any) -> dict[str, Any]:
    """Sharded over the ranks along the first axis."""
    place = (0, dist.get_rank(), dist.get_world_size())
    return {"w": ShardedTensor.from_rank_offsets("w", tensor, place), **plain}


def load(folder: Path, tensor: torch.Tensor) -> torch.Tensor:
    return checkpoint_io.load(state(torch.zeros_like(tensor)), folder)["w"]


def save_and_change(folder: Path) -> Any:
    """Two saves in the background, the tensor changed right after each has begun."""
    memory, tensor, places = HostMemory(), torch.zeros(1 << 16), []
    for step in (1, 2):
        tensor.fill_(step)
        pending = checkpoint_io.start_save(
            state(tensor, step=step), folder / str(step), metadata={}, memory=memory
        )
        tensor.fill_(-1.0)
        pending.wait()
        assert pending.done and 0 < pending.seconds < 60
        places.append(memory._arena.data_ptr())
    values = [load(folder / str(step), tensor).unique().tolist() for step in (1, 2)]
    return values, places[0] == places[1], memory.bytes


def test_a_save_holds_the_state_of_the_moment_it_began(tmp_path: Path) -> None:
    for values, reused, size in run_on_gloo(2, save_and_change, tmp_path):
        assert values == [[1.0], [2.0]] and reused and size == 4 << 16
    manifest = checkpoint_manifest.read_manifest(tmp_path / "2")
    names = [".metadata", "__0_0.distcp", "__1_0.distcp", "common.pt", "metadata.json"]
    assert list(manifest["files"]) == names
    assert checkpoint_manifest.verify(tmp_path / "2") == []


KINDS = {
    "view": lambda: torch.arange(1 << 20, dtype=torch.float32)[100:164],
    "transposed": lambda: torch.arange(64.0).view(16, 4).t().contiguous().t(),
    "bf16": lambda: torch.arange(64, dtype=torch.bfloat16),
    "requires grad": lambda: torch.nn.Parameter(torch.arange(64.0)) * 1,
    "number": lambda: torch.tensor(3.0),
}


def save_kinds(folder: Path, in_background: bool) -> dict[str, bool]:
    tensors = {name: make() for name, make in KINDS.items()}
    content: dict[str, Any] = {
        name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()
    }
    memory = HostMemory() if in_background else None
    checkpoint_io.start_save(content, folder, metadata={}, memory=memory).wait()
    wanted: dict[str, Any] = {
        name: ShardedTensor.from_rank_offsets(name, torch.zeros_like(tensor).detach())
        for name, tensor in tensors.items()
    }
    loaded = checkpoint_io.load(wanted, folder)
    return {name: torch.equal(loaded[name], tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("in_background", [False, True])
def test_tensors_of_every_kind_are_stored_without_what_surrounds_them(
    tmp_path: Path, in_background: bool
) -> None:
    equal = run_on_gloo(1, save_kinds, tmp_path / "c", in_background)[0]
    assert equal == dict.fromkeys(KINDS, True)
    size = sum(path.stat().st_size for path in (tmp_path / "c").glob("*.distcp"))
    assert size < 20_000  # the view's whole storage alone has 4 MB


def memory_error() -> str:
    with pytest.raises(MemoryError) as caught:
        HostMemory().copy([torch.zeros(1).expand(1 << 52)])
    return str(caught.value)


def test_memory_that_cannot_be_had_is_asked_for_by_name() -> None:
    text = memory_error()
    assert "16777216.0 GiB of host memory" in text and "checkpoint.async_save=false" in text


def failing_save(folder: Path, megabytes: float, limit_rank: int | None, count: int) -> list[str]:
    """Errors of `count` saves in the background, of which only the last one fits."""
    errors = []
    if dist.get_rank() == limit_rank:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    for attempt in range(count):
        size = int(megabytes * (1 << 18)) if attempt < count - 1 else 16
        try:
            checkpoint_io.start_save(
                state(torch.ones(size)), folder / "c", metadata={}, memory=HostMemory()
            ).wait()
            errors.append("")
        except SaveFailed as error:
            errors.append(str(error))
            dist.barrier()
            assert not folder.is_dir() or os.listdir(folder) == []
            dist.barrier()
    if dist.get_rank() == limit_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return errors


def test_a_full_disk_fails_the_save_on_all_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        for first, second, third in run_on_gloo(2, failing_save, disk, 4.0, None, 3):
            for text in (first, second):
                assert f"could not write {disk / 'c'}: rank 0: OSError: [Errno 28] No space" in text
                assert ".distcp'" in text
            assert third == ""
        assert checkpoint_manifest.verify(disk / "c") == []


def test_one_rank_that_cannot_write_fails_the_save_on_all(tmp_path: Path) -> None:
    """Without root: a limit on the size of files, on rank 1 alone."""
    for first, second in run_on_gloo(2, failing_save, tmp_path / "new", 4.0, 1, 2):
        assert "rank 1: OSError: [Errno 27] File too large: '" in first and "rank 0" not in first
        assert second == ""


def test_a_disk_that_is_read_only_fails_the_save(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        read_only(disk)
        for (text,) in run_on_gloo(2, failing_save, disk, 0.0, None, 1):
            assert "could not prepare" in text and "Read-only file system" in text
        writable(disk)
        assert run_on_gloo(2, failing_save, disk, 0.0, None, 1) == [[""], [""]]


def publish_in_the_way(folder: Path) -> str:
    """Somebody makes the folder while the save is being written."""
    try:
        pending = checkpoint_io.start_save(
            state(torch.ones(1 << 20)), folder / "c", metadata={}, memory=HostMemory()
        )
        if dist.get_rank() == 0:
            (folder / "c").mkdir()
            (folder / "c" / "file").touch()
        pending.wait()
    except SaveFailed as error:
        return str(error)
    return ""


def test_a_rename_that_fails_fails_the_save(tmp_path: Path) -> None:
    for text in run_on_gloo(2, publish_in_the_way, tmp_path):
        assert "Directory not empty" in text
    assert os.listdir(tmp_path) == ["c"]


def save_until_killed(folder: Path, step: int, kill_at: int) -> None:
    """A process of its own: save `step`, and end by SIGKILL at the `kill_at`th time that a file is
    opened for writing or something is renamed."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / f"store{step}"), 1), rank=0, world_size=1
    )
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event == "os.rename") and str(folder / "checkpoints") in str(arguments[0]):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    content = state(torch.full((1 << 12,), float(step)), step=step)
    checkpoint_io.start_save(
        content, folder / "checkpoints" / str(step), metadata={}, memory=HostMemory()
    ).wait()
    os._exit(0)


def test_a_kill_at_any_point_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    fork = multiprocessing.get_context("fork")
    for kill_at in range(1, 30):
        process = fork.Process(target=save_until_killed, args=(tmp_path, kill_at, kill_at))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        (left,) = folder.iterdir()
        assert left.name == f"{kill_at}.partial" and not checkpoint_io.is_complete(left)
        left.rename(folder / left.name.replace("partial", "tried"))
        for path in folder.iterdir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    # common.pt, one file of tensors, the index and its rename, its name, the manifest, the rename
    assert kill_at == 8
    assert [path.name for path in folder.iterdir()] == ["8"]
    assert checkpoint_manifest.verify(folder / "8") == []


@pytest.mark.parametrize("gets_on", [True, False])
def test_a_wait_that_gets_on_is_no_hang(monkeypatch: pytest.MonkeyPatch, gets_on: bool) -> None:
    monkeypatch.setattr(checkpoint_save, "_SLICE_SECONDS", 0.01)
    monkeypatch.setattr(beacon, "_moved", time.monotonic() - 1000)
    numbers = iter(range(10_000))
    never = threading.Event()
    assert not wait_for(never, lambda: next(numbers) if gets_on else 0, 0.1)
    assert (beacon.position().quiet < 100) == gets_on
    never.set()
    assert wait_for(never, lambda: 0)


def test_what_runs_in_the_background_lets_the_process_end() -> None:
    assert Background(lambda: threading.current_thread().daemon).result()
    with pytest.raises(ZeroDivisionError):
        Background(lambda: 1 // 0).result()


def test_where_memory_cannot_be_locked_other_memory_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(MemoryError):  # more than there is of either
        checkpoint_save._host_memory(1 << 62)
    assert "cannot be page-locked" in capsys.readouterr().err


def save_without_the_folder(folder: Path) -> str:
    """Another run takes the folder over while the save is written."""
    with pytest.raises(SaveFailed) as caught:
        checkpoint_io.start_save(
            state(torch.ones(4)),
            folder / "c",
            metadata={},
            memory=None,
            may_publish=lambda: False,
        ).wait()
    return str(caught.value)


def test_who_lost_the_folder_publishes_and_removes_nothing(tmp_path: Path) -> None:
    for text in run_on_gloo(2, save_without_the_folder, tmp_path):
        assert "this run does not hold its folder any more" in text
    assert os.listdir(tmp_path) == ["c.partial"]


def save_cut_off(folder: Path) -> str:
    """Rank 1 cannot reach the store; what the note says that ends all ranks."""
    runtime = initialize(ParallelConfig(), seed=1)
    with FailureWatch(runtime) as watch:
        if runtime.rank == 1:
            checkpoint_save._own_connection = unreachable
        pending = checkpoint_io.start_save(
            state(torch.ones(4)), folder / "c", metadata={}, memory=None
        )
        if runtime.rank == 1:
            with pytest.raises(StoreLost, match="rank 1 lost the store"):
                pending.wait()
        while not watch.store.check([failure_watch.KEY]):
            time.sleep(0.01)
        text = watch.store.get(failure_watch.KEY).decode()
        dist.barrier()
        watch.withdraw()
        return text


def unreachable() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 1, is_master=False, timeout=timedelta(seconds=0.1))


def test_a_rank_that_loses_the_store_ends_all_with_the_cause(tmp_path: Path) -> None:
    try:
        for text in run_on_gloo(2, save_cut_off, tmp_path, timeout=30):
            assert "StoreLost: rank 1 lost the store that all ranks share while" in text
    finally:
        close_pool()  # rank 0's thread waits for rank 1 still
