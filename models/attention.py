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
from models.xpos import rotary_table, rotate, xpos_tables
from parallel.megatron import MegatronModule, TransformerConfig, tensor_parallel


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

    Never holds an [s, s] mask or score matrix. Dropout on the probabilities differs between
    tensor-parallel ranks, which hold different heads.
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
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n·d]."""
        if self.rotary is not None:
            query_table, key_table = self.rotary.get(query.shape[0], query.shape[-1], query.device)
            query, key = rotate(query, query_table), rotate(key, key_table)
        # [b, heads, s, d]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if query.device.type == "cpu":
            # Rows of one head are b·n·d apart in a sequence-first tensor, a power of two that
            # keeps hitting the same cache sets: 20-45 % slower than these copies and contiguous
            # attention together. Nothing refers to the fused QKV activation then: it is freed.
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        dropout = self.dropout if self.training else 0.0
        with self._dropout_generator(dropout):
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

    def _dropout_generator(self, dropout: float) -> AbstractContextManager:
        # under sequence parallelism megatron-core's TransformerBlock has forked already
        if dropout == 0.0 or self.config.sequence_parallel:
            return nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()
