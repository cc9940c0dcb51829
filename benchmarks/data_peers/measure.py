"""What every loader peer shares: the interface it fills, the clock, and the protocol.

    python -m benchmarks.data_peers.NAME --raw DIR --work DIR --task serve|start|save|resume ...

prepare   write the peer's own format, once
serve     read commands from stdin, one JSON object a line, and answer each with one line
start     the cost of opening for a planned number of samples, in a process that did nothing else
save      draw K samples, write the state, and a digest of the samples that follow
resume    in another process: from the state to the same samples

Imports numpy and the standard library only; runs under each peer's own interpreter.
"""

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_job import (
    BATCH_SIZE,
    RATIOS,
    SEED,
    SEQ_LENGTH,
    Copying,
    language_of,
    make_raw,
    worst_error,
)

RESULT_MARK = "BENCHMARK_RESULT "  # what stands before each answer on stdout
RESUME_AT = 1000  # samples drawn before the state is taken
RESUME_COMPARED = 64
_COPY_SECONDS = 0.05


class Loader:
    """One peer. Subclasses fill in what differs; sizes are those of benchmarks.data_job."""

    package = ""  # whose version stands in the table
    # what the number of planned samples means to it: "asked" it is told, "endless" it needs no
    # number, "data" it ends when the data do, whatever is planned
    length = "asked"
    # samples that `sample_at` can give by number; 0: it only goes on from one to the next
    numbers = 0

    def __init__(self, raw: Path, work: Path, variant: str):
        self.raw, self.work, self.variant = raw, work, variant

    @property
    def index_folder(self) -> Path:
        """What it writes while opening, if anything, belongs here."""
        return self.work / "index"

    def prepare(self) -> None:
        """Writes its own format under `work`."""

    def open(self, planned: int) -> None:
        """From nothing to where the first sample can be drawn."""
        raise NotImplementedError

    def sample(self) -> Any:
        """The next sample: at least seq_length ids, in the type it comes in."""
        raise NotImplementedError

    def sample_at(self, number: int) -> Any:
        """As `sample`, of a number below `numbers`."""
        raise NotImplementedError

    def batch(self) -> Any:
        """The next batch_size samples, collated as this peer does it."""
        raise NotImplementedError

    def state(self) -> Any:
        """What has to be saved after the samples so far; pickled."""
        raise NotImplementedError

    def resume(self, state: Any) -> None:
        """After `open` in a new process."""
        raise NotImplementedError

    def exact_counts(self, samples: int) -> np.ndarray:
        """Samples of each language before this one, where the peer can tell without drawing."""
        raise NotImplementedError


def seconds_waited_for_a_core() -> float:
    """So far, by the main thread; NaN where the kernel does not say (other than Linux)."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return float("nan")


def memory_mb() -> float:
    """Anonymous and shared memory of this process; pages of mapped files are not in it."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = value
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1024


def folder_mb(folder: Path) -> float:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20


def timed(call: Callable[[], object], samples_per_call: int, seconds: float) -> dict[str, float]:
    """Calls for so many seconds, after one call that does not count."""
    call()
    calls, waited = 0, seconds_waited_for_a_core()
    cpu, start = time.process_time(), time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        call()
        calls += 1
    cpu = time.process_time() - cpu
    samples = calls * samples_per_call
    return {
        "samples_per_second": samples / passed,
        "cpu_us_per_sample": cpu / samples * 1e6,
        "waited_share": (seconds_waited_for_a_core() - waited) / passed,
    }


