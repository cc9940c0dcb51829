"""Context parallelism: one sequence on several ranks, and how attention sees all of it.

Each sequence is cut into 2·cp chunks and rank r holds chunks r and 2cp-1-r, one after the other:
under a causal mask every rank then has the same number of scores to compute. It is megatron-core's
own order, which its schedules and Transformer Engine expect. Two ways for attention to see the
rest, both exact:

    all_gather   every rank gets all keys and values for its own queries. Any number of heads;
                 memory for keys and values of the whole sequence.
    a2a          Ulysses (arXiv 2309.14509 section 3.1): every rank gets the whole sequence for its
                 share of the heads. Moves queries and outputs too, and needs heads to share out.

Shapes: s tokens of the whole sequence, cp ranks, b batch, n query heads, g key/value groups, d head
width; s is a multiple of 2·cp. "In order" is the sequence as it reads, "by rank" the parts of
ranks 0 to cp-1 one after the other. All ranks of a group must call the communicating functions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import all_gather, reduce_scatter


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The chunks a rank holds, in its order, of the 2·size chunks of a sequence."""
    return rank, 2 * size - 1 - rank


def place_of(position: int, length: int, size: int) -> tuple[int, int]:
    """(rank, index among its tokens) of one position of a sequence of `length` tokens."""
    if size == 1:
        return 0, position
    width = length // (2 * size)
    chunk, offset = divmod(position, width)
    if chunk < size:
        return chunk, offset
    return 2 * size - 1 - chunk, width + offset


def shard_sequence(x: Tensor, rank: int, size: int, *, dim: int = 0) -> Tensor:
    """This rank's part of x along `dim`: s entries -> s/size."""
    if size == 1:
        return x
    chunks = x.chunk(2 * size, dim)
    return torch.cat([chunks[chunk] for chunk in chunks_of(rank, size)], dim)


def context_parallel_group(model: Any) -> dist.ProcessGroup:
    """The context-parallel group `model` was built with, also when an engine has wrapped it."""
    while hasattr(model, "module"):
        model = model.module
    return model.cp_group


def gather_keys_and_values(
    key: Tensor, value: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Of the whole sequence, in order: key and value [s/cp, b, g, d] -> [s, b, g, d] each.

    One all-gather; backward sums each rank's gradients where the keys came from, in one
    reduce-scatter and in the type of the keys (bf16 sums of cp terms are rounded as such).
    """
    gathered = _AllGather.apply(torch.cat([key, value], -1), group)
    key, value = _in_order(gathered, group.size()).split([key.shape[-1], value.shape[-1]], -1)
    return key, value


def sequence_to_heads(*tensors: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Each [s/cp, b, heads, d] -> [s, b, heads/cp, d] in order, in one all-to-all together.

    Rank r gets the r-th share of each tensor's heads; every number of heads is a multiple of cp.
    """
    size = group.size()
    parts = torch.cat([x.unflatten(2, (size, -1)) for x in tensors], 3)  # [s/cp, b, cp, heads, d]
    received = _AllToAll.apply(parts.movedim(2, 0), group).flatten(0, 1)
    return list(_in_order(received, size).split([x.shape[2] // size for x in tensors], 2))


def heads_to_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The inverse, for the output: [s, b, n/cp, d] in order -> [s/cp, b, n, d]."""
    size = group.size()
    parts = _by_rank(x, size).unflatten(0, (size, -1))
    return _AllToAll.apply(parts, group).movedim(0, 2).flatten(2, 3)


def _in_order(x: Tensor, size: int) -> Tensor:
    """By rank -> in order, along the first axis."""
    held = [chunk for rank in range(size) for chunk in chunks_of(rank, size)]
    chunks = x.chunk(2 * size)
    return torch.cat([chunks[held.index(chunk)] for chunk in range(2 * size)])


def _by_rank(x: Tensor, size: int) -> Tensor:
    """In order -> by rank, along the first axis."""
    chunks = x.chunk(2 * size)
    return torch.cat([chunks[chunk] for rank in range(size) for chunk in chunks_of(rank, size)])


class _AllGather(torch.autograd.Function):
    """[s/cp, ...] -> [s, ...] by rank; backward is a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        all_gather(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        size = ctx.group.size()
        mine = gradient.new_empty(gradient.shape[0] // size, *gradient.shape[1:])
        reduce_scatter(mine, gradient.contiguous(), group=ctx.group)
        return mine, None


class _AllToAll(torch.autograd.Function):
    """x [cp, ...]: part r goes to rank r, what rank r sent becomes part r. Its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = x.new_empty(x.shape)
        dist.all_to_all_single(received, x.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(gradient, ctx.group), None
