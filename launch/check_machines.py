"""How many processes a run is to have, on how many nodes, and whether what is said of it agrees.

Imports neither torch nor megatron-core.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from launch.config import ClusterConfig
from launch.findings import Findings, many
from launch.slurm import Wish
from pretrain.config import PretrainConfig

TOPIC = "layout"


@dataclass(frozen=True)
class Machines:
    """What the run is to have. None: not said."""

    processes: int | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    device: str | None = None  # of launch.check_memory


@dataclass(frozen=True)
class Planned:
    """What it will have."""

    processes: int
    how_many: str  # in words
    nodes: int | None = None  # None: nobody said
    per_node: int | None = None


def plan(
    config: PretrainConfig | None,
    wish: Wish,
    words: Sequence[str],
    machines: Machines,
    cluster: ClusterConfig | None,
    findings: Findings,
) -> Planned:
    """How many processes the run has, and why so many; errors where two say different numbers.

    words: as typed, of which `wish` was made.
    """
    typed = any(word.startswith("nodes=") for word in words)
    nodes, told_nodes = _agreed(
        {
            f"--nodes {machines.nodes}": machines.nodes,
            f"nodes={wish.nodes}": wish.nodes if typed else None,
        },
        findings,
    )
    per_node, told_per_node = _agreed(
        {
            f"--gpus-per-node {machines.gpus_per_node}": machines.gpus_per_node,
            "the cluster's " + (f"{cluster.processes} a node" if cluster else ""): (
                cluster.processes if cluster else None
            ),
        },
        findings,
    )
    processes = machines.processes
    if nodes is None and cluster is not None:
        nodes, told_nodes = wish.nodes, f"nodes={wish.nodes}"  # what a job asks for
    if processes is not None:
        said = " x ".join(filter(None, (told_nodes, told_per_node)))
        return _of_processes(processes, nodes, per_node, said, findings)
    if per_node is not None:
        nodes = nodes or 1
        where = f"{many(nodes, 'node')} x {per_node}"
        if cluster is not None and machines.gpus_per_node is None:
            where = f"nodes={nodes} x {per_node} of the cluster"
        return Planned(nodes * per_node, where, nodes, per_node)
    if nodes is not None and nodes > 1:
        findings.errors(
            TOPIC,
            [
                f"nodes={nodes}: how many processes has a node? Add cluster=NAME, or "
                "--gpus-per-node 8"
            ],
        )
    text = "the fewest of this layout; --processes N or cluster=NAME say otherwise"
    return Planned(_fewest(config), text, nodes)


def _agreed(said: dict[str, int | None], findings: Findings) -> tuple[int | None, str]:
    """The first that is said, and in which words; an error where another says another number."""
    given = {words: number for words, number in said.items() if number is not None}
    if len(set(given.values())) > 1:
        findings.errors(TOPIC, [f"{' and '.join(given)} say different things; leave one out"])
    return next(((number, words) for words, number in given.items()), (None, ""))


def _of_processes(
    processes: int, nodes: int | None, per_node: int | None, said: str, findings: Findings
) -> Planned:
    """With --processes, which what is `said` of nodes and of the processes of each must give."""
    option = f"--processes {processes}"
    if nodes is not None and per_node is not None and nodes * per_node != processes:
        findings.errors(
            TOPIC, [f"{option}: {said} is {nodes * per_node} processes; leave {option} out"]
        )
        return Planned(nodes * per_node, said, nodes, per_node)
    unit = nodes if per_node is None else per_node if processes > per_node else 1
    if unit is not None and processes % unit:
        better = math.ceil(processes / unit) * unit
        findings.errors(TOPIC, [f"{option} must be a multiple of {said}; use {better}"])
        processes = better  # what follows is of the layout alone
    if per_node is not None:
        nodes, per_node = max(1, processes // per_node), min(per_node, processes)
    elif nodes is not None:
        per_node = processes // nodes
    return Planned(processes, "--processes", nodes, per_node)


def check_tensor_ranks(config: PretrainConfig, planned: Planned, findings: Findings) -> None:
    """Warns where the ranks of a tensor-parallel group, which are consecutive, lie on several
    nodes."""
    tensor, here = config.parallel.tensor_model_parallel_size, planned.per_node
    if here is None or planned.processes <= here:
        return
    setting = f"parallel.tensor_model_parallel_size={tensor}"
    instead = "parallel.pipeline_model_parallel_size for the rest"
    if tensor > here:
        findings.warnings(
            TOPIC,
            [
                f"{setting} spans nodes of {many(here, 'process')}, at the speed of the network; "
                f"use {f'{here} or less' if here > 1 else 1}, and {instead}"
            ],
        )
    elif here % tensor:
        findings.warnings(
            TOPIC,
            [
                f"{setting} does not divide the {here} processes of a node: some of its groups "
                f"span two nodes, at the speed of the network; use {math.gcd(here, tensor)}, and "
                f"{instead}"
            ],
        )


def _fewest(config: PretrainConfig | None) -> int:
    if config is None:
        return 1
    sizes = config.parallel
    dense = (
        sizes.tensor_model_parallel_size
        * sizes.context_parallel_size
        * sizes.pipeline_model_parallel_size
    )
    experts = (
        sizes.expert_model_parallel_size
        * sizes.expert_tensor_parallel_size
        * sizes.pipeline_model_parallel_size
    )
    return max(1, math.lcm(max(1, dense), max(1, experts)))
