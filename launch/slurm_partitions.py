"""What a site's partitions allow, where its SLURM is here to tell."""

import re
import shutil
from dataclasses import dataclass, field

from launch.slurm_commands import SlurmError, ask_slurm
from launch.slurm_script import Job
from pretrain.walltime import walltime_seconds

# A line of sinfo's: name, nodes, longest job as [[D-]H:]MM:SS or a word for any.
_LINE = re.compile(r"([^|]+)\|(\d+)\|(infinite|n/a|((\d+-)?\d+:)?\d+:\d+)")


@dataclass(frozen=True)
class Partition:
    nodes: int
    limit: float | None  # longest job in seconds; None: any


@dataclass
class PartitionCheck:
    """problems: why SLURM would refuse the job. notes: what was not looked at, and why."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_partition(job: Job) -> PartitionCheck:
    """Holds a job against the partition that the site names; the default one is not asked for."""
    name = job.cluster.partition
    if not name:
        return PartitionCheck()
    try:
        partitions, strange = list_partitions()
    except SlurmError as error:
        return PartitionCheck(notes=[f"partition {name} not checked: {error}"])
    if name in partitions:
        return PartitionCheck(problems=_beyond(partitions[name], job))
    if strange:  # it may be the one
        why = f"sinfo printed a line that is not NAME|NODES|LIMIT: {strange[0]!r}"
        return PartitionCheck(notes=[f"partition {name} not checked: {why}"])
    there = ", ".join(partitions)
    return PartitionCheck([f"cluster.partition={name}: there is none; choose from {there}"])


def list_partitions() -> tuple[dict[str, Partition], list[str]]:
    """The partitions by name, and the lines of sinfo's that tell of none.

    Raises SlurmError where sinfo is not here, fails, or prints nothing.
    """
    if shutil.which("sinfo") is None:
        raise SlurmError("sinfo is not on this machine")
    told = ask_slurm("sinfo", "--noheader", "--format=%R|%D|%l")
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    if not lines:
        raise SlurmError("sinfo printed nothing; are there partitions that you may see?")
    partitions: dict[str, Partition] = {}
    strange = []
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            strange.append(line)
            continue
        name, nodes, limit = match.group(1, 2, 3)
        before = partitions[name].nodes if name in partitions else 0
        partitions[name] = Partition(before + int(nodes), _limit_seconds(limit))
    return partitions, strange


def _beyond(partition: Partition, job: Job) -> list[str]:
    name, walltime = job.cluster.partition, walltime_seconds(job.cluster.walltime)
    problems = []
    if job.nodes > partition.nodes:
        problems.append(
            f"nodes={job.nodes}: cluster.partition={name} has {partition.nodes}; use at most so"
        )
    if partition.limit is not None and walltime > partition.limit:
        problems.append(
            f"cluster.walltime={job.cluster.walltime} is more than cluster.partition={name} "
            f"allows; use {_as_walltime(partition.limit)} or less, and chain=N for a run that "
            "takes longer"
        )
    return problems


def _limit_seconds(text: str) -> float | None:
    if not text[0].isdigit():
        return None
    return walltime_seconds(text if text.count(":") == 2 else f"0:{text}")


def _as_walltime(seconds: float) -> str:
    days, rest = divmod(int(seconds), 24 * 3600)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock
