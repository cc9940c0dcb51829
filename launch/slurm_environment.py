"""Processes that SLURM started itself, one for each rank: `srun python launch/pretrain.py ...`.

So does submitit, which Hydra's sweeps use on a cluster (docs/slurm.md). torchrun is not there to
tell each process its rank; SLURM's own variables do.
"""

import os
import re
import subprocess
from collections.abc import Mapping

# Only one rendezvous of a job at a time has it; another range than slurm_job.sh, which may run
# beside a sweep on the same node.
FIRST_PORT, PORTS = 30000, 2000


def adopt_slurm_ranks() -> None:
    """Sets what torchrun would set, in a step of several tasks without it; else does nothing."""
    os.environ.update(ranks_of_step(os.environ))


def ranks_of_step(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and the like from the variables of a SLURM step; empty where they are set.

    A batch script's own shell has a rank for SLURM too, but is in no step of several tasks.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or tasks == "1":
        return {}
    number = int(environment["SLURM_JOB_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(
            tasks_on_node(
                environment["SLURM_STEP_TASKS_PER_NODE"], int(environment["SLURM_NODEID"])
            )
        ),
        "MASTER_ADDR": first_address(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + number % PORTS),
    }


def tasks_on_node(counts: str, node: int) -> int:
    """How many tasks a step has on its `node`-th node, from "2(x3),1": 2 on three, 1 on another."""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        if node < int(times or 1):
            return int(count)
        node -= int(times or 1)
    raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={counts} ends {node + 1} nodes before this one")


def first_address(nodes: str) -> str:
    """The address of the first of `nodes`, as in "n[1-8]"; a node's name need not resolve."""
    first = _scontrol("hostnames", nodes).split()[0]
    told = re.search(r"NodeAddr=(\S+)", _scontrol("node", first))
    return told[1] if told else first


def _scontrol(*what: str) -> str:
    return subprocess.run(
        ["scontrol", "show", *what], check=True, capture_output=True, text=True, timeout=60
    ).stdout
