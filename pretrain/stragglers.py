"""Which rank the others wait for: every rank's time of one step, compared now and then."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.runtime import Runtime
from parallel.stage_clock import STAGES, Table
from pretrain.config import ProfileConfig
from pretrain.metrics_file import StepLines
from pretrain.throughput import peak_memory_bytes

STRAGGLERS_FILE = "stragglers.jsonl"


class StragglerReport:
    """Gathers the ranks' tables of a step. All ranks must make it and call its methods alike.

    A rank is busy while it is not in communication: a slow one has others wait for it and waits
    little itself, whatever the layout. `run_dir`/stragglers.jsonl gets one JSON object for each
    step measured, lists going by rank:

        {"step": 50, "hosts": ["h1", "h1", "h2", "h2"], "pipeline_stages": [0, 1, 0, 1],
         "busy_seconds": [...], "communication_seconds": [...], "data_seconds": [...],
         "peak_bytes": [...], "slowest_rank": 2, "slowest_host": "h2", "slowdown": 1.8}

    After a resume, lines of later steps are dropped, as in metrics.jsonl.

    Args:
        announce: what tells people of a slow rank; (step, text, rank, host).
    """

    def __init__(
        self,
        config: ProfileConfig,
        runtime: Runtime,
        run_dir: Path,
        resumed_step: int | None,
        announce: Callable[[int, str, int, str], None],
    ) -> None:
        self._config, self._runtime, self._announce = config, runtime, announce
        places: list[tuple[str, int]] = [("", 0)] * runtime.world_size
        dist.all_gather_object(places, (platform.node(), runtime.pipeline_parallel_rank))
        self.hosts = [host for host, _ in places]
        self.pipeline_stages = [stage for _, stage in places]
        self._file = None
        if runtime.rank == 0:
            self._file = StepLines(run_dir / STRAGGLERS_FILE, resumed_step)
        self._suspect: int | None = None  # over the ratio in the step measured last
        self._announced: set[int] = set()

    def due(self, step: int) -> bool:
        interval = self._config.straggler_interval
        return interval > 0 and step % interval == 0

    def report(self, step: int, table: Table) -> dict[str, float]:
        """time/..., stragglers/... and memory/... of a step that every rank measured: one
        all-gather of a few numbers a rank."""
        rows = self._gather(table)  # [rank][...]
        count = len(STAGES)
        communication = [sum(row[count : 2 * count]) for row in rows]
        busy = [sum(row[:count]) for row in rows]
        data = [row[STAGES.index("data")] for row in rows]
        peaks = [row[2 * count] for row in rows]
        slowest = max(range(len(rows)), key=busy.__getitem__)
        # of an even number of ranks the lower one: of two ranks, the other
        median = statistics.median_low(busy)
        slowdown = busy[slowest] / median
        if self._file is not None:
            self._file.write(
                {
                    "step": step,
                    "hosts": self.hosts,
                    "pipeline_stages": self.pipeline_stages,
                    "busy_seconds": busy,
                    "communication_seconds": communication,
                    "data_seconds": data,
                    "peak_bytes": peaks,
                    "slowest_rank": slowest,
                    "slowest_host": self.hosts[slowest],
                    "slowdown": slowdown,
                }
            )
        self._point_out(step, slowest, busy[slowest], median)
        ranks = len(rows)
        stages = {
            f"time/{stage}_seconds": sum(row[i] + row[count + i] for row in rows) / ranks
            for i, stage in enumerate(STAGES)
        }
        return {
            **stages,
            "time/communication_seconds": sum(communication) / ranks,
            "stragglers/busy_max_seconds": busy[slowest],
            "stragglers/busy_median_seconds": median,
            "stragglers/slowdown": slowdown,
            "stragglers/slowest_rank": float(slowest),
            "memory/peak_bytes_max": max(peaks),
        }

    def go_back(self, step: int) -> None:
        """The run takes the steps after `step` again."""
        if self._file is not None:
            self._file.go_back(step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _gather(self, table: Table) -> list[list[float]]:
        device = self._runtime.device
        mine = [own for own, _ in table.values()] + [inside for _, inside in table.values()]
        mine.append(float(peak_memory_bytes(device)))
        row = torch.tensor(mine, dtype=torch.float64, device=device)
        rows = [torch.empty_like(row) for _ in range(self._runtime.world_size)]
        dist.all_gather(rows, row)
        return torch.stack(rows).tolist()

    def _point_out(self, step: int, rank: int, busy: float, median: float) -> None:
        """Once a rank, and only if it was the slowest by far twice running: one step may be odd."""
        slow = busy > self._config.straggler_ratio * median
        if slow and self._suspect == rank and rank not in self._announced:
            self._announced.add(rank)
            host = self.hosts[rank]
            text = (
                f"rank {rank} on {host} (pipeline stage {self.pipeline_stages[rank]}) is busy for "
                f"{busy:.3g} s of a step, {busy / median:.1f} times as long as the median rank "
                f"({median:.3g} s); the others wait for it"
            )
            self._announce(step, text, rank, host)
        self._suspect = rank if slow else None
