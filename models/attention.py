"""Core attention: causal softmax(QKᵀ)V on torch's scaled_dot_product_attention, with positions.

Shapes: s sequence, b batch, n this rank's query heads, g its key/value groups, d head width.
Plugs into megatron-core's SelfAttention as its `core_attention`; queries, keys and values arrive
without positions, which are applied here because xPos scales queries and keys differently
(megatron-core's rotary hook has one scale for both).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import ModelConfig, PositionEmbedding
from models.document_segments import DocumentSegments
from models.xpos import rotary_table, rotate, xpos_tables
from parallel.megatron import MegatronModule, TransformerConfig, tensor_parallel

try:  # torch 2.10 or newer
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]


class RotaryTables:
    """Complex tables for one model, made once per length and device and shared by its layers."""

    def __init__(self, model: ModelConfig) -> None:
        self.kind = model.position_embedding_type
        self.base = model.rotary_base
        self.scale_base = model.xpos_scale_base
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def get(self, length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables for queries and keys at positions 0..length-1: complex64 [length, d/2] each."""
        key = (length, device)
        if key not in self._tables:
            positions = torch.arange(length)
            if self.kind is PositionEmbedding.xpos:
                query, key_ = xpos_tables(
                    positions, head_dim, self.base, self.scale_base, centre=length // 2
                )
            else:
                query = key_ = rotary_table(positions, head_dim, self.base)
            self._tables[key] = (
                query.to(torch.complex64).to(device),
                key_.to(torch.complex64).to(device),
            )
        return self._tables[key]


class CausalAttention(MegatronModule):
    """softmax(q·kᵀ/sqrt(d)) v under a causal mask; flash kernels on GPU and CPU through SDPA.

    With `DocumentSegments` it equals attention on each document alone. Never holds an [s, s] score
    matrix, and a mask of that shape only for documents on a GPU in fp32 or with dropout. Dropout
    on the probabilities differs between tensor-parallel ranks, which hold different heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        *,
        rotary: RotaryTables | None = None,
    ) -> None:
        super().__init__(config)
        self.scale = softmax_scale
        self.dropout = config.attention_dropout
        self.rotary = rotary

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: DocumentSegments | None = None,
    ) -> Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n·d].

        packed_seq_params: the documents attention stays in; None: it is causal over the sequence.
        """
        segments = packed_seq_params
        if self.rotary is not None:
            tables = self.rotary.get(query.shape[0], query.shape[-1], query.device)
            if segments is not None and segments.reset_positions:
                at = segments.positions_on(query.device)
                tables = tables[0][at], tables[1][at]  # [s, b, d/2]
            query, key = rotate(query, tables[0]), rotate(key, tables[1])
        dropout = self.dropout if self.training else 0.0
        with self._dropout_generator(dropout):
            if segments is None:
                return self._causal(query, key, value, dropout)
            if query.device.type == "cpu":
                return self._segment_by_segment(query, key, value, dropout, segments)
            if dropout == 0.0 and _has_varlen_kernel(query):
                return self._variable_lengths(query, key, value, segments)
            return self._masked(query, key, value, dropout, segments)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        # [b, heads, s, d]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if query.device.type == "cpu":
            # Rows of one head are b·n·d apart in a sequence-first tensor, a power of two that
            # keeps hitting the same cache sets: 20-45 % slower than these copies and contiguous
            # attention together. Nothing refers to the fused QKV activation then: it is freed.
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            dropout_p=dropout,
            scale=self.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )  # [b, n, s, d]
        return out.permute(2, 0, 1, 3).flatten(2)

    def _segment_by_segment(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float,
        segments: DocumentSegments,
    ) -> Tensor:
        """Causal attention on each segment alone: only the scores that count are computed.

        `split`, not slices: its backward writes each gradient once, where that of a slice fills a
        tensor of the whole sequence for every segment.
        """
        rows = []
        for row, lengths in enumerate(segments.lengths):
            parts = zip(
                *(x[:, row : row + 1].split(lengths) for x in (query, key, value)), strict=True
            )
            rows.append(torch.cat([self._causal(q, k, v, dropout) for q, k, v in parts]))
        return rows[0] if len(rows) == 1 else torch.cat(rows, 1)

    def _variable_lengths(
        self, query: Tensor, key: Tensor, value: Tensor, segments: DocumentSegments
    ) -> Tensor:
        """One call of the flash kernel over all segments of the micro-batch."""
        s, b = query.shape[:2]
        # [b·s, heads, d], row after row
        query, key, value = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        borders = segments.borders(query.device)
        out = varlen_attn(
            query,
            key,
            value,
            borders,
            borders,
            segments.longest,
            segments.longest,
            scale=self.scale,
            window_size=(-1, 0),  # causal
            enable_gqa=key.shape[1] != query.shape[1],
        )  # [b·s, n, d]
        assert isinstance(out, Tensor)
        return out.unflatten(0, (b, s)).transpose(0, 1).flatten(2)

    def _masked(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float,
        segments: DocumentSegments,
    ) -> Tensor:
        """With an [s, s] mask, where no kernel takes lengths: b·s² bytes once a micro-batch."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=segments.mask(query.device),
            dropout_p=dropout,
            scale=self.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _dropout_generator(self, dropout: float) -> AbstractContextManager:
        # under sequence parallelism megatron-core's TransformerBlock has forked already
        if dropout == 0.0 or self.config.sequence_parallel:
            return nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()


def _has_varlen_kernel(query: Tensor) -> bool:
    """torch's flash kernel for variable lengths takes 16-bit types on NVIDIA Ampere or newer."""
    return (
        varlen_attn is not None
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
