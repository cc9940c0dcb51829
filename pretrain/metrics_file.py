"""The record of a run, metrics.jsonl, and other files of one JSON object a line that go by step.

Imports neither torch nor megatron-core.
"""

import contextlib
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


class StepLines:
    """A file of one JSON object a line, each with a "step", that survives crashes and resumes.

    Each line is handed to the operating system at once, so killing the process loses none; only a
    power loss may. A full disk does not end the run: lines wait in memory until it takes them.

    A run resumed from step k takes the steps after k again, so their old lines are dropped, as is
    a line cut off by a crash or with bytes that are not UTF-8; the file is rewritten atomically.
    Removed or moved under the run, it is written again whole, once its folder is there again.

    Args:
        resumed_step: step of the checkpoint; None: a run from its start, old lines all go.
    """

    def __init__(self, path: str | Path, resumed_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            old = self.path.read_text(encoding="utf-8", errors="replace")
            kept = "" if resumed_step is None else _lines_up_to(old, resumed_step)
            if kept != old:
                atomic_write_text(self.path, kept)
        self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115  closed by close()
        self._waiting = b""
        self._failing = False

    def write(self, record: Mapping[str, Any]) -> None:
        self._waiting += (json.dumps(record) + "\n").encode()
        error = self._write()
        if error and not self._failing:
            warn(f"could not write {self.path} ({error}); its lines wait in memory")
        self._failing = error is not None

    def _write(self) -> OSError | None:
        try:
            self._follow()
            while self._waiting:  # a disk that fills up takes a part
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            return error
        return None

    def _follow(self) -> None:
        """Where another file, or none, has the path by now: go on there. A look costs a stat."""
        if not self.path.parent.is_dir():
            return  # the old file, though nobody sees it, keeps the lines meanwhile
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
                return
        new = not self.path.exists()
        if new:
            self._file.seek(0)
            atomic_write_text(self.path, self._file.read().decode(errors="replace"))
        there = open(self.path, "ab+", buffering=0)  # noqa: SIM115  closed by close()
        self._file.close()
        self._file = there
        warn(
            f"{self.path} was {'removed or moved' if new else 'replaced'} while the run writes it; "
            f"its lines go on in the file of that name{', with all earlier ones' if new else ''}"
        )

    def reopened(self, step: int) -> "StepLines":
        """The file without the lines after `step`, of a run that goes on from there."""
        self.close()
        return StepLines(self.path, step)

    def close(self) -> None:
        if not self._file.closed and (error := self._write()):
            count = self._waiting.count(b"\n")
            warn(f"{self.path}: lines missing at its end: {count} ({error})")
        self._waiting = b""
        self._file.close()


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
        self._lines = self._lines.reopened(step)

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


def _lines_up_to(text: str, last_step: int) -> str:
    kept = []
    for line in text.splitlines(keepends=True):
        record = _parse(line) if line.endswith("\n") else None
        if record is not None and record["step"] <= last_step:
            kept.append(line)
    return "".join(kept)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def warn(text: str) -> None:
    print(f"\nWARNING: {text}\n", file=sys.stderr, flush=True)
