"""A run's dealings with anomalies: judges each step, notes it, and reports what is out of order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data.open_data import Data
from parallel.engine import Engine
from parallel.progress_beacon import beacon
from parallel.runtime import Runtime
from pretrain.anomaly import Action, Verdict, judge
from pretrain.anomaly_report import (
    AnomalyReport,
    Findings,
    forget_rollback,
    printable,
    read_rollback,
    write_report,
    write_rollback,
)
from pretrain.checkpoint import Checkpoints
from pretrain.config import AnomalyConfig, PretrainConfig
from pretrain.culprits import Culprits, from_rank_zero
from pretrain.events import Events
from pretrain.progress import Progress
from pretrain.train_state import TrainState
from pretrain.train_step import Judge, StepMetrics

_DONE = {
    "apply": "updated all the same",
    "skip": "update skipped",
    "rollback": "going back",
    "stop": "stopping",
}


class AnomalyWatch:
    """All ranks hold one and call its methods in the same order.

    Args:
        can_roll_back: whether there is a checkpoint to go back to, after so many steps; asked on
            all ranks, and only when it matters.
        writes: on the one rank that writes reports.
    """

    def __init__(
        self,
        config: AnomalyConfig,
        run_dir: Path,
        culprits: Culprits,
        can_roll_back: Callable[[int], bool],
        *,
        progress: Progress,
        events: Events,
        writes: bool,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.culprits = culprits
        self.can_roll_back = can_roll_back
        self.progress = progress
        self.events = events
        self.writes = writes
        self._last_anomaly: int | None = None  # its step
        # Where it was found out that no document is to blame, and why; no update was made since.
        self._blameless: tuple[int, str] | None = None

    def judge(self, state: TrainState) -> Judge:
        """What `train_step` asks about the step after `state`."""
        return partial(self._judge, state)

    def _judge(self, state: TrainState, loss: float, grad_norm: float) -> Verdict:
        verdict = judge(self.config, state.anomaly, loss, grad_norm)
        if verdict.action is Action.rollback and not self.can_roll_back(state.step):
            why = f"{verdict.why}; there is no checkpoint to go back to yet"
            return replace(verdict, action=Action.skip, why=why)
        return verdict

    def after_step(
        self, state: TrainState, sequences: int, metrics: StepMetrics, learning_rate: float
    ) -> None:
        """Take note of the step that `state` has just counted, and report it if need be."""
        verdict, loss = metrics.verdict, metrics.losses.mean()
        end = state.consumed_sequences
        samples = [end - sequences, end]
        self.culprits.keep(state.step, samples[0], metrics)
        state.anomaly.note(verdict, loss, metrics.grad_norm, samples, self.config.spike_window)
        if verdict.action is Action.apply:
            self._blameless = None
        if not verdict.kind:
            return
        with beacon.stage("anomaly report", state.step):
            findings = self.culprits.find(verdict, rerun=not self._goes_on(state.step))
        self._last_anomaly = state.step
        if verdict.kind == "nonfinite":
            self._blame_as_before(state.step, findings)
        if self.writes:
            self._write(
                AnomalyReport(
                    step=state.step,
                    kind=verdict.kind,
                    decision=verdict.action.value,
                    why=verdict.why,
                    samples=samples,
                    loss=loss,
                    grad_norm=metrics.grad_norm,
                    loss_z=verdict.loss_z,
                    grad_norm_z=verdict.grad_norm_z,
                    learning_rate=learning_rate,
                    findings=findings,
                )
            )

    def _blame_as_before(self, step: int, findings: Findings) -> None:
        """What made an earlier step not finite, and no update has changed since, makes this one so:
        whatever its documents look like, they are not run again."""
        if self._blameless is not None:
            earlier, why = self._blameless
            findings.no_culprit = f"as at step {earlier}: {why}"
        elif findings.no_culprit:
            self._blameless = step, findings.no_culprit

    def take_up(self, state: TrainState) -> None:
        """At the start of a run: a rollback that no save has come after still counts, or a run that
        is restarted trains on the same samples again, as often as it is restarted."""
        known = from_rank_zero(self._last_rollback(state.step) if self.writes else None)
        if known is not None and state.take_up(known):
            self.progress.message(
                f"the run went back to step {known['step']} before it ended: rollback "
                f"{state.anomaly.rollbacks} of at most {self.config.max_rollbacks} counts, and "
                f"samples {state.anomaly.left_out_samples} (each [first, end)) are left out"
            )

    def _last_rollback(self, step: int) -> dict[str, Any] | None:
        """On the one rank that writes; the others wait for it, so it must not raise."""
        try:
            if step == 0:  # the run starts anew
                forget_rollback(self.run_dir)
            return read_rollback(self.run_dir)
        except (OSError, ValueError) as error:
            self._warn(step, f"a rollback before this start is forgotten, if any: {error}")
            return None

    def remember_rollback(self, state: TrainState) -> None:
        """`state` has just gone back: what the next save will hold counts from now on."""
        if not self.writes:
            return
        try:
            write_rollback(self.run_dir, state.rollback())
        except OSError as error:
            self._warn(
                state.step,
                f"the rollback is forgotten if the run ends before its next checkpoint: {error}",
            )

    def _warn(self, step: int, text: str) -> None:
        self.progress.message(text)
        self.events.write("rollback_unsaved", step, printable(text))

    def rolled_back(self, state: TrainState, from_step: int, left_out: tuple[int, int]) -> None:
        """`state` is what the run goes on with."""
        self.culprits.forget()
        self._last_anomaly = self._blameless = None
        first, end = left_out
        text = (
            f"back to step {state.step}, rollback {state.anomaly.rollbacks} of at most "
            f"{self.config.max_rollbacks}; samples {first} to {end - 1} are left out"
        )
        self.progress.message(text)
        self.events.write("rollback", state.step, text, from_step=from_step, left_out=[first, end])

    def metrics(self, state: TrainState, verdict: Verdict) -> dict[str, float]:
        """Names and values for a tracker, after `state` has counted the step."""
        metrics: dict[str, float] = {
            "anomaly/count": state.anomaly.count,
            "anomaly/skipped_updates": len(state.anomaly.skipped_samples),
            "anomaly/rollbacks": state.anomaly.rollbacks,
        }
        if not math.isnan(verdict.loss_z):  # known after the warm-up
            metrics["anomaly/loss_z"] = verdict.loss_z
            metrics["anomaly/grad_norm_z"] = verdict.grad_norm_z
        return metrics

    def _goes_on(self, step: int) -> bool:
        """Whether the run has been in trouble lately: then sequences are not run again, which
        takes as long as several steps."""
        return self._last_anomaly is not None and step - self._last_anomaly <= (
            self.config.keep_batches
        )

    def _write(self, report: AnomalyReport) -> None:
        try:
            path = str(write_report(self.run_dir, report).relative_to(self.run_dir))
            where = f"see {path}"
        except (OSError, ValueError) as error:  # no reason to end a run over a spike
            path, where = "", f"without a report: {error}"
        suspect = _suspect(report.findings)
        text = printable(f"{report.why}; {_DONE[report.decision]}; {suspect}, {where}")
        self.progress.message(f"step {report.step}: {text}")
        self.events.write(
            report.kind,
            report.step,
            text,
            decision=report.decision,
            samples=report.samples,
            report=path,
        )


def open_anomaly_watch(
    config: PretrainConfig,
    engine: Engine,
    runtime: Runtime,
    data: Data,
    checkpoints: Checkpoints,
    progress: Progress,
    events: Events,
) -> AnomalyWatch:
    """The watch of a run."""

    return AnomalyWatch(
        config.anomaly,
        Path(config.run_dir),
        Culprits(config.anomaly, config.train, engine, runtime, data),
        can_roll_back=checkpoints.can_roll_back,
        progress=progress,
        events=events,
        writes=runtime.rank == 0,
    )


def _suspect(findings: Findings) -> str:
    if findings.no_culprit:
        return findings.no_culprit
    if not findings.documents:
        return "no document could be looked at"
    row = findings.documents[0]
    return f"most suspicious is {row.doc_id or row.place} ({row.language})"
