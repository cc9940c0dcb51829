"""A trace of a few steps of some ranks, and a table of where the time of all ranks went."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist

from parallel import failure_watch
from parallel.runtime import Runtime
from parallel.stage_clock import STAGES, Table
from pretrain.config import ProfileConfig

PROFILE_FOLDER = "profile"
TABLE_FILE = "step_times.txt"
# torch holds Python's lock while it ends a trace and writes it, 28 µs for each operator: this rank
# gives no sign of life for so many seconds at most, which are 10 million operators.
TRACE_SECONDS = 300.0


class RankTimes(TypedDict):
    """Of one rank: seconds of a step by stage, those of them in communication, and of pauses."""

    seconds: dict[str, float]
    communication: dict[str, float]
    pauses: dict[str, float]


class StepProfiler:
    """Steps profile.start_step to start_step + steps - 1, each timed by a StageClock.

    `run_dir`/profile gets, when the last of them and what followed it (save, evaluation) is over:

    - rank_0000.json for each of profile.ranks: a Chrome trace of torch.profiler (open it in
      https://ui.perfetto.dev or chrome://tracing), with the names of stages, torch.distributed
      calls, checkpoint and evaluation as ranges over torch's operators and the device's kernels;
    - step_times.txt and step_times.json: seconds of each stage, mean over these steps, and how
      much of that is communication; over all ranks, and of each rank.

    All ranks must call its methods alike: the end of the window gathers their tables. A traced step
    is slower than others, by as much as its many small operators cost to record.
    """

    def __init__(self, config: ProfileConfig, runtime: Runtime, run_dir: Path) -> None:
        self._config, self._runtime = config, runtime
        self.folder = run_dir / PROFILE_FOLDER
        self._tables: list[Table] = []  # of the steps of the window
        self._first = 0  # the first of them
        self._pauses: dict[str, float] = {}  # seconds outside steps, by name
        self._trace: Any = None

    def covers(self, step: int) -> bool:
        """Whether the step of this number is in the window."""
        first = self._config.start_step
        return first > 0 and first <= step < first + self._config.steps

    @property
    def tracing(self) -> bool:
        return self._trace is not None

    def before(self, step: int) -> str | None:
        """Call before every step: begins the window, and ends it like `finish`."""
        if not self.covers(step):
            return self.finish()
        if not self._tables:
            self._first = step
        if self._trace is None and self._runtime.rank in self._config.ranks:
            self._trace = _start_trace(self._runtime.device)
        return None

    def add(self, table: Table) -> None:
        """The times of a step of the window."""
        self._tables.append(table)

    @contextlib.contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """Around what stands between steps: checkpoint, evaluation."""
        start = time.perf_counter()
        with torch.profiler.record_function(name) if self.tracing else contextlib.nullcontext():
            yield
        if self._tables:
            self._pauses[name] = self._pauses.get(name, 0.0) + time.perf_counter() - start

    def finish(self) -> str | None:
        """Write what was collected, if anything was; returns the table, on rank 0."""
        if not self._tables:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._trace is not None:
            watch = failure_watch.current()
            with watch.pause(TRACE_SECONDS) if watch is not None else contextlib.nullcontext():
                self._trace.stop()
                self._trace.export_chrome_trace(
                    str(self.folder / f"rank_{self._runtime.rank:04d}.json")
                )
            self._trace = None
        ranks = self._gather()
        first, steps = self._first, len(self._tables)
        self._tables, self._pauses = [], {}
        if self._runtime.rank != 0:
            return None
        title = f"steps {first} to {first + steps - 1}" if steps > 1 else f"step {first}"
        text = format_table(ranks, title)
        (self.folder / TABLE_FILE).write_text(text + "\n", encoding="utf-8")
        record = {"first_step": first, "steps": steps, "ranks": ranks}
        (self.folder / TABLE_FILE).with_suffix(".json").write_text(json.dumps(record) + "\n")
        return text

    def _gather(self) -> list[RankTimes]:
        count = len(self._tables)
        mine: RankTimes = {
            "seconds": {s: sum(sum(table[s]) for table in self._tables) / count for s in STAGES},
            "communication": {
                s: sum(table[s][1] for table in self._tables) / count for s in STAGES
            },
            "pauses": self._pauses,
        }
        ranks = [mine] * self._runtime.world_size
        dist.all_gather_object(ranks, mine)
        return ranks


def format_table(ranks: Sequence[RankTimes], title: str) -> str:
    """Where a step went: one row for each stage, one for the step, one for each pause.

    Args:
        ranks: of each rank, as in step_times.json.
    """
    step = sum(sum(rank["seconds"].values()) for rank in ranks) / len(ranks)
    lines = [
        f"Where the time went, {title}: {step * 1000:,.1f} ms a step",
        f"{'stage':<12}{'mean':>10}{'least':>10}{'most':>10}   of rank{'share':>8}"
        f"{'communication':>15}",
    ]
    for stage in STAGES:
        values = [rank["seconds"][stage] for rank in ranks]
        communication = _mean([rank["communication"][stage] for rank in ranks])
        lines.append(
            f"{_row(stage, values)}{_mean(values) / step:>8.1%}{1000 * communication:>15,.2f}"
        )
    inside = _mean([sum(rank["communication"].values()) for rank in ranks])
    values = [sum(rank["seconds"].values()) for rank in ranks]
    lines.append(f"{_row('the step', values)}{1:>8.1%}{1000 * inside:>15,.2f}")
    lines += [_row(name, [rank["pauses"][name] for rank in ranks]) for name in ranks[0]["pauses"]]
    lines.append("milliseconds; communication, the mean over ranks, is part of its stage")
    return "\n".join(lines)


def _row(name: str, seconds: Sequence[float]) -> str:
    longest = max(range(len(seconds)), key=seconds.__getitem__)
    numbers = (_mean(seconds), min(seconds), max(seconds))
    return f"{name:<12}" + "".join(f"{1000 * n:>10,.2f}" for n in numbers) + f"{longest:>10}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _start_trace(device: torch.device) -> Any:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    trace = torch.profiler.profile(activities=activities)
    trace.start()
    return trace
