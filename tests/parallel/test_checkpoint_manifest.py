"""The manifest finds what happened to a checkpoint's files."""

import errno
import json
import os
import resource
import threading
import zlib
from pathlib import Path

import pytest

from parallel import checkpoint_manifest
from parallel.checkpoint_manifest import (
    ChecksummedFile,
    ManifestError,
    NewerManifestError,
    Progress,
    in_threads,
    read_manifest,
    verify,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.distcp").write_bytes(os.urandom(5000))
    (tmp_path / "sub" / "b").write_bytes(b"\0" * 100)
    (tmp_path / "empty").touch()
    write_manifest(tmp_path)
    return tmp_path


def test_a_manifest_lists_every_file_and_nothing_else(folder: Path) -> None:
    content = read_manifest(folder)
    assert content["format"] == 1 and content["algorithm"] == "crc32"
    assert list(content["files"]) == ["a.distcp", "empty", "sub/b"]
    expected = zlib.crc32((folder / "a.distcp").read_bytes())
    assert content["files"]["a.distcp"] == {"bytes": 5000, "checksum": f"{expected:08x}"}
    assert verify(folder) == []


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_each_kind_of_damage_is_named(folder: Path) -> None:
    flip_a_bit(folder / "a.distcp")
    (folder / "sub" / "b").write_bytes(b"\0" * 99)
    (folder / "empty").unlink()
    changed, missing, truncated = verify(folder)
    assert changed.startswith("a.distcp has checksum") and "its content has changed" in changed
    assert missing == "empty is missing"
    assert truncated == "sub/b has 99 bytes instead of 100"
    assert verify(folder, checksums=False) == [missing, truncated]
    assert verify(folder, names=["sub/b"]) == [truncated]


def test_a_file_that_cannot_be_read_is_a_problem(folder: Path) -> None:
    (folder / "sub" / "b").unlink()
    (folder / "sub" / "b").mkdir()
    size = (folder / "sub" / "b").stat().st_size
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["sub/b"]["bytes"] = size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert verify(folder) == ["sub/b cannot be read: Is a directory"]
    with pytest.raises(IsADirectoryError):
        verify(folder, unreadable_is_damage=False)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    with pytest.raises(IsADirectoryError):
        verify(folder, unreadable_is_damage=False)


def test_what_is_written_and_compared_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_manifest, "_SYNC_BYTES", 1000)
    before = Progress.bytes
    with ChecksummedFile(tmp_path / "a") as file:
        file.write(b"x" * 900)
        assert (tmp_path / "a").stat().st_size == 0
        file.write(b"x" * 900)
        assert (tmp_path / "a").stat().st_size == 1800  # in parts, not all at the end
        file.close()
    assert Progress.bytes == before + 1800
    write_manifest(tmp_path)
    before = Progress.bytes
    assert verify(tmp_path) == [] and Progress.bytes == before + 1800


def test_the_disk_is_kept_busy_from_early_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_manifest, "_HAND_OVER_BYTES", 1000)
    monkeypatch.setattr(checkpoint_manifest, "_SYNC_BYTES", 4000)
    advice: list[tuple[int, int]] = []
    real = os.posix_fadvise

    def posix_fadvise(file: int, first: int, size: int, kind: int) -> None:
        advice.append((first, size))
        real(file, first, size, kind)

    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    parts = [os.urandom(900) for _ in range(7)]
    with ChecksummedFile(tmp_path / "a") as file:
        for part in parts:
            file.write(part)
        file.close()
    assert advice == [(0, 1800), (0, 3600), (0, 6300)]  # and 4500 bytes by fsync
    assert (tmp_path / "a").read_bytes() == b"".join(parts)


def test_threads_keep_the_order_and_let_the_process_end() -> None:
    assert in_threads(lambda n: n * n, range(100), 4) == [n * n for n in range(100)]
    assert in_threads(lambda n: threading.current_thread().daemon, range(3), 2) == [True] * 3
    assert in_threads(abs, [], 2) == []
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda n: 1 // n, [1, 0], 2)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', "\xff", '{"format": 1, "alg'])
def test_a_damaged_manifest_is_a_problem(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content, encoding="latin-1")
    (line,) = verify(folder)
    assert line.startswith("manifest.json cannot be read")
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(folder)


def test_sizes_that_are_no_numbers_are_a_problem(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("5000", '"5000"'))
    assert verify(folder) == ["manifest.json cannot be read: a size is not a number"]


def test_a_missing_manifest_is_a_problem(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    assert verify(folder) == ["manifest.json is missing"]
    with pytest.raises(ManifestError, match=r"manifest\.json is missing"):
        read_manifest(folder)


@pytest.mark.parametrize(("key", "value"), [("format", 2), ("algorithm", "sha512")])
def test_a_newer_manifest_is_not_mistaken_for_a_damaged_one(
    folder: Path, key: str, value: object
) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, key: value}))
    with pytest.raises(NewerManifestError, match="use the version that wrote it"):
        verify(folder)


def test_without_checksums_sizes_are_compared(folder: Path) -> None:
    write_manifest(folder, checksums=False)
    assert read_manifest(folder)["files"]["empty"] == {"bytes": 0}
    flip_a_bit(folder / "a.distcp")
    assert verify(folder) == []
    (folder / "a.distcp").write_bytes(b"short")
    assert verify(folder) == ["a.distcp has 5 bytes instead of 5000"]


def test_checksums_taken_while_writing_are_those_of_the_file(tmp_path: Path) -> None:
    parts = [os.urandom(3), os.urandom(3 << 20), b"", memoryview(os.urandom(64)).cast("I")]
    with ChecksummedFile(tmp_path / "a") as file:
        for part in parts:
            file.write(part)
        file.flush()
        assert file.tell() == 3 + (3 << 20) + 64
        entry = file.close()
    assert entry == checkpoint_manifest.file_entry(tmp_path / "a")
    write_manifest(tmp_path, {"a": entry})
    assert verify(tmp_path) == []


@pytest.mark.parametrize("size", [4096, 4 << 20])  # noticed by close, and by write
def test_a_file_that_cannot_grow_names_itself(tmp_path: Path, size: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with (
            pytest.raises(OSError, match="File too large") as caught,
            ChecksummedFile(tmp_path / "a") as file,
        ):
            file.write(b"x" * size)
            file.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / "a")
