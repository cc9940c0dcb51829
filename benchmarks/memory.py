"""Predicted memory (models/memory.py) against the memory that a training step was seen to take.

    python -m benchmarks.memory [NAME ...]

Each case runs in real processes over gloo. What is there before the first step is counted tensor by
tensor; what the step takes on top is the peak of what torch's profiler sees its CPU allocator hand
out and take back, which is exact whatever the operating system does. Prints a table by part. With
engine=deepspeed a first step goes before, for ZeRO-3 gathers otherwise in it.
"""

from __future__ import annotations

import os
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from benchmarks.memory_cases import CASES, VOCABULARY, Case
from models.memory import StageMemory, predict_memory, readable
from parallel.config import OptimizerConfig


@dataclass(frozen=True)
class Measured:
    """Bytes that one rank took in a step; with DeepSpeed all but parameters is `optimizer`."""

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    step: int  # what the step took on top, at most
    expert_load: float  # rows of this rank's experts over the even share, the mean of all layers

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.step


# ---- what a rank does ---------------------------------------------------------------------------


def measure_on_rank(case: Case) -> Measured:
    """A training step of the case; all ranks of it call this, each in a process."""
    from models.build import build_model
    from parallel.runtime import initialize, shutdown
    from pretrain.parity import Exercise, micro_batches
    from pretrain.train_step import train_step

    runtime = initialize(case.parallel, seed=1)
    vocabulary = case.model.vocab_size or VOCABULARY
    foreign = set(storages())
    chunks = build_model(case.model, case.parallel, runtime, vocab_size=vocabulary, seed=1)
    engine = make_engine(case, chunks, runtime)
    loads = watch_experts(case, chunks)
    exercise = Exercise(
        model=case.model,
        vocab_size=vocabulary,
        seq_length=case.seq_length,
        micro_batch_size=case.micro_batch_size,
        global_batch_size=(case.micro_batches * case.micro_batch_size * runtime.data_parallel_size),
    )

    def step() -> None:
        batches = micro_batches(exercise, 0, runtime.data_parallel_rank, runtime.data_parallel_size)
        if case.resets:
            batches = [with_documents(batch) for batch in batches]
        train_step(
            engine,
            batches,
            runtime,
            learning_rate=1e-3,
            languages=("de", "hi", "zh"),
            stop_requested=False,
        )

    if case.deepspeed is None:
        weights, gradients, optimizer = state_bytes(engine)
        with waiting_for_gloos_threads():
            peak = peak_bytes(step, times=1 if case.world_size == 1 else 3)
    else:
        weights, gradients = _bytes(chunks[0].parameters()), 0
        with waiting_for_gloos_threads():
            held, peak = least_of_steps(step, foreign)
        optimizer = held - weights
    stage = runtime.pipeline_parallel_rank
    shutdown(runtime)
    return Measured(
        stage, weights, gradients, optimizer, peak, sum(loads) / len(loads) if loads else 1.0
    )


@contextmanager
def waiting_for_gloos_threads() -> Iterator[None]:
    """After each collective they get the time to let go of its tensors.

    They hold them a moment longer than whoever waits for the collective, and on a busy machine so
    long that a step seems to need a seventh more.
    """
    from torch._C._distributed_c10d import Work

    original = Work.wait

    def wait(self: Any, *timeout: Any) -> Any:
        done = original(self, *timeout)
        time.sleep(0.003)
        return done

    setattr(Work, "wait", wait)  # noqa: B010
    try:
        yield
    finally:
        setattr(Work, "wait", original)  # noqa: B010


def make_engine(case: Case, chunks: Any, runtime: Any) -> Any:
    from parallel.deepspeed_engine import DeepSpeedEngine
    from parallel.engine import MegatronEngine

    if case.deepspeed is None:
        return MegatronEngine(chunks, case.parallel, OptimizerConfig(), runtime)
    return DeepSpeedEngine(chunks, case.parallel, OptimizerConfig(), case.deepspeed, runtime)


def least_of_steps(step: Callable[[], None], foreign: set[int]) -> tuple[int, int]:
    """(bytes held between steps, bytes a step takes on top) of the leanest of three later steps.

    Counted anew before each, for what gloo's threads free is not seen by the profiler. foreign:
    addresses of storages that do not count.
    """
    step()
    found = []
    for _ in range(3):
        there = storages()
        held = sum(size for address, size in there.items() if address not in foreign)
        found.append((held, peak_bytes(step, times=1)))
    return min(found, key=sum)


