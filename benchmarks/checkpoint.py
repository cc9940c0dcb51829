"""What a checkpoint costs: the training's wait, and reading and writing beside the bare disk.

    python -m benchmarks.checkpoint --millions 50 200 --rounds 5
    python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.checkpoint

Weights and AdamW's moments of a decoder that has taken a step, under the distributed optimizer, in
`--folder` on the disk in question. A round does, one after the other, so that a busy machine is
busy for all of them:

    disk write    the same bytes from memory to one file for each rank, and fsync (as dd does), the
                  disk kept busy from early on
    copy          the same bytes from memory to memory, which the kernel has handed out before, with
                  torch's threads: what no asynchronous save goes below
    synchronous   Checkpoints.save with checkpoint.async_save=false
    stall         Checkpoints.save with checkpoint.async_save=true, until the training may go on
    asynchronous  the same, until the checkpoint is there
    disk read     the files of that checkpoint front to back, each rank its own, none of them
                  cached and none of them left in the cache: the disk's own rate
    plain read    the same as a program reads that asks for nothing, and dd: they stay in the cache
    load          Checkpoints.resume: checksums compared and state loaded, nothing cached

Rates are of the state's size. Ratios are taken in each round; medians are printed, and single
figures written as JSON. The first round makes the memory of the copy, plans who writes what, and
is not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from benchmarks.own_training import OwnTraining
from models.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.page_cache import PagesBehind
from pretrain.checkpoint import Checkpoints
from pretrain.config import CheckpointConfig
from pretrain.train_state import TrainState

WAYS = (
    *("disk write", "copy", "synchronous", "stall", "asynchronous"),
    *("disk read", "plain read", "load"),
)
VOCAB, SEQ_LENGTH = 8192, 32
STALL_GOAL = 0.05  # of a synchronous save
COPY_GOAL = 1.1  # times the bare copy
DISK_GOAL = 0.8  # of the disk's rate, for states that are large
_BLOCK_BYTES = 4 << 20
_HAND_OVER_BYTES = 32 << 20


def model_of(millions: float) -> ModelConfig:
    """A decoder with about so many parameters: 12 h^2 a layer, and the embedding."""
    hidden = 64 if millions < 2 else 512 if millions < 100 else 1024
    layers = max(1, round((millions * 1e6 - VOCAB * hidden) / (12 * hidden**2)))
    return ModelConfig(
        name="checkpoint",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=hidden // 64,
        max_position_embeddings=SEQ_LENGTH,
        vocab_size=VOCAB,
    )


class Rounds:
    """One size of a model on all ranks. Every method is called by all ranks."""

    def __init__(self, training: OwnTraining, folder: Path, *, checksums: bool) -> None:
        self.training = training
        self.checksums = checksums
        self.folder = folder
        self.seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        self.bytes = 0  # of a checkpoint, over all ranks
        # kept for all rounds, as a run keeps its own: what a save plans serves the next one
        self._behind = self._checkpoints(async_save=True)
        self._before = self._checkpoints(async_save=False)
        self._payload = self._copy = torch.empty(0, dtype=torch.uint8)

    def _checkpoints(self, *, async_save: bool) -> Checkpoints:
        config = CheckpointConfig(
            keep_last=0, async_save=async_save, verify_integrity=self.checksums
        )
        return Checkpoints(self.folder / "checkpoints", config, {})

    def run(self) -> None:
        """One round; the first also measures the size."""
        engine, state = self.training.engine, TrainState(step=1)
        self._clear()
        synchronous = self._timed(lambda: self._before.save(engine, state))
        self._measure_size()
        self._clear()
        self._note("disk write", self._write_to_disk)
        self._note("copy", lambda: self._copy.copy_(self._payload))
        self.seconds["synchronous"].append(synchronous)
        begin = time.perf_counter()
        self._note("stall", lambda: self._behind.save(engine, state))
        self._behind.wait(1)
        self.seconds["asynchronous"].append(time.perf_counter() - begin)
        self._forget_cached()
        self._note("disk read", lambda: self._read_from_disk(kept=False))
        self._forget_cached()
        self._note("plain read", lambda: self._read_from_disk(kept=True))
        self._forget_cached()
        self._note("load", lambda: self._checkpoints(async_save=True).resume(engine))

    def _timed(self, action: Callable[[], object]) -> float:
        """Seconds until all ranks have done it."""
        dist.barrier()
        begin = time.perf_counter()
        action()
        dist.barrier()
        return time.perf_counter() - begin

    def _note(self, way: str, action: Callable[[], object]) -> None:
        self.seconds[way].append(self._timed(action))

    def _files(self) -> list[Path]:
        return sorted((self.folder / "checkpoints" / "step_00000001").iterdir())

    def _my_files(self) -> list[Path]:
        return self._files()[dist.get_rank() :: dist.get_world_size()]

    def _measure_size(self) -> None:
        if self.bytes == 0:
            self.bytes = sum(path.stat().st_size for path in self._files())
            mine = self.bytes // dist.get_world_size()
            self._payload = torch.randint(256, (mine,), dtype=torch.uint8)
            self._copy = torch.zeros_like(self._payload)

    def _write_to_disk(self) -> None:
        content = self._payload.numpy().data
        with open(self.folder / f"disk_{dist.get_rank()}", "wb", buffering=0) as file:
            for start in range(0, len(content), _BLOCK_BYTES):
                file.write(content[start : start + _BLOCK_BYTES])
                if start % _HAND_OVER_BYTES == 0:  # or the disk would idle at first
                    os.posix_fadvise(file.fileno(), 0, start, os.POSIX_FADV_DONTNEED)
            os.fsync(file.fileno())

    def _read_from_disk(self, *, kept: bool) -> None:
        block = memoryview(bytearray(_BLOCK_BYTES))
        for path in self._my_files():
            with open(path, "rb", buffering=0) as file:
                behind = PagesBehind(file.fileno())  # new pages would cost more than the disk
                at = 0
                while count := file.readinto(block):
                    at += count
                    if not kept:
                        behind.done_with(at - count, at)

    def _forget_cached(self) -> None:
        for path in self._my_files():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _clear(self) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        with suppress(FileNotFoundError):
            (self.folder / f"disk_{dist.get_rank()}").unlink()
        dist.barrier()


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians over rounds of one way's seconds against another's of the same round."""

    def ratio(one: str, other: str) -> float:
        return median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))

    return {
        "stall / synchronous": ratio("stall", "synchronous"),
        "copy / synchronous": ratio("copy", "synchronous"),
        "stall / copy": ratio("stall", "copy"),
        "disk write / synchronous": ratio("disk write", "synchronous"),
        "disk write / asynchronous": ratio("disk write", "asynchronous"),
        "disk read / load": ratio("disk read", "load"),
        "plain read / load": ratio("plain read", "load"),
    }


