"""How a run is, or all runs of a folder: without torch, without a GPU, from any machine.

    python -m launch.status runs/magneto_1b
    python -m launch.status runs [--json]

Reads what a run writes into its folder (status.json, metrics.jsonl, events.jsonl, checkpoints) and,
where SLURM is here, asks it for the run's jobs. Exit status: 0, 2 where there is no run.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.interrupted import say_interrupted
from launch.findings import many
from pretrain.events import read_events
from pretrain.progress import format_duration
from pretrain.run_status import FAILED, FINISHED, STATUS_FILE, STOPPED, read_status

METRICS_FILE = "metrics.jsonl"  # pretrain.metrics_file's, which would take longer to import
SUBMITTED = Path("slurm", "submitted.jsonl")  # job numbers, one line for each, by launch.slurm
CHECKPOINTS = "checkpoints"
LOCK = "lock"  # pretrain.run_lock's, whose time stamp a run renews also where the disk is full
# A run renews its lock and its status every few seconds; both silent for longer, it was killed.
SILENT_SECONDS = 60.0
# Enough of a metrics file's end to hold a line of training among long ones of evaluations.
TAIL_BYTES = 1 << 18
RESTART = "resume"  # the kind of event that a start from a checkpoint leaves
SHOWN_EVENTS = 5


@dataclass
class RunReport:
    """What is known of a run; None: nothing."""

    run_dir: str
    state: str  # of status.json; "lost" without a sign of life, "queued" before the first start
    reason: str = ""
    step: int | None = None
    train_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    remaining_seconds: float | None = None
    heartbeat_age_seconds: float | None = None
    host: str | None = None
    world_size: int | None = None
    checkpoints: list[dict[str, Any]] = field(default_factory=list)  # oldest first
    restarts: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)  # the last ones
    jobs: list[dict[str, str]] = field(default_factory=list)  # SLURM's, those it still knows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.status",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a run's folder, or one with runs below it")
    parser.add_argument("--json", action="store_true", help="a list of runs, for programs")
    given = parser.parse_args(arguments)
    folders = list(find_runs(given.folder))
    if not folders:
        print(f"error: {given.folder}: there is no run here or below", file=sys.stderr)
        return 2
    reports = look_at(folders, now=time.time())
    if given.json:
        print(json.dumps([asdict(report) for report in reports], indent=2))
    elif folders == [given.folder]:
        print("\n".join(in_full(reports[0], now=time.time())))
    else:
        print("\n".join(as_table(reports)))
    return 0


def find_runs(folder: Path) -> Iterator[Path]:
    """Run folders at `folder` or below it; none is looked for inside another."""
    if not folder.is_dir():
        return
    if any((folder / name).exists() for name in (STATUS_FILE, METRICS_FILE, SUBMITTED)):
        yield folder
        return
    for child in sorted(folder.iterdir()):
        if child.name != CHECKPOINTS:
            yield from find_runs(child)


def look_at(folders: Sequence[Path], now: float) -> list[RunReport]:
    """A report for each run; SLURM is asked once for all of them."""
    reports = [_report(folder, now) for folder in folders]
    numbers = {str(folder): job_numbers(folder) for folder in folders}
    jobs = ask_slurm([number for each in numbers.values() for number in each])
    for report in reports:
        report.jobs = [jobs[number] for number in numbers[report.run_dir] if number in jobs]
        if report.state == "no status" and report.jobs:
            report.state = "queued"
    return reports


def _report(run_dir: Path, now: float) -> RunReport:
    status = read_status(run_dir) or {}
    record = last_training_record(run_dir)
    events = read_events(run_dir)
    report = RunReport(
        run_dir=str(run_dir),
        state=status.get("state", "no status"),
        reason=status.get("reason", ""),
        step=status.get("step", record.get("step")),
        train_steps=status.get("train_steps"),
        loss=record.get("train/loss"),
        tokens_per_second=record.get("throughput/tokens_per_second"),
        host=status.get("host"),
        world_size=status.get("world_size"),
        checkpoints=list_checkpoints(run_dir, now),
        restarts=sum(event["kind"] == RESTART for event in events),
        events=events[-SHOWN_EVENTS:],
    )
    at_work = bool(status) and report.state not in (FINISHED, STOPPED, FAILED)
    if "heartbeat" in status:
        written = now - status["heartbeat"]
        age = min(written, _lock_age(run_dir, now)) if at_work else written
        report.heartbeat_age_seconds = round(age, 1)
        if at_work and age > SILENT_SECONDS:
            report.state = "lost"
            report.reason = f"killed while {status['state']}: it has said nothing since"
        elif at_work and written > SILENT_SECONDS:
            report.reason = (
                f"alive, but could not write {STATUS_FILE} for {format_duration(written)}: "
                "is the disk full? step, loss and events may be as old"
            )
    if at_work and report.state != "lost" and report.train_steps is not None:
        report.remaining_seconds = remaining_seconds(record, report.train_steps)
    return report


def _lock_age(run_dir: Path, now: float) -> float:
    """Seconds since whoever holds the run folder renewed its lock; infinite where nobody does."""
    try:
        return now - (run_dir / LOCK).stat().st_mtime
    except OSError:
        return math.inf


def last_training_record(run_dir: Path) -> dict[str, Any]:
    """The last line of a run's metrics that is about a training step; empty where there is none.

    Reads the end of the file only, however long the run has been.
    """
    try:
        with open(run_dir / METRICS_FILE, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # cut off: the first line here, or the last one being written
            continue
        if isinstance(record, dict) and "train/loss" in record:
            return record
    return {}


def remaining_seconds(record: Mapping[str, Any], train_steps: int) -> float | None:
    """Time for the steps after this record at its speed; evaluations and saves come on top."""
    seconds = record.get("throughput/step_seconds")
    if seconds is None:
        return None
    return max(0, train_steps - record["step"]) * float(seconds)


def list_checkpoints(run_dir: Path, now: float) -> list[dict[str, Any]]:
    """Complete checkpoints by step, with their age."""
    found = []
    for path in (run_dir / CHECKPOINTS).glob("step_*"):
        step = path.name.removeprefix("step_")
        if step.isdigit():  # others are half written
            age = round(now - path.stat().st_mtime, 1)
            found.append({"name": path.name, "step": int(step), "age_seconds": age})
    return sorted(found, key=lambda checkpoint: checkpoint["step"])


def job_numbers(run_dir: Path) -> list[str]:
    """Numbers of the run's SLURM jobs: those submitted, and the one that wrote its status."""
    numbers: dict[str, None] = {}  # in order, each once
    try:
        lines = (run_dir / SUBMITTED).read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        with suppress(ValueError):  # cut off, as by a disk that was full
            numbers[json.loads(line)["job_id"]] = None
    wrote = (read_status(run_dir) or {}).get("slurm_job_id")
    if wrote:
        numbers[str(wrote)] = None
    return list(numbers)


