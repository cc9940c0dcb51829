"""What a person should know of that happened to a run, in `run_dir`/events.jsonl.

A failed save, an older checkpoint taken instead of a damaged one, a spike, a skipped update, a
restart, a preemption. One JSON object a line:

    {"time": 1700000000.0, "kind": "resume", "step": 120, "text": "...", ...}

"time" is in Unix seconds; "step" counts finished optimizer steps. Unlike metrics, events are a
history: a resume from an older step drops none of them, so steps may go backwards in file order.
What a full disk refuses waits in memory for the next event, or the end of the run.
Imports neither torch nor megatron-core.
"""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.ledger import PatientLines

EVENTS_FILE = "events.jsonl"


class Events:
    """Appends to a run's events. One process of a run may write; the others pass enabled=False.

    Args:
        run_dir: made by the first event if need be; nothing is touched before.
        enabled: False: `write` does nothing.
    """

    def __init__(self, run_dir: str | Path, enabled: bool) -> None:
        self._lines = PatientLines(Path(run_dir) / EVENTS_FILE)
        self.path = self._lines.path
        self.enabled = enabled

    def write(self, kind: str, step: int, text: str, **more: Any) -> None:
        """One line, on disk when this returns. A full disk does not end the run: the line is
        written, with the time of its event, together with a later one.

        Args:
            kind: one word to filter by, such as "save_failed".
            text: a sentence for a person.
            more: further keys, of JSON types.
        """
        if not self.enabled:
            return
        record = {"time": round(time.time(), 3), "kind": kind, "step": step, "text": text, **more}
        with suppress(OSError):  # appending says so
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lines.append(record, about=text)

    def close(self) -> None:
        """Once more for what a full disk has refused; says so where it is lost."""
        self._lines.close()


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """The readable events of a run in file order; none where no file is."""
    path = Path(run_dir) / EVENTS_FILE
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict) and {"time", "kind", "step", "text"} <= event.keys():
            events.append(event)
    return events
