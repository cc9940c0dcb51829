"""Weights & Biases as a sink of a run's numbers. Imports wandb only where a run uses it.

Imports neither torch nor megatron-core.
"""

import contextlib
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pretrain import wandb_file
from pretrain.config import WandbConfig
from pretrain.metrics import METRICS
from pretrain.metrics_file import METRICS_FILE, read_metrics, warn
from pretrain.provenance import atomic_write_text, hide_secret_values, without_secrets

WANDB_RUN_ID_FILE = "wandb_run_id"
# wandb's process may write the end of its file a moment after it was told to finish.
WANDB_WRITING_SECONDS = 5.0


class WandbTracker:
    """A run at Weights & Biases through the wandb library.

    A run folder is one W&B run, however often it is started: its id is kept in
    `run_dir`/wandb_run_id (`pretrain.earlier_record` says when there is a new one). W&B accepts no
    step twice and none out of order, so each start goes on behind the last step that W&B has: what
    a run repeats from its checkpoint is skipped (the numbers are the same), and what W&B has lost
    or never had of the steps before comes from metrics.jsonl, which must be open already. Offline,
    each start leaves one folder in `run_dir`/wandb, each with the id of its W&B run:
    `wandb sync run_dir/wandb/offline-run-*` uploads them in
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
        warn: Callable[[str], None] = warn,
    ) -> None:
        self._run: Any = None
        self._warn = warn
        self._logged_step = -1  # the last one that wandb took
        run_dir = Path(run_dir)
        try:
            run_id = _run_id(run_dir)
            earlier = _earlier_starts(run_dir, run_id)
            if mode == "online" and any(_is_waiting(file) for file in earlier):
                mode = "offline"
                warn(
                    f"{run_dir / 'wandb'} holds earlier steps of this run that are not uploaded, "
                    "which W&B would refuse after later ones; recording offline. Upload them with: "
                    f"wandb sync {run_dir}/wandb/offline-run-*, and the next start is online"
                )
            self._run = self._init(
                config, run_dir, run_id, resolved_config, mode, init_timeout, finish_timeout
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
        run_id: str,
        resolved_config: Mapping[str, Any],
        mode: str,
        init_timeout: float,
        finish_timeout: float,
    ) -> Any:
        import wandb

        arguments: dict[str, Any] = {
            "mode": mode,
            "project": config.project,
            "entity": config.entity,
            "group": config.group,
            "tags": without_secrets(config.tags),
            "name": run_dir.resolve().name,
            "id": run_id,
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


def _run_id(run_dir: Path) -> str:
    """The id of the folder's W&B run, a new one where it has none."""
    file = run_dir / WANDB_RUN_ID_FILE
    if not file.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, secrets.token_hex(4) + "\n")
    return file.read_text(encoding="utf-8").strip()


def _earlier_starts(run_dir: Path, run_id: str) -> dict[Path, int]:
    """The .wandb file of each earlier start of this W&B run -> the last step in it, -1 without any.

    Folders of starts that were killed before wandb wrote anything are renamed, because `wandb sync`
    would stop at them.
    """
    found = {}
    for file in (run_dir / "wandb").glob(f"*run-*/*{run_id}.wandb"):
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