def serve(loader: Loader, planned: int, seconds: float) -> None:
    """Answers until stdin ends."""
    copying = Copying(loader.raw)
    random = np.random.default_rng(SEED)
    opened = False
    for line in sys.stdin:
        asked = json.loads(line)
        command = asked["do"]
        if not opened:
            loader.open(planned)
            opened = True
        if command == "ratios":
            drawn = np.array([language_of(_ids(loader.sample())) for _ in range(asked["samples"])])
            answer: dict[str, Any] = {"worst_error": worst_error(drawn)}
        elif command == "counts":
            errors = [abs(loader.exact_counts(n) - RATIOS * n).max() for n in asked["prefixes"]]
            answer = {"worst_errors": [float(error) for error in errors]}
        elif command == "singles":
            answer = timed(loader.sample, 1, seconds)
        elif command == "anywhere":
            if not loader.numbers:
                _answer({})
                continue
            answer = timed(_anywhere(loader, random), 1, seconds)
        elif command == "batches":
            before = copying.samples_per_second(_COPY_SECONDS)
            answer = timed(loader.batch, BATCH_SIZE, seconds)
            after = copying.samples_per_second(_COPY_SECONDS)
            answer["share_of_copying"] = answer["samples_per_second"] / ((before + after) / 2)
        else:
            raise ValueError(f"unknown command {command}")
        _answer(answer)


def start(loader: Loader, planned: int) -> dict[str, Any]:
    shutil.rmtree(loader.index_folder, ignore_errors=True)
    memory, disk = memory_mb(), folder_mb(loader.work)
    cpu, began = time.process_time(), time.perf_counter()
    loader.open(planned)
    loader.sample()
    result: dict[str, Any] = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "memory_mb": memory_mb() - memory,
        "disk_mb": folder_mb(loader.work) - disk,
    }
    if result["disk_mb"] > 0:
        began = time.perf_counter()
        loader.open(planned)
        loader.sample()
        result["seconds_from_disk"] = time.perf_counter() - began
    return result


def save(loader: Loader, planned: int, state_file: Path) -> dict[str, Any]:
    loader.open(planned)
    for _ in range(RESUME_AT):
        loader.sample()
    content = pickle.dumps(loader.state())
    state_file.write_bytes(content)
    return {"digest": _digest(loader), "state_bytes": len(content)}


def resume(loader: Loader, planned: int, state_file: Path) -> dict[str, Any]:
    """The cost counts from the opened loader to the first sample after the resume."""
    state = pickle.loads(state_file.read_bytes())
    loader.open(planned)
    start = time.perf_counter()
    loader.resume(state)
    first = _ids(loader.sample())
    seconds = time.perf_counter() - start
    return {"digest": _digest(loader, first), "seconds": seconds}


def run(make: Callable[[Path, Path, str], Loader]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--variant", default="")
    parser.add_argument(
        "--task", choices=("prepare", "serve", "start", "save", "resume"), required=True
    )
    parser.add_argument("--planned", type=int, default=10**6)
    parser.add_argument("--seconds", type=float, default=0.4, help="of one turn of serving")
    parser.add_argument("--state", type=Path)
    given = parser.parse_args()
    make_raw(given.raw)
    given.work.mkdir(parents=True, exist_ok=True)
    loader = make(given.raw, given.work, given.variant)
    if given.task == "prepare":
        began = time.perf_counter()
        loader.prepare()
        _answer({"seconds": time.perf_counter() - began})
    elif given.task == "serve":
        version = importlib.metadata.version(loader.package)
        _answer({"version": version, "length": loader.length})
        serve(loader, given.planned, given.seconds)
    elif given.task == "start":
        _answer(start(loader, given.planned))
    elif given.task == "save":
        _answer(save(loader, given.planned, given.state))
    else:
        _answer(resume(loader, given.planned, given.state))
    sys.stdout.flush()
    # some peers leave threads and processes behind that would keep this one from ending
    os._exit(0)


def _anywhere(loader: Loader, random: np.random.Generator) -> Callable[[], object]:
    numbers = itertools.cycle(random.integers(0, loader.numbers, 1 << 12).tolist())
    return lambda: loader.sample_at(next(numbers))


def _ids(sample: Any) -> np.ndarray:
    return np.asarray(sample).reshape(-1)[:SEQ_LENGTH].astype(np.int64)


def _digest(loader: Loader, *already: np.ndarray) -> str:
    digest = hashlib.sha256()
    for ids in already:
        digest.update(ids.tobytes())
    for _ in range(RESUME_COMPARED - len(already)):
        digest.update(_ids(loader.sample()).tobytes())
    return digest.hexdigest()


def _answer(content: dict[str, Any]) -> None:
    print(RESULT_MARK + json.dumps(content), flush=True)
