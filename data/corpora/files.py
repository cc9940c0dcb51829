"""Files that are either whole or not there: temporary name, fsync, rename, fsync of the folder."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from data.durable_files import sync_folder

PARTIAL = ".partial"  # no reader of a corpus takes a file with this ending
LOCK = ".lock"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file to write, which gets its name only when the block has ended well."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")  # two writers, two files
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text)


def check_writable(setting: str, path: Path) -> None:
    """Raises ValueError, naming the setting, where `write_text` could not write the file; makes
    its folder and a file there to see, and leaves neither behind."""
    made = [place for place in path.parents if not os.path.exists(place)]
    probe = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        there = next((place for place in path.parents if os.path.exists(place)), path)
        reason = error.strerror if there.is_dir() else f"{there} is a file"
        raise ValueError(
            f"{setting}: cannot be written ({reason}); choose another place"
        ) from error
    finally:
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()
    if path.is_dir():
        raise ValueError(f"{setting}: {path} is a folder; name a file")


@contextlib.contextmanager
def only_one(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the folder's lock; a second build waits. The system frees it when a process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another build works in {folder}: waiting for it to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: two builds at once would do work twice
            say(f"{folder} cannot be locked here: do not start a second build on it")
        yield
