"""Core attention: causal softmax(QKᵀ)V on torch's scaled_dot_product_attention, with positions.

Shapes: s sequence, b batch, n this rank's query heads, g its key/value groups, d head width; under
context parallelism s is this rank's part of the sequence (`parallel.context_parallel`).
Plugs into megatron-core's SelfAttention as its `core_attention`; queries, keys and values arrive
without positions, which are applied here because xPos scales queries and keys differently
(megatron-core's rotary hook has one scale for both).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import ModelConfig, PositionEmbedding
from models.document_segments import DocumentSegments
from models.xpos import rotary_table, rotate, xpos_tables
from parallel.config import ContextParallelComm
from parallel.context_parallel import (
    chunks_of,
    gather_keys_and_values,
    heads_to_sequence,
    sequence_to_heads,
    shard_sequence,
)
from parallel.megatron import MegatronModule, TransformerConfig, tensor_parallel

# torch.nn.attention's modules import torch.compile's machinery, a second of every start; they are
# imported where a GPU uses them.


class RotaryTables:
    """Complex tables for one model, made once per length and device and shared by its layers."""

    def __init__(self, model: ModelConfig) -> None:
        self.kind = model.position_embedding_type
        self.base = model.rotary_base
        self.scale_base = model.xpos_scale_base
        self._tables: dict[tuple[int, torch.device, int, int], tuple[Tensor, Tensor]] = {}

    def get(
        self,
        length: int,
        head_dim: int,
        device: torch.device,
        *,
        context_rank: int = 0,
        context_size: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Tables for queries and keys of a sequence of `length` tokens, at the positions which this
        context-parallel rank holds: complex64 [length/context_size, d/2] each.
        """
        key = (length, device, context_rank, context_size)
        if key not in self._tables:
            positions = shard_sequence(torch.arange(length), context_rank, context_size)
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

    Under context parallelism it is the part of that function which belongs to this rank's queries,
    by `config.cp_comm_type`: "all_gather" (also None) or "a2a".
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
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None
        # an argument where megatron-core's own transformer layer is around, which ours is not
        comm_type = cp_comm_type or config.cp_comm_type
        self.exchanges_heads = comm_type == ContextParallelComm.a2a.value

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
            tables = self._rotary_tables(query)
            if segments is not None and segments.reset_positions:
                at = segments.positions_on(query.device)
                tables = tables[0][at], tables[1][at]  # [s, b, d/2]
            query, key = rotate(query, tables[0]), rotate(key, tables[1])
        dropout = self.dropout if self.training else 0.0
        with self._dropout_generator(dropout):
            if self.context_group is not None:
                assert segments is None  # refused by LanguageModel
                return self._context_parallel(query, key, value, dropout)
            if segments is None:
                return self._causal(query, key, value, dropout)
            if query.device.type == "cpu":
                return self._segment_by_segment(query, key, value, dropout, segments)
            if dropout == 0.0 and _has_varlen_kernel(query):
                return self._variable_lengths(query, key, value, segments)
            return self._masked(query, key, value, dropout, segments)

    def _rotary_tables(self, query: Tensor) -> tuple[Tensor, Tensor]:
        assert self.rotary is not None
        length, width = query.shape[0], query.shape[-1]
        if self.context_group is None:
            return self.rotary.get(length, width, query.device)
        rank, size = self.context_group.rank(), self.context_group.size()
        return self.rotary.get(
            length * size, width, query.device, context_rank=rank, context_size=size
        )

    def _context_parallel(
        self, query: Tensor, key: Tensor, value: Tensor, dropout: float
    ) -> Tensor:
        group = self.context_group
        assert group is not None
        if self.exchanges_heads:
            width = query.shape[-1]
            query, key, value = sequence_to_heads(query, key, value, group=group)
            out = self._causal(query, key, value, dropout).unflatten(2, (-1, width))
            return heads_to_sequence(out, group).flatten(2)
        key, value = gather_keys_and_values(key, value, group)
        parts = []
        for part, chunk in zip(query.chunk(2), chunks_of(group.rank(), group.size()), strict=True):
            end = (chunk + 1) * part.shape[0]
            parts.append(self._causal(part, key[:end], value[:end], dropout))
        return torch.cat(parts)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """The queries are those of the last positions of the keys."""
        # [b, heads, s, d]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if query.device.type == "cpu":
            # Rows of one head are b·n·d apart in a sequence-first tensor, a power of two that
            # keeps hitting the same cache sets: 20-45 % slower than these copies and contiguous
            # attention together. Nothing refers to the fused QKV activation then: it is freed.
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        whole = query.shape[2] == key.shape[2]
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if whole else _later_queries(query, key),
            is_causal=whole,
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
        from torch.nn.attention.varlen import varlen_attn

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


def _later_queries(query: Tensor, key: Tensor) -> Tensor:
    """Causal bias for queries [b, n, q, d] at the last q of the keys' k positions.

    On a GPU a mark that the flash kernel understands. On a CPU a mask, because the kernel there
    aligns `is_causal` with the first key: q·k bytes for each of a rank's two chunks, shared by
    the layers, and a copy in the type of the queries while the kernel runs. It then computes the
    scores above the diagonal too, q²/2 a chunk and 1/(2·cp) more over the whole sequence (measured
    on one core, forward and backward: 8 to 17 % more time for cp 2 and 4).
    """
    if query.device.type != "cpu":
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(query.shape[2], key.shape[2])
    return _lower_right_mask(query.shape[2], key.shape[2])


@lru_cache(maxsize=4)
def _lower_right_mask(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def _has_varlen_kernel(query: Tensor) -> bool:
    """torch's flash kernel for variable lengths takes 16-bit types on NVIDIA Ampere or newer."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.version.hip is None
        and find_spec("torch.nn.attention.varlen") is not None  # torch 2.10 or newer
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
