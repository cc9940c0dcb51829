"""Who writes what of a state. Planned by megatron-core and torch, and from then on known.

Planning is Python for each tensor and each box of it: for 60 million parameters it takes as long as
copying them does. A training's state changes in nothing but its values: the tensors of one save are
those of the next, in the same memory. While that holds on every rank, the plan of the last save is
that of the next one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from parallel.megatron import (
    MCoreSavePlanner,
    ShardedObject,
    ShardedTensor,
    mcore_to_pyt_state_dict,
    save_state_dict_async_plan,
    state_by_sharded_keys,
)


@dataclass(frozen=True)
class Plan:
    """This rank's part of a save."""

    items: list[WriteItem]
    data: list[Tensor | io.BytesIO]  # the training's own memory, and values that are no tensors
    metadata: Metadata | None  # on rank 0: the index, but for where things lie


class Plans:
    """The plan of the last save, kept for the next. All ranks hold one and call `plan` together."""

    def __init__(self) -> None:
        self._tried = False  # the same on all ranks, also where planning failed on one
        self._layout: list[Any] = []
        self._known: Plan | None = None
        self._worthwhile = True  # the same on all ranks: so far no state was laid out anew
        self.reused = 0  # times

    def plan(self, sharded: dict[str, Any]) -> Plan:
        """Who writes what of `sharded`, what `save_preprocess` leaves of a state; consumed."""
        by_key, _, _ = state_by_sharded_keys(sharded, True)
        layout = list(_layout(by_key))
        tried, self._tried = self._tried, True
        if tried and self._worthwhile:
            unchanged = self._known is not None and layout == self._layout
            if on_all_ranks(unchanged):
                assert self._known is not None
                self.reused += 1
                return self._known
            self._worthwhile = False
        memory = _storages(by_key)
        plan = _plan(by_key)
        # a tensor that planning had to make contiguous is a copy, and would grow old
        lasting = _storages_of(one for one in plan.data if isinstance(one, Tensor)) <= memory
        self._known = plan if lasting and self._worthwhile else None
        self._layout = layout
        return plan


def on_all_ranks(mine: bool) -> bool:
    """Whether it is so on each of them. All ranks must call it."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor(int(mine), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def _plan(by_key: dict[str, Any]) -> Plan:
    writer = _PlannedWriter()
    (_, metadata, _), *_ = save_state_dict_async_plan(
        mcore_to_pyt_state_dict(by_key, False),
        writer,
        None,
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    if metadata is not None:
        vars(metadata).pop("all_local_plans", None)  # megatron-core's cache; nobody reads it
    return Plan(writer.items, writer.data, metadata)


def _entries(by_key: Mapping[str, Sequence[Any]]) -> Iterator[Any]:
    for entries in by_key.values():
        yield from entries


def _layout(by_key: Mapping[str, Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """All that a plan depends on: names, places, the memory of tensors, values that are none."""
    for entry in _entries(by_key):
        if isinstance(entry, ShardedTensor):
            data = entry.data
            where = (data.data_ptr(), data.dtype, data.shape, data.stride(), data.device)
            place = (entry.global_shape, entry.global_offset, entry.axis_fragmentations)
            yield (entry.key, entry.replica_id, *place, entry.prepend_axis_num, *where)
        else:
            assert isinstance(entry, ShardedObject)
            yield (entry.unique_key, entry.replica_id, _serialised(entry.data))


def _serialised(value: Any) -> bytes | None:
    if value is None:
        return None
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _storages(by_key: Mapping[str, Sequence[Any]]) -> set[int]:
    tensors = (entry.data for entry in _entries(by_key) if isinstance(entry, ShardedTensor))
    return _storages_of(tensors)


def _storages_of(tensors: Iterator[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


class _PlannedWriter(FileSystemWriter):
    """Stands where torch's planning expects a writer, and keeps what was planned.

    Unlike its base it makes no folder and looks for no files while ranks are in a collective: one
    that failed there would leave the others waiting.
    """

    # each rank names its files by its own number, and only rank 0 has to see everybody's plan
    can_run_decentralized_global_plan = True

    def __init__(self) -> None:
        super().__init__(Path())
        self.items: list[WriteItem] = []
        self.data: list[Any] = []

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_decentralized_global_plan(self, local_plan: SavePlan) -> SavePlan:
        return replace(local_plan, storage_data=_StoragePrefix(f"__{dist.get_rank()}_"))

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self.items = list(plan.items)
        self.data = [planner.resolve_data(item) for item in plan.items]
