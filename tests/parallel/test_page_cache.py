"""What was read once does not stay in the kernel's memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from parallel import page_cache
from parallel.page_cache import PagesBehind
from tests.parallel.test_checkpoint_io import is_cached

SIZE = 2 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """On the disk, and in memory as a whole."""
    path = tmp_path / "f"
    path.write_bytes(os.urandom(SIZE))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if is_cached(path, 0):
            pytest.skip("files of this folder cannot be dropped from memory")
    path.read_bytes()
    return path


def cached(path: Path) -> list[bool]:
    """Of each sixteenth of the file, the middle."""
    return [is_cached(path, (2 * part + 1) * SIZE // 32) for part in range(16)]


def test_stretches_go_and_what_lies_between_them_stays(file: Path) -> None:
    part = SIZE // 16
    with open(file, "rb") as opened:
        behind = PagesBehind(opened.fileno())
        for one in (1, 2, 3, 8, 9, 5):  # 4, 6 and 7 are left out, and 5 comes late
            behind.done_with(one * part, (one + 1) * part)
        behind.let_go()
    gone = {one for one, there in enumerate(cached(file)) if not there}
    # a page cache in folios of several pages may keep one that is needed in part
    assert {2, 8, 9} <= gone | {1, 3} and gone <= {1, 2, 3, 5, 8, 9}


def test_pages_go_while_a_long_stretch_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_ENOUGH_BYTES", SIZE // 2)
    advice: list[tuple[int, int]] = []
    real = os.posix_fadvise

    def posix_fadvise(descriptor: int, first: int, size: int, kind: int) -> None:
        advice.append((first, size))
        real(descriptor, first, size, kind)

    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    with open(file, "rb") as opened:
        behind = PagesBehind(opened.fileno())
        for begin in range(0, SIZE, SIZE // 8):
            behind.done_with(begin + 100, begin + SIZE // 8)  # small gaps are no end of a stretch
        behind.let_go()
        behind.let_go()
    assert advice == [(0, SIZE // 2), (SIZE // 2, SIZE // 2)]
    assert not any(cached(file)[1:-1])


def test_a_file_that_takes_no_advice_is_left_alone() -> None:
    first, second = os.pipe()
    try:
        behind = PagesBehind(first)
        behind.done_with(0, 100)
        behind.let_go()
    finally:
        os.close(first)
        os.close(second)
