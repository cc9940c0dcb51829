"""Where a run's numbers go: its own JSONL, which is the truth; W&B and TensorBoard are sinks.

Names are flat and '/'-separated (train/loss, ...); `pretrain.metrics` lists them. Imports neither
torch nor megatron-core, and wandb and tensorboard only where a run uses them.
"""

import contextlib
import json
import math
import netrc
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pretrain import wandb_file
from pretrain.config import TensorboardConfig, WandbConfig, WandbMode
from pretrain.metrics import METRICS
from pretrain.provenance import atomic_write_text, hide_secret_values, without_secrets

METRICS_FILE = "metrics.jsonl"
WANDB_RUN_ID_FILE = "wandb_run_id"
TENSORBOARD_FOLDER = "tensorboard"
# wandb's process may write the end of its file a moment after it was told to finish.
WANDB_WRITING_SECONDS = 5.0


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


class StepLines:
    """A file of one JSON object a line, each with a "step", that survives crashes and resumes.

    Each line is handed to the operating system at once, so killing the process loses none; only a
    power loss may. A full disk does not end the run: lines wait in memory until it takes them.

    A run resumed from step k takes the steps after k again, so their old lines are dropped, as is
    a line cut off by a crash; the file is rewritten atomically.

    Args:
        resumed_step: step of the checkpoint; None: a run from its start, old lines all go.
    """

    def __init__(self, path: str | Path, resumed_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            old = self.path.read_text(encoding="utf-8")
            kept = "" if resumed_step is None else _lines_up_to(old, resumed_step)
            if kept != old:
                atomic_write_text(self.path, kept)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  closed by close()
        self._waiting = b""
        self._failing = False

    def write(self, record: Mapping[str, Any]) -> None:
        self._waiting += (json.dumps(record) + "\n").encode()
        error = self._write()
        if error and not self._failing:
            _warn(f"could not write {self.path} ({error}); its lines wait in memory")
        self._failing = error is not None

    def _write(self) -> OSError | None:
        try:
            while self._waiting:  # a disk that fills up takes a part
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            return error
        return None

    def reopened(self, step: int) -> "StepLines":
        """The file without the lines after `step`, of a run that goes on from there."""
        self.close()
        return StepLines(self.path, step)

    def close(self) -> None:
        if not self._file.closed and (error := self._write()):
            count = self._waiting.count(b"\n")
            _warn(f"{self.path}: lines missing at its end: {count} ({error})")
        self._waiting = b""
        self._file.close()


class MetricsFile:
    """`run_dir`/metrics.jsonl: one JSON object a line, {"step", "time" (Unix seconds), metrics...}.

    `StepLines` says what crashes and resumes do to it. Values that are not finite become null: JSON
    has no NaN. One step may have several lines (training, evaluation), and the last line holding a
    name counts. Tables are not written here.
    """

    def __init__(self, run_dir: str | Path, resumed_step: int | None = None) -> None:
        self._lines = StepLines(Path(run_dir) / METRICS_FILE, resumed_step)
        self.path = self._lines.path

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for name, value in metrics.items():
            record[name] = value if math.isfinite(value) else None
        self._lines.write(record)

    def log_table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        pass

    def go_back(self, step: int) -> None:
        self._lines = self._lines.reopened(step)

    def close(self, failed: bool = False) -> None:
        self._lines.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl in file order; null becomes NaN, a cut-off line is skipped."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        record = _parse(line)
        if record is not None:
            records.append({k: math.nan if v is None else v for k, v in record.items()})
    return records


def _lines_up_to(text: str, last_step: int) -> str:
    kept = []
    for line in text.splitlines(keepends=True):
        record = _parse(line) if line.endswith("\n") else None
        if record is not None and record["step"] <= last_step:
            kept.append(line)
    return "".join(kept)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def _warn(text: str) -> None:
    print(f"\nWARNING: {text}\n", file=sys.stderr, flush=True)


class WandbTracker:
    """A run at Weights & Biases through the wandb library.

    A run folder is one W&B run, however often it is started: its id is kept in
    `run_dir`/wandb_run_id. W&B accepts no step twice and none out of order, so each start goes on
    behind the last step that W&B has: what a run repeats from its checkpoint is skipped (the
    numbers are the same), and what W&B has lost or never had of the steps before comes from
    metrics.jsonl, which must be open already. Offline, each start leaves one folder in
    `run_dir`/wandb, all with the run's id: `wandb sync run_dir/wandb/offline-run-*` uploads them in
    order. As long as such a folder is not uploaded, later starts record offline too, or their steps
    would come first.

    No failure of W&B ends the run or interrupts it twice: online falls back to offline, and what
    fails after that is reported once, loudly, and W&B is left alone from then on. metrics.jsonl
    has every number anyway. Of a disk that fills up wandb itself says nothing and its file ends
    there, even if there is room again later (an upload goes on): `close` looks, and says so.

    wandb starts two service processes: use it on one rank. Sent besides metrics: the configuration
    without secrets, host name, package versions, the machine's load. Not sent: code, git state,
    console output, command line.

    Args:
        mode: "online" or "offline".
        init_timeout: seconds wandb may try to reach its server at the start.
        finish_timeout: seconds the end of the run may wait for the upload of what is left; what
            is not uploaded stays in `run_dir`/wandb.
    """

    def __init__(
        self,
        config: WandbConfig,
        run_dir: str | Path,
        resolved_config: Mapping[str, Any],
        mode: str,
        init_timeout: float = 60.0,
        finish_timeout: float = 120.0,
        warn: Callable[[str], None] = _warn,
    ) -> None:
        self._run: Any = None
        self._warn = warn
        self._logged_step = -1  # the last one that wandb took
        run_dir = Path(run_dir)
        try:
            earlier = _earlier_starts(run_dir)
            if mode == "online" and any(_is_waiting(file) for file in earlier):
                mode = "offline"
                warn(
                    f"{run_dir / 'wandb'} holds earlier steps of this run that are not uploaded, "
                    "which W&B would refuse after later ones; recording offline. Upload them with: "
                    f"wandb sync {run_dir}/wandb/offline-run-*, and the next start is online"
                )
            self._run = self._init(
                config, run_dir, resolved_config, mode, init_timeout, finish_timeout
            )
            _define_metrics(self._run)
            offline = self._run.offline
            recorded = max(earlier.values(), default=-1) + 1
            self._next_step: int = recorded if offline else self._run.starting_step
            self._make_up(run_dir / METRICS_FILE)
            where = f"recording offline; to upload: wandb sync {run_dir}/wandb/offline-run-*"
            print(f"Weights & Biases: {where if offline else self._run.url}", flush=True)
        except Exception as error:
            self._give_up("could not start", error)

    def _make_up(self, metrics_file: Path) -> None:
        """Log the steps of earlier starts that W&B does not have."""
        if not metrics_file.is_file():
            return
        for record in read_metrics(metrics_file):
            step, when = record.pop("step"), record.pop("time", None)
            self.log(step, {**record, "_timestamp": when} if when else record)

    def _init(
        self,
        config: WandbConfig,
        run_dir: Path,
        resolved_config: Mapping[str, Any],
        mode: str,
        init_timeout: float,
        finish_timeout: float,
    ) -> Any:
        import wandb

        run_dir.mkdir(parents=True, exist_ok=True)
        id_file = run_dir / WANDB_RUN_ID_FILE
        if not id_file.exists():
            atomic_write_text(id_file, secrets.token_hex(4) + "\n")
        arguments: dict[str, Any] = {
            "mode": mode,
            "project": config.project,
            "entity": config.entity,
            "group": config.group,
            "tags": without_secrets(config.tags),
            "name": run_dir.resolve().name,
            "id": id_file.read_text(encoding="utf-8").strip(),
            "resume": "allow",
            "dir": str(run_dir),
            "config": without_secrets(resolved_config),
            "settings": wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                save_code=False,
                x_disable_meta=True,  # the metadata holds the command line
                init_timeout=init_timeout,
                finish_timeout=finish_timeout,
                finish_timeout_raises=True,
            ),
        }
        try:
            return wandb.init(**arguments)
        except Exception as error:
            if mode != "online":
                raise
            self._warn(
                f"wandb.mode=online failed ({_one_line(error)}); recording offline in "
                f"{run_dir / 'wandb'}. Upload later with: wandb sync {run_dir}/wandb/offline-run-*"
            )
            wandb.teardown()  # the failed attempt's service still holds the run id
            return wandb.init(**{**arguments, "mode": "offline"})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._log(step, lambda: metrics)

    def log_table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        def table() -> dict[str, Any]:
            import wandb

            return {name: wandb.Table(columns=[*columns], data=rows)}

        self._log(step, table)

    def go_back(self, step: int) -> None:
        pass  # it accepts no step twice; see `_log`

    def _log(self, step: int, values: Callable[[], Mapping[str, Any]]) -> None:
        if self._run is None or step < self._next_step:
            return
        self._next_step = step  # more of the same step may follow, and a rollback may not
        try:
            self._run.log({"step": step, **values()}, step=step)
            self._logged_step = step
        except Exception as error:
            self._give_up("failed", error)

    def close(self, failed: bool = False) -> None:
        if self._run is None:
            return
        try:
            file = Path(self._run.settings.sync_file) if self._run.offline else None
            self._run.finish(exit_code=1 if failed else 0)
            self._run = None
            if file is not None:
                self._look_at(file)
        except Exception as error:
            self._give_up("could not finish", error)

    def _look_at(self, file: Path) -> None:
        """Whether the file of an offline start, now closed, ends with the last step given to it."""
        deadline = time.monotonic() + WANDB_WRITING_SECONDS
        while (kept := _kept_step(file)) < self._logged_step and time.monotonic() < deadline:
            time.sleep(0.1)
        if kept < self._logged_step:
            ends = f"ends with step {kept}" if kept >= 0 else "has no step"
            self._warn(
                f"Weights & Biases: {file.parent} {ends}, and the run got to step "
                f"{self._logged_step}: wandb could not write it, because the disk was full perhaps "
                "(logs/debug-internal.log there says why). Once there is room, start the same "
                f"command again: it makes up what is missing from {METRICS_FILE}, also of a run "
                "that has ended"
            )

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        if "wandb" in sys.modules:  # its exit hook would report the same failure with a traceback
            with contextlib.suppress(Exception):
                sys.modules["wandb"].teardown()
        self._warn(
            f"Weights & Biases {what} ({_one_line(error)}); the run goes on without it. "
            f"All metrics are in {METRICS_FILE} in the run folder."
        )


