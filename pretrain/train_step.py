"""One optimizer step, and the forward function that training and evaluation share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from models.language_model import LossOutput
from parallel.context_parallel import context_parallel_group, shard_sequence
from parallel.engine import Engine
from parallel.progress_beacon import beacon
from parallel.runtime import Runtime
from pretrain.anomaly import Action, Verdict
from pretrain.loss import LanguageLosses

# (mean loss, global gradient norm) -> what to do with the update
Judge = Callable[[float, float], Verdict]


@dataclass(frozen=True)
class StepMetrics:
    """The same on every rank."""

    losses: LanguageLosses
    grad_norm: float
    applied: bool  # False: the update was skipped
    stop_requested: bool  # by any rank
    verdict: Verdict = field(default_factory=Verdict)
    # not the same: on the last pipeline stage those of this rank's micro-batches, [b, s/cp] each,
    # masked tokens included; empty elsewhere
    token_losses: list[Tensor] = field(default_factory=list)


def forward_step(
    micro_batches: Iterator[Batch], model: torch.nn.Module, *, device: torch.device
) -> tuple[Any, Any]:
    """megatron-core's forward-step protocol: model output, and the loss as a function of it."""
    beacon.tick()
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
    judge: Judge | None = None,
) -> StepMetrics:
    """Forward and backward over this rank's micro-batches, reduction, one update.

    All ranks must call it. `stop_requested` is this rank's own wish; the answer is everybody's.
    `judge` decides about the update from numbers that are the same on every rank; without it a
    gradient norm that is not finite is all that prevents one.
    """
    with beacon.stage("forward_backward"):
        metrics = engine.forward_backward(
            micro_batches, partial(forward_step, device=runtime.device), **_shape(micro_batches)
        )
    seen: list[StepMetrics] = []

    def accept(grad_norm: float) -> bool:
        # The norm of rank 0 for all, and not finite if it is so anywhere: ranks whose gradients
        # differ, as after a fault of the hardware, must still do the same.
        finite = math.isfinite(grad_norm)
        numbers = [stop_requested, not finite, grad_norm if runtime.rank == 0 else 0.0]
        losses, (stop, broken, grad_norm) = _sum_over_world(metrics, runtime, languages, numbers)
        if broken and math.isfinite(grad_norm):
            grad_norm = math.nan
        verdict = Verdict() if judge is None else judge(losses.mean(), grad_norm)
        seen.append(StepMetrics(losses, grad_norm, False, stop > 0, verdict))
        return verdict.action is Action.apply and math.isfinite(grad_norm)

    with beacon.stage("optimizer"):
        result = engine.step(learning_rate, accept)
    token_losses = [entry["loss"] for entry in metrics]
    return replace(seen[0], applied=result.applied, token_losses=token_losses)


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
    losses, (any_flag,) = _sum_over_world(metrics, runtime, languages, [flag])
    return losses, any_flag > 0


def _sum_over_world(
    metrics: list[dict[str, Any]],
    runtime: Runtime,
    languages: Sequence[str],
    numbers: Sequence[float],
) -> tuple[LanguageLosses, list[float]]:
    """`reduce_losses`, with any numbers added up over all ranks: the host waits for the device
    once."""
    losses = LanguageLosses(languages, device=runtime.device)
    if runtime.is_last_pipeline_stage and runtime.tensor_parallel_rank == 0:
        for entry in metrics:
            batch: Batch = entry["batch"]
            losses.add(entry["loss"], batch.loss_mask, batch.language_ids)
    more = losses.totals.new_tensor([float(number) for number in numbers])
    packed = torch.cat([losses.totals.flatten(), more])
    dist.all_reduce(packed)
    packed = packed.cpu()
    losses.totals = packed[: -len(numbers)].view(-1, 2)
    return losses, packed[-len(numbers) :].tolist()


class _Shape(TypedDict):
    seq_length: int
    micro_batch_size: int


def _shape(micro_batches: list[Batch]) -> _Shape:
    micro_batch_size, seq_length = micro_batches[0].tokens.shape
    return {"seq_length": seq_length, "micro_batch_size": micro_batch_size}
