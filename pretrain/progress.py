"""One line that says how far a run is: live in a terminal, plain lines elsewhere.

Imports neither torch nor megatron-core, and rich only for a terminal.
"""

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO


def format_duration(seconds: float) -> str:
    """Short and readable: "0:07", "12:34", "3:25:45", "2d 03:25"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{m:02d}"
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Progress:
    """Progress of a run, for rank 0: bar, step, loss, tokens/s, remaining time.

    On a terminal a live line redrawn at most four times a second. Elsewhere (a log file, SLURM's
    output) plain lines: the first and the last step always, in between those at `log_interval`
    but no more than one in `min_seconds`.

    The remaining time is the median duration of the last 50 steps times the steps left. The
    median does not see the steps around an evaluation or a save; their own time, to come as well,
    is not in it.

    Args:
        total_steps: of the whole run.
        start_step: steps already taken when the run was resumed.
        enabled: False on all ranks but one: everything does nothing.
        log_interval, min_seconds: of the plain lines.
        file: None: stdout.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        *,
        log_interval: int = 1,
        min_seconds: float = 2.0,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._start_step = start_step
        self._enabled = enabled
        self._log_interval = max(1, log_interval)
        self._min_seconds = min_seconds
        self._file = sys.stdout if file is None else file
        self._clock = clock
        self._last = (start_step, clock())  # (step, time) of the last update
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._last_line: float | None = None
        self._live: Any = None  # rich.progress.Progress, on a terminal
        if enabled and self._file.isatty():
            self._start_live()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` optimizer steps are taken; `metrics` as for a tracker, missing ones left out."""
        if not self._enabled:
            return
        last_step, last_time = self._last
        now = self._clock()
        if step > last_step:
            self._step_seconds.append((now - last_time) / (step - last_step))
        self._last = (step, now)
        if self._live is not None:
            self._live.update(self._task, completed=step, text=self._describe(step, metrics))
        elif self._wants_line(step, now):
            self._last_line = now
            width = len(str(self._total_steps))
            text = self._describe(step, metrics)
            self._write(f"step {step:>{width}}/{self._total_steps}  {text}")

    def message(self, text: str) -> None:
        """A line of its own, above the live line."""
        if not self._enabled:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._write(text)

    def close(self) -> None:
        """Leave the last state of the line standing; a second call is harmless."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._enabled = False

    def _wants_line(self, step: int, now: float) -> bool:
        if self._last_line is None or step >= self._total_steps:
            return True
        return step % self._log_interval == 0 and now - self._last_line >= self._min_seconds

    def _describe(self, step: int, metrics: Mapping[str, float]) -> str:
        parts = []
        if "train/loss" in metrics:
            parts.append(f"loss {metrics['train/loss']:.4f}")
        if "throughput/tokens_per_second" in metrics:
            parts.append(f"{metrics['throughput/tokens_per_second']:,.0f} tokens/s")
        if step >= self._total_steps:
            parts.append("done")
        elif self._step_seconds:
            left = statistics.median(self._step_seconds) * (self._total_steps - step)
            parts.append(f"{format_duration(left)} left")
        return "  ".join(parts)

    def _write(self, text: str) -> None:
        print(text, file=self._file, flush=True)

    def _start_live(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as LiveProgress

        self._live = LiveProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}", markup=False),
            console=Console(file=self._file),
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._live.add_task(
            "", total=self._total_steps, completed=self._start_step, text=""
        )
        self._live.start()
