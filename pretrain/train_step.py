"""One optimizer step, and the forward function that training and evaluation share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from models.language_model import LossOutput
from parallel.context_parallel import context_parallel_group, shard_sequence
from parallel.engine import Engine
from parallel.runtime import Runtime
from pretrain.loss import LanguageLosses


@dataclass(frozen=True)
class StepMetrics:
    """The same on every rank."""

    losses: LanguageLosses
    grad_norm: float
    applied: bool  # False: gradients were not finite, the update was skipped
    stop_requested: bool  # by any rank


def forward_step(
    micro_batches: Iterator[Batch], model: torch.nn.Module, *, device: torch.device
) -> tuple[Any, Any]:
    """megatron-core's forward-step protocol: model output, and the loss as a function of it."""
    batch = to_device(next(micro_batches), device)
    batch = context_parallel_part(batch, context_parallel_group(model))
    output = model(
        batch.tokens,
        batch.labels,
        batch.loss_mask,
        batch.documents,
        batch.reset_positions,
        language_ids=batch.language_ids,
    )
    return output, partial(loss_of, batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; a copy the host does not wait for if its memory is page-locked.

    `documents` stay on the host, where attention reads the borders from.
    """

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return replace(
        batch,
        tokens=move(batch.tokens),
        labels=move(batch.labels),
        loss_mask=move(batch.loss_mask),
        language_ids=move(batch.language_ids),
    )


def context_parallel_part(batch: Batch, group: dist.ProcessGroup) -> Batch:
    """The tokens, labels and mask which this rank of a context-parallel group works on: [b, s/cp].

    Every rank of the group has the whole batch, and each token is counted by one of them.
    """
    size = group.size()
    if size == 1:
        return batch

    def mine(tensor: Tensor) -> Tensor:
        return shard_sequence(tensor, group.rank(), size, dim=1)

    return replace(
        batch,
        tokens=mine(batch.tokens),
        labels=mine(batch.labels),
        loss_mask=mine(batch.loss_mask),
    )


def loss_of(batch: Batch, output: LossOutput) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(loss sum, valid tokens, metrics) of one micro-batch, on the last pipeline stage.

    The engine divides the step's gradient by the global count of valid tokens; see
    `pretrain.loss.mean_over_valid_tokens`.
    """
    valid_tokens = batch.loss_mask.sum().to(torch.int)
    return output.loss_sum, valid_tokens, {"batch": batch, "loss": output.per_token_loss}


def train_step(
    engine: Engine,
    micro_batches: list[Batch],
    runtime: Runtime,
    *,
    learning_rate: float,
    languages: Sequence[str],
    stop_requested: bool,
) -> StepMetrics:
    """Forward and backward over this rank's micro-batches, reduction, one update.

    All ranks must call it. `stop_requested` is this rank's own wish; the answer is everybody's.
    """
    metrics = engine.forward_backward(
        micro_batches, partial(forward_step, device=runtime.device), **_shape(micro_batches)
    )
    result = engine.step(learning_rate)
    losses, stop = reduce_losses(metrics, runtime, languages, stop_requested)
    return StepMetrics(losses, result.grad_norm, result.applied, stop)


def forward_losses(
    engine: Engine, micro_batches: list[Batch], runtime: Runtime, *, languages: Sequence[str]
) -> LanguageLosses:
    """Losses of these micro-batches on every data-parallel rank, without gradients."""
    metrics = engine.forward_backward(
        micro_batches,
        partial(forward_step, device=runtime.device),
        **_shape(micro_batches),
        forward_only=True,
    )
    return reduce_losses(metrics, runtime, languages, False)[0]


def reduce_losses(
    metrics: list[dict[str, Any]], runtime: Runtime, languages: Sequence[str], flag: bool
) -> tuple[LanguageLosses, bool]:
    """Sum the micro-batches' losses over the world and tell every rank: one small all-reduce.

    Of each last pipeline stage's tensor-parallel ranks one contributes: the others hold copies.
    Context-parallel ranks each hold other tokens. The flag (true on every rank if on any) rides
    along.
    """
    losses = LanguageLosses(languages, device=runtime.device)
    if runtime.is_last_pipeline_stage and runtime.tensor_parallel_rank == 0:
        for entry in metrics:
            batch: Batch = entry["batch"]
            losses.add(entry["loss"], batch.loss_mask, batch.language_ids)
    packed = torch.cat([losses.totals.flatten(), losses.totals.new_tensor([float(flag)])])
    dist.all_reduce(packed)
    packed = packed.cpu()
    losses.totals = packed[:-1].view(-1, 2)
    return losses, bool(packed[-1] > 0)


class _Shape(TypedDict):
    seq_length: int
    micro_batch_size: int


def _shape(micro_batches: list[Batch]) -> _Shape:
    micro_batch_size, seq_length = micro_batches[0].tokens.shape
    return {"seq_length": seq_length, "micro_batch_size": micro_batch_size}
