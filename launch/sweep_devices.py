"""Which processors the trainings of a sweep get on this machine.

A run is `processes_per_run` processes; each has one GPU, or with device=cpu_core as many cores as
threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data.scaling_law.sweep_config import Device, SweepConfig

# torchrun kills its workers so many seconds after it told them to stop; its own 30 may not be
# enough for the step at work and the checkpoint.
SHUTDOWN_SECONDS = 300
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def training_command(config: SweepConfig, script: Path, words: Sequence[str]) -> list[str]:
    """What starts one run: its script, under torchrun where it is several processes."""
    if config.processes_per_run == 1:
        return [sys.executable, str(script), *words]
    processes = ["--standalone", "--nproc-per-node", str(config.processes_per_run)]
    return [sys.executable, "-m", "torch.distributed.run", *processes, str(script), *words]


def usable_gpus(config: SweepConfig, number: int | None) -> list[str]:
    """The GPUs that the runner may give away, as CUDA_VISIBLE_DEVICES names them; [] for CPU runs.

    number: the first so many of this machine's; None: those of CUDA_VISIBLE_DEVICES, or all that
    nvidia-smi lists. Raises ValueError where they are not enough for one run.
    """
    if config.device is not Device.gpu:
        if number is not None:
            raise ValueError(f"--gpus {number}: this sweep has device=cpu_core; leave --gpus out")
        return []
    found = _visible() if number is None else (_visible(asked=False) or _numbered(number))[:number]
    if len(found) < config.processes_per_run:
        told = (
            f"--gpus {number}" if number is not None else "nvidia-smi -L and CUDA_VISIBLE_DEVICES"
        )
        raise ValueError(
            f"device=gpu and processes_per_run={config.processes_per_run}: this machine has "
            f"{len(found)} GPUs by {told}; run the sweep where there are enough, say how many "
            "there are with --gpus N, or submit it with --slurm"
        )
    return found


def most_jobs(config: SweepConfig, gpus: Sequence[str], cores: int, threads: int) -> int:
    """Trainings that fit on the machine at a time; at least one."""
    if config.device is Device.gpu:
        return len(gpus) // config.processes_per_run
    return max(1, cores // (threads * config.processes_per_run))


def environment(
    config: SweepConfig, gpus: Sequence[str], slot: int, threads: int
) -> dict[str, str]:
    """Variables of the training in a slot: its threads, and GPUs that no other slot has."""
    variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    if gpus:
        first = slot * config.processes_per_run
        variables[_VISIBLE] = ",".join(gpus[first : first + config.processes_per_run])
    if config.processes_per_run > 1:
        variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = os.environ.get(
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS)
        )
    return variables


def _visible(asked: bool = True) -> list[str]:
    """What CUDA_VISIBLE_DEVICES lists; where it is not set and `asked`, what nvidia-smi does."""
    listed = os.environ.get(_VISIBLE)
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip()]
    return _numbered(_installed()) if asked else []


def _installed() -> int:
    try:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in told.stdout.splitlines())


def _numbered(number: int) -> list[str]:
    return [str(gpu) for gpu in range(number)]
