"""The optimizer's state in a form that knows no layout and no optimizer class.

A checkpoint holds for every trained parameter, by the name <name> that it has in the model's
sharded state (layers and experts stacked, as there):

    optimizer.state.exp_avg.<name>       Adam's first moment, fp32
    optimizer.state.exp_avg_sq.<name>    Adam's second moment, fp32
    optimizer.state.fp32_param.<name>    the master weight, where the weight itself is not fp32

each of the weight's global shape; and once, as plain values, the number of updates and what Adam
was set to. Where the weight is fp32 it is its own master: loading across `parallel.precision` reads
the one for the other (`resolve_masters`).

Under the distributed optimizer (ZeRO-1) a rank owns a range of each of its parameters, flattened.
Such a range of an N-dimensional tensor is at most 2 N - 1 boxes (`boxes`), which megatron-core's
distributed checkpoints store as they are. Each rank therefore writes what it owns out of the
optimizer's own memory and reads into it: nothing is gathered and nothing copied. megatron-core
0.16.1's "fully_reshardable" format gathers all three tensors of a model replica on every rank
first, and knows neither the plain optimizers' state nor another number of optimizers (experts have
one of their own under expert parallelism).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.megatron import (
    DistributedOptimizer,
    Float16OptimizerWithFloat16Params,
    ShardedTensor,
    ShardedTensorFactory,
)

PREFIX = "optimizer."
WEIGHT = "weight"  # the kind of a part's tensor that is the weight itself
_MASTER = "optimizer.state.fp32_param."
_SETTINGS = ("betas", "eps", "weight_decay")


def sharded_state(optimizer: Any, model_state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of megatron-core's `optimizer` as sharded tensors and plain values.

    The tensors are views: saving reads the optimizer's memory, loading fills it. `model_state` is
    the sharded state of this rank's model chunks. All ranks must call it.
    """
    return {
        "step": _step(optimizer),
        "settings": settings_of(optimizer.param_groups),
        "tensors": sharded_parts(_parts(optimizer), model_state),
    }


