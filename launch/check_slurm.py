"""A job as SLURM would get it, and whether its time is enough for what the run is asked to do."""

import shutil
from pathlib import Path

from launch.findings import Findings
from launch.slurm import check_partition, check_paths, check_times
from launch.slurm_script import Job, render
from launch.status import last_training_record
from pretrain.config import PretrainConfig
from pretrain.progress import format_duration
from pretrain.walltime import walltime_seconds

TOPIC = "slurm"
_SHORTEST_JOB = 15 * 60.0  # seconds; a start and its end leave little of less


def check_job(job: Job, findings: Findings) -> None:
    """The rules of `launch.slurm`, and what is legal and likely a slip."""
    broken = check_paths(job) + check_times(job) + check_partition(job)
    findings.errors(TOPIC, broken)
    if not broken:
        render(job)
    cluster = job.cluster
    if walltime_seconds(cluster.walltime) < _SHORTEST_JOB and cluster.walltime.isdecimal():
        findings.warnings(
            TOPIC,
            [
                f"cluster.walltime={cluster.walltime} is {cluster.walltime} minutes; if hours were "
                f"meant: cluster.walltime={int(cluster.walltime)}:00:00"
            ],
        )
    if shutil.which("sbatch") is None:
        findings.notes(
            TOPIC, ["sbatch is not on this machine: partitions and limits are not asked for"]
        )


def check_time(config: PretrainConfig, seconds: float, setting: str, findings: Findings) -> None:
    """What fits into `seconds`, at the speed that the run has had so far; nothing before that.

    setting: where the seconds come from, as typed.
    """
    record = last_training_record(Path(config.run_dir).expanduser())
    step_seconds = record.get("throughput/step_seconds")
    if not step_seconds:
        return
    interval = config.checkpoint.save_interval
    if interval and interval * step_seconds > seconds:
        fits = max(1, int(seconds / step_seconds / 4))
        findings.warnings(
            TOPIC,
            [
                f"checkpoint.save_interval={interval} steps take "
                f"{format_duration(interval * step_seconds)} at the {step_seconds:.3g} s a step "
                f"that the run has had, and {setting} ends before: only its last save would "
                f"remain; use checkpoint.save_interval={fits}"
            ],
        )
