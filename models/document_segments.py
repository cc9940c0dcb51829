"""Where the documents of a micro-batch begin and end, in the forms attention asks for.

Shapes: b sequences, s tokens each. A segment is the part of one document that lies in one sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor


class DocumentSegments:
    """Made once for a micro-batch and shared by its layers, also when they are recomputed.

    Travels through megatron-core's TransformerBlock and SelfAttention as their packed_seq_params,
    which both hand on as they are, in recomputation too. They ask it for `qkv_format` only: "sbhd"
    leaves queries, keys and values as [s, b, heads, d] ("thd" would join the batch to one row).

    documents: [b, s], a number for each token; a segment ends where it changes. On the host: the
    kernels take lengths as plain numbers, and reading them from a device would stop it.
    """

    qkv_format = "sbhd"

    def __init__(self, documents: Tensor, *, reset_positions: bool = False) -> None:
        documents = documents.cpu()
        self.shape = documents.shape
        self.reset_positions = reset_positions
        b, s = documents.shape
        begins = torch.ones(b, s, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        self._begins = begins
        starts = begins.flatten().nonzero().flatten()  # in the batch laid out row after row
        self._borders = torch.cat([starts, torch.tensor([b * s])])
        self._by_device: dict[tuple[str, torch.device], Tensor] = {}

    @cached_property
    def lengths(self) -> list[list[int]]:
        """Of the segments of each sequence, in order."""
        lengths = self._borders.diff().tolist()
        rows: list[list[int]] = []
        at = 0
        for count in self._begins.sum(1).tolist():
            rows.append(lengths[at : at + count])
            at += count
        return rows

    @cached_property
    def longest(self) -> int:
        return int(self._borders.diff().max())

    @cached_property
    def positions(self) -> Tensor:
        """Of each token in its segment, sequence-first: int64 [s, b]."""
        b, s = self.shape
        starts = self._borders[:-1].repeat_interleave(self._borders.diff())
        return (torch.arange(b * s) - starts).view(b, s).t().contiguous()

    def borders(self, device: torch.device) -> Tensor:
        """Cumulative lengths over the batch laid out row after row: int32 [segments + 1]."""
        return self._on(device, "borders", lambda: self._borders.int().to(device))

    def positions_on(self, device: torch.device) -> Tensor:
        return self._on(device, "positions", lambda: self.positions.to(device))

    def mask(self, device: torch.device) -> Tensor:
        """True where a token may attend: causal and in its own segment: bool [b, 1, s, s]."""

        def make() -> Tensor:
            number = self._begins.to(device).cumsum(1)  # [b, s]
            same = number[:, None, :, None] == number[:, None, None, :]
            return same.tril()

        return self._on(device, "mask", make)

    def _on(self, device: torch.device, name: str, make: Callable[[], Tensor]) -> Tensor:
        key = (name, device)
        if key not in self._by_device:
            self._by_device[key] = make()
        return self._by_device[key]
