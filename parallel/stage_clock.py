"""Where the time of an optimizer step goes on this rank: stages, and communication inside them.

    data        waiting for the batch
    forward     forward passes
    backward    backward passes
    schedule    the schedule around these two: zeroing gradients, messages between pipeline stages
    gradients   summing gradients over the ranks that share weights
    optimizer   gradient norm, clipping, update, gathering what ZeRO has shared out
    other       the rest: random seeds, summing the losses

Each stage has two times: its own, and that of torch.distributed calls inside it, which is transfer
and waiting for other ranks. A rank that others wait for is the one with little of the second.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from parallel.megatron import DistributedDataParallel  # megatron-core behind its bridge

STAGES = ("data", "forward", "backward", "schedule", "gradients", "optimizer", "other")

# torch.distributed's calls that can wait for another rank. isend and irecv only begin a message
# (and are compared by identity in P2POp); who needs it waits in Work.wait, which is timed too.
_CALLS = (
    "all_reduce", "reduce", "broadcast", "barrier", "send", "recv", "batch_isend_irecv",
    "all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object",
    "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single",
    "all_to_all", "all_to_all_single", "broadcast_object_list",
)  # fmt: skip
_OURS = ("megatron.core.", "parallel.", "models.", "pretrain.")
# parallel.collectives has wrapped these two, so they are not known by identity
_BUFFER_CALLS = ("dist_all_gather_func", "dist_reduce_scatter_func")

Table = dict[str, tuple[float, float]]  # stage -> (seconds of its own, seconds in communication)


class StageClock:
    """Times the stages of single steps, from outside: what it watches is wrapped for that step.

    On a CPU marks are the host's clock, on a GPU events on the stream that computes, read when the
    step is over. A step that is not measured pays for one comparison at `stage`; a measured one for
    two marks a stage and call: about 2 µs each on a CPU.
    """

    def __init__(self, engine: Any, device: torch.device) -> None:
        self._engine = engine
        self._on_gpu = device.type == "cuda"
        self._active = False
        self._annotate = False
        self._marks: list[tuple[Any, str, bool]] = []  # (when, stage, communicating) from then on
        self._stages: list[str] = []
        self._calls = 0  # torch.distributed calls we are in

    @contextlib.contextmanager
    def measure(self, *, annotate: bool = False) -> Iterator[None]:
        """Around one step. annotate: name the stages in a torch.profiler trace as well."""
        with contextlib.ExitStack() as undo:
            for owner, name, stage in self._engine.stage_calls():
                _replace(undo, owner, name, self._in_stage(getattr(owner, name), stage))
            for owner, name in _communication_calls():
                _replace(undo, owner, name, self._in_communication(getattr(owner, name), name))
            self._marks, self._stages, self._calls = [], ["other"], 0
            self._active, self._annotate = True, annotate
            self._mark()
            try:
                yield
            finally:
                self._mark()
                self._active = False

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Around a part of the step that is called here and not in the engine."""
        if not self._active:
            yield
            return
        self._stages.append(name)
        self._mark()
        try:
            with self._annotation(name):
                yield
        finally:
            self._stages.pop()
            self._mark()

    def table(self) -> Table:
        """Seconds of each stage in the step measured last; waits for the device."""
        if self._on_gpu and self._marks:
            self._marks[-1][0].synchronize()
        seconds = {stage: [0.0, 0.0] for stage in STAGES}
        for (start, stage, communicating), (end, _, _) in zip(
            self._marks, self._marks[1:], strict=False
        ):
            elapsed = start.elapsed_time(end) / 1000 if self._on_gpu else end - start
            seconds[stage][communicating] += elapsed
        return {stage: (own, communication) for stage, (own, communication) in seconds.items()}

    def _mark(self) -> None:
        when: Any
        if self._on_gpu:
            when = torch.cuda.Event(enable_timing=True)
            when.record()
        else:
            when = time.perf_counter()
        self._marks.append((when, self._stages[-1], self._calls > 0))

    def _annotation(self, name: str) -> Any:
        return torch.profiler.record_function(name) if self._annotate else contextlib.nullcontext()

    def _in_stage(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.stage(stage):
                return function(*args, **kwargs)

        return run

    def _in_communication(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._calls or not self._active:  # a call inside a call
                return function(*args, **kwargs)
            self._calls = 1
            self._mark()
            try:
                with self._annotation(f"communication: {name}"):
                    return function(*args, **kwargs)
            finally:
                self._calls = 0
                self._mark()

        return run


def _replace(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until `undo` closes: an instance's method goes back to its class."""
    own = vars(owner)
    if name in own:
        undo.callback(setattr, owner, name, own[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


@functools.cache
def _communication_calls() -> tuple[tuple[Any, str], ...]:
    """(owner, name) wherever one of torch.distributed's calls can be reached by name."""
    calls = {id(getattr(dist, name)) for name in _CALLS if hasattr(dist, name)}
    found: list[tuple[Any, str]] = [(dist.Work, "wait")]
    for module_name, module in list(sys.modules.items()):
        if module is not None and (module is dist or module_name.startswith(_OURS)):
            found += [(module, name) for name, value in vars(module).items() if id(value) in calls]
    buffers = sys.modules[DistributedDataParallel.__module__.rpartition(".")[0]]
    module = sys.modules[f"{buffers.__name__}.param_and_grad_buffer"]
    found += [(module, name) for name in _BUFFER_CALLS if (module, name) not in found]
    return tuple(found)
