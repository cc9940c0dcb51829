"""How long a run is away after one of its ranks is killed: python -m benchmarks.recovery

Starts the tiny model on 8 CPU processes under `torchrun --max-restarts`, kills one of them by
SIGKILL in the middle of a step, lets torchrun start all again, and so on. Printed for each kill, in
seconds after it, then as medians:

    noticed     a surviving rank has named the dead one (run_dir/events.jsonl)
    ended       none of the processes of that attempt is left
    started     torchrun has started as many new ones
    connected   rank 0 has passed start-up, opened the data, built the model and read the checkpoint
    training    the first new step has been taken

Between "started" and "connected" lie mostly imports: what one process needs for them alone is
printed first, and for each kill the CPU seconds rank 0 has used until it was connected. With fewer
cores than ranks, these times the ranks, divided by the cores, are what the restart waits for.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from pretrain.events import read_events

ROOT = Path(__file__).resolve().parents[1]
POINTS = ("noticed", "ended", "started", "connected", "training")
SAVE_INTERVAL = 20
PATIENCE = 600.0  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--kills", type=int, default=5)
    arguments = parser.parse_args()
    print(f"imports of one process: {import_seconds():.1f} s of CPU time")
    with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
        job = Job(Path(folder), arguments.ranks, arguments.kills)
        try:
            measured = [job.kill_one(number) for number in range(arguments.kills)]
        finally:
            job.end()
    print_row("median", {p: statistics.median(m[p] for m in measured) for p in measured[0]})


def import_seconds() -> float:
    before = os.times()
    subprocess.run([sys.executable, "-c", "import pretrain.run"], cwd=ROOT, check=True)
    after = os.times()
    return after.children_user + after.children_system - before[2] - before[3]


def print_row(name: str, seconds: dict[str, float]) -> None:
    points = (f"{point} {seconds[point]:5.1f}" for point in POINTS)
    print(f"{name:>8}", *points, f"  (CPU of rank 0: {seconds['cpu']:.1f})", flush=True)


class Job:
    """A run under torchrun."""

    def __init__(self, folder: Path, ranks: int, restarts: int) -> None:
        self.ranks = ranks
        self.run_dir = folder / "run"
        self.log = folder / "log"
        words = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
        settings = [
            "+model=magneto_tiny",
            "data.seq_length=64",
            "train.train_steps=1000000",
            f"train.global_batch_size={ranks}",
            "train.eval_interval=0",
            "train.eval_sequences=1",
            f"checkpoint.save_interval={SAVE_INTERVAL}",
            "wandb.mode=disabled",
            f"run_dir={self.run_dir}",
        ]
        script = str(ROOT / "launch" / "pretrain.py")
        with open(self.log, "w") as log:
            self.agent = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *words, script, *settings],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def kill_one(self, number: int) -> dict[str, float]:
        """Kill a rank once there is a checkpoint of this attempt to go back to."""
        first = self.last_step()
        self.until(lambda: self.last_step() > first + SAVE_INTERVAL)
        workers = self.workers()
        victim = 1 + 3 * number % (self.ranks - 1)
        log_before = self.log.stat().st_size
        os.kill(workers[victim], signal.SIGKILL)
        killed = time.time()
        at: dict[str, float] = {}
        at["ended"] = self.until(lambda: not any(map(is_alive, workers.values())))
        at["started"] = self.until(lambda: len(self.workers()) == self.ranks)
        at["connected"] = self.until(lambda: "rank 0 of" in self.log.read_text()[log_before:])
        cpu = cpu_seconds(self.workers()[0])
        self.until(lambda: self.newest_record()["time"] > at["started"])
        at["training"] = self.newest_record()["time"]
        deaths = [e for e in read_events(self.run_dir) if e["kind"] == "rank_dead"]
        assert len(deaths) == number + 1 and f"rank {victim} on" in deaths[-1]["text"], deaths
        at["noticed"] = deaths[-1]["time"]
        row = {point: at[point] - killed for point in POINTS}
        row["cpu"] = cpu
        print_row(f"rank {victim}", row)
        return row

    def end(self) -> None:
        workers = self.workers()
        self.agent.kill()
        for pid in workers.values():
            os.kill(pid, signal.SIGKILL)
        self.agent.wait()

    def until(self, what: Callable[[], bool]) -> float:
        """Wait for it; returns the time, in Unix seconds."""
        deadline = time.monotonic() + PATIENCE
        while not what():
            if self.agent.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the run did not get on:\n{self.log.read_text()}")
            time.sleep(0.01)
        return time.time()

    def workers(self) -> dict[int, int]:
        """rank -> pid of those that live."""
        return {rank: pid for rank, pid in workers_of(self.agent.pid).items() if is_alive(pid)}

    def newest_record(self) -> dict[str, Any]:
        path = self.run_dir / "metrics.jsonl"
        newest = {"step": 0, "time": 0.0}
        if not path.is_file():
            return newest
        for line in path.read_bytes()[-4096:].split(b"\n")[1:-1]:  # whole lines only
            record = json.loads(line)
            newest = record if "train/loss" in record else newest
        return newest

    def last_step(self) -> int:
        return int(self.newest_record()["step"])


def workers_of(agent: int) -> dict[int, int]:
    """rank -> pid of the processes that torchrun's agent has started."""
    found: dict[int, int] = {}
    for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        with suppress(OSError):  # it has ended meanwhile
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            found |= {int(v.removeprefix("RANK=")): int(pid) for v in variables if v[:5] == "RANK="}
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, in all its threads."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    main()
