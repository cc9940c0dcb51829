"""Small disks that fill up or refuse writes: real mounts, so only where the tests run as root."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """`folder` as a disk of `size` ("4m"); skips the test where that cannot be had."""
    folder.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def mount(*arguments: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")


def fill(disk: Path) -> Path:
    """The file in which the rest of a `small_disk` now is."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while file.write(b"x" * 1000):
            pass
    return filler


def read_only(folder: Path) -> None:
    """Of a `small_disk`; root may write where permissions forbid it, but not there."""
    mount("-o", "remount,ro", str(folder))


def writable(folder: Path) -> None:
    mount("-o", "remount,rw", str(folder))
