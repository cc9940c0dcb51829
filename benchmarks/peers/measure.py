"""What every peer script shares: its arguments, the batch, the clock, and the line it prints.

Imports torch and the standard library only; runs under each peer's own interpreter.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.jobs import ADAM_BETAS, CLIP_GRAD, JOBS, LEARNING_RATE, WEIGHT_DECAY, Job

RESULT_MARK = "BENCHMARK_RESULT "  # what stands before the one line of JSON on stdout
READY_MARK = "BENCHMARK_READY"  # printed before a step, which then waits for a line on stdin
TURNS_VARIABLE = "BENCHMARK_TURNS"  # set by train_step.py, where it runs two peers step by step


@dataclass(frozen=True)
class Arguments:
    job: Job
    steps: int  # measured steps
    warmup: int  # steps before them
    variant: str  # which of the peer's models, where it has several


def parse_arguments() -> Arguments:
    """Reads the command line, and sets the number of threads and the seed that go with the job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", choices=JOBS, required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--variant", default="")
    given = parser.parse_args()
    job = JOBS[given.job]
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    return Arguments(job=job, steps=given.steps, warmup=given.warmup, variant=given.variant)


def make_batch(job: Job) -> tuple[Tensor, Tensor]:
    """(ids, labels), each [micro_batch_size, seq_length] int64: the same random ids everywhere."""
    generator = torch.Generator().manual_seed(1)
    shape = (job.micro_batch_size, job.seq_length + 1)
    ids = torch.randint(0, job.vocab_size, shape, generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def seconds_waited_for_a_core() -> float:
    """So far, by the main thread; NaN where the kernel does not say (other than Linux).

    Not by all threads: megatron-core's process groups keep dozens that have next to nothing to do,
    and each counts as waiting.
    """
    try:
        # nanoseconds on a core, nanoseconds waiting for one, slices
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return float("nan")


@dataclass
class StepMeter:
    """Measures steps one by one, and the machine's matmul rate right before and after each.

    On a shared machine the wall time of a step says little on its own. The matmul rate around it
    says what the machine could have done at that moment, and CPU-seconds do not count the time in
    which another process had the core. How long that was is measured too: the scheduler does not
    hold up all programs alike.
    """

    warmup: int
    wall_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    # the main thread: ready to run, and no core for it
    waited_seconds: list[float] = field(default_factory=list)
    matmul_gflops: list[float] = field(default_factory=list)  # the better of before and after
    losses: list[float] = field(default_factory=list)  # of every step, warm-up included

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self._matrices = torch.randn(2, 1024, 1024, generator=generator)
        self._seen = 0
        self._matmul_rate()

    def _matmul_rate(self) -> float:
        """Best of six fp32 1024^3 products, in GFLOP/s; 0.15 to 0.3 s."""
        a, b = self._matrices
        best = float("inf")
        for _ in range(6):
            begin = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - begin)
        return 2 * 1024**3 / best / 1e9

    def start(self) -> None:
        if TURNS_VARIABLE in os.environ:
            print(READY_MARK, flush=True)
            if not sys.stdin.readline():
                sys.exit("train_step.py has gone")
        self._before = self._matmul_rate()
        self._waited = seconds_waited_for_a_core()
        self._cpu = time.process_time()
        self._wall = time.perf_counter()

    def stop(self, loss: float | None = None) -> None:
        wall = time.perf_counter() - self._wall
        cpu = time.process_time() - self._cpu
        waited = seconds_waited_for_a_core() - self._waited
        after = self._matmul_rate()
        self._seen += 1
        if loss is not None:
            self.losses.append(loss)
        if self._seen > self.warmup:
            self.wall_seconds.append(wall)
            self.cpu_seconds.append(cpu)
            self.waited_seconds.append(waited)
            self.matmul_gflops.append(max(self._before, after))

    def print_result(self, *, parameters: int, version: str) -> None:
        """The line of JSON that train_step.py looks for.

        `parameters`: the model's trainable parameters as the framework built it; `version`: the
        framework's. Peak memory is the process's ru_maxrss, imports and start-up included.
        """
        result = {
            "version": version,
            "torch": torch.__version__,
            "parameters": parameters,
            "wall_seconds": self.wall_seconds,
            "cpu_seconds": self.cpu_seconds,
            "waited_seconds": self.waited_seconds,
            "matmul_gflops": self.matmul_gflops,
            "losses": self.losses,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print(RESULT_MARK + json.dumps(result), flush=True)


def adamw(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """torch's fused AdamW, for the peers that are a model without an optimizer of its own."""
    return torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=ADAM_BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )


def train(
    arguments: Arguments,
    model: torch.nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    version: str,
) -> None:
    """The shortest training loop, for peers that bring a model only; prints the result.

    `loss_of(ids, labels)` is the mean loss of a batch, both [micro_batch_size, seq_length].
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters)
    ids, labels = make_batch(arguments.job)
    meter = StepMeter(arguments.warmup)
    for _ in range(arguments.warmup + arguments.steps):
        meter.start()
        loss = loss_of(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.stop(loss.item())
    meter.print_result(parameters=sum(p.numel() for p in parameters), version=version)