def storages() -> dict[int, int]:
    """Bytes of all tensors of this process by their storage's address."""
    import gc

    import torch

    gc.collect()
    # by their exact types: torch.compile holds others, which stand for tensors and have no memory
    known = (torch.Tensor, torch.nn.Parameter)
    tensors = [found for found in gc.get_objects() if type(found) in known]
    gradients = [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    held = [t.untyped_storage() for t in (*tensors, *gradients) if t.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in held}


def with_documents(batch: Any, length: int = 50) -> Any:
    """The batch as documents of this many tokens, packed one after the other."""
    import torch

    number = torch.arange(batch.tokens.shape[1]) // length
    documents = number.int().expand(batch.tokens.shape).contiguous()
    return replace(batch, documents=documents, reset_positions=True)


def watch_experts(case: Case, chunks: Iterable[Any]) -> list[float]:
    """A list that is filled with each pass's rows of this rank's experts over the even share."""
    from models.experts import ExpertFeedForward, StackedExperts

    parallel, loads = case.parallel, []
    own = case.micro_batch_size * case.seq_length // parallel.context_parallel_size
    if parallel.sequence_parallel:
        own //= parallel.tensor_model_parallel_size
    even = own * case.model.moe.router_topk * parallel.expert_tensor_parallel_size

    def note(module: Any, arguments: tuple[Any, ...]) -> None:
        loads.append(len(arguments[0]) / even)

    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, ExpertFeedForward | StackedExperts):
                module.register_forward_pre_hook(note)
    return loads


def state_bytes(engine: Any) -> tuple[int, int, int]:
    """Bytes of parameters, gradient buffers, and of what the optimizer holds beside them."""
    chunks = engine.chunks
    buffers = [b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    weights = _bytes([p for chunk in chunks for p in chunk.parameters()])
    gradients = _bytes([buffer.grad_data for buffer in buffers])
    optimizers = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    held = [
        tensor
        for one in optimizers
        if one.optimizer is not None
        for parameter, state in one.optimizer.state.items()
        for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])
    ]
    known = {p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()}
    return weights, gradients, _bytes(held, known)


def _bytes(tensors: Iterable[Any], known: Iterable[int] = ()) -> int:
    """Of the tensors' storages, each once, without those at the addresses `known`."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(s.nbytes() for address, s in storages.items() if address not in set(known))


def peak_bytes(action: Callable[[], None], times: int) -> int:
    """Most bytes of torch's CPU allocator that `action` holds at a time, beside what was there.

    The least of several `times`, with what earlier ones left: gloo's threads hold on to a tensor a
    moment longer (`waiting_for_gloos_threads`), and have let go of all before the next time.
    """
    import torch

    spans = []
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:  # one for all times: it knows only the size of what it has seen allocated
        for _ in range(times):
            begin = time.time_ns()
            action()
            spans.append((begin, time.time_ns()))
            time.sleep(0.05)  # for those threads
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    times_ns = [event.start_ns() for event in events]
    held = [0, *accumulate(event.nbytes() for event in events)]  # before and after each
    return min(
        max(held[bisect_left(times_ns, begin) : bisect_right(times_ns, end) + 1])
        for begin, end in spans
    )


# ---- what the parent does -----------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Of one pipeline stage."""

    predicted: StageMemory
    measured: Measured

    @property
    def deviation(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted.total / self.measured.total - 1


def compare(case: Case) -> list[Comparison]:
    """Runs the case and predicts it, with the load of experts that was seen.

    Of the ranks of a stage, which should take the same, the one counts that takes least.
    """
    from tests.distributed import run_on_gloo

    ranks = run_on_gloo(case.world_size, measure_on_rank, case, timeout=280)
    stages = [
        min((rank for rank in ranks if rank.stage == stage), key=lambda rank: rank.total)
        for stage in range(case.parallel.pipeline_model_parallel_size)
    ]
    return [
        Comparison(predicted(case, found.expert_load).stages[found.stage], found)
        for found in stages
    ]


def predicted(case: Case, expert_load: float = 1.0) -> Any:
    return predict_memory(
        case.model,
        case.parallel,
        world_size=case.world_size,
        seq_length=case.seq_length,
        micro_batch_size=case.micro_batch_size,
        micro_batches=case.micro_batches,
        vocab_size=VOCABULARY if case.model.vocab_size is None else None,
        device="cpu",
        expert_load=expert_load,
        resets_attention=case.resets,
        resets_positions=case.resets,
        deepspeed=case.deepspeed,
    )


def main(names: list[str]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"{'case':<32} stage   {'state':^23}   {'step':^23}   {'in all':^23} deviation")
    for name in names or CASES:
        for row in compare(CASES[name]):
            there, seen = row.predicted, row.measured
            state = there.parameters + there.gradients + there.optimizer
            cells = [
                (state, seen.total - seen.step),
                (there.total - state, seen.step),
                (there.total, seen.total),
            ]
            text = "   ".join(f"{readable(a):>11} {readable(b):>11}" for a, b in cells)
            if CASES[name].deepspeed is not None:  # its gradients come and go with a step
                text = f"{'':52}{text[52:]}"
            print(
                f"{name:<32} {there.stage:>5}   {text} {row.deviation:>+9.1%}  {there.moment}",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
