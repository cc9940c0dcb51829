"""Settings of the launch room: a site with SLURM, as described by a file of conf/cluster.

Imports neither torch nor megatron-core.
"""

import re
from dataclasses import dataclass, field

from parallel.config import ConfigError, below
from pretrain.walltime import walltime_seconds

# options of sbatch, long and short, that settings of ours write: a second one would win unseen
_WRITTEN_BY = {
    ("--nodes", "-N"): "nodes=N",
    ("--time", "-t"): "cluster.walltime",
    ("--partition", "-p"): "cluster.partition",
    ("--account", "-A"): "cluster.account",
    ("--qos", "-q"): "cluster.qos",
    ("--constraint", "-C"): "cluster.constraint",
    ("--gpus-per-node",): "cluster.gpus_per_node",
    ("--ntasks-per-node",): "cluster.processes_per_node",
    ("--cpus-per-task", "-c"): "cluster.cpus_per_node",
    ("--mem",): "cluster.memory_per_node",
}
_OPTION = re.compile(r"--[\w-]+|-\w")


@dataclass(kw_only=True)
class ClusterConfig:
    """A site: what a job asks for, what its nodes need, and what happens when it ends too early.

    None asks for nothing and takes what the site gives.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None  # features of the nodes, as in "a100&infiniband"
    walltime: str = "1-00:00:00"  # of one job: "[D-]HH:MM:SS" or minutes
    gpus_per_node: int = 0
    gpu_type: str | None = None  # where a site has several, as in "h100"
    processes_per_node: int | None = None  # None: one for each GPU, and one on a node without
    cpus_per_node: int | None = None
    memory_per_node: str | None = None  # as in "480G"; "0": all of it
    exclusive: bool = False  # no other job on the nodes
    sbatch_arguments: list[str] = field(default_factory=list)  # as in "--reservation=llm"

    # shell lines run once, before training starts: modules, a virtual environment
    setup: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)  # of every process
    python: str | None = None  # None: the one that runs launch.slurm
    container: str = ""  # command in front of Python's, as in "apptainer exec --nv image.sif"
    srun_arguments: list[str] = field(default_factory=list)  # as in "--container-image=..."

    # how often SLURM may start a job again that was stopped, or failed, before the last step
    max_requeues: int = 100
    # starts in a row that failed, or were stopped, without a new checkpoint, after which a job
    # gives up
    max_failures: int = 3
    # restarts of failed processes by torchrun, within a job
    max_restarts: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError with every broken rule."""
        sizes: dict[str, float] = {"cluster.processes_per_node": self.processes}
        if self.cpus_per_node is not None:
            sizes["cluster.cpus_per_node"] = self.cpus_per_node
        problems = below(sizes | {"cluster.max_failures": self.max_failures}, 1)
        problems += below(
            {
                "cluster.gpus_per_node": self.gpus_per_node,
                "cluster.max_requeues": self.max_requeues,
                "cluster.max_restarts": self.max_restarts,
            },
            0,
        )
        try:
            walltime_seconds(self.walltime)
        except ValueError as error:
            problems.append(f"cluster.walltime={self.walltime} {error}")
        if 0 < self.gpus_per_node < self.processes:
            problems.append(
                f"cluster.processes_per_node={self.processes} must not exceed "
                f"cluster.gpus_per_node={self.gpus_per_node}: each process takes a GPU"
            )
        if self.gpu_type is not None and not self.gpus_per_node:
            problems.append(
                f"cluster.gpu_type={self.gpu_type} needs cluster.gpus_per_node, which is 0; say "
                "how many there are on a node"
            )
        if self.memory_per_node and not re.fullmatch(r"\d+[KMGT]?", self.memory_per_node):
            problems.append(
                f"cluster.memory_per_node={self.memory_per_node} must be a number with K, M, G or "
                "T, as in 480G, or 0 for all of a node's"
            )
        problems += self._unwritable()
        if problems:
            raise ConfigError(*problems)

    @property
    def processes(self) -> int:
        """Processes on each node."""
        if self.processes_per_node is not None:
            return self.processes_per_node
        return max(self.gpus_per_node, 1)

    def _unwritable(self) -> list[str]:
        """What would not survive as a line of a batch script."""
        words = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "gpu_type": self.gpu_type,
        }
        problems = [
            f"cluster.{name}={word} must be one word, without spaces"
            for name, word in words.items()
            if word is not None and (not word or re.search(r"\s", word))
        ]
        for name, arguments in {
            "sbatch_arguments": self.sbatch_arguments,
            "srun_arguments": self.srun_arguments,
        }.items():
            problems += [
                f"cluster.{name}: {argument!r} must be an option on one line, as in --exclude=n7"
                for argument in arguments
                if not argument.startswith("-") or "\n" in argument
            ]
        problems += [
            f"cluster.sbatch_arguments: {argument!r} is written by {setting}; give it there"
            for argument in self.sbatch_arguments
            for options, setting in _WRITTEN_BY.items()
            if (option := _OPTION.match(argument)) and option[0] in options
        ]
        problems += [
            f"cluster.environment.{name} is no name of an environment variable"
            for name in self.environment
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)
        ]
        return problems
