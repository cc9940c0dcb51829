"""Which of the ranks that hold the same weight writes it.

megatron-core marks the copy of the first data-parallel rank as the one to write. That rank would
copy and write all weights of its part of the model, and the others none: with many replicas, whose
optimizer states are small parts, a save would be as slow as it. Here the weights are dealt out.

megatron-core's own way (`FullyParallelSaveStrategyWrapper`) gathers what everyone has at each save,
or at the first one, and takes replicas² steps for each tensor. All replicas hold the same tensors
in the same order, so that each can work out alone what the others do.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

from torch.nn import Parameter

from parallel.megatron import ShardedTensor, ShardedTensorFactory, parallel_state
from parallel.optimizer_state import leaves


def deal_out_weights(state: Any) -> None:
    """Give every weight of a model's sharded state one writer among its replicas.

    Largest first, each to the replica with the fewest bytes so far. The last number of a
    `replica_id` counts replicas, and the one with 0 writes: it is turned so that the chosen one has
    it. Boxes of an optimizer that are made from these entries follow them. Values that are no
    parameters stay with the first replica.
    """
    weights = [
        entry
        for entry in leaves(state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
        and isinstance(entry.data, Parameter)
    ]
    dense = [entry for entry in weights if getattr(entry.data, "allreduce", True)]
    experts = [entry for entry in weights if not getattr(entry.data, "allreduce", True)]
    _deal_out(dense, parallel_state.get_data_parallel_world_size(with_context_parallel=True))
    _deal_out(experts, parallel_state.get_expert_data_parallel_world_size())


def _deal_out(weights: Sequence[Any], replicas: int) -> None:
    loads = [(0, replica) for replica in range(replicas)]
    for entry in sorted(weights, key=lambda entry: -entry.data.nbytes):
        size, writer = loads[0]
        *others, mine = entry.replica_id
        if not any(others):  # else another rank's copy is written, whoever is chosen here
            heapq.heapreplace(loads, (size + entry.data.nbytes, writer))
        entry.replica_id = (*others, (mine - writer) % replicas)