def sharded_parts(parts: Iterable[Part], model_state: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of `parts` as boxes of the tensors that `model_state` describes."""
    described = {
        id(entry.data): entry
        for entry in leaves(model_state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    tensors = chain.from_iterable(
        _sharded_tensors(part, described[id(part.parameter)]) for part in parts
    )
    return {str(index): tensor for index, tensor in enumerate(tensors)}


def take_over(optimizer: Any, state: Mapping[str, Any]) -> None:
    """After the tensors of `sharded_state` were filled: the plain values.

    Adam's step is the checkpoint's; its settings are this run's, as typed.

    Raises ValueError for a state in megatron-core's own formats.
    """
    step = step_of(state)
    for group in optimizer.param_groups:
        group["step"] = step


def step_of(state: Mapping[str, Any]) -> int:
    """Adam's step in a state that was loaded.

    Raises ValueError for a state in megatron-core's own formats.
    """
    if "step" not in state:
        raise ValueError(
            "the checkpoint holds no step of Adam: its optimizer state is of another format than "
            "this version writes; start from its weights"
        )
    return int(state["step"])


@dataclass(frozen=True)
class Part:
    """The elements of a parameter that this rank updates, and what the optimizer holds for them."""

    parameter: Tensor  # the model's
    start: int  # the first of them, in the flattened parameter
    # [elements] or the parameter's shape, by kind: exp_avg, exp_avg_sq, fp32_param, or WEIGHT
    tensors: dict[str, Tensor]
    alone: bool  # whether no other data-parallel rank holds them


def _parts(optimizer: Any) -> Iterator[Part]:
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if one.is_stub_optimizer:  # nothing to train on this rank
            continue
        shared_out = isinstance(one, DistributedOptimizer)
        for parameter, updated in updated_parameters(one):
            moments = one.optimizer.state[updated]
            tensors = {"exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
            if parameter.dtype != torch.float32:
                tensors["fp32_param"] = updated
            start = one._get_model_param_range_map(parameter)["param"].start if shared_out else 0
            yield Part(parameter, start, tensors, alone=shared_out)


def updated_parameters(one: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter with what the inner optimizer updates for it: itself, a view, or a master."""
    if isinstance(one, DistributedOptimizer):
        yield from _pairs(one.model_fp32_groups, one.shard_fp32_groups)
        yield from _pairs(one.model_float16_groups, one.shard_fp32_from_float16_groups)
    elif isinstance(one, Float16OptimizerWithFloat16Params):
        yield from _pairs(one.fp32_from_fp32_groups, one.fp32_from_fp32_groups)
        yield from _pairs(one.float16_groups, one.fp32_from_float16_groups)
    else:
        groups = [group["params"] for group in one.param_groups]
        yield from _pairs(groups, groups)


def _pairs(first: Any, second: Any) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(chain.from_iterable(first), chain.from_iterable(second), strict=True)


def _sharded_tensors(part: Part, described: Any) -> Iterator[ShardedTensor]:
    tensors = {kind: tensor.detach().view(-1) for kind, tensor in part.tensors.items()}
    elements = next(iter(tensors.values())).numel()
    for piece in _pieces(described):
        # gate and up of a gated layer are pieces of one parameter
        assert piece.data.is_contiguous()
        begin = _first_element(piece.data, part.parameter)
        low = max(part.start, begin)
        high = min(part.start + elements, begin + piece.data.numel())
        for first, offset, size in boxes(tuple(piece.data.shape), low - begin, high - begin):
            place = begin + first - part.start
            for kind, tensor in tensors.items():
                yield _box(
                    piece.key if kind == WEIGHT else f"{PREFIX}state.{kind}.{piece.key}",
                    tensor[place : place + math.prod(size)],
                    piece,
                    offset,
                    size,
                    alone=part.alone,
                )


def _pieces(described: Any) -> list[ShardedTensor]:
    if isinstance(described, ShardedTensor):
        return [described]
    return list(leaves(described.build()))


def _first_element(view: Tensor, whole: Tensor) -> int:
    return (view.data_ptr() - whole.data_ptr()) // whole.element_size()


def _box(
    key: str,
    values: Tensor,
    piece: ShardedTensor,
    offset: tuple[int, ...],
    size: tuple[int, ...],
    *,
    alone: bool,
) -> ShardedTensor:
    """`values` as the box at `offset` of the piece of a weight that `piece` describes."""
    ahead = piece.prepend_axis_num  # the axes of layers, where `piece` is one of many
    inner = (a + b for a, b in zip(piece.global_offset[ahead:], offset, strict=True))
    local = (1,) * ahead + size
    return ShardedTensor(
        key=key,
        data=values.view(local),
        dtype=values.dtype,
        local_shape=local,
        global_shape=piece.global_shape,
        global_offset=(*piece.global_offset[:ahead], *inner),
        axis_fragmentations=None,  # boxes make no regular grid
        # the last number counts data-parallel ranks, which hold copies of the weight
        replica_id=(*piece.replica_id[:-1], 0) if alone else piece.replica_id,
    )


def boxes(
    shape: tuple[int, ...], low: int, high: int
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """The elements [low, high) of a flattened row-major tensor as boxes of it, in their order.

    Yields (first element, offset, size) of each: the rest of a row, whole rows, the start of a row;
    rows being what one index of the first axis selects, and cut likewise themselves.
    """
    if low >= high:
        return
    if not shape:
        yield 0, (), ()
        return
    row = math.prod(shape[1:])
    whole_from, whole_to = -(-low // row), high // row
    if whole_from > whole_to:  # within one row
        yield from _within_row(shape, whole_to, low, high)
        return
    yield from _within_row(shape, whole_from - 1, low, whole_from * row)
    if whole_from < whole_to:
        rest = len(shape) - 1
        size = (whole_to - whole_from, *shape[1:])
        yield whole_from * row, (whole_from, *(0,) * rest), size
    yield from _within_row(shape, whole_to, whole_to * row, high)


def _within_row(
    shape: tuple[int, ...], index: int, low: int, high: int
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    start = index * math.prod(shape[1:])
    for first, offset, size in boxes(shape[1:], low - start, high - start):
        yield start + first, (index, *offset), (1, *size)


def _step(optimizer: Any) -> int:
    # a group of which this rank holds nothing is not stepped, and stays where a resume put it
    groups = [group for group in optimizer.param_groups if group["params"]]
    return agreed_step({int(group["step"]) for group in groups if group.get("step")})


def agreed_step(mine: set[int]) -> int:
    """How many updates were made: the same on all ranks, also on those with nothing to update.

    mine: the steps of what this rank has updated. All ranks must call it.
    """
    found: list[set[int]] = [set()] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    steps = set().union(*found)
    assert len(steps) <= 1, f"Adam's step differs between parameters: {steps}"
    return steps.pop() if steps else 0


def settings_of(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the parameters with weight decay are updated with, for whoever reads the file."""
    if not groups:
        return {}
    group = max(groups, key=lambda group: group["weight_decay"])
    return {name: group[name] for name in _SETTINGS}


# ---- other precisions ----------------------------------------------------------------------------


def resolve_masters(wanted: set[str], stored: set[str]) -> dict[str, str]:
    """Which stored tensor to read for a wanted one of another name.

    A weight that is its own master here (fp32) is read from the master of a run that had one
    (bf16), and the other way round a master from the fp32 weight; both are exact.
    """
    weights = {
        name: _MASTER + name
        for name in wanted
        if _MASTER + name in stored and _MASTER + name not in wanted
    }
    masters = {
        name: name.removeprefix(_MASTER)
        for name in wanted
        if name.startswith(_MASTER) and name not in stored and name.removeprefix(_MASTER) in stored
    }
    return weights | masters


def is_master(name: str) -> bool:
    return name.startswith(_MASTER)


def renamed(entry: Any, names: Mapping[str, str]) -> Any:
    """A sharded tensor under the name that `names` gives it; anything else as it is."""
    if isinstance(entry, ShardedTensor | ShardedTensorFactory) and entry.key in names:
        return replace(entry, key=names[entry.key])
    return entry


# ---- nested states -------------------------------------------------------------------------------


def leaves(state: Any) -> Iterator[Any]:
    """What a nested state of dictionaries and lists holds."""
    if isinstance(state, Mapping):
        state = list(state.values())
    if not isinstance(state, list):
        yield state
        return
    for value in state:
        yield from leaves(value)


def mapped(state: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested state with `change` of each leaf."""
    if isinstance(state, Mapping):
        return {key: mapped(value, change) for key, value in state.items()}
    if isinstance(state, list):
        return [mapped(value, change) for value in state]
    return change(state)
