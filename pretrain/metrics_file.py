"""The record of a run, metrics.jsonl, and other files of one JSON object a line that go by step.

Imports neither torch nor megatron-core.
"""

import contextlib
import errno
import io
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.provenance import atomic_write_text

METRICS_FILE = "metrics.jsonl"
# With these a descriptor refuses everything from now on: another host removed the file (NFS).
_UNUSABLE = (errno.ESTALE, errno.EBADF)


class StepLines:
    """A file of one JSON object a line, each with a "step", that survives crashes and resumes.

    Each line is handed to the operating system at once, so killing the process loses none; only a
    power loss may. A full disk does not end the run: lines wait in memory until it takes them.

    A run resumed from step k takes the steps after k again, so their old lines are dropped, as is
    a line cut off by a crash or with bytes that are not UTF-8. Where these are the file's end it is
    cut off there, which a full disk allows; otherwise it is rewritten atomically. Removed or moved
    under the run, it is written again whole, once its folder is there again; what cannot be read
    any more of the old one, for a stale NFS handle, is lost, and told.

    Args:
        resumed_step: step of the checkpoint; None: a run from its start, old lines all go.
    """

    def __init__(self, path: str | Path, resumed_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _drop_lines_after(self.path, resumed_step)
        self._file = self._opened()
        self._waiting = b""
        self._failing = False
        self._unusable = False  # the open file refuses everything, or is closed

    def write(self, record: Mapping[str, Any]) -> None:
        self._waiting += (json.dumps(record) + "\n").encode()
        error = self._write()
        if error and not self._failing:
            warn(f"could not write {self.path} ({error}); its lines wait in memory")
        self._failing = error is not None

    def _write(self) -> OSError | None:
        try:
            self._follow()
            try:
                self._hand_over()
            except OSError as error:
                if error.errno not in _UNUSABLE:
                    raise
                self._unusable = True
                self._follow()
                self._hand_over()
        except OSError as error:
            return error
        return None

    def _hand_over(self) -> None:
        while self._waiting:  # a disk that fills up takes a part
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def _follow(self) -> None:
        """Where another file, or none, has the path by now, or the open one is of no use any more:
        go on in the file of that name. A look costs a stat."""
        if self._is_current():
            return
        new = not self.path.exists()
        found = "removed or moved" if new else "replaced, or its handle went stale,"
        earlier = ""
        if new:
            try:
                self._file.seek(0)
                old = self._file.read()
            except (OSError, ValueError) as error:  # ValueError: it is closed
                earlier = f"; all earlier lines are lost ({error})"
            else:
                atomic_write_text(self.path, old.decode(errors="replace"))
                earlier = ", with all earlier ones"
        self._unusable = True
        self._drop()  # before another descriptor may get its number
        self._file = self._opened()
        self._unusable = False
        warn(
            f"{self.path} was {found} while the run writes it; its lines go on in the file of that "
            f"name{earlier}"
        )

    def _is_current(self) -> bool:
        if self._unusable:
            return False
        if not self.path.parent.is_dir():
            return True  # the old file, though nobody sees it, keeps the lines meanwhile
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return False
        try:
            return os.path.samestat(there, os.fstat(self._file.fileno()))
        except OSError:  # a stale handle
            return False

    def _drop(self) -> None:
        with contextlib.suppress(OSError):  # closed it is all the same
            self._file.close()

    def go_back(self, step: int) -> None:
        """Drops the lines after `step`, of a run that takes those steps again. A disk that refuses
        this does not end the run: of a step with two lines the second counts."""
        self._write()
        try:
            torn = _drop_lines_after(self.path, step)
        except OSError as error:
            warn(
                f"{self.path}: the lines after step {step}, to which the run goes back, cannot be "
                f"removed ({error}); of a step with two lines the second counts"
            )
            return
        waiting = torn + self._waiting if self._waiting else b""
        self._waiting = _lines_up_to(waiting, step)
        self._drop()
        self._unusable = True
        with contextlib.suppress(OSError):  # what is written next tries again, and says so
            self._file = self._opened()  # it may be another file now
            self._unusable = False
        self._write()

    def _opened(self) -> io.FileIO:
        return open(self.path, "ab+", buffering=0)

    def close(self) -> None:
        open_or_owing = not self._file.closed or self._waiting
        if open_or_owing and (error := self._write()):
            count = self._waiting.count(b"\n")
            warn(f"{self.path}: lines missing at its end: {count} ({error})")
        self._waiting = b""
        try:
            self._file.close()
        except OSError as error:  # NFS may refuse here what it seemed to take
            warn(f"{self.path}: its last lines may be missing ({error})")


class MetricsFile:
    """`run_dir`/metrics.jsonl: one JSON object a line, {"step", "time" (Unix seconds), metrics...}.

    `StepLines` says what crashes and resumes do to it. Values that are not finite become null: JSON
    has no NaN. One step may have several lines (training, evaluation), and the last line holding a
    name counts. Tables are not written here.
    """

    def __init__(self, run_dir: str | Path, resumed_step: int | None = None) -> None:
        self._lines = StepLines(Path(run_dir) / METRICS_FILE, resumed_step)
        self.path = self._lines.path

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for name, value in metrics.items():
            record[name] = value if math.isfinite(value) else None
        self._lines.write(record)

    def log_table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        pass

    def go_back(self, step: int) -> None:
        self._lines.go_back(step)

    def close(self, failed: bool = False) -> None:
        self._lines.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl in file order; null becomes NaN, a line that is cut off or holds
    anything but JSON is skipped."""
    records = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        record = _parse(line)
        if record is not None:
            records.append({k: math.nan if v is None else v for k, v in record.items()})
    return records


def _drop_lines_after(path: Path, step: int | None) -> bytes:
    """None: all lines. Returns what was behind the last whole line, which goes in any case."""
    old = path.read_bytes()
    kept = b"" if step is None else _lines_up_to(old, step)
    if old != kept and old.startswith(kept):
        os.truncate(path, len(kept))
    elif old != kept:
        atomic_write_text(path, kept.decode())
    return old[old.rfind(b"\n") + 1 :]


def _lines_up_to(text: bytes, last_step: int) -> bytes:
    kept = []
    for line in text.splitlines(keepends=True):
        record = _parse(line) if line.endswith(b"\n") else None
        if record is not None and record["step"] <= last_step:
            kept.append(line)
    return b"".join(kept)


def _parse(line: str | bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode() if isinstance(line, bytes) else line)
    except ValueError:  # also of bytes that are not UTF-8
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def warn(text: str) -> None:
    print(f"\nWARNING: {text}\n", file=sys.stderr, flush=True)