def ask_slurm(numbers: Sequence[str]) -> dict[str, dict[str, str]]:
    """What squeue knows of these jobs, by number; it forgets jobs minutes after their end."""
    if not numbers or shutil.which("squeue") is None:
        return {}
    names = ("job_id", "state", "nodes", "reason", "time_left")
    command = ["squeue", "--noheader", "--states=all", "--format=%i|%T|%N|%r|%L"]
    try:
        # numbers it has forgotten are an error to squeue only where it knows none of them
        ended = subprocess.run(
            [*command, f"--jobs={','.join(numbers)}"], capture_output=True, text=True, timeout=5
        )
    except (subprocess.TimeoutExpired, OSError):
        return {}
    told = [line.split("|") for line in ended.stdout.splitlines()]
    rows = [dict(zip(names, words, strict=True)) for words in told if len(words) == len(names)]
    return {row["job_id"]: row for row in rows}


def in_full(report: RunReport, now: float) -> list[str]:
    """A run for a person, in some lines."""
    lines = [f"{report.run_dir}: {report.state}" + (f" ({report.reason})" if report.reason else "")]
    if report.step is not None:
        lines.append(f"  step        {_progress(report)}")
    if report.heartbeat_age_seconds is not None:
        age = _ago(report.heartbeat_age_seconds)
        processes = many(report.world_size or 0, "process")
        lines.append(f"  heartbeat   {age}, {processes}, first on {report.host}")
    for job in report.jobs:
        place = f"on {job['nodes']}, {job['time_left']} left" if job["nodes"] else job["reason"]
        lines.append(f"  job         {job['job_id']} {job['state']} {place}")
    if report.checkpoints:
        last = report.checkpoints[-1]
        lines.append(
            f"  checkpoint  {last['name']}, {_ago(last['age_seconds'])}; "
            f"{len(report.checkpoints)} kept"
        )
    if report.restarts:
        lines.append(f"  restarts    {report.restarts}")
    for event in report.events:
        when = f"at step {event['step']:,}, {_ago(now - event['time'])}"
        headline = event["text"].partition("\n")[0]
        lines.append(f"  event       {event['kind']} {when}: {headline}")
    return lines


def as_table(reports: Sequence[RunReport]) -> list[str]:
    """Runs below each other, one line each."""
    width = max(len(report.run_dir) for report in reports)
    return [
        f"{report.run_dir:<{width}}  {report.state:<9}  {_progress(report)}".rstrip()
        for report in reports
    ]


def _progress(report: RunReport) -> str:
    if report.step is None:
        return ""
    parts = [f"{report.step:,}"]
    if report.train_steps:
        parts = [
            f"{report.step:,} of {report.train_steps:,}"
            f" ({100 * report.step / report.train_steps:.1f} %)"
        ]
    if report.loss is not None:
        parts.append(f"loss {report.loss:.4f}")
    if report.tokens_per_second is not None:
        parts.append(f"{report.tokens_per_second:,.0f} tokens/s")
    if report.remaining_seconds is not None:
        parts.append(f"{format_duration(report.remaining_seconds)} left")
    return ", ".join(parts)


def _ago(seconds: float) -> str:
    return f"{format_duration(max(0.0, seconds))} ago"


if __name__ == "__main__":
    say_interrupted()
    sys.exit(main())
