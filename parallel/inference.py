"""Forward pass across the pipeline without gradients; every rank gets the last stage's result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.context_parallel import place_of, shard_sequence
from parallel.megatron import MegatronModule, get_forward_backward_func
from parallel.runtime import Runtime


@torch.no_grad()
def last_token_logits(
    chunks: Sequence[MegatronModule], tokens: Tensor, runtime: Runtime, *, padded_vocab_size: int
) -> Tensor:
    """Logits of the token after each sequence: tokens [b, s] -> fp32 [b, v], on every rank.

    All ranks must call it with the same tokens. Recomputes the whole sequence; there is no cache
    of keys and values. Where the sequence is split over ranks, tokens that nobody looks at fill it
    up to a length that can be.
    """
    config = chunks[0].config
    rank, size = runtime.context_parallel_rank, runtime.context_parallel_size
    batch_size, length = tokens.shape
    unit = 2 * size if size > 1 else 1
    if config.sequence_parallel:
        unit *= runtime.tensor_parallel_size
    tokens = F.pad(tokens, (0, -length % unit))
    seq_length = tokens.shape[1]
    last_token_rank, last_token_index = place_of(length - 1, seq_length, size)
    tokens = shard_sequence(tokens, rank, size, dim=1)

    def forward_step(_: Any, model: torch.nn.Module) -> tuple[Any, Any]:
        return model(tokens, logits_at=last_token_index), lambda output, non_loss_data: output

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=chunks[0],
        num_microbatches=1,
        seq_length=seq_length,
        micro_batch_size=batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if runtime.is_last_pipeline_stage:
        logits = outputs[0].contiguous()
    else:
        logits = torch.empty(
            batch_size, padded_vocab_size, dtype=torch.float32, device=runtime.device
        )
    if runtime.pipeline_parallel_size > 1:
        last = dist.get_process_group_ranks(runtime.groups.pp)[-1]
        dist.broadcast(logits, src=last, group=runtime.groups.pp)
    if size > 1:
        owner = dist.get_process_group_ranks(runtime.groups.cp)[last_token_rank]
        dist.broadcast(logits, src=owner, group=runtime.groups.cp)
    return logits
