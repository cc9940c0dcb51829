"""What a run drew, in a file beside its metrics: starts, changes of ratios, skipped updates.

One JSON object a line, appended and synced; a line that a crash cut off is ignored.

    {"event": "start", "step": 0, "consumed_sequences": 0, "global_batch_size": 8, ...}
    {"event": "ratios", "step": 120, "consumed_sequences": 960, "shares": {...}}
    {"event": "skip", "step": 130, "samples": [1032, 1040], "why": "..."}

"step" counts finished optimizer steps. A start says with which batch size the steps after it were
cut; one at a lower step than lines before it (a resume from an older checkpoint) replaces what they
say from there on.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LEDGER_NAME = "data_ledger.jsonl"


class Ledger:
    """Appends to a run's ledger. Only one process of a run may write."""

    def __init__(self, run_dir: Path | str):
        self._lines = PatientLines(Path(run_dir) / LEDGER_NAME)
        self.path = self._lines.path

    def write(self, event: str, *, step: int, consumed_sequences: int, **more: Any) -> None:
        """One line, on disk when this returns. `more`: JSON types.

        A full disk does not end the run: the line is written together with a later one.
        """
        entry = {
            "event": event,
            "step": step,
            "consumed_sequences": consumed_sequences,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **more,
        }
        self._lines.append(entry)

    def close(self) -> None:
        """Once more for what a full disk has refused; says so where it is lost."""
        self._lines.close()


class PatientLines:
    """JSON objects appended to a file, a line each, in order; those that the disk refuses wait in
    memory for a later call. Any thread may append."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def append(self, record: dict[str, Any], about: str = "") -> None:
        """On disk when this returns, or the refusal is said, and what the line is about."""
        with self._lock:
            self._waiting.append(record)
            if error := self._write():
                _say(f"could not write {self.path} yet ({error}){about and ': '}{about}")

    def close(self) -> None:
        """Once more for what waits; says so where it is lost."""
        with self._lock:
            if error := self._write():
                _say(f"WARNING: {self.path}: lines missing: {len(self._waiting)} ({error})")
            self._waiting = []

    def _write(self) -> OSError | None:
        try:
            while self._waiting:
                append_line(self.path, self._waiting[0])
                del self._waiting[0]
        except OSError as error:
            return error
        return None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """One JSON object as a line of its own at the end of the file, on disk when this returns.

    What a power loss or a full disk cut off stays a line of its own, too, and unreadable alone.
    """
    line = json.dumps(record, ensure_ascii=False) + "\n"
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_ledger(run_dir: Path | str) -> list[dict[str, Any]]:
    """The valid lines of a run's ledger, without those that a later start replaced.

    Raises FileNotFoundError if there is no ledger.
    """
    path = Path(run_dir) / LEDGER_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; it is written by a run, into its run_dir, from its first step"
        )
    entries: list[dict[str, Any]] = []
    for entry in _lines(path):
        if entry["event"] == "start":
            entries = [old for old in entries if old["step"] <= entry["step"]]
        entries.append(entry)
    return entries


def samples_of_step(entries: list[dict[str, Any]], step: int) -> tuple[int, int]:
    """First and last + 1 of the samples that optimizer step `step` (from 1) was made of.

    Raises ValueError for a step below 1 and for a ledger without a start before the step.
    """
    if step < 1:
        raise ValueError(f"--step={step}: steps count from 1")
    start = next((e for e in reversed(entries) if e["event"] == "start" and e["step"] < step), None)
    if start is None:
        raise ValueError(f"--step={step}: the ledger records no start before this step")
    size = start["global_batch_size"]
    first = start["consumed_sequences"] + (step - 1 - start["step"]) * size
    return first, first + size


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off by a crash; the next start says where the run stood
        if isinstance(entry, dict) and {"event", "step", "consumed_sequences"} <= entry.keys():
            yield entry
