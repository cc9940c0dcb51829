"""Tensors are read straight into their memory, once, and what is not as it should be is refused."""

from __future__ import annotations

import io
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from parallel import checkpoint_io, checkpoint_load, checkpoint_save, optimizer_state
from parallel.checkpoint_io import CheckpointError, DamageSearch
from parallel.checkpoint_load import _FileReader, reading_directly
from parallel.checkpoint_manifest import Progress
from parallel.checkpoint_reader import (
    CheckpointFormatError,
    CheckpointReader,
    _values_in_front,
)
from parallel.megatron import ShardedObject, ShardedTensor
from tests.distributed import run_on_gloo
from tests.launch.test_checkpoint import plant
from tests.parallel.test_checkpoint_io import is_cached

W = torch.arange(256.0 * 1024).view(256, 1024)
# what a rank of two fills, and along which axis it is half of the whole
WANTED: dict[str, tuple[torch.Tensor, int | None]] = {
    "whole": (torch.zeros(256, 1024), None),
    "rows": (torch.zeros(128, 1024), 0),
    "columns": (torch.zeros(256, 512), 1),
    "another type": (torch.zeros(128, 1024, dtype=torch.bfloat16), 0),
    "not in order": (torch.zeros(1024, 256).t(), None),
}


def sharded(tensor: torch.Tensor, axis: int | None = None) -> dict[str, Any]:
    rank = dist.get_rank()
    if axis is None:
        return {"w": ShardedTensor.from_rank_offsets("w", tensor, replica_id=rank)}
    return {"w": ShardedTensor.from_rank_offsets("w", tensor, (axis, rank, 2))}


def save(folder: Path) -> None:
    checkpoint_io.save(sharded(W), folder, metadata={})


def load(folder: Path, search: DamageSearch | None = None) -> torch.Tensor:
    return checkpoint_io.load(sharded(torch.zeros_like(W)), folder, search=search)["w"]


def load_each(folder: Path) -> dict[str, bool]:
    save(folder)
    equal = {}
    for kind, (target, axis) in WANTED.items():
        loaded = checkpoint_io.load(sharded(target, axis), folder)["w"]
        expected = W if axis is None else W.chunk(2, axis)[dist.get_rank()]
        equal[kind] = torch.equal(loaded, expected.to(target.dtype))
    return equal


def test_blocks_types_and_orders(tmp_path: Path) -> None:
    assert run_on_gloo(2, load_each, tmp_path / "c") == [dict.fromkeys(WANTED, True)] * 2


def load_searching(folder: Path, changed: bool) -> tuple[int, list[str], bool]:
    """Bytes read, what is wrong, and whether the numbers are right."""
    save(folder)
    (path,) = folder.glob("*.distcp")
    if changed:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    before, search = Progress.bytes, DamageSearch(folder)
    loaded = load(folder, search=search)
    read = Progress.bytes - before - path.stat().st_size
    return read, search.result(), torch.equal(loaded, W)


def test_the_checksum_is_of_what_was_loaded_and_costs_no_second_reading(tmp_path: Path) -> None:
    assert run_on_gloo(1, load_searching, tmp_path / "sound", False) == [(0, [], True)]
    [(read, wrong, right)] = run_on_gloo(1, load_searching, tmp_path / "changed", True)
    assert read == 0 and not right
    assert len(wrong) == 1 and wrong[0].startswith("__0_0.distcp has checksum ")


def load_what_two_have_written(folder: Path) -> list[str]:
    """Names of the files that this rank reads, in that order; plans are not exchanged."""
    half = W.chunk(2)[dist.get_rank()].clone()
    checkpoint_io.save(sharded(half, 0), folder, metadata={})
    read: list[str] = []
    read_file = checkpoint_load._read_file

    def noted(path: Path, *args: Any, **kwargs: Any) -> Any:
        read.append(path.name)
        return read_file(path, *args, **kwargs)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan is sent to another rank")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_load, "_read_file", noted)
        patch.setattr(checkpoint_load, "_THREADS", 1)
        patch.setattr(dist, "scatter_object_list", refuse)
        search = DamageSearch(folder)
        assert torch.equal(load(folder, search), W)
        assert search.result() == []
    return read


def test_a_rank_reads_its_own_share_first(tmp_path: Path) -> None:
    names = ["__0_0.distcp", "__1_0.distcp"]
    assert run_on_gloo(2, load_what_two_have_written, tmp_path / "c") == [names, names[::-1]]


