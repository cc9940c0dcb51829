"""What the file system says of a path that somebody typed."""

from collections.abc import Iterator
from contextlib import contextmanager

from launch.findings import Findings


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
