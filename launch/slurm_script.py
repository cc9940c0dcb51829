"""The batch script of a run: SLURM's own lines and the run's settings, then launch/slurm_job.sh."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from launch.config import ClusterConfig
from pretrain.config import PretrainConfig

BODY = Path(__file__).with_name("slurm_job.sh")
ENTRY = Path(__file__).with_name("pretrain.py")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run as SLURM is to see it."""

    config: PretrainConfig
    cluster: ClusterConfig
    nodes: int
    words: Sequence[str]  # for the launcher, as typed
    folder: Path  # in which the launcher runs: relative paths among the words start there
    python: str

    @property
    def run_dir(self) -> Path:
        return (self.folder / self.config.run_dir).resolve()

    @property
    def name(self) -> str:
        """The same for all jobs of a run folder: only one of a name runs at a time."""
        return f"{self.run_dir.name}-{sha256(str(self.run_dir).encode()).hexdigest()[:6]}"

    @property
    def processes(self) -> int:
        return self.nodes * self.cluster.processes

    @property
    def gpus(self) -> int:
        return self.nodes * self.cluster.gpus_per_node

    @property
    def script(self) -> Path:
        return self.run_dir / "slurm" / "job.sbatch"


def render(job: Job) -> str:
    """The whole script, ready for sbatch."""
    cluster = job.cluster
    typed = shlex.join(job.words).replace("\n", " ")  # a second line of it would be run
    lines = [
        "#!/bin/bash",
        f"# Written by: python -m launch.slurm {typed} nodes={job.nodes} ...",
        *(f"#SBATCH {option}" for option in sbatch_options(job)),
        "",
        *(["set -e # a line of cluster.setup that fails ends the job"] if cluster.setup else []),
        *cluster.setup,
        *(["set +e"] if cluster.setup else []),
        *(f"export {name}={shlex.quote(text)}" for name, text in cluster.environment.items()),
        "",
        f"RUN_DIR={shlex.quote(str(job.run_dir))}",
        f"TRAIN_STEPS={job.config.train.train_steps}",
        f"MAX_REQUEUES={cluster.max_requeues}",
        f"MAX_FAILURES={cluster.max_failures}",
        f"SRUN=({shlex.join(srun(cluster))})",
        f"CONTAINER=({cluster.container})",
        f"TORCHRUN=({shlex.join(torchrun(job))})",
        f"TRAINING=({shlex.join([str(ENTRY), *job.words])})",
        "",
    ]
    return "\n".join(lines) + "\n" + BODY.read_text(encoding="utf-8")


def sbatch_options(job: Job) -> list[str]:
    cluster = job.cluster
    gpus = [cluster.gpu_type, str(cluster.gpus_per_node)] if cluster.gpus_per_node else []
    wanted = {
        "job-name": job.name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "nodes": job.nodes,
        "ntasks-per-node": 1,  # torchrun, which starts the others
        "gpus-per-node": ":".join(part for part in gpus if part),
        "cpus-per-task": cluster.cpus_per_node,
        "mem": cluster.memory_per_node,
        "time": cluster.walltime,
        "signal": f"B:USR1@{grace_seconds(job.config)}",
        "chdir": job.folder,
        "output": job.run_dir / "logs" / "slurm-%j.log",
        "open-mode": "append",  # a requeued job goes on writing where it stopped
        "dependency": "singleton",  # two jobs must not write one run folder
    }
    options = [f"--{name}={_quoted(value)}" for name, value in wanted.items() if value]
    options.append("--requeue" if cluster.max_requeues else "--no-requeue")
    return options + (["--exclusive"] if cluster.exclusive else []) + cluster.sbatch_arguments


def srun(cluster: ClusterConfig) -> list[str]:
    # a step does not take the job's cpus-per-task over; without it a node's processes share one
    cpus = [f"--cpus-per-task={cluster.cpus_per_node}"] if cluster.cpus_per_node else []
    fixed = ["--kill-on-bad-exit=1", "--cpu-bind=none"]
    return ["srun", *fixed, *cpus, *cluster.srun_arguments]


def torchrun(job: Job) -> list[str]:
    """torchrun on one node, up to what is known only there: who it is, and where the first is.

    A static rendezvous numbers the nodes as SLURM does, so that neighbours in the network are
    neighbours in rank; but it cannot form anew, which restarts within the job need.
    """
    restarts = job.cluster.max_restarts
    return [
        *(job.python, "-m", "torch.distributed.run"),
        f"--nnodes={job.nodes}",
        f"--nproc-per-node={job.cluster.processes}",
        f"--max-restarts={restarts}",
        f"--rdzv-backend={'c10d' if restarts else 'static'}",
    ]


def grace_seconds(config: PretrainConfig) -> int:
    """How long before the end SLURM sends its signal; SLURM may do so up to a minute earlier."""
    return max(1, round(config.fault_tolerance.grace_seconds))


def _quoted(value: object) -> str:
    """A value in a #SBATCH line, which knows double quotes."""
    text = str(value)
    return f'"{text}"' if any(letter in text for letter in " '#") else text
