"""Whether there is room for the checkpoints that a run will keep."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from launch.findings import Findings
from models.parameter_count import parameter_count
from parallel.config import Precision
from pretrain.config import PretrainConfig

_DISK = "disk"
# of weights, fp32 main weights and two moments, for each parameter
BYTES_A_PARAMETER = {Precision.fp32: 12, Precision.bf16: 14, Precision.auto: 14}
# what a file system writes for one node; a save within the grace time should not need more
_GB_A_SECOND = 2.0


def check_room(
    config: PretrainConfig, vocab_size: int | None, nodes: int | None, findings: Findings
) -> None:
    """Whether the checkpoints that the settings keep fit on the file system of run_dir, and one of
    them into the grace time. nodes: how many write it; None: not known.

    Raises OSError and RuntimeError for a run_dir that cannot be looked at.
    """
    if vocab_size is None and config.model.vocab_size is None:
        return
    size = checkpoint_bytes(config, vocab_size)
    run_dir = Path(config.run_dir).expanduser()
    empty = free_bytes(run_dir)
    if empty == 0:  # also of /proc and the like, where no folder can be made
        findings.errors(
            _DISK,
            [
                f"run_dir={config.run_dir}: its file system has no room at all, or takes no files; "
                "choose another run_dir"
            ],
        )
        return
    free = empty + _present_bytes(run_dir / "checkpoints")
    at_once = kept_at_once(config)
    needed = size * at_once
    findings.notes(
        _DISK,
        [
            f"a checkpoint takes {_gigabytes(size)}, and "
            f"{at_once} {'is' if at_once == 1 else 'are'} there at once: "
            f"{_gigabytes(needed)} of the {_gigabytes(free)} free on the file system of {run_dir}"
        ],
    )
    setting = f"checkpoint.keep_last={config.checkpoint.keep_last}"
    if needed > free:
        fit = free // size - 1
        findings.warnings(
            _DISK,
            [
                f"{setting}: {at_once} checkpoints of {_gigabytes(size)} need {_gigabytes(needed)},"
                f" and {_gigabytes(free)} are free on the file system of run_dir={run_dir}; "
                + (
                    f"use checkpoint.keep_last={fit}"
                    + " without keep_every and keep_best"
                    * bool(config.checkpoint.keep_every or config.checkpoint.keep_best)
                    if fit >= 1
                    else "not even two fit, which a save needs: choose another run_dir"
                )
            ],
        )
    grace = config.fault_tolerance.grace_seconds
    if nodes and grace and size / grace > _GB_A_SECOND * 1e9 * nodes:
        findings.warnings(
            _DISK,
            [
                f"fault_tolerance.grace_seconds={grace:g}: a checkpoint of {_gigabytes(size)} in "
                f"that time is {size / grace / 1e9:,.1f} GB/s for {nodes} "
                f"{'node' if nodes == 1 else 'nodes'}; use "
                f"{size / (_GB_A_SECOND * 1e9 * nodes):.0f} unless your file system does it"
            ],
        )


def checkpoint_bytes(config: PretrainConfig, vocab_size: int | None) -> int:
    """Of one checkpoint: weights, and what the optimizer keeps."""
    count = parameter_count(config.model, vocab_size).total
    return count * BYTES_A_PARAMETER[config.parallel.precision]


def kept_at_once(config: PretrainConfig) -> int:
    """The most checkpoints that lie in the folder: those kept, and the one being written."""
    checkpoint, steps = config.checkpoint, config.train.train_steps
    interval = checkpoint.save_interval or steps
    saved = steps // interval + (steps % interval > 0)
    if saved <= 2 or checkpoint.keep_last == 0:
        return saved
    best = checkpoint.keep_best
    multiples = len(
        {s for s in range(interval, steps + 1, interval) if s % checkpoint.keep_every == 0}
        if checkpoint.keep_every and saved < 1_000_000
        else ()
    )
    regular = int(config.anomaly.rolls_back)  # older than what signals added
    return min(saved, checkpoint.keep_last + multiples + best + regular + 1)


def _present_bytes(folder: Path) -> int:
    """What lies there already, and will make room as the run goes on."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # a run that is going on takes files away
                total += os.stat(os.path.join(place, name)).st_size
    return total


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def free_bytes(path: Path) -> int:
    """Room on the file system that `path` is on, or would be on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
