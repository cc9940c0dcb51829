"""What the file system says of a path that somebody typed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.check_disk import free_bytes
from launch.findings import Findings
from pretrain.run_lock import unusable


def not_writable(setting: str, folder: Path) -> list[str]:
    """Why the folder that `setting` names cannot be made or written, as far as a look tells.

    Raises OSError for a path that cannot be looked at.
    """
    if problem := unusable(folder, setting=setting):
        return [problem]
    if free_bytes(folder) == 0:  # also of /proc and the like, where no folder can be made
        return [
            f"{setting}={folder}: its file system has no room at all, or takes no files; choose "
            f"another {setting}"
        ]
    return []


@contextmanager
def path_of(setting: str, value: str, findings: Findings) -> Iterator[None]:
    """Makes an error that names `setting` of what a look at its path raises, and ends the look.

    Names that are too long and folders that may not be entered raise OSError also where one only
    asks whether they are there; ~NAME of nobody raises RuntimeError.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = str(error)
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
            if isinstance(error, PermissionError) and error.filename is not None:
                reason += f": {error.filename}"
        findings.errors("paths", [f"{setting}={value}: {reason}; choose another path"])
