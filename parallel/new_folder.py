"""A folder that is complete or absent. Imports neither torch nor megatron-core."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `folder` when the block ends without an error.

    Until then its name is `folder`'s with ".partial" behind it; an error removes it. What was left
    under that name by a process that was killed is removed first.

    Raises FileExistsError where `folder` exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; name another folder, or remove it")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*sorted(partial.rglob("*")), partial]:
            _flush(path)
        os.rename(partial, folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