def load_masters_where_one_rank_fails(folder: Path) -> str:
    """From fp32, whose weights are the masters of bf16: what is read in a second go."""
    checkpoint_io.save(entire({"w": W, "v": W}), folder, metadata={})
    read = checkpoint_load._read

    def fail(*args: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError("no such disk any more")
        return read(*args)

    master = optimizer_state._MASTER + "w"
    wanted = {name: torch.zeros_like(W) for name in ("w", "v", master)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_load, "_read", fail)
        with pytest.raises(CheckpointError) as refused:
            checkpoint_io.load(entire(wanted), folder)
    checkpoint_io.load(entire(wanted), folder)
    assert torch.equal(wanted["w"], W) and torch.equal(wanted[master], W)
    return str(refused.value)


def test_all_ranks_learn_of_one_that_cannot_read(tmp_path: Path) -> None:
    said = run_on_gloo(2, load_masters_where_one_rank_fails, tmp_path / "c", timeout=30)
    assert said[0] == said[1] and "rank 1" in said[0] and "no such disk any more" in said[0]


def load_others(folder: Path) -> str:
    """The error of a load that wants more, less and other than is stored."""
    tensors = {"w": W, "gone": W, "moved": W}
    checkpoint_io.save(entire(tensors), folder, metadata={})
    wanted = {"w": torch.zeros_like(W), "new": W.clone(), "moved": torch.zeros(2, 3)}
    with pytest.raises(CheckpointError) as refused:
        checkpoint_io.load(entire(wanted), folder)
    assert not wanted["w"].any()
    return str(refused.value)


def entire(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    rank = dist.get_rank()
    return {
        name: ShardedTensor.from_rank_offsets(name, tensor, replica_id=rank)
        for name, tensor in tensors.items()
    }


def test_tensors_that_do_not_fit_are_named_on_all_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    expected = (
        f"{folder} does not hold the tensors of this run:\n"
        "  wanted and not stored (1): new\n"
        "  stored and not wanted (1): gone\n"
        "  of another shape (1): moved [256, 1024] stored, [2, 3] wanted\n"
        "Use the settings it was saved with: the model, and what of it is trained."
    )
    assert run_on_gloo(2, load_others, folder) == [expected] * 2


def load_in_parts(folder: Path, axis: int) -> tuple[int, bool]:
    """Bytes read for both halves of a tensor, each wanted by itself."""
    save(folder)
    halves = {str(half): torch.zeros_like(W.chunk(2, axis)[half]) for half in (0, 1)}
    before = Progress.bytes
    loaded = checkpoint_io.load(
        {
            half: ShardedTensor.from_rank_offsets("w", tensor, (axis, int(half), 2))
            for half, tensor in halves.items()
        },
        folder,
    )
    whole = torch.cat([loaded["0"], loaded["1"]], axis)
    return Progress.bytes - before, torch.equal(whole, W)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_piece_is_read_once_for_all_blocks_of_it(tmp_path: Path, axis: int) -> None:
    assert run_on_gloo(1, load_in_parts, tmp_path / "c", axis) == [(W.nbytes, True)]


def search_alone(folder: Path) -> tuple[list[str], list[str]]:
    """What a search finds whose loader never came, or failed."""
    save(folder)
    (path,) = folder.glob("*.distcp")
    never, failed = DamageSearch(folder), DamageSearch(folder)
    assert failed.leave_to_loader({path.name, "another"}) == {path.name}
    path.write_bytes(bytes(path.stat().st_size))
    return never.result(), failed.result()


def test_what_the_loader_left_out_is_compared_as_well(tmp_path: Path) -> None:
    [(never, failed)] = run_on_gloo(1, search_alone, tmp_path / "c")
    assert never == failed and never[0].startswith("__0_0.distcp has checksum ")


def cached_after_loading(folder: Path, kind: str) -> tuple[bool, bool]:
    """Whether the middle of a tensor's file is in the kernel's memory before and after."""
    save(folder)
    (path,) = (path for path in folder.glob("*.distcp") if path.stat().st_size > W.nbytes)
    middle = path.stat().st_size // 2
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = is_cached(path, middle)
    dist.barrier()
    target, axis = WANTED[kind]
    checkpoint_io.load(sharded(target.clone(), axis), folder)
    dist.barrier()
    return before, is_cached(path, middle)


@pytest.mark.parametrize(
    ("ranks", "kind", "kept"),
    [
        (1, "whole", False),
        (2, "whole", True),  # the other rank wants it too
        (2, "columns", True),  # of which each rank reads all
    ],
)
def test_what_no_other_rank_wants_does_not_stay_in_memory(
    tmp_path: Path, ranks: int, kind: str, kept: bool
) -> None:
    cached = run_on_gloo(ranks, cached_after_loading, tmp_path / "c", kind)
    if any(before for before, _ in cached):
        pytest.skip("files of this folder cannot be dropped from memory")
    assert cached == [(False, kept)] * ranks


def test_tensors_that_are_read_once() -> None:
    stored = {"w": (4, 2), "optimizer.w": (8,), "optimizer.v": (8,)}
    counts = Counter({"w": 16, "optimizer.w": 8})  # two ranks hold w, and each half of the rest
    assert checkpoint_io._read_once(stored, counts, {}) == {"optimizer.w"}
    counts = Counter({"optimizer.v": 4, "w": 8, "optimizer.w": 8})
    assert checkpoint_io._read_once(stored, counts, {"optimizer.w": "w"}) == {"optimizer.v"}


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("echo this must never run",)


def of_a_larger_storage(tensor: torch.Tensor) -> Any:
    return torch.cat([tensor, tensor])[: len(tensor)]


def column_by_column(tensor: torch.Tensor) -> Any:
    return tensor.t().contiguous().t()


def cut_short(tensor: torch.Tensor) -> Any:
    return tensor[:-1].clone()


def in_bf16(tensor: torch.Tensor) -> Any:
    return tensor.bfloat16()


def harmful(tensor: torch.Tensor) -> Any:
    return [Harmful(), tensor]


def load_written_as(folder: Path, change: Any) -> Any:
    """The tensor, or the error, where torch.save was given something else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            checkpoint_save, "_save_tensor", lambda tensor, file: torch.save(change(tensor), file)
        )
        save(folder)
    try:
        return load(folder)
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("change", [of_a_larger_storage, column_by_column])
def test_pieces_in_other_forms_are_left_to_torch(tmp_path: Path, change: Any) -> None:
    [loaded] = run_on_gloo(1, load_written_as, tmp_path / "c", change)
    assert torch.equal(loaded, W)
    (piece,) = CheckpointReader(tmp_path / "c").tensors["w"].pieces
    assert CheckpointReader(tmp_path / "c").values(piece) is None
    with open(tmp_path / "c" / piece.file, "rb") as file:
        assert CheckpointReader(tmp_path / "c").values(piece, file.fileno()) is None


def save_types(folder: Path) -> None:
    types = {f"a{bits}": W[:3, : bits + 1].to(dtype) for bits, dtype in enumerate(TYPES)}
    checkpoint_io.save(entire({**types, "w": W, "one": torch.ones(1)}), folder, metadata={})


TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]


def test_the_head_of_a_piece_tells_what_its_directory_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on_gloo(1, save_types, tmp_path / "c")
    reader = CheckpointReader(tmp_path / "c")
    pieces = [piece for tensor in reader.tensors.values() for piece in tensor.pieces]
    expected = [reader.values(piece) for piece in pieces]
    assert len(expected) == len(TYPES) + 2 and None not in expected

    def not_needed(*_: Any) -> None:
        raise AssertionError("the directory was looked up")

    monkeypatch.setattr("parallel.checkpoint_reader._values", not_needed)
    for piece, values in zip(pieces, expected, strict=True):
        with open(tmp_path / "c" / piece.file, "rb") as file:
            assert reader.values(piece, file.fileno()) == values
            assert file.tell() == 0


@pytest.mark.parametrize(
    ("place", "content"),
    [
        (0, b"PK\1\2"),  # no header
        (8, b"\x08"),  # compressed
        (26, b"\xff\xff"),  # a name beyond what was read
        (30, b"archive/data.xyz"),  # no pickle
    ],
)
def test_a_head_that_does_not_tell_leaves_it_to_the_directory(
    tmp_path: Path, place: int, content: bytes
) -> None:
    run_on_gloo(1, save, tmp_path / "c")
    reader = CheckpointReader(tmp_path / "c")
    (piece,) = reader.tensors["w"].pieces
    with open(tmp_path / "c" / piece.file, "r+b") as file:
        head = bytearray(os.pread(file.fileno(), 4096, piece.start))
        assert _values_in_front(bytes(head), "", piece) == reader.values(piece)
        head[place : place + len(content)] = content
        assert _values_in_front(bytes(head), "", piece) is None
        assert _values_in_front(bytes(head[:200]), "", piece) is None


def save_objects(folder: Path) -> None:
    """Many small objects, and in each of two files tensors of 8 MB before them."""
    objects = {
        str(n): ShardedObject("o", io.BytesIO(pickle.dumps(n)), (9,), (n,)) for n in range(9)
    }
    tensors = {name: torch.ones(1 << 21) for name in ("a", "b")}
    checkpoint_io.save({**entire(tensors), **objects}, folder, metadata={})


def test_small_entries_lie_where_reading_ahead_looks_for_them(tmp_path: Path) -> None:
    run_on_gloo(1, save_objects, tmp_path / "c")
    objects = CheckpointReader(tmp_path / "c").objects
    assert len(objects) == 9
    for piece in objects.values():
        size = (tmp_path / "c" / piece.file).stat().st_size
        assert piece.start >= size - checkpoint_io._END_BYTES


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            cut_short,
            "is damaged where w lies: its piece at [0, 0] should be float32 [256, 1024], by the "
            "index, and is float32 [255, 1024]",
        ),
        (in_bf16, "should be float32 [256, 1024], by the index, and is bfloat16 [256, 1024]"),
        (harmful, "names posix.system, which no checkpoint of ours has in it"),
    ],
)
def test_pieces_that_are_not_what_the_index_says_are_refused(
    tmp_path: Path, change: Any, expected: str
) -> None:
    [said] = run_on_gloo(1, load_written_as, tmp_path / "c", change)
    assert isinstance(said, str) and expected in said


def load_what_changed_after_the_check(folder: Path, file: str, trap: Path) -> str:
    """A checkpoint whose pickles are made hostile when rank 0 has looked at them."""
    state = {"extra": ShardedObject("w._extra_state", [1], (1,), (0,)), **sharded(W)}
    checkpoint_io.save(state, folder, metadata={})
    plant(folder, file, trap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # torch.load trusts where it may
        patch.setattr(CheckpointReader, "check_harmless", lambda self: None)
        with pytest.raises(CheckpointError) as caught:
            checkpoint_io.load_plain_values(folder)
            state = {"extra": ShardedObject("w._extra_state", None, (1,), (0,))}
            checkpoint_io.load({**state, **sharded(torch.zeros_like(W))}, folder)
    return str(caught.value)


@pytest.mark.parametrize("file", [".metadata", "common.pt", "object", "tensor"])
def test_no_rank_runs_what_it_reads(tmp_path: Path, file: str) -> None:
    trap = tmp_path / "trap"
    [said] = run_on_gloo(1, load_what_changed_after_the_check, tmp_path / "c", file, trap)
    # a "tensor" without numbers is in a form that is left to torch, which refuses it
    refusal = "names posix.system, which " + ("weights do" if file == "tensor" else "no ")
    assert refusal in said and "weights_only" not in said and not trap.exists()


def test_an_index_of_another_kind_is_refused(tmp_path: Path) -> None:
    [said] = run_on_gloo(1, load_with_index, tmp_path / "c", pickle.dumps({"no": "index"}))
    assert "is damaged: it is no index" in said


def test_an_index_that_torch_would_not_take_for_one_is_refused(tmp_path: Path) -> None:
    run_on_gloo(1, save, tmp_path / "c")
    other = BytesStorageMetadata()  # not Metadata, though it has all that one has
    vars(other).update(state_dict_metadata={}, storage_data={})
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(other))
    reader = CheckpointReader(tmp_path / "c")
    assert reader.tensors == {}
    with (
        reading_directly(reader),
        pytest.raises(CheckpointFormatError, match="is damaged: its index is none"),
    ):
        FileSystemReader(tmp_path / "c").read_metadata()


def load_with_index(folder: Path, content: bytes) -> str:
    save(folder)
    (folder / ".metadata").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointReader, "check_harmless", lambda self: None)
        with pytest.raises(CheckpointError) as caught:
            load(folder)
    return str(caught.value)


def test_a_file_that_ends_early_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"123")
    with open(tmp_path / "f", "rb", buffering=0) as file:
        reader = _FileReader(tmp_path / "f", file, checksum=False)
        with pytest.raises(CheckpointFormatError, match="is damaged: it is cut off"):
            reader.fill(memoryview(bytearray(4)))