def _earlier_starts(run_dir: Path) -> dict[Path, int]:
    """The .wandb file of each earlier start -> the last step in it, -1 without any.

    Folders of starts that were killed before wandb wrote anything are renamed, because `wandb sync`
    would stop at them.
    """
    found = {}
    for file in (run_dir / "wandb").glob("*run-*/*.wandb"):
        step = wandb_file.last_step(file)
        if step is None:
            name = file.parent.name.replace("run-", "empty-")
            file.parent.rename(file.parent.with_name(name))
        else:
            found[file] = step
    return found


def _kept_step(file: Path) -> int:
    """The last step in a .wandb file, -1 without any."""
    step = wandb_file.last_step(file) if file.exists() else None
    return -1 if step is None else step


def _is_waiting(file: Path) -> bool:
    """Whether the .wandb file of an offline start is still to be uploaded."""
    offline = file.parent.name.startswith("offline-run-")
    return offline and not file.with_suffix(".wandb.synced").exists()


def _define_metrics(run: Any) -> None:
    """W&B's own axis counts calls of log; ours is the optimizer step. Some metrics are best
    summarised by their best value, not their last."""
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    for metric in METRICS:
        if metric.best and not metric.is_pattern:
            run.define_metric(metric.name, step_metric="step", summary=f"last,{metric.best}")


def _one_line(error: Exception) -> str:
    return hide_secret_values(" ".join(f"{type(error).__name__}: {error}".split())[:300])


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
            _warn(f"TensorBoard's files cannot be written ({error}); the run goes on without them")

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
