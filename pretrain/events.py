"""What a person should know of that happened to a run, in `run_dir`/events.jsonl.

A failed save, an older checkpoint taken instead of a damaged one, a spike, a skipped update, a
restart, a preemption. One JSON object a line:

    {"time": 1700000000.0, "kind": "resume", "step": 120, "text": "...", ...}

"time" is in Unix seconds; "step" counts finished optimizer steps. Unlike metrics, events are a
history: a resume from an older step drops none of them, so steps may go backwards in file order.
Imports neither torch nor megatron-core.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from data.ledger import append_line

EVENTS_FILE = "events.jsonl"


class Events:
    """Appends to a run's events. One process of a run may write; the others pass enabled=False.

    Args:
        run_dir: made by the first event if need be; nothing is touched before.
        enabled: False: `write` does nothing.
    """

    def __init__(self, run_dir: str | Path, enabled: bool) -> None:
        self.path = Path(run_dir) / EVENTS_FILE
        self.enabled = enabled

    def write(self, kind: str, step: int, text: str, **more: Any) -> None:
        """One line, on disk when this returns; a full disk costs the event, not the run.

        Args:
            kind: one word to filter by, such as "save_failed".
            text: a sentence for a person.
            more: further keys, of JSON types.
        """
        if not self.enabled:
            return
        record = {"time": round(time.time(), 3), "kind": kind, "step": step, "text": text, **more}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self.path, record)
        except OSError as error:
            print(f"could not write {self.path} ({error}): {text}", file=sys.stderr, flush=True)


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
