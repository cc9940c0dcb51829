"""Where a run's numbers go: its own JSONL, which is the truth, and Weights & Biases, a sink.

Names are flat and '/'-separated (train/loss, eval/family/<family>/loss, ...). Imports neither
torch nor megatron-core, and wandb only where a run uses it.
"""

import contextlib
import json
import math
import netrc
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pretrain.config import WandbConfig, WandbMode
from pretrain.provenance import atomic_write_text, hide_secret_values, without_secrets

METRICS_FILE = "metrics.jsonl"
WANDB_RUN_ID_FILE = "wandb_run_id"


class Tracker(Protocol):
    """Takes records; one per rank, of which all but rank 0's are silent."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` at `step`, the number of optimizer steps taken."""

    def log_table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Show a table where the tracker can; who calls keeps it in a file of its own."""

    def close(self, failed: bool = False) -> None:
        """Flush and end, `failed` after an error; a second call is harmless."""


class NullTracker:
    """Tracks nothing: every rank but one."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def log_table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        pass

    def close(self, failed: bool = False) -> None:
        pass


class StepLines:
    """A file of one JSON object a line, each with a "step", that survives crashes and resumes.

    Each line is handed to the operating system at once, so killing the process loses none; only a
    power loss may.

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
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
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

    The run's id is kept in `run_dir`/wandb_run_id, so a resumed run is the same W&B run. Steps
    that W&B already has are skipped: it accepts no step twice, and a run repeated from its
    checkpoint repeats the numbers. Offline, each start of the run leaves one folder in
    `run_dir`/wandb, all with the run's id: `wandb sync run_dir/wandb/offline-run-*` uploads them
    in order.

    No failure of W&B ends the run or interrupts it twice: online falls back to offline, and what
    fails after that is reported once, loudly, and W&B is left alone from then on. metrics.jsonl
    has every number anyway.

    wandb starts a service process: use it on one rank. Sent besides metrics: the configuration
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
        try:
            self._run = self._init(
                config, Path(run_dir), resolved_config, mode, init_timeout, finish_timeout
            )
            # wandb's own axis counts calls of log; ours is the optimizer step
            self._run.define_metric("*", step_metric="step")
            self._first_step = self._run.starting_step
            where = f"recording offline; to upload: wandb sync {run_dir}/wandb/offline-run-*"
            print(f"Weights & Biases: {where if self._run.offline else self._run.url}", flush=True)
        except Exception as error:
            self._give_up("could not start", error)

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
        if self._run is None or step < self._first_step:
            return
        try:
            self._run.log({"step": step, **metrics}, step=step)
        except Exception as error:
            self._give_up("failed", error)

    def log_table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        if self._run is None or step < self._first_step:
            return
        try:
            import wandb

            table = wandb.Table(columns=[*columns], data=rows)
            self._run.log({"step": step, name: table}, step=step)
        except Exception as error:
            self._give_up("failed", error)

    def close(self, failed: bool = False) -> None:
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=1 if failed else 0)
            self._run = None
        except Exception as error:
            self._give_up("could not finish", error)

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        if "wandb" in sys.modules:  # its exit hook would report the same failure with a traceback
            with contextlib.suppress(Exception):
                sys.modules["wandb"].teardown()
        self._warn(
            f"Weights & Biases {what} ({_one_line(error)}); the run goes on without it. "
            f"All metrics are in {METRICS_FILE} in the run folder."
        )


def _one_line(error: Exception) -> str:
    return hide_secret_values(" ".join(f"{type(error).__name__}: {error}".split())[:300])


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

    def close(self, failed: bool = False) -> None:
        for tracker in self._trackers:
            tracker.close(failed)


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
    return "online" if os.environ.get("WANDB_API_KEY") or _has_netrc_entry() else "offline"


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
) -> Tracker:
    """Rank 0 writes metrics.jsonl and, unless disabled, W&B; the other ranks track nothing.

    Args:
        resumed_step: step of the checkpoint the run goes on from; None: from its start.
    """
    if rank != 0:
        return NullTracker()
    trackers: list[Tracker] = [MetricsFile(run_dir, resumed_step)]
    mode = resolve_wandb_mode(config.mode)
    if mode != "disabled":
        trackers.append(WandbTracker(config, run_dir, resolved_config, mode))
    return _Trackers(trackers)
