"""Whether what the processes of a node keep in its memory fits cluster.memory_per_node.

    on GPUs    what engine=deepspeed offloads, and the copy that checkpoints are written from
    on CPUs    all of the training, and with checkpoint.async_save that copy

Each byte of a checkpoint is copied by one rank, about as many by each. Imports neither torch nor
megatron-core.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace

from launch.check_disk import checkpoint_bytes
from launch.check_machines import Planned
from launch.config import ClusterConfig
from launch.findings import Findings, many
from launch.leaner_layout import allowed, shortened
from launch.nearest_layout import words_between
from models.memory import readable
from pretrain.config import PretrainConfig
from pretrain.memory import predict_memory_of_run

TOPIC = "memory"
# Of a node's memory, what Python, torch, CUDA and batches read ahead leave to these.
USABLE = 0.9
_UNITS = {"K": 2**10, "": 2**20, "M": 2**20, "G": 2**30, "T": 2**40}  # SLURM's own
_MORE_NODES = (2, 4, 8, 16, 32, 64)  # times those there are to be


def on_cpu(cluster: ClusterConfig | None) -> bool:
    """Whether the nodes of `cluster` have no GPUs; False where nobody has said."""
    return cluster is not None and not cluster.gpus_per_node


def check_host_memory(
    config: PretrainConfig,
    planned: Planned,
    vocab_size: int | None,
    cluster: ClusterConfig | None,
    room: int | None,
    findings: Findings,
) -> None:
    """Notes what is predicted; warns where it is more than cluster.memory_per_node leaves.

    config: legal on so many processes. room: bytes that a GPU may hold; None: not known.
    """
    parts, per_node = _parts(config, planned.processes, vocab_size, cluster), planned.per_node
    if per_node is None:
        if len(parts) > 1:  # what is offloaded too
            findings.notes(TOPIC, [f"each process keeps {_sum(parts)} in its host's memory"])
        return
    of_node = {what: per_node * size for what, size in parts.items()}
    keep = "keeps" if per_node == 1 else "keep"
    told = f"the {many(per_node, 'process')} of a node {keep} {_sum(of_node)} in its memory"
    findings.notes(TOPIC, [told])
    needed, limit = sum(of_node.values()), _limit(cluster)
    if limit is None or needed <= USABLE * limit:
        return
    assert cluster is not None  # whose limit it is
    ways = [f"cluster.memory_per_node={math.ceil(needed / USABLE / 2**30)}G"]
    ways += _ways_out(config, planned, vocab_size, cluster, room)
    findings.warnings(
        TOPIC,
        [
            f"cluster.memory_per_node={cluster.memory_per_node} leaves {readable(USABLE * limit)}, "
            f"and {told}: use {', or '.join(ways)}"
        ],
    )


def host_room(
    config: PretrainConfig, planned: Planned, vocab_size: int | None, cluster: ClusterConfig | None
) -> float | None:
    """Bytes that each process may offload; None where the memory of a node is not known."""
    limit = _limit(cluster)
    if limit is None or planned.per_node is None:
        return None
    copy = checkpoint_bytes(config, vocab_size) / planned.processes
    return max(0.0, USABLE * limit / planned.per_node - copy)


def _parts(
    config: PretrainConfig, processes: int, vocab_size: int | None, cluster: ClusterConfig | None
) -> dict[str, float]:
    """Bytes that each process keeps in its host's memory, by what they are."""
    here = on_cpu(cluster)
    peak = predict_memory_of_run(
        shortened(config, processes),
        processes,
        vocab_size=vocab_size,
        device="cpu" if here else "cuda",
    ).peak
    parts: dict[str, float] = {}
    if here:
        parts["of the training"] = peak.total
    elif peak.host:
        parts["of what is offloaded"] = peak.host
    if not here or config.checkpoint.async_save:
        parts["to write checkpoints from"] = checkpoint_bytes(config, vocab_size) / processes
    return parts


def _sum(parts: dict[str, float]) -> str:
    each = [f"{readable(size)} {what}" for what, size in parts.items()]
    if len(each) == 1:
        return each[0]
    return f"{readable(sum(parts.values()))} ({', '.join(each)})"


def _limit(cluster: ClusterConfig | None) -> int | None:
    """Bytes of cluster.memory_per_node; None where a job takes what there is."""
    size = re.fullmatch(r"(\d+)([KMGT]?)", (cluster and cluster.memory_per_node) or "0")
    assert size is not None  # the rule of ClusterConfig
    return int(size[1]) * _UNITS[size[2]] or None


def _ways_out(
    config: PretrainConfig,
    planned: Planned,
    vocab_size: int | None,
    cluster: ClusterConfig,
    room: int | None,
) -> Iterator[str]:
    """Of no copy, less offloaded and more nodes those that are enough, each in the words to type.

    room: as in `check_host_memory`.
    """
    per_node, nodes, limit = planned.per_node, planned.nodes, _limit(cluster)
    assert per_node is not None and nodes is not None and limit is not None

    def fits(candidate: PretrainConfig, processes: int) -> bool:
        if not allowed(candidate, processes):
            return False
        parts = _parts(candidate, processes, vocab_size, cluster)
        return per_node * sum(parts.values()) <= USABLE * limit

    in_place = replace(config, checkpoint=replace(config.checkpoint, async_save=False))
    if on_cpu(cluster) and fits(in_place, planned.processes):
        yield "checkpoint.async_save=false"
    for candidate in _less_offloaded(config):
        if fits(candidate, planned.processes) and _holds(candidate, planned, vocab_size, room):
            yield " ".join(words_between(config, candidate))
            break
    more = (nodes * times for times in _MORE_NODES if fits(config, per_node * nodes * times))
    yield from (f"nodes={count}" for count in list(more)[:1])


def _less_offloaded(config: PretrainConfig) -> Iterator[PretrainConfig]:
    asked = config.deepspeed
    if asked.offload_parameters:
        yield replace(config, deepspeed=replace(asked, offload_parameters=False))
    if asked.offload_optimizer:
        none = replace(asked, offload_parameters=False, offload_optimizer=False)
        yield replace(config, deepspeed=none)


def _holds(
    config: PretrainConfig, planned: Planned, vocab_size: int | None, room: int | None
) -> bool:
    """Whether a GPU holds it; taken to be so where its memory is not known."""
    short = shortened(config, planned.processes)
    peak = predict_memory_of_run(short, planned.processes, vocab_size=vocab_size).peak
    return room is None or peak.total <= room
