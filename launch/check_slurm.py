"""A job as SLURM would get it, and whether its time is enough for what the run is asked to do."""

from pathlib import Path

from launch.findings import Findings
from launch.slurm import check_paths, check_times
from launch.slurm_partitions import check_partition
from launch.slurm_script import Job, render
from launch.status import last_training_record
from launch.units import minutes_or_hours
from pretrain.config import PretrainConfig
from pretrain.progress import format_duration

TOPIC = "slurm"


def check_job(job: Job, findings: Findings) -> None:
    """The rules of `launch.slurm`, and what is legal and likely a slip."""
    partition = check_partition(job)
    broken = check_paths(job) + check_times(job) + partition.problems
    findings.errors(TOPIC, broken)
    if not broken:
        render(job)
    findings.warnings(TOPIC, minutes_or_hours("cluster.walltime", job.cluster.walltime))
    findings.notes(TOPIC, partition.notes)


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
