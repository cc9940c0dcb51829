"""Where a run's numbers go: its own JSONL, which is the truth; W&B and TensorBoard are sinks.

Names are flat and '/'-separated (train/loss, ...); `pretrain.metrics` lists them. Imports neither
torch nor megatron-core, and wandb and tensorboard only where a run uses them.
"""

import contextlib
import math
import netrc
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pretrain.config import TensorboardConfig, WandbConfig, WandbMode
from pretrain.metrics_file import MetricsFile, warn
from pretrain.wandb_tracker import WandbTracker

TENSORBOARD_FOLDER = "tensorboard"


class Tracker(Protocol):
    """Takes records; one per rank, of which all but rank 0's are silent."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` at `step`, the number of optimizer steps taken."""

    def log_table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Show a table where the tracker can; who calls keeps it in a file of its own."""

    def go_back(self, step: int) -> None:
        """The run goes on from `step`, an earlier one: what came after it no longer holds."""

    def close(self, failed: bool = False) -> None:
        """Flush and end, `failed` after an error; a second call is harmless."""


class NullTracker:
    """Tracks nothing: every rank but one."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def log_table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        pass

    def go_back(self, step: int) -> None:
        pass

    def close(self, failed: bool = False) -> None:
        pass


class TensorboardTracker:
    """Scalars for TensorBoard in `run_dir`/tensorboard, one event file for each start of the run.

    A start tells TensorBoard to drop the steps it is about to repeat. Events are written by a
    thread every 30 s: killing the process loses the last of them, and metrics.jsonl has them.
    A value that is not finite is left out. A disk that is full ends this, with a warning, and not
    the run. Needs the package tensorboard.
    """

    def __init__(self, run_dir: str | Path, resumed_step: int | None = None) -> None:
        self._folder = Path(run_dir) / TENSORBOARD_FOLDER
        threading.excepthook = _silent_about_tensorboard(threading.excepthook)
        self._open(resumed_step)

    def _open(self, resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = None
        purge_step = 0 if resumed_step is None else resumed_step + 1
        with self._leaving_the_run_alone():
            self._writer = SummaryWriter(str(self._folder), purge_step=purge_step, flush_secs=30)

    @contextlib.contextmanager
    def _leaving_the_run_alone(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # its own, or what the thread met when it wrote
            self._writer = None
            warn(f"TensorBoard's files cannot be written ({error}); the run goes on without them")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is None:
            return
        with self._leaving_the_run_alone():
            for name, value in metrics.items():
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, step)

    def log_table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        pass

    def go_back(self, step: int) -> None:
        self.close()
        self._open(step)

    def close(self, failed: bool = False) -> None:
        if self._writer is not None:
            with self._leaving_the_run_alone():
                self._writer.close()


def _silent_about_tensorboard(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What TensorBoard's thread meets it hands to whoever writes next, who says so: Python need not
    print its traceback besides."""

    def without(arguments: Any) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            hook(arguments)

    return without


class _Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def log_table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        for tracker in self._trackers:
            tracker.log_table(step, name, columns, rows)

    def go_back(self, step: int) -> None:
        for tracker in self._trackers:
            tracker.go_back(step)

    def close(self, failed: bool = False) -> None:
        with contextlib.ExitStack() as all_of_them:  # also those after one that raises
            for tracker in self._trackers:
                all_of_them.callback(tracker.close, failed)


def resolve_wandb_mode(mode: WandbMode) -> str:
    """ "online", "offline" or "disabled".

    auto: what the environment variable WANDB_MODE says, else online with a key (WANDB_API_KEY, or
    a netrc entry for the server: ~/.netrc, ~/_netrc or $NETRC), else offline.
    """
    if mode is not WandbMode.auto:
        return mode.value
    from_environment = os.environ.get("WANDB_MODE", "")
    if from_environment in ("online", "offline", "disabled"):
        return from_environment
    return "online" if has_wandb_key() else "offline"


def has_wandb_key() -> bool:
    """Whether this machine has a key for W&B's server: WANDB_API_KEY, or a netrc entry."""
    return bool(os.environ.get("WANDB_API_KEY")) or _has_netrc_entry()


def _has_netrc_entry() -> bool:
    server = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    host = urlsplit(server).hostname or ""
    named = os.environ.get("NETRC")
    candidates = [named] if named else ["~/.netrc", "~/_netrc"]
    for candidate in candidates:
        path = Path(candidate).expanduser()
        try:
            if host in netrc.netrc(path).hosts:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def make_tracker(
    config: WandbConfig,
    run_dir: str | Path,
    rank: int,
    resolved_config: Mapping[str, Any],
    resumed_step: int | None = None,
    tensorboard: TensorboardConfig | None = None,
) -> Tracker:
    """Rank 0 writes metrics.jsonl and, as the settings say, W&B and TensorBoard; the other ranks
    track nothing.

    Args:
        resumed_step: step of the checkpoint the run goes on from; None: from its start.
    """
    if rank != 0:
        return NullTracker()
    trackers: list[Tracker] = [MetricsFile(run_dir, resumed_step)]
    mode = resolve_wandb_mode(config.mode)
    if mode != "disabled":
        trackers.append(WandbTracker(config, run_dir, resolved_config, mode))
    if tensorboard is not None and tensorboard.enabled:
        trackers.append(TensorboardTracker(run_dir, resumed_step))
    return _Trackers(trackers)