def table(parameters: int, ranks: int, size: int, seconds: dict[str, list[float]]) -> str:
    lines = [
        f"{parameters / 1e6:.0f} M parameters, {ranks} rank(s), {size / 1e9:.2f} GB, "
        f"{len(seconds['copy'])} rounds",
        "",
        "| | seconds | GB/s |",
        "|---|---|---|",
    ]
    for way in WAYS:
        middle = median(seconds[way])
        lines.append(f"| {way} | {middle:.3f} | {size / middle / 1e9:.2f} |")
    lines += ["", "| ratio, median over rounds | |", "|---|---|"]
    lines += [f"| {name} | {value:.3f} |" for name, value in ratios(seconds).items()]
    return "\n".join([*lines, "", verdict(ratios(seconds)), *verdict_on_disk(ratios(seconds)), ""])


def verdict(ratio: dict[str, float]) -> str:
    """Whether the training waits for less than 5 % of a synchronous save, and if not, whether for
    much more than the copy of its state."""
    stall, copies = ratio["stall / synchronous"], ratio["stall / copy"]
    said = f"the stall is {stall:.1%} of a synchronous save and {copies:.2f} times the bare copy"
    if stall < STALL_GOAL:
        return f"{said}: below {STALL_GOAL:.0%}"
    bound = "bound by memory" if copies <= COPY_GOAL else "not for the copy alone"
    return f"{said}: {bound}"


def verdict_on_disk(ratio: dict[str, float]) -> list[str]:
    """Whether saving and loading come near the disk's own rate."""
    rates = {"save": ratio["disk write / synchronous"], "load": ratio["disk read / load"]}
    return [
        f"a {name} has {rate:.0%} of the disk's rate: "
        f"{'at least' if rate >= DISK_GOAL else 'below'} {DISK_GOAL:.0%}"
        for name, rate in rates.items()
    ]


def measure(millions: float, rounds: int, folder: Path, *, checksums: bool) -> dict[str, object]:
    """All rounds of one size; prints the table on rank 0 and returns what stands in the JSON."""
    parallel = ParallelConfig()
    training = OwnTraining(model_of(millions), parallel, seq_length=SEQ_LENGTH, micro_batch_size=1)
    with training:
        training.step()
        job = Rounds(training, folder, checksums=checksums)
        try:
            for _ in range(rounds + 1):
                job.run()
            ranks, rank = dist.get_world_size(), dist.get_rank()
        finally:
            job._clear()
    seconds = {way: values[1:] for way, values in job.seconds.items()}
    if rank == 0:
        print(table(training.parameters, ranks, job.bytes, seconds), flush=True)
    return {
        "parameters": training.parameters,
        "ranks": ranks,
        "bytes": job.bytes,
        "seconds": seconds,
        "ratios": ratios(seconds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=float, nargs="+", default=[50.0, 200.0])
    parser.add_argument("--rounds", type=int, default=5, help="that count; one more warms up")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-checkpoint"))
    parser.add_argument("--checksums", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    gc.freeze()  # as launch/pretrain.py does: what was imported is not looked through for garbage
    results = [
        measure(one, options.rounds, options.folder, checksums=options.checksums)
        for one in options.millions
    ]
    if options.json is not None and os.environ.get("RANK", "0") == "0":
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
