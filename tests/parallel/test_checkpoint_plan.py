"""A save is planned once, and anew as soon as anything but values has changed on any rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel import checkpoint_io
from parallel.checkpoint_plan import Plans
from parallel.megatron import ShardedObject, ShardedTensor
from tests.distributed import run_on_gloo

SAVES = 3


def state(tensor: torch.Tensor, extra: Any) -> dict[str, Any]:
    """A layer of each rank, stacked; megatron-core has such tensors copied where they are no single
    stretch of memory."""
    rank = dist.get_rank()
    return {
        "w": ShardedTensor.from_rank_offsets("w", tensor, (0, rank, 2), prepend_axis_num=1),
        "extra": ShardedObject("w._extra_state", extra, (2,), (rank,)),
    }


def save_each(folder: Path, change: str) -> tuple[list[int], bool]:
    """Times that a plan was taken again, after each save; whether all hold what they should."""
    plans, tensor, extra = Plans(), torch.zeros(64, 32), [0]
    if change == "not contiguous":
        tensor = torch.zeros(32, 64).t()
    reused, expected = [], {}
    for step in range(SAVES):
        if step == 1 and dist.get_rank() == 1:
            tensor = tensor.clone() if change == "memory of rank 1" else tensor
            extra = [1] if change == "object of rank 1" else extra
        tensor.fill_(step + dist.get_rank() / 2)
        target = folder / f"{step}"
        checkpoint_io.start_save(
            state(tensor, extra), target, metadata={"step": step}, memory=None, plans=plans
        ).wait()
        reused.append(plans.reused)
        expected[target] = (float(tensor[0, 0]), extra)
    right = []
    for target, values in expected.items():
        loaded = checkpoint_io.load(state(torch.zeros(64, 32), None), target)
        right.append((loaded["w"].unique().tolist(), loaded["extra"]) == ([values[0]], values[1]))
    return reused, all(right)


@pytest.mark.parametrize(
    ("change", "reused"),
    [
        ("nothing", [0, 1, 2]),
        ("memory of rank 1", [0, 0, 0]),
        ("object of rank 1", [0, 0, 0]),
        ("not contiguous", [0, 0, 0]),
    ],
)
def test_a_plan_is_taken_again_while_nothing_but_values_changes(
    tmp_path: Path, change: str, reused: list[int]
) -> None:
    assert run_on_gloo(2, save_each, tmp_path, change) == [(reused, True)] * 2
