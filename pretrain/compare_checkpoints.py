"""What two checkpoints differ in: settings, counters, tensors; one piece in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel.checkpoint_reader import CheckpointReader, StoredTensor

_BLOCK = 1 << 20  # elements compared at once, in fp64


@dataclass(frozen=True)
class Difference:
    """Of one tensor that both have in one shape."""

    name: str
    largest: float  # absolute; inf where one has NaN or infinity and the other has not
    relative: float  # largest, divided by the largest absolute value of the first one's
    elements: int  # how many differ
    numel: int


@dataclass
class Comparison:
    values: list[str] = field(default_factory=list)  # plain values that differ, a line each
    only_first: list[str] = field(default_factory=list)  # names of tensors
    only_second: list[str] = field(default_factory=list)
    described: list[str] = field(default_factory=list)  # of other shapes or types, a line each
    tensors: list[Difference] = field(default_factory=list)  # the largest `relative` first
    compared: int = 0  # tensors

    @property
    def equal(self) -> bool:
        return not (
            self.values or self.only_first or self.only_second or self.described or self.tensors
        )


def compare(first: Path, second: Path, *, weights_only: bool = False) -> Comparison:
    """Compare two checkpoints, whatever layouts wrote them. Raises as `CheckpointReader`.

    A tensor of another type is compared by value.
    """
    a, b = CheckpointReader(first), CheckpointReader(second)
    mine, theirs = (r.weights if weights_only else r.tensors for r in (a, b))
    left, right = (
        {k: v for k, v in r.plain.items() if not (weights_only and k == "optimizer")}
        for r in (a, b)
    )
    result = Comparison(values=differing_values(left, right))
    result.only_first = sorted(mine.keys() - theirs.keys())
    result.only_second = sorted(theirs.keys() - mine.keys())
    for name in sorted(mine.keys() & theirs.keys()):
        one, other = mine[name], theirs[name]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            result.described.append(f"{name}: {_describe(one)}, {_describe(other)}")
        if one.shape != other.shape:
            continue
        result.compared += 1
        found = _compare_tensors(a, one, b)
        if found.elements:
            result.tensors.append(found)
    result.tensors.sort(key=lambda d: (-d.relative, d.name))
    return result


def differing_values(first: Any, second: Any, name: str = "") -> list[str]:
    """Nested plain values that differ, as "name: first, second"."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        lines = []
        for key in [*first, *(key for key in second if key not in first)]:
            inner = f"{name}.{key}" if name else str(key)
            if key not in second:
                lines.append(f"{inner}: only in the first")
            elif key not in first:
                lines.append(f"{inner}: only in the second")
            else:
                lines += differing_values(first[key], second[key], inner)
        return lines
    if first == second:
        return []
    return [f"{name}: {_short(first)}, {_short(second)}"]


def _compare_tensors(a: CheckpointReader, stored: StoredTensor, b: CheckpointReader) -> Difference:
    largest, scale, elements = 0.0, 0.0, 0
    for piece in stored.pieces:
        one = a.read_piece(stored, piece).flatten()
        other = b.read(stored.name, piece.box).flatten()
        for x, y in zip(one.split(_BLOCK), other.split(_BLOCK), strict=True):
            x, y = x.double(), y.double()
            differ = (x != y) & ~(x.isnan() & y.isnan())
            scale = max(scale, float(x.abs().nan_to_num(0.0, 0.0).max()))
            count = int(differ.sum())
            if count:
                elements += count
                found = float((x - y)[differ].abs().max())
                largest = max(largest, found if math.isfinite(found) else math.inf)
    return Difference(stored.name, largest, largest / (scale or 1.0), elements, stored.numel)


def _describe(stored: StoredTensor) -> str:
    return f"{stored.dtype} {list(stored.shape)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
