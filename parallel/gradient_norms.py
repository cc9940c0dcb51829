"""Norms of gradients and weights by kind of parameter and by layer, under any layout.

Each weight counts once, as in the global gradient norm: of copies on tensor-parallel ranks one
counts, of a tied embedding the first stage's, under ZeRO each rank's shard, and experts on the
ranks that hold them.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import adam
from parallel.engine import Engine

# kind -> what its parameters' names hold; the first match wins
_KINDS = {
    "norms": "norm",
    "router": r"\.router\.",
    "experts": r"\.(shared_)?experts\.",
    "attention": r"\.self_attention\.",
    "feed_forward": r"\.mlp\.",
    "embedding": r"\bembedding\.",  # with tied weights the output projection too
    "output": r"\boutput_layer\.",
}
KINDS = (*_KINDS, "other")


class NormsByBlock:
    """Measures one step's norms, between the reduction of gradients and their clipping.

        with norms.measuring():
            engine.step(...)
        norms.metrics()

    All ranks must call it. A measurement reads gradients and fp32 weights once and adds one small
    all-reduce for each group the optimizer takes its norm over, and one wait for the device.
    """

    def __init__(self, engine: Engine, num_layers: int) -> None:
        self._engine, self._num_layers = engine, num_layers
        self._rows = {
            parameter: (KINDS.index(kind_of(name)), layer)
            for chunk in engine.chunks
            for name, parameter, layer in _named_parameters(chunk)
        }
        self._metrics: dict[str, float] = {}

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        self._metrics = {}
        self._engine.before_clipping = self._measure
        try:
            yield
        finally:
            self._engine.before_clipping = None

    def metrics(self) -> dict[str, float]:
        """gradients/... and weights/... of the step measured last; empty before."""
        return self._metrics

    @torch.no_grad()
    def _measure(self) -> None:
        device = self._engine.runtime.device
        rows = len(KINDS) + self._num_layers + 1  # the last: what lies in no layer
        sums: dict[Any, Tensor] = {}  # of squares: [rows, (gradients, weights)]
        for counted in self._engine.counted():
            group = counted.group
            if group not in sums:
                sums[group] = torch.zeros(rows, 2, dtype=torch.float64, device=device)
            if not counted.parameters:
                continue
            gradients, weights = adam.norms(counted.gradients), adam.norms(counted.weights)
            squares = torch.stack([gradients, weights], dim=1).double().square().to(device)
            places = (self._place(parameter) for parameter in counted.parameters)
            for rows_of in zip(*places, strict=True):
                sums[group].index_add_(0, torch.tensor(rows_of, device=device), squares)
        for group, squared in sums.items():
            dist.all_reduce(squared, group=group)
        norms = torch.stack(list(sums.values())).sum(0).sqrt().tolist()
        self._metrics = self._named(norms)

    def _place(self, parameter: Tensor) -> tuple[int, int]:
        """The rows a parameter is added to: its kind's, and its layer's behind those."""
        kind, layer = self._rows[parameter]
        return kind, len(KINDS) + (layer - 1 if layer else self._num_layers)

    def _named(self, norms: list[list[float]]) -> dict[str, float]:
        kinds, layers = norms[: len(KINDS)], norms[len(KINDS) : -1]
        metrics = {"weights/norm": math.hypot(*(weights for _, weights in kinds))}
        for kind, (gradients, weights) in zip(KINDS, kinds, strict=True):
            if weights or gradients:  # there are such parameters
                metrics[f"gradients/block/{kind}/norm"] = gradients
                metrics[f"weights/block/{kind}/norm"] = weights
        for number, (gradients, _) in enumerate(layers, start=1):
            metrics[f"gradients/layer_{number:02d}/norm"] = gradients
        return metrics


def kind_of(name: str) -> str:
    """Which of KINDS a parameter of this name is."""
    return next((kind for kind, part in _KINDS.items() if re.search(part, name)), "other")


def _named_parameters(chunk: Any) -> Iterator[tuple[str, Tensor, int]]:
    """(name, parameter, number of its layer in the model or 0) of a model chunk."""
    layers = {
        parameter: layer.layer_number
        for layer in chunk.module.decoder.layers
        for parameter in layer.parameters()
    }
    for name, parameter in chunk.named_parameters():
        yield name, parameter, layers.get(parameter, 0)
