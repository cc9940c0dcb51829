"""Trains a small copy of a configuration under its layout and in one process, and compares.

The processes are forked here, on this machine, and talk over gloo: `launch/verify.py` is the
command. What is compared, and within which bounds, stands in `pretrain.parity`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.config import ParallelConfig
from parallel.deepspeed_config import DeepSpeedConfig, EngineKind
from parallel.deepspeed_library import library
from pretrain.config import PretrainConfig
from pretrain.parity import (
    OPTIMIZER,
    Difference,
    Exercise,
    NearTie,
    RankRecord,
    Result,
    compare,
    merge,
    table,
    train_on_rank,
    without_near_ties,
)
from pretrain.shrink import Shrunk

# forked, because importing torch and megatron-core anew takes each process seconds
_FORK = multiprocessing.get_context("fork")
# after the first failure, for the other ranks to fail of their own accord and say why
_GRACE_SECONDS = 1.0


class RanksFailed(RuntimeError):
    """Processes raised, died, or were not done in time; the message has what each of them said."""


def verify(small: Shrunk, *, timeout: float) -> list[Difference]:
    """Differences between the layout and one process. Raises RanksFailed where training fails."""
    exercise = exercise_of(small)
    one_process = ParallelConfig(
        use_distributed_optimizer=False, precision=small.config.parallel.precision
    )

    def alone(exercise: Exercise) -> Result:
        return merge(run_ranks(1, exercise, one_process, timeout))

    exercise, expected = without_near_ties(exercise, alone)
    deepspeed = None
    if small.config.engine is EngineKind.deepspeed:
        library()  # imported once, for all that are forked
        deepspeed = small.config.deepspeed
    ranks = run_ranks(small.world_size, exercise, small.config.parallel, timeout, deepspeed)
    return compare(merge(ranks), expected)


def exercise_of(small: Shrunk) -> Exercise:
    config = small.config
    return Exercise(
        model=config.model,
        vocab_size=small.vocab_size,
        seq_length=config.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        resets=config.data.packing.reset_attention,
        # the learning rate and eps that the bounds are made for
        optimizer=replace(
            OPTIMIZER,
            clip_grad=config.optimizer.clip_grad,
            weight_decay=config.optimizer.weight_decay,
        ),
    )


def describe(small: Shrunk) -> str:
    """Which axes are covered at which size, and what is not as in the launch."""
    model, train = small.config.model, small.config.train
    rows = [
        f"  {axis.name:<22} {'' if axis.launch is None else axis.launch:>6}  {axis.tried:>5}  "
        f"{axis.remark}".rstrip()
        for axis in small.axes
        if axis.launch != 1 or axis.tried != 1
    ]
    return "\n".join(
        [
            f"{small.world_size} processes on this machine, and one to compare them with: "
            f"{model.num_layers} layers of {model.hidden_size}, "
            f"{train.global_batch_size} sequences of {small.config.seq_length} tokens a step",
            f"  {'axis':<22} {'launch':>6}  tried",
            *rows,
            *(f"  not as in the launch: {remark}" for remark in small.remarks),
        ]
    )


def report(config: PretrainConfig, small: Shrunk, *, timeout: float) -> bool:
    """Verify, print what came out, and say whether the layout passed."""
    print(f"{config.model.name}: {describe(small)}", flush=True)
    began = time.monotonic()
    try:
        differences = verify(small, timeout=timeout)
    except RanksFailed as error:
        print(f"\n{error}\n\nFAIL: the training did not run to its end.")
        return False
    except NearTie as error:
        print(f"\nNo verdict: {error}.")
        return False
    print(f"\n{table(differences)}\n")
    passed = all(row.ok for row in differences)
    verdict = (
        "PASS: this layout trains the same model as one process"
        if passed
        else "FAIL: this layout trains another model than one process"
    )
    print(f"{verdict} ({time.monotonic() - began:.0f} s).")
    return passed


def run_ranks(
    world_size: int,
    exercise: Exercise,
    parallel: ParallelConfig,
    timeout: float,
    deepspeed: DeepSpeedConfig | None = None,
) -> list[RankRecord]:
    """`train_on_rank` in as many forked processes; what each recorded, by rank.

    Raises RanksFailed; by then all processes have ended. The calling process must hold no process
    group: a forked one would inherit half of it.
    """
    torch.set_num_threads(1)  # forked processes must not inherit a pool of threads
    with tempfile.TemporaryDirectory(prefix="verify-") as name:
        folder = Path(name)
        processes = [
            _FORK.Process(
                target=_rank,
                args=(folder, rank, world_size, exercise, parallel, timeout, deepspeed),
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            in_time = _wait_for(processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        failed = {
            rank: _last_words(folder, rank, process.exitcode, in_time)
            for rank, process in enumerate(processes)
            if process.exitcode
        }
        if failed:
            raise RanksFailed(
                "\n".join(f"rank {rank} of {world_size}: {text}" for rank, text in failed.items())
            )
        # written a moment ago by a fork of this very process
        return [
            pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)
        ]


def _wait_for(processes: list[Any], timeout: float) -> bool:
    """Until all have ended, or one has failed, or the time is over; whether it was not."""
    deadline = time.monotonic() + timeout
    running = {process.sentinel: process for process in processes}
    while running and (left := deadline - time.monotonic()) > 0:
        for sentinel in wait(list(running), left):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
                timeout = 0.0
    return not running or timeout == 0.0


def _last_words(folder: Path, rank: int, exitcode: int, in_time: bool) -> str:
    with contextlib.suppress(FileNotFoundError):
        return (folder / f"{rank}.error").read_text()
    if exitcode == -9:
        return (
            "stopped, because another rank failed" if in_time else "still busy when time was over"
        )
    return f"ended with exit code {exitcode}"


def _rank(
    folder: Path,
    rank: int,
    world_size: int,
    exercise: Exercise,
    parallel: ParallelConfig,
    timeout: float,
    deepspeed: DeepSpeedConfig | None,
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    warnings.filterwarnings("ignore", module=r"megatron\.")  # about speed, from every rank
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        record = train_on_rank(exercise, parallel, deepspeed)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(record))
        dist.barrier()  # nobody takes connections down that another rank still uses
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # no destructors of groups that others may have left already
