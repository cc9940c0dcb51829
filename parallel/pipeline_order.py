"""In which order a pipeline stage works: the forward and backward passes of 1F1B.

Arithmetic only, for whoever asks how much is in flight; megatron-core's schedules do the work
(`pipeline_parallel/schedules.py`, arXiv 2104.04473 section 2.2). Imports neither torch nor
megatron-core.
"""

from typing import NamedTuple


class Pass(NamedTuple):
    forward: bool
    chunk: int  # of the model chunks of this stage


def passes(stage: int, stages: int, chunks: int, micro_batches: int) -> list[Pass]:
    """The passes of one step on pipeline stage `stage` of `stages`, in their order.

    After a warm-up of forward passes alone, each is followed by the backward pass that has waited
    longest; then come the backward passes that are left. The warm-up is stages - stage - 1 passes
    long. With several `chunks` on each stage (interleaved 1F1B) micro-batches go in groups of
    `stages` through the chunks, forward and back, and the warm-up is
    2 (stages - stage - 1) + (chunks - 1) stages passes long.
    """
    total = micro_batches * chunks
    warmup = stages - stage - 1
    if chunks > 1:
        warmup = 2 * warmup + (chunks - 1) * stages
    warmup = min(warmup, total)
    forward = [Pass(True, n // stages % chunks) for n in range(total)]
    backward = [Pass(False, chunks - 1 - n // stages % chunks) for n in range(total)]
    order = forward[:warmup]
    for n in range(total - warmup):
        order += [forward[warmup + n], backward[n]]
    return order + backward[total - warmup :]


def in_flight(stage: int, stages: int, chunks: int, micro_batches: int) -> int:
    """Most passes of `stage` that have gone forward and not yet back at one time."""
    most = now = 0
    for step in passes(stage, stages, chunks, micro_batches):
        now += 1 if step.forward else -1
        most = max(most, now)
    return most
